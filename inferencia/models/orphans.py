"""No model's server outlives the gateway, however that ends.

=========================  ========================================================
the gateway ends in order  it stops its children (``process.py``)
it is killed (SIGKILL,     each child's **guard**, a waiting shell, sees the pipe to
out of memory, a crash)    the gateway close and ends the child's process group
the guard was killed too   the **book** in the state folder names every child; the
                           next start ends those that are still there
=========================  ========================================================

Why a guard and not Linux's ``PR_SET_PDEATHSIG``: that signal reaches the child alone,
not what it has started (a shell script's server, vLLM's workers), is lost when a
program changes its user, and has to be asked for between fork and exec. Python runs
code there only on a forked copy of a process with threads, which may deadlock and took
4.3 ms instead of 0.2 ms at 80 MB; a wrapper in Python takes 8 ms. A guard takes 0.1 ms
after the child has started, is under way anyway while the child loads, and works on
macOS as well.

What the book says of a process holds only for the one with the same ``groups.mark``:
a number that has gone to another process is left alone, and so are the children of a
gateway that still runs.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from inferencia.folders import make_private
from inferencia.models import groups

log = logging.getLogger(__name__)

# From SIGTERM to SIGKILL. An orphan serves nobody, so it has nothing to finish; its
# memory is wanted. llama-server takes 0.1 s if it is idle and 30 s in mid-stream.
GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.02

# An entry has some hundred bytes; what is longer was not written by us.
MAX_ENTRY = 16 * 1024

_SHELL = "/bin/sh"
# $1 is the group. It reads a line when all is well, and an end of file when the gateway
# is gone.
_GUARD = """
read -r _ && exit
kill -s TERM -- "-$1" && sleep 1 && kill -s KILL -- "-$1"
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One child in the book."""

    model: str
    pid: int  # of the process and of its group
    mark: str  # ``groups.mark`` of it
    gateway: int  # the process whose child it is
    gateway_mark: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str`` of ``json`` has written.

        Raises:
            ValueError: it is something else.
        """
        try:
            entry = cls(**json.loads(text))
        except (RecursionError, TypeError) as error:
            raise ValueError("not an entry") from error
        texts = (entry.model, entry.mark, entry.gateway_mark)
        numbers = (entry.pid, entry.gateway)
        if not all(type(one) is str for one in texts):
            raise ValueError("not an entry")
        # Group 0 would be our own, 1 everybody.
        if not all(type(one) is int for one in numbers) or entry.pid <= 1:
            raise ValueError("not an entry")
        return entry


class OrphanBook:
    """Keeps the guards and the book of one gateway's children."""

    def __init__(self, folder: Path) -> None:
        """Use a folder of its own, ``children`` in the state folder.

        It has a file for each child, so that two gateways with one state folder do not
        get in each other's way. It is made when it is needed.
        """
        self._folder = folder
        self._own_mark = groups.mark(os.getpid())
        self._guards: dict[int, _Guard] = {}  # by child
        self._dismissed: set[asyncio.Future[None]] = set()  # guards that are ending

    def note(self, pid: int, model: str) -> None:
        """From now on the process group ``pid`` ends with us.

        Call it right after the process was started; needs a running loop. What cannot
        be done is logged and keeps no model from starting.
        """
        try:
            self._write(pid, model)
        except OSError as error:
            log.warning(
                'cannot note the server of model "%s" in %s: %s; if this process is '
                "killed, the next start does not find it",
                model,
                self._folder,
                error.strerror,
            )
        try:
            self._guards[pid] = _Guard(pid)
        except OSError as error:
            log.info(
                'if this process is killed, the server of model "%s" runs on until the '
                "next start: %s",
                model,
                error,
            )

    def forget(self, pid: int) -> None:
        """The group is gone. Idempotent."""
        if guard := self._guards.pop(pid, None):
            guard.dismiss()
            if not guard.ended.done():
                self._dismissed.add(guard.ended)
                guard.ended.add_done_callback(self._dismissed.discard)
        with contextlib.suppress(OSError):
            self._file(pid).unlink()

    async def aclose(self) -> None:
        """Wait for the guards of children that are gone; they take a millisecond."""
        if self._dismissed:
            await asyncio.wait(tuple(self._dismissed))

    async def reap(self, grace: float = GRACE_SECONDS) -> list[str]:
        """End what gateways before us have left behind.

        Args:
            grace: seconds from SIGTERM to SIGKILL.

        Returns:
            The names of the models whose servers were ended.
        """
        orphans = [entry for entry in self._entries() if self._is_orphan(entry)]
        are_gone = await asyncio.gather(*(_end(entry.pid, grace) for entry in orphans))
        for entry, is_gone in zip(orphans, are_gone, strict=True):
            if is_gone:
                self.forget(entry.pid)
        return [entry.model for entry in orphans]

    # --- the book ----------------------------------------------------------------

    def _file(self, pid: int) -> Path:
        return self._folder / f"{pid}.json"

    def _write(self, pid: int, model: str) -> None:
        mark = groups.mark(pid)
        if mark is None or self._own_mark is None:
            return  # it is gone already, or nobody could ever prove that it is ours
        entry = Entry(model, pid, mark, os.getpid(), self._own_mark)
        make_private(self._folder)
        # Not synced to the disk: after a power cut there are no processes either.
        fresh = self._folder / f".{pid}.{os.getpid()}"
        fresh.write_text(json.dumps(asdict(entry)), "utf-8")
        fresh.replace(self._file(pid))

    def _entries(self) -> list[Entry]:
        found = []
        for file in sorted(self._folder.glob("*.json")):
            try:
                with file.open(encoding="utf-8") as text:
                    found.append(Entry.parse(text.read(MAX_ENTRY)))
            except (OSError, ValueError):
                log.warning("%s is not readable and is left out", file)
        return found

    def _is_orphan(self, entry: Entry) -> bool:
        """Whether to end it; entries of those who are gone are taken out."""
        if groups.mark(entry.gateway) == entry.gateway_mark:
            return False  # its gateway runs
        if groups.mark(entry.pid) != entry.mark:
            self.forget(entry.pid)
            return False
        if groups.owner(entry.pid) not in (None, os.geteuid()):
            log.warning(
                "the server of model %s (process %d) was left behind by another run; "
                "it now belongs to another user and is left alone",
                entry.model,
                entry.pid,
            )
            return False
        log.warning(
            "ending the server of model %s (process %d), left behind by another run",
            entry.model,
            entry.pid,
        )
        return True


class _Guard:
    """A shell that ends a process group when we are gone."""

    def __init__(self, group: int) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started.
        """
        self.ended = asyncio.get_running_loop().create_future()
        self._process = subprocess.Popen(
            [_SHELL, "-c", _GUARD, "inferencia-guard", str(group)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.defpath},  # for ``sleep``
            cwd="/",
            bufsize=0,
            start_new_session=True,  # so that a terminal's Ctrl-C does not reach it
        )
        groups.watch_exit(self._process, self._reap)

    def dismiss(self) -> None:
        """Let it end and do nothing."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody has killed it
            self._process.stdin.write(b"\n")
        self._process.stdin.close()

    def _reap(self) -> None:
        self._process.wait()
        self.ended.set_result(None)


async def _end(group: int, grace: float) -> bool:
    """End a process group; whether it is gone."""
    _signal(group, signal.SIGTERM)
    if await _is_gone(group, grace):
        return True
    _signal(group, signal.SIGKILL)
    return await _is_gone(group, GRACE_SECONDS)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


async def _is_gone(group: int, seconds: float) -> bool:
    """Wait until nobody of a group is left; whether that came to pass."""
    deadline = asyncio.get_running_loop().time() + seconds
    while groups.lives(group):
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True
