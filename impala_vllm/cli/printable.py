"""What logs, ledgers and servers say, made fit for a terminal: a name in them may hold anything."""


def printable(text: str) -> str:
    """Line ends stay; other control characters, and bytes of a file name that are no text, become escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
