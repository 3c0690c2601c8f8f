"""``inferencia status``: what runs now, as a live table.

Asks the gateway of the configuration once a second, with an admin key that is written
down on this machine or in a file that is named. On a terminal the table is drawn in
place until Ctrl-C; into a pipe, and with ``--once``, it is written once. Names come
from others, so what would move a terminal's cursor is taken out of them.
"""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from inferencia.config import Loaded
from inferencia.inuse import FAILURES, ask, connections, is_gateway, written_keys
from inferencia.keycommands import DONE
from inferencia.keylines import Role
from inferencia.models.download import size_text

_PATH = "/admin/api/state"
_SECONDS = 1.0
_MAX_KEY_BYTES = 4096

# An alternate screen without cursor, and back; then each picture over the last one.
_BEGIN, _END = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _LINE_END, _REST = "\x1b[H", "\x1b[K\n", "\x1b[J"


class NoAnswer(Exception):
    """The state cannot be had; ``str()`` says why and what to do."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Where it is written."""

    out: TextIO
    is_terminal: bool
    pause: Callable[[float], None] = time.sleep


def register(
    subparsers: "argparse._SubParsersAction[Any]",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Add ``status`` to the program's parser.

    Args:
        parents: what every command takes, such as ``-c FILE``.
    """
    about = "show what runs now: requests, models, backends, agents, the machine"
    status = subparsers.add_parser(
        "status", help=about, description=f"{about}.", parents=parents
    )
    status.add_argument("--once", action="store_true", help="write it once and end")
    status.add_argument("--json", action="store_true", help="write it once, as JSON")
    status.add_argument(
        "--key-file",
        metavar="F",
        type=Path,
        help="a file that holds a key of the role admin alone (default: one that is "
        "written down here)",
    )


def run(
    options: argparse.Namespace,
    loaded: Loaded,
    env: Mapping[str, str],
    screen: Screen,
) -> int:
    """Carry out the command.

    Raises:
        NoAnswer: there is nothing to show.
        OSError: the key file cannot be read.
    """
    keys = list(_keys(loaded, env, options.key_file))
    state = fetch(loaded, keys)
    if options.json:
        screen.out.write(json.dumps(state, indent=2, ensure_ascii=False) + "\n")
    elif options.once or not screen.is_terminal:
        screen.out.write("".join(f"{line}\n" for line in table(state)))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _live(state, lambda: fetch(loaded, keys), screen)
    return DONE


def _live(state: Any, again: Callable[[], Any], screen: Screen) -> None:
    """Draw it again each second, until Ctrl-C.

    Raises:
        NoAnswer: the gateway is gone.
    """
    screen.out.write(_BEGIN)
    try:
        while True:
            size = shutil.get_terminal_size()
            lines = [line[: size.columns] for line in table(state)]
            picture = _LINE_END.join(lines[: size.lines - 1])
            screen.out.write(f"{_HOME}{picture}{_LINE_END}{_REST}")
            screen.out.flush()
            screen.pause(_SECONDS)
            state = again()
    finally:
        screen.out.write(_END)
        screen.out.flush()


# --- asking ----------------------------------------------------------------------


def fetch(loaded: Loaded, keys: Sequence[str]) -> Any:
    """The state of the gateway that this configuration is of.

    Args:
        loaded: says where it listens.
        keys: one of which may be an administrator's.

    Raises:
        NoAnswer: none runs, or it does not tell.
    """
    tried, refusal = [], ""
    for connection in connections(loaded, "admin"):
        place = f"{connection.host}:{connection.port}"
        tried.append(place)
        with contextlib.closing(connection), contextlib.suppress(*FAILURES):
            if not is_gateway(connection):
                continue
            refusal = refusal or (
                f"the gateway at {place} runs, but no key of the role admin is known "
                "here; name a file that holds one with --key-file"
            )
            for key in keys:
                status, document = ask(connection, _PATH, key)
                if status == 200:
                    return document
                if status == 403:
                    refusal = f"the gateway at {place}: {_message(document)}"
    where = ", ".join(tried) or "any address (server.listen offers no admin)"
    raise NoAnswer(refusal or f"no gateway answers at {where}; start one: inferencia")


def _message(document: Any) -> str:
    with contextlib.suppress(TypeError, KeyError):
        return _shown(document["error"]["message"])
    return "it refuses"


def _keys(loaded: Loaded, env: Mapping[str, str], file: Path | None) -> Iterator[str]:
    """Keys that may be an administrator's, as far as they are written down."""
    if file is not None:
        with file.open("rb") as opened:
            yield opened.read(_MAX_KEY_BYTES).decode("utf-8", "replace").strip()
        return
    for key in written_keys(loaded, env):
        if key.role is Role.ADMIN:
            yield key.secret


# --- showing ---------------------------------------------------------------------


def table(state: Any) -> list[str]:
    """The state as lines for a person; its time is the clock."""
    now = state["time"]
    lines = [_truth(state), _machine(state["host"])]
    lines += _part(
        "REQUESTS",
        ("KEY", "MODEL", "STATE", "TOKENS", "TOK/S", "AGE", "CLIENT"),
        (_request(one, now) for one in state["requests"]),
    )
    local = [one for one in state["models"] if one["backend"] == "local"]
    lines += _part(
        "MODELS",
        ("NAME", "STATE", "MEMORY", "BUSY", "WAITING", "UNLOADS IN", ""),
        (_model(one, now) for one in local if one["listed"] or _is_up(one)),
    )
    lines += _part(
        "BACKENDS",
        ("NAME", "STATE", "MODELS", "BUSY", "WAITING", "", ""),
        (_backend(one) for one in state["backends"]),
    )
    lines += _part(
        "AGENTS",
        ("NAME", "STATE", "MODELS", "BUSY", "WAITING", "ROUND TRIP", ""),
        (_agent(one) for one in state["agents"]),
    )
    running = [one for one in state["downloads"] if one["state"] == "running"]
    lines += _part(
        "DOWNLOADS", ("MODEL", "PHASE", "DONE", "RATE", "LEFT"), map(_download, running)
    )
    return [line for line in lines if line is not None]


def _truth(state: Any) -> str:
    rates, memory = state["rates"], state["memory"]
    parts = [
        f"inferencia {state['version']}",
        state["health"],
        f"{rates['completion']:.0f} tok/s out, {rates['prompt']:.0f} in",
        f"{state['in_flight']} in flight",
        f"{state['waiting']['total']} waiting",
    ]
    if memory["budget"]:
        parts.append(f"{size_text(memory['used'])} of {size_text(memory['budget'])}")
    if state["usage"]["degraded"]:
        parts.append("usage is not written down")
    return "  ·  ".join(map(_shown, parts))


def _machine(host: Any) -> str:
    if host is None:
        return ""
    parts = [f"{host['name']}: {host['cpus']} processors"]
    if host["cpu"] is not None:
        parts.append(f"{host['cpu']:.0%} busy")
    if host["memory_total"] and host["memory_used"] is not None:
        used, total = size_text(host["memory_used"]), size_text(host["memory_total"])
        parts.append(f"{used} of {total} memory")
    for gpu in host["gpus"]:
        use = "" if gpu["use"] is None else f" {gpu['use']:.0%}"
        parts.append(f"{gpu['name']}{use}")
    return "  ·  ".join(map(_shown, parts))


def _request(one: Any, now: float) -> tuple[str, ...]:
    return (
        one["key"] or "-",
        one["model"] or "-",
        one["state"],
        _number(one["completion_tokens"]),
        _number(one["tokens_per_second"]),
        _age(now - one["began"]),
        one["client"] or "",
    )


def _is_up(one: Any) -> bool:
    return one["state"] not in ("stopped", "broken")


def _model(one: Any, now: float) -> tuple[str, ...]:
    state, progress = one["state"], one.get("progress")
    if state == "loading" and progress is not None:
        state = f"loading {progress:.0%}"
    memory, leaves = one.get("memory"), one.get("unloads_at")
    return (
        one["id"],
        state,
        size_text(memory) if memory else "",
        _count(one.get("in_flight")),
        _count(one.get("waiting")),
        "" if leaves is None else _age(leaves - now),
        one.get("error") or "",
    )


def _backend(one: Any) -> tuple[str, ...]:
    busy, waiting = _count(one["in_flight"]), _count(one["waiting"])
    trouble = one["trouble"] or ""
    return one["name"], one["state"], str(one["models"]), busy, waiting, "", trouble


def _agent(one: Any) -> tuple[str, ...]:
    trip = one["round_trip"]
    return (
        one["name"],
        one["state"],
        str(len(one["models"])),
        _count(one["streams"]),
        _count(one["waiting"]),
        "" if trip is None else f"{trip * 1000:.0f} ms",
        "",
    )


def _download(one: Any) -> tuple[str, ...]:
    left = one["seconds_left"]
    done = f"{size_text(one['done'])} of {size_text(one['size'])}"
    rate = f"{size_text(one['rate'])}/s"
    return one["model"], one["phase"], done, rate, "" if left is None else _age(left)


def _part(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]
) -> list[str]:
    """A table with its title; nothing if it has no rows."""
    cells = [[_shown(cell) for cell in row] for row in rows]
    if not cells:
        return []
    cells = [list(headings), *cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells
    )
    return ["", title, *(f"  {line}".rstrip() for line in lines)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _count(value: int | None) -> str:
    return str(value) if value else ""


def _age(seconds: float) -> str:
    """``12 s``, ``3 min``, ``2 h``."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def _shown(text: str) -> str:
    """A name without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
