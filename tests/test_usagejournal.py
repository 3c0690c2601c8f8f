"""Promises of the journal of usage: what was written is found again, once."""

import errno
import os
import random
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inferencia.usagejournal import Journal
from inferencia.usageleftovers import Leftover, leftovers, read_pending
from inferencia.usagerecords import framed, unframed
from inferencia.usageschema import BEGUN_WIDTH
from inferencia.usagesegments import Segment


def begun(entry: int) -> tuple[Any, ...]:
    return entry, *["x"] * (BEGUN_WIDTH - 1)


def ended(entry: int, words: str = "x") -> tuple[Any, ...]:
    return *begun(entry), words, "more"


def begin(journal: Journal, entry: int) -> None:
    journal.note([begun(entry)], [])


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "usage.sqlite3"


@pytest.fixture(params=[True, False], ids=["mapped", "written"])
def may_map(request: pytest.FixtureRequest) -> bool:
    """Each of the two ways in which a record gets into the file."""
    return bool(request.param)


@pytest.fixture
def journal(database: Path, may_map: bool) -> Iterator[Journal]:
    journal = Journal(database, may_map=may_map)
    journal.open()
    yield journal
    journal.close()


def fold(journal: Journal) -> list[int]:
    """Take what is pending as the thread does; return the entries."""
    journal.open()
    journal.prepare()
    was_behind, journal.is_behind = journal.is_behind, False
    marks = journal.marks()
    found = [row[0] for row in journal.rows]
    journal.rows.clear()
    if was_behind:
        for segment, size in marks:
            found += [row[0] for row in segment.rows(size)]
    journal.note_folded(marks)
    return list(dict.fromkeys(found))


def files(database: Path) -> list[Path]:
    return sorted(database.parent.glob("*.pending"))


def test_a_record_comes_back_as_it_was() -> None:
    record = (1, 2**62, 'a "b" \\ é\n\ud800', None, 0.5, True)
    assert unframed(framed([record], 7), 7) == ([record], 0)
    assert unframed(framed([record, record], 7), 7) == ([record, record], 0)


def test_what_a_file_held_before_is_none_of_its_records() -> None:
    before = [framed([ended(n)], 7) for n in range(9)]
    now = [framed([begun(n), ended(n)], 8) for n in range(20, 24)]
    for count in range(len(now) + 1):
        written = b"".join(now[:count])
        held = written + b"".join(before)[len(written) :]
        found, damaged = unframed(held, 8)
        assert [record[0] for record in found[::2]] == list(range(20, 20 + count))
        assert damaged == 0


def test_a_value_of_another_kind_is_written_as_what_it_stands_for() -> None:
    class Name(str): ...

    class Number(int): ...

    written = framed([(1, Name("a"), Number(7), [2], True)], 1)
    assert unframed(written, 1) == ([(1, "a", 7, "[2]", 1)], 0)


def test_at_every_cut_whole_records_are_found_and_the_torn_one_is_not() -> None:
    records = [framed([one], 1) for one in (begun(1), ended(1), begun(2))]
    data = b"".join(records)
    ends = [0, len(records[0]), len(records[0] + records[1]), len(data)]
    for cut in range(len(data) + 1):
        found, damaged = unframed(data[:cut], 1)
        assert len(found) == sum(cut >= end for end in ends) - 1
        assert damaged == 0
        more, damaged = unframed(data[:cut] + records[0], 1)
        assert len(more) == len(found) + 1
        assert damaged == (cut not in ends)


def test_a_changed_bit_spoils_its_record_only() -> None:
    parts = [framed([ended(n)], 1) for n in (1, 2, 3)]
    data = b"".join(parts)
    for at in range(len(parts[0]), len(parts[0] + parts[1])):
        for bit in range(8):
            spoilt = bytearray(data)
            spoilt[at] ^= 1 << bit
            found, damaged = unframed(bytes(spoilt), 1)
            assert [record[0] for record in found] == [1, 3]
            assert damaged >= 1


def test_what_ended_is_folded_once(journal: Journal) -> None:
    for entry in range(100):
        begin(journal, entry)
    for entry in range(50):
        journal.note([], [ended(entry)])
    assert fold(journal) == list(range(50))
    assert fold(journal) == []
    assert (journal.pending_bytes, journal.running) == (0, 50)


def test_no_two_requests_have_the_same_entry_even_if_the_clock_goes_back() -> None:
    journal = Journal(Path("unused"))
    moments = ((1.0, 1), (1.0, 3), (0.9, 0), (5e-6, 1), (2.0, 2))
    entries = [e for moment, n in moments for e in journal.entries(moment, n)]
    assert len(set(entries)) == 7 and entries == sorted(entries)


def test_journals_that_live_together_have_tags_of_their_own(database: Path) -> None:
    journals = [Journal(database) for _ in range(20)]
    for one in journals:
        one.tag = 7
        one.open()
    try:
        assert len({one.tag for one in journals}) == 20
    finally:
        for one in journals:
            one.close()


def test_a_full_segment_is_followed_by_one_with_the_open_requests(
    database: Path, may_map: bool
) -> None:
    journal = Journal(database, segment_bytes=2000, may_map=may_map)
    journal.open()
    begin(journal, 0)  # goes on all the time
    for entry in range(1, 200):
        begin(journal, entry)
        journal.note([], [ended(entry)])
        if entry % 20 == 0:
            fold(journal)
    assert len(files(database)) <= 3
    fold(journal)
    journal.close()
    assert [cut for _, cut, _ in left_behind(database)] == [[0]]


def left_behind(database: Path) -> Iterator[tuple[list[int], list[int], Leftover]]:
    for leftover in leftovers(database):
        closed = [row[0] for rows in leftover.ended() for row in rows]
        yield closed, [row[0] for row in leftover.interrupted()], leftover


def test_the_journal_of_a_killed_process_is_found_and_removed(
    database: Path, may_map: bool
) -> None:
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_usagejournal import Journal, begin, begun, ended, framed
journal = Journal(Path({str(database)!r}), segment_bytes=500, may_map={may_map})
journal.open()
for entry in range(40):
    begin(journal, entry)
    if entry == 1:
        segment = journal._current
        segment.append(framed([ended(50)], segment.number)[:15])
    if entry % 2:
        journal.note([], [ended(entry)])
    journal.prepare()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", script], check=False, timeout=30)
    assert len(files(database)) > 2
    ((closed, cut, leftover),) = (
        (closed, cut, leftover) for closed, cut, leftover in left_behind(database)
    )
    assert sorted(closed) == list(range(1, 40, 2))
    assert cut == list(range(0, 40, 2))
    assert leftover.damaged == 1
    for _, _, again in left_behind(database):
        again.remove()
    assert files(database) == []


def test_of_a_segment_that_was_used_again_only_its_last_use_counts(
    database: Path, may_map: bool
) -> None:
    journal = Journal(database, segment_bytes=3000, may_map=may_map)
    journal.open()
    seen = set()
    for entry in range(300):
        begin(journal, entry)
        journal.note([], [ended(entry)])
        seen |= {path.stat().st_ino for path in files(database)}
        if entry % 5 == 0 and entry < 290:
            fold(journal)
            journal.prepare()
    assert len(seen) == 2
    pending = read_pending(database)
    entries = {row[0] for row in pending.ended}
    assert set(range(291, 300)) <= entries <= set(range(200, 300))
    assert pending.running == 0
    journal.close()


def test_what_is_pending_is_known_though_a_file_is_used_again_while_it_turns(
    database: Path,
) -> None:
    class Prompt(deque[Segment]):
        """The thread runs the moment it can know of a full one."""

        def append(self, segment: Segment) -> None:
            super().append(segment)
            turning.note_folded([(segment, segment.size)])

    turning = Journal(database, segment_bytes=1000)
    turning._full = Prompt()
    turning.open()
    for entry in range(1000):
        begin(turning, entry)
        turning.prepare()
        turning.note([], [ended(entry)])
        assert 0 <= turning.pending_bytes < 2000
    fold(turning)
    assert turning.pending_bytes == 0 and len(files(database)) == 2
    turning.close()


def test_however_often_it_turns_it_takes_no_more_files(journal: Journal) -> None:
    small = Journal(journal._database, segment_bytes=1, may_map=journal._may_map)
    small.open()
    begin(small, 0)
    fold(small)
    descriptors = len(os.listdir("/proc/self/fd"))
    for entry in range(1, 600):
        small.note([begun(entry)], [ended(entry)])
        assert fold(small) == [entry]
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    assert (small.pending_bytes, small.running) == (0, 1)
    small.close()
    assert read_pending(journal._database).begun == {0}
    for left in files(journal._database):
        left.unlink()


def test_a_full_disk_makes_no_more_and_more_files(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(database, segment_bytes=300, may_map=False)
    journal.open()
    for entry in range(10):
        begin(journal, entry)
    disk = FullDisk(monkeypatch, 50)
    descriptors = len(os.listdir("/proc/self/fd"))
    for entry in range(50):
        journal.prepare()
        journal.note([begun(100 + entry)], [])
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1
    assert journal.failure is not None and len(files(database)) == 2
    disk.room = 10**6
    journal.note([], [ended(3)])
    assert journal.failure is None
    pending = read_pending(database)
    assert ([row[0] for row in pending.ended], pending.running) == ([3], 59)
    fold(journal)
    assert journal.pending_bytes == 0
    journal.close()


def test_a_journal_that_begins_anew_holds_nothing_of_before(
    database: Path, may_map: bool
) -> None:
    journal = Journal(database, may_map=may_map)
    journal.open()
    for turn in range(3):  # a file that is used again can be left again
        for entry in (0, 1, 2):
            begin(journal, 10 * turn + entry)
        journal.note([], [ended(10 * turn + 1)])
        fold(journal)
        journal.begin_anew()
        fold(journal)
        journal.note([], [ended(10 * turn + 2)])
        fold(journal)
        pending = read_pending(database)
        assert [row[0] for row in pending.ended] == [10 * turn + 2]
        assert pending.begun == set(range(0, 10 * turn + 1, 10))
    assert journal.pending_bytes == 0 and len(files(database)) == 2
    journal.close()


def test_a_file_that_was_put_in_the_place_of_ours_is_not_used_again(
    database: Path,
) -> None:
    journal = Journal(database, segment_bytes=300)
    journal.open()
    (first,) = files(database)
    first.rename(first.with_suffix(".moved"))
    first.write_text("a copy")
    for entry in range(20):
        journal.note([begun(entry)], [ended(entry)])
        fold(journal)
        journal.prepare()
    journal.note([], [ended(99)])
    assert [row[0] for row in read_pending(database).ended][-1] == 99
    journal.close()


def test_a_name_that_is_taken_is_not_taken_again(database: Path) -> None:
    journal = Journal(database, segment_bytes=300)
    journal.open()
    (first,) = files(database)
    others = [Path(str(first).replace(".1.pending", f".{n}.pending")) for n in (3, 4)]
    for path in others:
        path.write_text("mine")
    for entry in range(20):
        journal.note([begun(entry)], [ended(entry)])
        fold(journal)
        journal.prepare()
    assert [path.read_text() for path in others] == ["mine", "mine"]
    assert not journal.has_pending and journal.pending_bytes == 0
    journal.close()
    assert files(database) == others


def test_a_journal_in_use_is_not_taken_for_one_that_was_left(
    journal: Journal, database: Path
) -> None:
    begin(journal, 1)
    journal.note([], [ended(1)])
    assert list(leftovers(database)) == []
    pending = read_pending(database)  # but it can be read
    assert ([row[0] for row in pending.ended], pending.running) == ([1], 0)


def test_files_that_only_look_similar_are_left_alone(database: Path) -> None:
    for name in ("usage.sqlite3.pending", "other.sqlite3.007-1.1.pending", "x.pending"):
        (database.parent / name).write_text("mine")
    assert list(leftovers(database)) == []
    assert len(files(database)) == 3


class FullDisk:
    """``os.pwrite`` on a disk on which so many bytes have room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def pwrite(self, fd: int, data: bytes, at: int) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._pwrite(fd, data[: self.room], at)
        self.room -= written
        return written


@pytest.mark.parametrize("room", range(0, 120, 7))
def test_what_a_full_disk_refuses_is_kept_in_memory(
    database: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    journal = Journal(database, may_map=False)
    journal.open()
    disk = FullDisk(monkeypatch, room)
    for entry in range(5):
        begin(journal, entry)
        journal.note([], [ended(entry)])
    assert journal.failure is not None
    disk.room = 10**6
    journal.note([], [ended(99)])
    assert journal.failure is None
    # What was written after the torn record is found in the file, too.
    assert [row[0] for row in read_pending(database).ended][-1] == 99
    assert fold(journal) == [0, 1, 2, 3, 4, 99]
    journal.close()


def test_where_no_room_can_be_reserved_nothing_is_mapped(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(fd: int, at: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", is_full)
    journal = Journal(database)
    journal.open()
    begin(journal, 5)
    assert [path.stat().st_size for path in files(database)] == [
        len(framed([begun(5)], 1))
    ]
    journal.close()


def test_more_than_a_mapped_file_has_room_for_is_written_behind_it(
    database: Path,
) -> None:
    journal = Journal(database, segment_bytes=100)  # nobody prepares the next
    journal.open()
    for entry in range(3000):
        journal.note([], [ended(entry)])
    assert len(files(database)) == 1
    assert len(read_pending(database).ended) == 3000
    journal.close()
    assert len(read_pending(database).ended) == 3000


def test_memory_for_what_cannot_be_written_is_bounded(database: Path) -> None:
    journal = Journal(database, max_rows=3)  # never opened
    for entry in range(10):
        begin(journal, entry)
        journal.note([], [ended(entry)])
    assert (len(journal.rows), journal.lost, journal.running) == (3, 7, 0)


def test_what_has_no_place_in_memory_is_found_in_the_files(database: Path) -> None:
    journal = Journal(database, max_rows=3, segment_bytes=500)
    journal.open()
    for entry in range(50):
        begin(journal, entry)
        journal.note([], [ended(entry)])
        journal.prepare()
    assert (len(journal.rows), journal.lost) == (3, 0)
    assert journal.is_behind and len(files(database)) > 2
    assert sorted(fold(journal)) == list(range(50))
    assert not journal.has_pending and journal.pending_bytes == 0
    for entry in range(50, 53):
        journal.note([], [ended(entry)])
    assert not journal.is_behind
    assert fold(journal) == [50, 51, 52]
    journal.close()


def test_a_journal_that_nobody_folds_grows_no_further_than_it_may(
    database: Path,
) -> None:
    journal = Journal(database, max_pending_bytes=500, max_rows=2)
    journal.open()
    for entry in range(100):
        journal.note([], [ended(entry)])
    assert 500 < journal.pending_bytes < 600
    assert journal.lost == 100 - len(read_pending(database).ended)
    journal.close()


def test_requests_that_began_before_there_was_a_file_are_written_into_it(
    database: Path,
) -> None:
    journal = Journal(database)
    begin(journal, 1)
    journal.open()
    assert read_pending(database).running == 1
    journal.close()


def test_a_folded_journal_leaves_no_file(journal: Journal, database: Path) -> None:
    begin(journal, 1)
    journal.note([], [ended(1)])
    fold(journal)
    journal.close()
    assert files(database) == []


def test_its_files_are_for_this_user_alone(journal: Journal, database: Path) -> None:
    assert [path.stat().st_mode & 0o777 for path in files(database)] == [0o600]


def test_garbage_between_records_is_passed_over() -> None:
    rng = random.Random(3)
    for _ in range(300):
        garbage = rng.randbytes(rng.randrange(80))
        records, _ = unframed(garbage + framed([ended(1)], 9) + garbage, 9)
        assert ended(1) in records
