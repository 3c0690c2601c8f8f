"""Starting a program whose output goes to a log.

It gets a session and so a process group of its own, ``/dev/null`` as its input, no file
of ours, and a pipe for its output that the running loop reads: neither of them ever
waits for the other.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from inferencia.models.childlog import ChildLog

# What is read at once, and what the system may hold meanwhile (Linux; 64 KiB else).
_READ_BYTES = 64 * 1024
_PIPE_BYTES = 1024 * 1024

_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", None)


class CannotStart(Exception):
    """A program cannot be started. ``str()`` says why and what to do about it."""


def launch(
    command: Sequence[str], env: Mapping[str, str], cwd: Path | None, log: ChildLog
) -> "tuple[subprocess.Popen[bytes], Output]":
    """Start a program.

    In the loop's own thread: the system copies nothing (vfork), so it takes 0.2 ms, and
    whoever is cancelled meanwhile cannot leave a process behind.

    Args:
        command: argv; its first word is looked for on the ``PATH`` of ``env``.
        env: all variables it gets.
        cwd: where it starts; None: where we are.
        log: gets what it prints.

    Raises:
        CannotStart: it is not there, or is no program.
    """
    if not command:
        raise CannotStart("there is no command; set cmd")
    try:
        output = Output(log)
    except OSError as error:
        raise CannotStart(f'cannot start "{command[0]}": {error.strerror}') from error
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output.end,
            stderr=output.end,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        output.close()
        raise CannotStart(_why_not(command[0], error, cwd)) from error
    except ValueError as error:  # a NUL, or a variable with "=" in its name
        output.close()
        message = f'cannot start "{command[0]}": its command or env is malformed'
        raise CannotStart(message) from error
    finally:
        output.close_end()
    return process, output


class Output:
    """A pipe that the running loop reads into a log."""

    def __init__(self, log: ChildLog) -> None:
        """Make the pipe and begin to read.

        Raises:
            OSError: too many files are open.
        """
        self.has_news = asyncio.Event()  # set whenever something was read
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._pipe: int | None
        self._pipe, self.end = os.pipe()  # neither is inherited
        os.set_blocking(self._pipe, False)
        if _F_SETPIPE_SZ is not None:
            # Lets a server print on while the loop is busy; a limit may forbid it.
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._pipe, _F_SETPIPE_SZ, _PIPE_BYTES)
        self._loop.add_reader(self._pipe, self._read)

    def close_end(self) -> None:
        """Close the writing end; the process has its own."""
        os.close(self.end)

    def drain(self) -> None:
        """Read what is there, and no more than fits into the pipe."""
        for _ in range(_PIPE_BYTES // _READ_BYTES):
            if not self._read():
                return

    def close(self) -> None:
        """Read no more. Idempotent."""
        if self._pipe is not None:
            self._loop.remove_reader(self._pipe)
            os.close(self._pipe)
            self._pipe = None

    def _read(self) -> bool:
        """Read once; whether there may be more."""
        if self._pipe is None:
            return False
        try:
            data = os.read(self._pipe, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.close()
            return False
        self._log.feed(data)
        self.has_news.set()
        return True


def _why_not(program: str, error: OSError, cwd: Path | None) -> str:
    """Why a program cannot be started and what to do about it."""
    start = f'cannot start "{program}": '
    if cwd is not None and not cwd.is_dir():
        return f"{start}its folder {cwd} is not there"
    if error.errno == errno.ENOENT and "/" not in program:
        return (
            f"{start}no such program on the PATH; "
            "install it, or give its full path (in llama.exe, or in the model's cmd)"
        )
    if error.errno == errno.ENOENT and os.path.lexists(program):
        return f"{start}the file is there, but not the interpreter or loader it names"
    if error.errno == errno.ENOENT:
        return f"{start}there is no such file"
    if error.errno == errno.EACCES and os.path.isdir(program):
        return f"{start}that is a folder"
    if error.errno == errno.EACCES:
        return f"{start}it is not executable; chmod +x may help"
    if error.errno == errno.ENOEXEC:
        return (
            f"{start}it is no program for this machine ({platform.machine()}); "
            'a script needs a first line such as "#!/bin/sh"'
        )
    return f"{start}{error.strerror}"
