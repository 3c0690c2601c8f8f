"""A text that must not be seen: an API key, a token, a password.

Whatever prints one by accident, in a log line, a traceback or the ``repr`` of a whole
configuration, prints stars. Who really needs the text asks for it by ``reveal()``, so
that a search for that word finds every place where a secret leaves the program.

Other texts may hold one without anybody's saying so: ``looking_secret`` finds it.
"""

import hmac
import re
from collections.abc import Iterator

MASK = "***"

# What looks like a secret inside another text, with what leads to it.
_LOOKS = re.compile(
    r"(?<![A-Za-z0-9])(?:sk|hf|gsk|ghp|xoxb)[-_][^\s\"'\\,;&<>)\]}]{6,}"
    r"|(?i:bearer|basic)[ ]+[A-Za-z0-9._~+/=-]{6,}"
    r"|--(?:api-key|hf-token|token|password)(?:[ ]+|=)(?:''|\\?[\"'])?[^\s\"'\\]+"
    r"|\b[A-Za-z_]*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)[ ]*=[ ]*"
    r"(?:''|\\?[\"'])?[^\s\"'\\]+"
    r"|://[^\s/@\"']+(?=@)"
)
_LEAD = re.compile(
    r"(?i:bearer|basic)[ ]+|(?:--[a-z-]+(?:[ ]+|=)|[A-Za-z_]+[ ]*=[ ]*)(?:''|\\?[\"'])?"
    r"|://[^\s:/@]+:|://"
)
# A key that was commented out, or that stands in a text that is no YAML.
_KEYED = re.compile(
    r"(?:^|[\s{,])[\"']?(?:api_?key|apiKey|token|password|secret|admin|user"
    r"|authorization|x-api-key)[\"']?\s*:\s*[\"']?([^\s\"'#,}]{8,})",
    re.IGNORECASE | re.MULTILINE,
)


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


def starred(text: str) -> str:
    """A command, or another text, with stars in place of what looks secret in it."""
    parts, at = [], 0
    for begin, end in looking_secret(text):
        parts += [text[at:begin], MASK]
        at = end
    return "".join([*parts, text[at:]])


def looking_secret(raw: str, *, is_comment: bool = False) -> Iterator[tuple[int, int]]:
    """Where in a text something looks like a secret, from and to.

    Args:
        raw: a command, a value, or a line as it is written.
        is_comment: whether it may be a key with its value, as ``api_key: ...``.
    """
    found: list[tuple[int, int]] = []
    for match in _LOOKS.finditer(raw):
        lead = _LEAD.match(match[0])
        begin = match.start() + (lead.end() if lead else 0)
        found.append((begin, match.end()))
    if is_comment:
        found += [match.span(1) for match in _KEYED.finditer(raw)]
    at = 0
    for begin, end in sorted(found):
        value = raw[begin:end]
        if begin >= at and MASK not in value and not value.startswith("${env."):
            yield begin, end
            at = end
