"""What a person reads when the daemon starts.

Everything that is needed to use it stands in one place: where it listens, where the
keys are, which models there are, and one command that can be pasted. No secret is
printed. A terminal gets a little colour; elsewhere it is plain text.
"""

import contextlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from inferencia import __version__

# A first try should be a chat. These are parts of names of models that can't.
_NO_CHAT = (
    "embed",
    "minilm",
    "bge-",
    "rerank",
    "whisper",
    "tts",
    "kokoro",
    "moderation",
)

# More models than these are counted, not named.
_NAMED_MODELS = 8


@dataclass(frozen=True, slots=True)
class ServerLine:
    """One line on a server: whether it answers and what it offers."""

    name: str
    where: str
    models: int | None  # None: it does not answer
    remark: str = ""
    is_loading: bool = False  # it answers that it is loading its model


@dataclass(frozen=True, slots=True)
class Greeting:
    """The facts of one start."""

    base_url: str
    source: Path | None  # the configuration file
    servers: Sequence[ServerLine]
    models: Sequence[str]
    user_key: Path | None  # the file that holds the secret alone
    admin_key: Path | None
    is_open: bool  # nobody needs a key
    notes: Sequence[str] = ()
    page: str = ""  # where a person looks at it all; "" if that is not offered

    def print_to(self, out: TextIO, env: Mapping[str, str]) -> None:
        """Write it for whoever reads ``out``.

        Raises:
            OSError: nobody does, or the disk is full.
        """
        paint = _Paint(out.isatty() and wants_colour(env))
        out.write("\n".join(self._lines(paint)) + "\n")
        out.flush()

    def _lines(self, paint: "_Paint") -> list[str]:
        origin = (
            f"configuration {self.source}"
            if self.source
            else "no config file, using what runs here"
        )
        lines = [f"{paint.strong(f'inferencia {__version__}')} · {origin}", ""]
        for server in self.servers:
            lines.append(self._server_line(server, paint))
        lines += ["", f"  {'endpoint':<9} {paint.strong(self.base_url + '/v1')}"]
        if self.is_open:
            lines.append(f"  {'keys':<9} none needed (--no-api-key)")
        elif self.user_key and self.admin_key:
            lines.append(
                f"  {'keys':<9} {self.user_key} (user) · {self.admin_key} (admin)"
            )
        if self.page:
            lines.append(f"  {'page':<9} {self.page}")
        if self.models:
            lines.append(f"  {'models':<9} {self._model_names()}")
        for note in self.notes:
            lines.append(f"  {'note':<9} {note}")
        lines += ["", f"  {'try it':<9} {self.command()}", ""]
        return lines

    @staticmethod
    def _server_line(server: ServerLine, paint: "_Paint") -> str:
        if server.is_loading:
            word, count = paint.dim(f"{'loading':<9}"), server.remark
        elif server.models is None:
            word, count = paint.dim(f"{'missing':<9}"), server.remark
        else:
            noun = "model" if server.models == 1 else "models"
            word = paint.good(f"{'found':<9}")
            count = server.remark or f"{server.models} {noun}"
        return f"  {word} {server.name:<11} {server.where:<27} {count}".rstrip()

    def _model_names(self) -> str:
        named = ", ".join(self.models[:_NAMED_MODELS])
        more = len(self.models) - _NAMED_MODELS
        return f"{named} and {more} more" if more > 0 else named

    def command(self) -> str:
        """The curl line: one line, ready to be pasted."""
        body = {
            "model": first_choice(self.models),
            "stream": True,
            "messages": [{"role": "user", "content": "Hello!"}],
        }
        if body["model"] is None:
            del body["model"]
        if self.is_open:
            key = ""
        elif self.user_key is not None:
            path = shlex.quote(str(self.user_key))
            key = f' -H "Authorization: Bearer $(cat {path})"'
        else:
            key = ' -H "Authorization: Bearer $INFERENCIA_KEY"'
        data = shlex.quote(json.dumps(body, separators=(",", ":"), ensure_ascii=False))
        return f"curl -N {self.base_url}/v1/chat/completions{key} -d {data}"


def first_choice(models: Sequence[str]) -> str | None:
    """The model to try first: one that chats, as far as names tell."""
    chatting = (m for m in models if not any(part in m.lower() for part in _NO_CHAT))
    return next(chatting, models[0] if models else None)


def wants_colour(env: Mapping[str, str]) -> bool:
    """Whether colours are welcome on a terminal (https://no-color.org)."""
    return not env.get("NO_COLOR") and env.get("TERM") != "dumb"


def base_url(host: str, port: int, *, is_tls: bool = False) -> str:
    """The URL under which a client on this machine reaches a bound address."""
    if host in ("0.0.0.0", ""):
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    if ":" in host:
        host = f"[{host}]"
    return f"{'https' if is_tls else 'http'}://{host}:{port}"


def stop_writing(out: TextIO) -> None:
    """Give up a stream that nobody reads, so that Python does not complain at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


class _Paint:
    """Colours for a terminal, nothing elsewhere."""

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on

    def _in(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._is_on else text

    def strong(self, text: str) -> str:
        return self._in("1", text)

    def good(self, text: str) -> str:
        return self._in("32", text)

    def dim(self, text: str) -> str:
        return self._in("2", text)
