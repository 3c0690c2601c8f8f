"""Journals that were left behind: by processes that ended before they were folded.

``leftovers`` gives those whose process is no more to whoever puts them into the
database and removes them; ``read_pending`` only looks, at those of the living too.
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from inferencia.usagerecords import Record, unframed
from inferencia.usageschema import BEGUN_WIDTH
from inferencia.usagesegments import Lock, journals, lock, number_of

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Leftover:
    """The journal of a process that is no more; ours as long as it is not closed."""

    segments: list[tuple[Path, int]] = field(default_factory=list)  # with descriptors
    damaged: int = 0  # how often some bytes between records were none
    _begun: dict[int, Record] = field(default_factory=dict)

    def ended(self) -> Iterator[list[Record]]:
        """The columns of the requests that have ended, a segment at a time."""
        for path, _ in self.segments:
            records, damaged = unframed(path.read_bytes(), number_of(path))
            self.damaged += damaged
            ended = [one for one in records if len(one) > BEGUN_WIDTH]
            self._begun |= {one[0]: one for one in records if len(one) <= BEGUN_WIDTH}
            for columns in ended:
                self._begun.pop(columns[0], None)
            yield ended

    def interrupted(self) -> list[Record]:
        """What is known of those that have not; once ``ended`` is through."""
        return list(self._begun.values())

    def remove(self) -> None:
        """Take its files away, oldest first: an end never stands before its beginning.

        What is left after a kill in between is folded again, which changes nothing.
        """
        for path, fd in self.segments:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(fd)
        self.segments.clear()

    def close(self) -> None:
        """Leave its files to the next who comes. Idempotent."""
        for _, fd in self.segments:
            os.close(fd)
        self.segments.clear()


def leftovers(database: Path) -> Generator[Leftover, None, None]:
    """The journals beside a database that no living process holds.

    One whose files cannot be opened is left alone.
    """
    for paths in journals(database):
        try:
            leftover = _claimed(paths)
        except OSError as error:
            log.warning("the journal %s cannot be read: %s", paths[0], error)
            continue
        if leftover is not None:
            try:
                yield leftover
            finally:
                leftover.close()


def _claimed(paths: Iterable[Path]) -> Leftover | None:
    leftover = Leftover()
    try:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # somebody else has folded it
                fd = os.open(path, os.O_RDWR)
                leftover.segments.append((path, fd))
                if lock(fd, path) is not Lock.OURS:
                    leftover.close()
                    return None
    except OSError:
        leftover.close()
        raise
    return leftover


@dataclass(frozen=True, slots=True)
class Pending:
    """What stands in all journals beside a database, folded or not."""

    ended: list[Record]  # the columns of requests that have ended
    begun: frozenset[int]  # entries that have no end here

    @property
    def running(self) -> int:
        """Requests that have begun and not ended, or were interrupted."""
        return len(self.begun)


def read_pending(database: Path) -> Pending:
    """Read the journals beside a database, and change nothing.

    Raises:
        OSError: a file cannot be read.
    """
    begun: set[int] = set()
    ended: dict[int, Record] = {}
    for path in itertools.chain.from_iterable(journals(database)):
        try:
            records, _ = unframed(path.read_bytes(), number_of(path))
        except FileNotFoundError:
            continue
        for record in records:
            if len(record) > BEGUN_WIDTH:
                ended[record[0]] = record
            else:
                begun.add(record[0])
    return Pending(list(ended.values()), frozenset(begun - ended.keys()))
