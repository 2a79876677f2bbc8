"""Why a prompt stops agreeing with the one before it, and the one line that mends it."""

from enum import Enum


class Cause(Enum):
    """What changed in the first segment that differs."""

    TIMESTAMP = "timestamp"
    NONCE = "nonce"
    COUNTER = "counter"
    TOOLS_REORDERED = "tools reordered"
    TOOLS_CHANGED = "tools changed"
    JSON_KEYS = "JSON keys reordered"
    WHITESPACE = "whitespace"
    RERENDERED = "re-rendered"
    TRIMMED = "trimmed history"
    COMPACTED = "compaction"
    INSERTED = "message inserted"
    IMAGE = "changed image"
    EDITED = "edited message"
    HEAD = "different head"
    LEADING = "changing text first"
    EVICTED = "evicted"
    LAST_BLOCK = "last block dropped"
    SHORT = "shorter than a block"
    MODEL = "model or adapter change"
    SALT = "cache salt change"
    BLOCKS = "blocks differ"


FIXES = {
    Cause.TIMESTAMP: "Move the clock to the end of the prompt, or fix it when the session starts.",
    Cause.NONCE: "Take the id out of the prompt, or draw it once a session.",
    Cause.COUNTER: "Move the count to the newest message; leave what was sent before as it was.",
    Cause.TOOLS_REORDERED: "Sort the tools by name before every request.",
    Cause.TOOLS_CHANGED: "Send all tools from the first turn on; restrict them with tool_choice.",
    Cause.JSON_KEYS: "Serialise JSON once and keep the text, or sort its keys.",
    Cause.WHITESPACE: "Keep messages byte for byte as first sent; do not strip or indent them again.",
    Cause.RERENDERED: "Send old messages with the role and fields they first had (reasoning too).",
    Cause.TRIMMED: "Trim rarely and by much, not a little every turn.",
    Cause.COMPACTED: "Compact later or to less: every compaction computes the rest again.",
    Cause.INSERTED: "Append reminders at the end and leave them there.",
    Cause.IMAGE: "Send the same bytes again: no new encoding, size or signed URL.",
    Cause.EDITED: "Append a correction; an edit computes all behind it again.",
    Cause.HEAD: "Put what several agents read first, and what is each one's own behind it.",
    Cause.LEADING: "Put what differs between sessions behind what they share.",
    Cause.EVICTED: "The prompt is fine: give the cache more room (a host tier), or keep the session on one replica.",
    Cause.LAST_BLOCK: "Expected with speculative decoding (EAGLE, MTP): smaller blocks lose less.",
    Cause.SHORT: "Only full blocks are cached: nothing to gain below --block-tokens.",
    Cause.MODEL: "Keep a session on one model and adapter, or switch where its context is short.",
    Cause.SALT: "Use one cache_salt for all turns of a session.",
    Cause.BLOCKS: "Block ids hold no text; audit a log of messages to learn the cause.",
}
