"""``inferencia keys add|list|revoke|rotate``: the commands, without the program.

``register`` describes them to argparse, ``run`` carries one out on a given file and
returns what to print. A secret goes to standard output alone on its line, so that
``$(inferencia keys add alice)`` is the key; what a person wants to know besides goes to
standard error.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from inferencia.keylines import KeysError, Line, LineError, last_day
from inferencia.keysfile import EditError, add_key, list_keys, revoke_key, rotate_key

DONE, FAILED, BAD_USAGE = 0, 1, 2

# Options of the file that ``keys add`` takes, with their value's name and meaning.
_ADD_OPTIONS = {
    "role": ("ROLE", "user, admin, agent or metrics (default: user)"),
    "models": ("GLOB,..", "the models it may see (default: all)"),
    "rps": ("N", "requests per second (default: ratelimit.requests_per_second)"),
    "burst": ("N", "requests at once (default: ratelimit.burst)"),
    "tpm": ("N", "tokens per minute (default: no limit)"),
    "concurrency": ("N", "requests running at a time (default: no limit)"),
    "daily_tokens": ("N", "tokens per day, from 00:00 UTC (default: no limit)"),
    "priority": ("N", "place in the waiting line; higher goes first (default: 0)"),
    "expires": ("DATE|30d", "last day (UTC), or how many days from today"),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command ends with."""

    code: int
    out: str = ""  # for standard output; lines end with "\n"
    err: str = ""  # the same for standard error


def register(
    subparsers: "argparse._SubParsersAction[Any]",
    parents: Sequence[argparse.ArgumentParser] = (),
) -> None:
    """Add ``keys`` and its commands to the program's parser.

    Args:
        parents: what every command takes, such as ``-c FILE``.
    """
    about = "add, list, revoke and rotate keys in the keys file"
    keys = subparsers.add_parser("keys", help=about, description=f"{about}.")
    commands = keys.add_subparsers(
        dest="keys_command", metavar="COMMAND", required=True
    )

    def command(name: str, about: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, help=about, description=f"{about}.", parents=parents
        )
        return parser

    add = command("add", "make a key and print its secret, once")
    add.add_argument("name", metavar="NAME")
    for option, (value, meaning) in _ADD_OPTIONS.items():
        flag = "--" + option.replace("_", "-")
        add.add_argument(flag, dest=option, metavar=value, help=meaning)
    command("list", "show all keys, without their secrets")
    revoke = command("revoke", "remove a key")
    revoke.add_argument("name", metavar="NAME")
    rotate = command("rotate", "give a key a new secret and print it, once")
    rotate.add_argument("name", metavar="NAME")


def run(options: argparse.Namespace, path: Path, today: date) -> Outcome:
    """Carry out one command.

    Args:
        options: as parsed by what ``register`` added.
        path: the keys file.
        today: the day in UTC.
    """
    command = _COMMANDS[options.keys_command]
    try:
        return command(options, path, today)
    except LineError as error:
        return Outcome(BAD_USAGE, err=f"{error}\n")
    except KeysError as error:
        return Outcome(BAD_USAGE, err="".join(f"{one}\n" for one in error.problems))
    except EditError as error:
        return Outcome(FAILED, err=f"{error}\n")


def _add(options: argparse.Namespace, path: Path, today: date) -> Outcome:
    asked = {name: getattr(options, name) for name in _ADD_OPTIONS}
    given = {name: value for name, value in asked.items() if value is not None}
    if "expires" in given:
        given["expires"] = _last_day(given["expires"], today)
    secret = add_key(path, options.name, given)
    return _told_once(secret, f'key "{options.name}" added to {path}')


def _rotate(options: argparse.Namespace, path: Path, today: date) -> Outcome:
    secret = rotate_key(path, options.name)
    note = f'key "{options.name}" has a new secret in {path}; the old one is void'
    return _told_once(secret, note)


def _revoke(options: argparse.Namespace, path: Path, today: date) -> Outcome:
    revoke_key(path, options.name)
    return Outcome(DONE, err=f'key "{options.name}" removed from {path}\n')


def _list(options: argparse.Namespace, path: Path, today: date) -> Outcome:
    if not path.exists():
        note = f"{path} does not exist yet; inferencia keys add NAME makes it\n"
        return Outcome(FAILED, err=note)
    lines = list_keys(path)
    if not lines:
        note = f"{path} has no keys; add one with: inferencia keys add NAME\n"
        return Outcome(DONE, err=note)
    return Outcome(DONE, out=table([_row(line, today) for line in lines]))


_COMMANDS: dict[str, Callable[[argparse.Namespace, Path, date], Outcome]] = {
    "add": _add,
    "list": _list,
    "revoke": _revoke,
    "rotate": _rotate,
}


def _told_once(secret: str, note: str) -> Outcome:
    note = f"{note}. Its secret is shown only this once.\n"
    return Outcome(DONE, out=f"{secret}\n", err=note)


def _last_day(text: str, today: date) -> str:
    try:
        return last_day(text, today)
    except LineError as error:
        raise LineError(f"--expires: {error}") from None


_COLUMNS = (
    "NAME",
    "ROLE",
    "MODELS",
    "RPS",
    "BURST",
    "TPM",
    "CONCURRENCY",
    "DAILY_TOKENS",
    "PRIORITY",
    "EXPIRES",
    "NOTE",
)


def _row(line: Line, today: date) -> tuple[str, ...]:
    key = line.key
    cells: tuple[Any, ...] = (
        key.name,
        key.role.value,
        ",".join(key.models) or "all",
        None if key.rps is None else f"{key.rps:.15g}",
        key.burst,
        key.tpm,
        key.concurrency,
        key.daily_tokens,
        key.priority or None,
        key.expires,
        _note(line, today),
    )
    return tuple("-" if cell is None else str(cell) for cell in cells)


def _note(line: Line, today: date) -> str:
    notes = {
        "placeholder": line.is_placeholder,
        "expired": line.key.has_expired(today),
        "short": line.is_short and not line.is_placeholder,
    }
    return ", ".join(note for note, holds in notes.items() if holds)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns under their names; no line ends with blanks."""
    rows = [_COLUMNS, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "".join(f"{line.rstrip()}\n" for line in padded)
