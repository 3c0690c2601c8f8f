"""Child processes that end with the block that started them, whatever happens.

Each child has a group of its own, so that Ctrl-C reaches only the parent, which then
ends them one by one, by pid.
"""

import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from bench import machine

#: The checkout; ``python -m`` finds ``bench`` there.
ROOT = Path(__file__).resolve().parent.parent

#: How long a child may take to end after SIGTERM before it is killed.
_END_SECONDS = 5.0


class Children:
    """What this run has started; leaving the ``with`` block ends it all."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Children":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in reversed(self._running[:]):
            self.end(child)

    def start(
        self,
        module: str,
        *arguments: str,
        core: int | None,
        log: Path,
        env: Mapping[str, str] | None = None,
        speaks: bool = True,
    ) -> "subprocess.Popen[str]":
        """Run ``python -m MODULE``; the arguments are those of ``run``."""
        command = [sys.executable, "-m", module, *arguments]
        return self.run(command, core=core, log=log, env=env, speaks=speaks)

    def run(
        self,
        command: Sequence[str],
        *,
        core: int | None,
        log: Path,
        env: Mapping[str, str] | None = None,
        speaks: bool = True,
    ) -> "subprocess.Popen[str]":
        """Run a program.

        Args:
            command: the program and its arguments.
            core: where it is held, if this system can do that.
            log: what it writes to stderr is appended there.
            env: its environment, ours if None.
            speaks: its stdout is for us to read; otherwise it goes to ``log`` too.
        """
        with log.open("a") as errors:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if speaks else errors,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self._running.append(child)
        machine.pin(child.pid, core)
        return child

    def end(self, child: "subprocess.Popen[str]") -> None:
        """Ask it to end, then make it. Ending one that has ended is no error."""
        if child in self._running:
            self._running.remove(child)
        child.terminate()
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()

    def result(
        self, module: str, argument: str, *, core: int | None, log: Path, seconds: float
    ) -> str:
        """Run a child to its end; what it printed.

        Raises:
            ChildFailed: it took longer than ``seconds`` or did not end with 0.
        """
        child = self.start(module, argument, core=core, log=log)
        try:
            output, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as late:
            raise ChildFailed(f"{module} was not done after {seconds:g} s") from late
        finally:
            self.end(child)
        if child.returncode:
            said = tail(log)
            raise ChildFailed(f"{module} ended with {child.returncode}\n{said}")
        return output


def exit_code(program: str, measure: Callable[[], int]) -> int:
    """Measure, and say in a line why if that is not possible.

    Signals unwind it, so that no child is left behind.

    Returns:
        What ``measure`` does; 2 if a child failed, 130 after Ctrl-C.
    """
    leave_by_signals()
    try:
        return measure()
    except ChildFailed as failure:
        print(f"{program}: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; all children are ended", file=sys.stderr)
        return 130


def leave_by_signals() -> None:
    """Let SIGTERM and SIGINT unwind this program, so that no child is left behind."""
    signal.signal(signal.SIGTERM, _stop)
    # Ignored if a shell started us in the background; then no child would be ended.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


class ChildFailed(Exception):
    """A program of the bench did not do its work."""


def read_port(child: "subprocess.Popen[str]", log: Path) -> int:
    """The port that mock and yardstick print when they are ready."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line.strip():
        raise ChildFailed(f"a child did not start\n{tail(log)}")
    return int(line)


def tail(log: Path, lines: int = 8) -> str:
    """The end of a child's log, for the person who wonders why it ended."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
