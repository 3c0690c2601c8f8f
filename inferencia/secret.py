"""A text that must not be seen: an API key, a token, a password.

Whatever prints one by accident, in a log line, a traceback or the ``repr`` of a whole
configuration, prints stars. Who really needs the text asks for it by ``reveal()``, so
that a search for that word finds every place where a secret leaves the program.
"""

import hmac

MASK = "***"


class Secret:
    """Holds a text and shows stars."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself. Not for logs, errors or answers."""
        return self._text

    def __repr__(self) -> str:
        return f"Secret({MASK})"

    def __str__(self) -> str:
        return MASK

    def __bool__(self) -> bool:
        return bool(self._text)

    def __len__(self) -> int:
        return len(self._text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        # surrogatepass: an environment variable may hold any bytes.
        mine = self._text.encode("utf-8", "surrogatepass")
        return hmac.compare_digest(mine, other._text.encode("utf-8", "surrogatepass"))

    def __hash__(self) -> int:
        return hash(self._text)
