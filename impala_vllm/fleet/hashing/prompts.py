"""From a request's body to the block hashes of its prompt, as the engine will compute them.

Blocking and not quick for a prompt that is new (tokenising 100k tokens takes 0.2 s): call it in a worker thread. What
was hashed before is remembered by digests of the text, or tokens, at its ends, so a next turn costs what is new only.
"""

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, cast

from impala_vllm.fleet.hashing import chat, responses
from impala_vllm.fleet.hashing.scheme import Adapter, Scheme
from impala_vllm.fleet.hashing.tokenizer import Tokenizer, TokenizerError
from impala_vllm.fleet.places import BlockKey

MARK_EVERY_TOKENS = 1024
"""A prompt can be gone on from after about so many tokens each: other traces share its opening."""
MARKED_AT_END = 6
"""Of its last pieces, each one's end is a place to go on from: one of them is where its next turn departs."""
MARK_BYTES = 700
"""A mark without its keys: digest, hash, a few tokens, and their containers."""
MEMORY_BYTES = 256 << 20
"""Of remembered prompts. 100k tokens are some 120 KB."""


class Prompt(NamedTuple):
    """What routing needs of a prompt."""

    keys: Sequence[BlockKey]
    """Of its full blocks, root first."""
    num_tokens: int
    num_known_tokens: int
    """Tokens that were remembered, for statistics."""


class _Mark(NamedTuple):
    """A place in a prompt to go on from."""

    keys: "array[int]"
    """Of the whole prompt; shared between its marks."""
    num_keys: int
    last: bytes | None
    rest: tuple[int, ...]
    """Tokens after the last full block."""
    num_tokens: int


class Prompts:
    """Thread-safe."""

    def __init__(
        self, scheme: Scheme, tokenizer: Tokenizer, memory_bytes: int = MEMORY_BYTES, excludes_tools: bool = False
    ) -> None:
        """`excludes_tools`: from chats whose tool_choice is none."""
        self.scheme = scheme
        self._tokenizer = tokenizer
        self._excludes_tools = excludes_tools
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        """Guards the three below."""
        self._marks: OrderedDict[bytes, _Mark] = OrderedDict()
        self._num_marks_of: dict[int, int] = {}
        """By identity of the keys they share."""
        self._bytes = 0

    def of_chat(self, body: Mapping[str, Any], adapter: Adapter | None = None) -> Prompt | None:
        """Of a body of /v1/chat/completions; None where it has something that is not mirrored here."""
        tokenizer = self._tokenizer
        try:
            tools = None if self._excludes_tools and body.get("tool_choice") == "none" else chat.tools_of(body)
            messages = chat.messages_of(body, tokenizer.template if tools is None else tokenizer.tool_template)
            if messages is None:
                return None
            text = tokenizer.render(messages, tools, chat.variables_of(body, tokenizer.variables))
            return self._of_text(text, (), (), _salt(body), adapter)
        except (TokenizerError, ValueError, TypeError):
            return None  # the engine will say what is wrong with it

    def of_completion(self, body: Mapping[str, Any], adapter: Adapter | None = None) -> Prompt | None:
        """Of a body of /v1/completions; None for several prompts at once."""
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and all(type(t) is int for t in cast("list[Any]", prompt)):
            return self._of_tokens(cast("list[int]", prompt), _salt(body), adapter)
        if not isinstance(prompt, str):
            return None
        leading, trailing = self._tokenizer.leading, self._tokenizer.trailing
        if body.get("add_special_tokens", True) is False:
            leading = trailing = []
        return self._of_text(prompt, leading, trailing, _salt(body), adapter)

    def of_response(self, body: Mapping[str, Any], adapter: Adapter | None = None) -> Prompt | None:
        """Of a body of /v1/responses; None where it has something that is not mirrored here."""
        as_chat = responses.chat_of(body)
        return self.of_chat(as_chat, adapter) if as_chat is not None else None

    def _of_text(
        self, text: str, leading: Sequence[int], trailing: Sequence[int], salt: str | None, adapter: Adapter | None
    ) -> Prompt:
        pieces = self._tokenizer.pieces(text)
        data = (piece.encode("utf-8", "surrogatepass") for piece in pieces)
        digests = _digests(data, (salt, adapter, tuple(leading)))
        return self._of_pieces(
            digests, lambda number: self._tokenizer.encode(pieces[number]), leading, trailing, salt, adapter
        )

    def _of_tokens(self, tokens: list[int], salt: str | None, adapter: Adapter | None) -> Prompt | None:
        """In runs of one length from the beginning on, so that a next turn's are the same until it departs."""
        runs = [tokens[at : at + MARK_EVERY_TOKENS] for at in range(0, len(tokens), MARK_EVERY_TOKENS)]
        try:
            digests = _digests((array("I", run).tobytes() for run in runs), ("tokens", salt, adapter))
        except OverflowError:  # no tokens of any model
            return None
        return self._of_pieces(digests, runs.__getitem__, (), (), salt, adapter)

    def _of_pieces(
        self,
        digests: Sequence[bytes],
        tokens_of: Callable[[int], Sequence[int]],
        leading: Sequence[int],
        trailing: Sequence[int],
        salt: str | None,
        adapter: Adapter | None,
    ) -> Prompt:
        """Of pieces in a row, of which `tokens_of` is asked for those that are new."""
        start, mark = self._recall(digests)
        keys = mark.keys[: mark.num_keys]
        last, rest, num_tokens = mark.last, list(mark.rest), mark.num_tokens
        if start == 0:
            rest, num_tokens = list(leading), len(leading)
        kept: list[tuple[bytes, _Mark]] = []
        marked_at = num_tokens
        for number in range(start, len(digests)):
            tokens = tokens_of(number)
            num_tokens += len(tokens)
            rest += tokens
            last = self._hash(keys, rest, last, salt, adapter)
            if num_tokens - marked_at >= MARK_EVERY_TOKENS or number >= len(digests) - MARKED_AT_END:
                kept.append((digests[number], _Mark(keys, len(keys), last, tuple(rest), num_tokens)))
                marked_at = num_tokens
        rest += trailing
        if kept:
            whole = array("Q", keys)
            self._remember(digests[:start], [(digest, mark._replace(keys=whole)) for digest, mark in kept], whole)
        self._hash(keys, rest, last, salt, adapter)
        return Prompt(cast("Sequence[BlockKey]", keys), num_tokens + len(trailing), mark.num_tokens)

    def _hash(
        self, keys: "array[int]", rest: list[int], last: bytes | None, salt: str | None, adapter: Adapter | None
    ) -> bytes | None:
        """Move what fills blocks from `rest` to `keys`; the hash of the last block."""
        full = len(rest) - len(rest) % self.scheme.block_tokens
        if not full:
            return last
        chain = self.scheme.chain(rest[:full], last, salt, adapter)
        keys.extend(chain.keys)
        del rest[:full]
        return chain.last

    def _recall(self, digests: Sequence[bytes]) -> tuple[int, _Mark]:
        """The longest known beginning: how many pieces, and the mark behind them."""
        with self._lock:
            for number in range(len(digests), 0, -1):
                mark = self._marks.get(digests[number - 1])
                if mark is not None:
                    self._marks.move_to_end(digests[number - 1])
                    return number, mark
        return 0, _Mark(array("Q"), 0, None, (), 0)

    def _remember(self, known: Sequence[bytes], marks: Sequence[tuple[bytes, _Mark]], whole: "array[int]") -> None:
        """Keep `marks`, and let those at `known` beginnings share the same keys: else every turn's would stay."""
        with self._lock:
            again = [(digest, self._marks[digest]._replace(keys=whole)) for digest in known if digest in self._marks]
            self._bytes += whole.itemsize * len(whole)
            self._num_marks_of[id(whole)] = 0
            for digest, mark in [*again, *marks]:
                before = self._marks.pop(digest, None)
                if before is not None:
                    self._release(before)
                self._marks[digest] = mark
                self._num_marks_of[id(whole)] += 1
                self._bytes += MARK_BYTES
            while self._bytes > self._memory_bytes and self._marks:
                self._release(self._marks.popitem(last=False)[1])

    def _release(self, mark: _Mark) -> None:
        self._bytes -= MARK_BYTES
        self._num_marks_of[id(mark.keys)] -= 1
        if not self._num_marks_of[id(mark.keys)]:
            del self._num_marks_of[id(mark.keys)]
            self._bytes -= mark.keys.itemsize * len(mark.keys)


def _digests(pieces: Iterable[bytes], namespace: object) -> list[bytes]:
    """Of each beginning of a row of pieces, none shared between namespaces."""
    running = blake2b(repr(namespace).encode(), digest_size=16)
    found: list[bytes] = []
    for data in pieces:
        running.update(len(data).to_bytes(8, "big"))
        running.update(data)
        found.append(running.digest())
    return found


def _salt(body: Mapping[str, Any]) -> str | None:
    salt = body.get("cache_salt")
    return salt if isinstance(salt, str) and salt else None
