"""``inferencia connect URL``: run the daemon as an agent, without any file.

It serves whatever this machine has, as ``serve`` does, to the relay at the URL. The
token is taken from ``--token``, a file, or ``INFERENCIA_TUNNEL_TOKEN``, whichever comes
first. Its own door is on loopback, at a free port unless the configuration names one.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferencia.admission import StartFailed
from inferencia.overlay import Flags
from inferencia.secret import Secret
from inferencia.tunnel.dialing import relay_origin

VARIABLE = "INFERENCIA_TUNNEL_TOKEN"
# A token has some 50 characters. Above this somebody named the wrong file.
_MAX_FILE_BYTES = 4096


def register(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser(
        "connect",
        parents=parents,
        help="run the daemon as an agent: serve this machine's models at a relay",
        description="Dial the relay at URL and serve whatever this machine has through "
        f"it. Without --token or --token-file, {VARIABLE} is used.",
    )
    parser.add_argument("url", metavar="URL", help="such as https://relay.example.com")
    token = parser.add_mutually_exclusive_group()
    token.add_argument(
        "--token-file", metavar="F", type=Path, help="a file that holds the token alone"
    )
    token.add_argument(
        "--token", metavar="T", help="the token (any user here can see it in ps)"
    )
    parser.add_argument(
        "--name", metavar="N", help="refuse to connect if the token is another agent's"
    )
    parser.add_argument(
        "--demo", action="store_true", help="serve only the built-in model echo"
    )


def flags(options: argparse.Namespace, env: Mapping[str, str]) -> Flags:
    """What the command line says.

    Raises:
        StartFailed: the URL or the token cannot be used.
    """
    try:
        relay_origin(options.url)
    except ValueError as error:
        raise _misused(str(error)) from error
    token = options.token
    if options.token_file is not None:
        token = _read(options.token_file)
    if token is not None and (not token.isascii() or not token.isprintable()):
        raise _misused("the token has characters that no token has")
    if not token and not env.get(VARIABLE, "").strip():
        raise _misused(
            f"no token; give it by {VARIABLE} or --token-file. Make one at the "
            "relay with: inferencia keys add NAME --role agent --models 'qwen*'"
        )
    return Flags(
        relay=options.url,
        token=Secret(token) if token else None,
        name=options.name,
        demo=options.demo,
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _misused(f"{path}: {error.strerror}") from error
    text = data.decode("utf-8", "replace").strip()
    if len(data) > _MAX_FILE_BYTES or len(text.split()) != 1:
        raise _misused(f"{path} does not hold a token alone")
    return text


def _misused(why: str) -> StartFailed:
    return StartFailed(f"connect: {why}", is_usage=True)
