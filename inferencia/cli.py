"""The door: ``inferencia [COMMAND] [-c FILE]``.

One function per command. Exit codes: 0 done, 1 failed at run time, 2 bad usage or bad
configuration, with one line per error on standard error and no traceback.
"""

import argparse
import asyncio
import contextlib
import difflib
import gc
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from inferencia import (
    __version__,
    connectcommand,
    initcommand,
    keycommands,
    modelcommands,
    pullcommand,
    servicecommands,
    statuscommand,
    usagecommand,
)
from inferencia.admission import (
    StartFailed,
    keys_path,
    open_keys,
    open_terms,
    uses_first_keys,
)
from inferencia.config import ConfigErrors, Loaded, load, located
from inferencia.folders import make_private, state_folder
from inferencia.greeting import stop_writing
from inferencia.logs import setup as setup_logs
from inferencia.middleware import today
from inferencia.notify import Notifier
from inferencia.overlay import Flags
from inferencia.serving import START_AGAIN, serve
from inferencia.summary import summary
from inferencia.usage import usage_file

DONE, FAILED, BAD_USAGE = 0, 1, 2

# The least that Python lets us ask for (sys.int_info.str_digits_check_threshold).
_MAX_DIGITS = 640

# Net new objects until the youngest are looked through (Python's own: 700, which two
# dozen open requests exceed), and how many looks until older ones and all are.
_COLLECTOR_THRESHOLDS = (5000, 20, 20)

_BUILT = (
    *("serve", "init", "connect", "check", "keys", "models", "status", "usage"),
    "service",
)

_EPILOG = """\
Without a command the daemon runs; without a configuration it uses what it finds on
this machine. The configuration is looked for at -c, $INFERENCIA_CONFIG, ./config.yaml,
~/.config/inferencia/config.yaml and /etc/inferencia/config.yaml.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _hold_standard_streams()
    arguments = _with_command(list(sys.argv[1:] if argv is None else argv))
    try:
        if refusal := _refusal(arguments):
            return _complain(BAD_USAGE, refusal)
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace, Mapping[str, str]], int] = options.run
        code = command(options, os.environ)
        sys.stdout.flush()
        return code
    except ConfigErrors as errors:
        return _complain(BAD_USAGE, *errors.lines())
    except StartFailed as failure:
        return _complain(failure.exit_code, *str(failure).splitlines())
    except BrokenPipeError:
        # The reader of our output left. Python would complain once more at exit.
        stop_writing(sys.stdout)
        return FAILED
    except OSError as error:
        # A full disk behind our output, a file that was taken away meanwhile.
        stop_writing(sys.stdout)
        where = f"{error.filename}: " if error.filename else ""
        return _complain(FAILED, where + (error.strerror or str(error)))
    except KeyboardInterrupt:
        return FAILED
    finally:
        _give_up_what_cannot_be_logged()


def _give_up_what_cannot_be_logged() -> None:
    """Keep log lines that a full disk refused from becoming Python's exit code 120."""
    try:
        sys.stderr.flush()
    except OSError:
        stop_writing(sys.stderr)


def _complain(code: int, *lines: str) -> int:
    for line in lines:
        print(f"inferencia: {line}", file=sys.stderr)
    return code


def _hold_standard_streams() -> None:
    """Make sure that there is an input, an output, and an error output.

    Where whoever started us closed one, its number would go to the next socket, and
    what is printed would reach a client. And no name in another alphabet shall end the
    program where the terminal has none.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        sys.exit(_complain(BAD_USAGE, f"{message} (see {self.prog} --help)"))


def _refusal(arguments: Sequence[str]) -> str | None:
    """What is wrong with the command's name; None if it can be parsed."""
    command = arguments[0]
    if command.startswith("-") or command in _BUILT:
        return None
    near = difflib.get_close_matches(command, _BUILT, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_BUILT)}"
    return f'there is no command "{command}"; {hint} (see inferencia --help)'


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        type=Path,
        default=None,
        help="the configuration file",
    )
    parser = _Parser(
        prog="inferencia",
        description="An OpenAI-compatible front door for the language models on your "
        "own machines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands, common)
    connectcommand.register(commands, parents=[common])
    commands.choices["connect"].set_defaults(run=_serve)
    check = commands.add_parser(
        "check",
        parents=[common],
        help="load what serve would load and say what is wrong, or sum it up",
    )
    check.set_defaults(run=_check, host=None, port=None, no_api_key=False, demo=False)
    initcommand.register(commands, parents=[common])
    commands.choices["init"].set_defaults(run=_init)
    keycommands.register(commands, parents=[common])
    commands.choices["keys"].set_defaults(run=_keys)
    modelcommands.register(commands, parents=[common])
    commands.choices["models"].set_defaults(run=_models)
    statuscommand.register(commands, parents=[common])
    commands.choices["status"].set_defaults(run=_status)
    usagecommand.register(commands, parents=[common])
    commands.choices["usage"].set_defaults(run=_usage)
    servicecommands.register(commands, parents=[common])
    commands.choices["service"].set_defaults(run=_service)
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
    """Put ``serve`` where no command was given, and ``-c FILE`` behind everything.

    So ``-c`` may stand before the command, after it, or between ``keys`` and ``add``.
    """
    rest: list[str] = []
    config: list[str] = []
    given = iter(arguments)
    for word in given:
        if word in ("-c", "--config", "-config"):  # the last is Go-inferencia's
            value = next(given, None)
            config = [word] if value is None else [f"--config={value}"]
        elif word.startswith("--config="):
            config = [word]
        else:
            rest.append(word)
    is_about_all = bool(rest) and rest[0] in ("-h", "--help", "--version")
    if not is_about_all and (not rest or rest[0].startswith("-")):
        rest.insert(0, "serve")
    return rest + config


# --- commands --------------------------------------------------------------------


def _read(
    options: argparse.Namespace, env: Mapping[str, str], content: bytes | None = None
) -> Loaded:
    if "url" in options:
        flags = connectcommand.flags(options, env)
        return load(options.config, env, flags, content)
    flags = Flags(
        host=options.host,
        port=options.port,
        no_api_key=options.no_api_key,
        demo=options.demo,
    )
    return load(options.config, env, flags, content)


def _serve(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    loaded = _read(options, env)
    log = loaded.config.log
    # Without a configuration a person is looking: lines, not JSON, on a terminal.
    is_for_person = loaded.source is None and sys.stderr.isatty()
    is_text = is_for_person or log.format == "text"
    setup_logs(log.level, "text" if is_text else "json", sys.stderr)
    # Out of the environment with it: engines that we start are not asked how they are.
    notifier = Notifier.take(os.environ, os.getpid())
    # Decoding a number takes time that grows with the square of its digits; nobody's
    # JSON needs more than this.
    sys.set_int_max_str_digits(_MAX_DIGITS)
    _tune_collector()

    def read_again(content: bytes | None) -> Loaded:
        return _read(options, env, content)

    code = _run(serve(read_again, loaded, env, notifier))
    if code == START_AGAIN:
        _start_again(notifier)
    return code


def _start_again(notifier: Notifier) -> NoReturn:
    """Become a new process with the same number, as it was started the first time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ.update(notifier.environment)
    os.execv(sys.executable, sys.orig_argv)


def _tune_collector() -> None:
    """Let Python look for reference cycles less often, and not among our modules.

    Requests leave none behind when they go well; looking took 5 % of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTOR_THRESHOLDS)


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
    for line in summary(config, keys_path(loaded, env)):
        print(line)
    if keys is not None:
        print(f"keys: {keys.ring.usable(today())} usable")
    for warning in warnings:
        print(f"warning: {warning}")
    return DONE


def _init(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    outcome = initcommand.run(options, env)
    sys.stdout.write(outcome.out)
    sys.stderr.write(outcome.err)
    return outcome.code


def _keys(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    loaded = load(options.config, env, Flags())
    path = keys_path(loaded, env)
    elsewhere = _keys_elsewhere(loaded, env)
    where = elsewhere.get(getattr(options, "name", ""))
    if where is not None:
        hint = "choose another name"
        if options.keys_command != "add":
            hint = "change it there (a file that is removed is made anew at the start)"
        return _complain(
            BAD_USAGE,
            f'the key "{options.name}" is not in {path}, but is {where}; {hint}',
        )
    try:
        if options.keys_command == "add" and _is_in_our_folder(path, env):
            make_private(path.parent)
        outcome = keycommands.run(options, path, today())
    except OSError as error:
        return _complain(FAILED, f"{error.filename or path}: {error.strerror}")
    sys.stdout.write(outcome.out)
    for line in outcome.err.splitlines():
        print(line, file=sys.stderr)
    if options.keys_command == "list":
        for key, place in elsewhere.items():
            print(f'besides, the key "{key}" is {place}', file=sys.stderr)
    if outcome.code == DONE and loaded.config.auth.api_keys is not None:
        note = f"INFERENCIA_API_KEYS is set, and a daemon that has it ignores {path}"
        print(f"warning: {note}", file=sys.stderr)
    return outcome.code


def _is_in_our_folder(path: Path, env: Mapping[str, str]) -> bool:
    """Whether a keys file is kept where nobody but we would make a folder for it."""
    with contextlib.suppress(OSError):  # there is no home folder
        return path.parent == state_folder(env)
    return False


def _keys_elsewhere(loaded: Loaded, env: Mapping[str, str]) -> dict[str, str]:
    """Names of keys that are not in the keys file, and where those keys are."""
    given = loaded.config.server.api_key
    if uses_first_keys(loaded):
        with contextlib.suppress(OSError):
            folder = state_folder(env)
            return {
                "user": f"the file {folder / 'key'}",
                "admin": f"the file {folder / 'admin-key'}",
            }
    return {
        role: f"server.api_key.{role}"
        for role, key in (("admin", given.admin), ("user", given.user))
        if key is not None
    }


def _models(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    loaded = load(options.config, env, Flags())
    if options.models_command == "pull":
        out, err = sys.stdout, sys.stderr
        return pullcommand.run(options.reference, loaded, env, out=out, err=err)
    person = modelcommands.Asking(sys.stdin.isatty() and sys.stdout.isatty())
    outcome = modelcommands.run(options, loaded, env, person)
    sys.stdout.write(outcome.out)
    sys.stderr.write(outcome.err)
    return outcome.code


def _status(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    loaded = load(options.config, env, Flags())
    screen = statuscommand.Screen(sys.stdout, is_terminal=sys.stdout.isatty())
    try:
        return statuscommand.run(options, loaded, env, screen)
    except statuscommand.NoAnswer as error:
        return _complain(FAILED, str(error))


def _usage(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    loaded = load(options.config, env, Flags())
    database = usage_file(loaded.config.usage, env)
    outcome = usagecommand.run(options, database, time.time())
    sys.stdout.write(outcome.out)
    sys.stderr.write(outcome.err)
    return outcome.code


def _service(options: argparse.Namespace, env: Mapping[str, str]) -> int:
    outcome = servicecommands.run(options, env, servicecommands.Machine.here())
    sys.stdout.write(outcome.out)
    sys.stderr.write(outcome.err)
    return outcome.code
