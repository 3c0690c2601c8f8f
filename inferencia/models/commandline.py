"""A command as llama-swap's files write it: text over several lines, made an argv.

It looks like shell and is not: quotes and backslashes work as in POSIX's shell, and
nothing else does; no variables, no globs, no ``|`` and no ``;``. Lines that begin with
``#`` are dropped, and a line end is a blank, with or without a backslash before it.
"""

import re

# One step of the splitting. A quote or a backslash that begins nothing matches nothing.
_PIECE = re.compile(
    r"""
      (?P<blank>\s+)
    | (?P<bare>[^\s'"\\]+)
    | \\(?P<escaped>.)
    | '(?P<single>[^']*)'
    | "(?P<double>[^"\\]*(?:\\.[^"\\]*)*)"
    """,
    re.X | re.S,
)
# POSIX 2.2.3: within double quotes a backslash is special only before these.
_IN_DOUBLE = re.compile(r'\\([$`"\\])|\\\n')


def without_comments(text: str) -> str:
    """``text`` less the lines whose first sign is ``#``."""
    lines = text.split("\n")
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def words(text: str) -> tuple[str, ...]:
    """The arguments in ``text``; none if it is empty or all comments.

    Raises:
        ValueError: a quote is not closed; the message says which.
    """
    text = re.sub(r"\\[^\S\n]*(?:\n|\Z)", " \n", without_comments(text))
    found: list[str] = []
    word: list[str] = []  # its parts; "" is one, so that '' is a word
    at = 0
    while at < len(text):
        piece = _PIECE.match(text, at)
        if piece is None:
            raise ValueError(f"a quote {text[at]} is not closed: {_shown(text[at:])}")
        if piece["blank"] is None:
            word.append(_meaning(piece))
        elif word:
            found.append("".join(word))
            word = []
        at = piece.end()
    return (*found, "".join(word)) if word else tuple(found)


def _meaning(piece: re.Match[str]) -> str:
    if piece["double"] is not None:
        return _IN_DOUBLE.sub(lambda found: found[1] or "", piece["double"])
    return next(part for part in piece.groups() if part is not None)


def _shown(text: str) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= 40 else line[:39] + "…"


def model_file(command: tuple[str, ...]) -> str:
    """The GGUF file that a llama-server command names with ``-m``, or "" """
    for at, word in enumerate(command):
        name, _, value = word.partition("=")
        if name not in ("-m", "--model"):
            continue
        path = value or (command[at + 1] if at + 1 < len(command) else "")
        return path if path.lower().endswith(".gguf") else ""
    return ""
