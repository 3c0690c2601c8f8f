"""The door: ``inferencia [COMMAND] [-c FILE]``.

One function per command. Exit codes: 0 done, 1 failed at run time, 2 bad usage or bad
configuration, with one line per error on standard error and no traceback.
"""

import argparse
import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from inferencia import __version__, keycommands
from inferencia.config import ConfigErrors, Flags, Loaded, load, located, summary
from inferencia.firstkeys import KEYS_FILE
from inferencia.folders import state_folder
from inferencia.logs import setup as setup_logs
from inferencia.middleware import today
from inferencia.serving import (
    StartFailed,
    open_keys,
    open_terms,
    serve,
    uses_first_keys,
)

DONE, FAILED, BAD_USAGE = 0, 1, 2

# Named in the contract of the command line and not built.
_UNBUILT = ("connect", "init", "models", "service", "status", "usage")

_EPILOG = """\
Without a command the daemon runs; without a configuration it uses what it finds on
this machine. The configuration is looked for at -c, $INFERENCIA_CONFIG, ./config.yaml,
~/.config/inferencia/config.yaml and /etc/inferencia/config.yaml.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(_with_command(arguments))
    command: Callable[[argparse.Namespace, Mapping[str, str]], int] = options.run
    try:
        return command(options, os.environ)
    except ConfigErrors as errors:
        return _complain(BAD_USAGE, *errors.lines())
    except StartFailed as failure:
        return _complain(failure.exit_code, *str(failure).splitlines())
    except BrokenPipeError:
        # The reader of our output left. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return FAILED


def _complain(code: int, *lines: str) -> int:
    for line in lines:
        print(f"inferencia: {line}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-c", "--config", metavar="FILE", type=Path, default=None)
    parser = argparse.ArgumentParser(
        prog="inferencia",
        description="An OpenAI-compatible front door for the language models on your "
        "own machines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands, common)
    check = commands.add_parser(
        "check",
        parents=[common],
        help="load what serve would load and say what is wrong, or sum it up",
    )
    check.set_defaults(run=_check, host=None, port=None, no_api_key=False, demo=False)
    keycommands.register(commands, parents=[common])
    commands.choices["keys"].set_defaults(run=_keys)
    for name in _UNBUILT:
        # No help: it is not listed. Everything that follows is taken and refused.
        unbuilt = commands.add_parser(name, add_help=False)
        unbuilt.add_argument("rest", nargs=argparse.REMAINDER)
        unbuilt.set_defaults(run=_refuse, name=name)
    return parser


def _add_serve(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "serve", parents=[common], help="run the daemon (also without a command)"
    )
    parser.add_argument("--host", metavar="H", help="address to listen on")
    parser.add_argument("--port", metavar="P", type=_port, help="port to listen on")
    parser.add_argument(
        "--no-api-key",
        action="store_true",
        help="let everybody on this machine in as user, without a key",
    )
    parser.add_argument(
        "--demo", action="store_true", help="serve only the built-in model echo"
    )
    parser.set_defaults(run=_serve)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, got {text!r}")
    return int(text)


def _with_command(arguments: list[str]) -> list[str]:
    """Put ``serve`` where no command was given, and ``-c FILE`` at the end.

    So ``-c`` may stand before the command, after it, or between ``keys`` and ``add``.
    """
    rest: list[str] = []
    config: list[str] = []
    given = iter(arguments)
    for word in given:
        if word in ("-c", "--config"):
            config = [word, *([value] if (value := next(given, None)) else [])]
        else:
            rest.append(word)
    is_about_all = bool(rest) and rest[0] in ("-h", "--help", "--version")
    if not is_about_all and (not rest or rest[0].startswith("-")):
        rest.insert(0, "serve")
    return rest + config


# --- commands --------------------------------------------------------------------


def _read(options: argparse.Namespace, env: Mapping[str, str]) -> Loaded:
    flags = Flags(
        host=options.host,
        port=options.port,
        no_api_key=options.no_api_key,
        demo=options.demo,
    )
    return load(options.config, env, flags)


def _serve(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    loaded = _read(options, env)
    log = loaded.config.log
    # Without a configuration a person is looking: lines, not JSON, on a terminal.
    is_for_person = loaded.source is None and sys.stderr.isatty()
    is_text = is_for_person or log.format == "text"
    setup_logs(log.level, "text" if is_text else "json", sys.stderr)
    return _run(serve(lambda: _read(options, env), loaded, env))


def _run(main_coroutine: Coroutine[Any, Any, int]) -> int:
    """Run the loop, with uvloop if it is installed."""
    loop_factory = None
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main_coroutine)


def _check(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    loaded = _read(options, env)
    config = loaded.config
    warnings = [located(warning, loaded.source) for warning in loaded.warnings]
    keys = None
    if not uses_first_keys(loaded):
        keys = open_keys(loaded, env)
        warnings += keys.ring.warnings
    open_terms(config)
    print(f"configuration: {loaded.source or 'none; defaults and environment'}")
    for line in summary(config):
        print(line)
    if keys is not None:
        print(f"keys: {keys.ring.usable(today())} usable")
    for warning in warnings:
        print(f"warning: {warning}")
    return DONE


def _keys(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    loaded = load(options.config, env, Flags())
    auth = loaded.config.auth
    if loaded.source is None and not auth.is_keys_file_given:
        # The daemon without a configuration reads this one besides its first two.
        path = state_folder(env) / KEYS_FILE
    else:
        path = auth.keys_file
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    outcome = keycommands.run(options, path, today())
    sys.stdout.write(outcome.out)
    sys.stderr.write(outcome.err)
    return outcome.code


def _refuse(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    return _complain(BAD_USAGE, f"{options.name}: not in this version")
