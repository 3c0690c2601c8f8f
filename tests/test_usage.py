"""Promises of the record of usage, seen from outside: over HTTP and in its file."""

import asyncio
import contextlib
import errno
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import (
    ADMIN,
    DONE,
    FINISH,
    KEYS,
    LAST_CHUNK,
    PATIENCE,
    SSE_HEAD,
    USAGE,
    USER,
    Exchange,
    FakeEngine,
    Gateway,
    behind,
    chunk,
    event,
    eventually,
    running,
)
from inferencia import usagewriter
from inferencia.api.admin.state import requests
from inferencia.limits import Allowances, Refusal
from inferencia.measurement import Measurement
from inferencia.spending import Cost
from inferencia.usage import UsageBook
from inferencia.usagejournal import Journal
from inferencia.usageleftovers import read_pending
from inferencia.usagestore import Store
from inferencia.usagewriter import UsageUnavailable
from scripted import response

YEAR = 365 * 86400.0


@contextlib.asynccontextmanager
async def recording(
    folder: Path, *engines: FakeEngine, config: str | None = None, keys: str = KEYS
) -> AsyncIterator[Gateway]:
    """A gateway that writes usage into ``folder / "usage.sqlite3"``."""
    text = behind(*engines) if config is None else config
    async with running(folder, text, keys=keys) as gateway:
        parts = gateway.parts
        standing = await parts.usage.open(folder / "usage.sqlite3", YEAR)
        if standing is not None:
            now, wall = time.monotonic(), time.time()
            parts.allowances.restore(
                standing.tokens_today, standing.tokens_lately, now, wall
            )
            parts.spending.restore(standing.cost_today)
        try:
            yield gateway
        finally:
            await parts.usage.close()


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a closed database, oldest first."""
    with contextlib.closing(sqlite3.connect(folder / "usage.sqlite3")) as connection:
        connection.row_factory = sqlite3.Row
        found = connection.execute("SELECT * FROM requests ORDER BY entry").fetchall()
        return [dict(one) for one in found]


def done(**members: Any) -> Measurement:
    """A request that is over."""
    m = Measurement(id="req-1", method="POST", path="/v1/chat/completions")
    m.key, m.model, m.status, m.is_work = "alice", "m", 200, True
    for name, value in members.items():
        setattr(m, name, value)
    return m


# --- what becomes of a request ----------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_becomes_one_row(tmp_path: Path, stream: bool) -> None:
    before = time.time()
    async with FakeEngine() as engine:
        async with recording(tmp_path, engine) as gateway:
            async with gateway.chat(stream) as answer:
                body = await answer.read()
                request_id = answer.headers["X-Request-Id"]
    (row,) = rows(tmp_path)
    expected = {
        "id": request_id,
        "key": "alice",
        "model": "m",
        "backend": "b0",
        "endpoint": "/v1/chat/completions",
        "stream": int(stream),
        "status": 200,
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "cached_tokens": None,
        "estimated": 0,
        "outcome": "complete",
        "error": None,
        "bytes_out": len(body),
        "cost": None,
    }
    assert row | expected == row
    assert before <= row["started"] <= row["ended"] <= time.time()
    assert 0 < row["first_byte"] <= row["duration"] < PATIENCE
    assert row["tokens_per_second"] > 0 and row["bytes_in"] > 50


async def test_only_what_was_asked_of_a_model_becomes_a_row(tmp_path: Path) -> None:
    async with FakeEngine() as engine, recording(tmp_path, engine) as gateway:
        for path in ("/v1/models", "/v1/usage", "/health", "/nowhere"):
            async with gateway.get(path):
                pass
        async with gateway.post("/v1/chat/completions", b"{") as answer:
            assert answer.status == 400
        async with gateway.chat(model="nobody-has-it") as answer:
            assert answer.status == 404
    (row,) = rows(tmp_path)
    assert (row["status"], row["model"], row["outcome"]) == (404, None, "error")
    assert row["error"] == "model_not_found"


async def test_a_request_is_noted_before_the_engine_gets_it(tmp_path: Path) -> None:
    async with FakeEngine(behave=hold) as engine:
        async with recording(tmp_path, engine) as gateway:
            asking = asyncio.ensure_future(read(gateway.chat(True)))
            exchange = await engine.next()
            pending = read_pending(tmp_path / "usage.sqlite3")
            assert (pending.running, pending.ended) == (1, [])
            assert gateway.parts.usage.state.running == 1
            await exchange.write(SSE_HEAD + chunk(FINISH + DONE) + LAST_CHUNK)
            await asking
            assert gateway.parts.usage.state.running == 0


@pytest.mark.parametrize(
    "answer",
    [
        SSE_HEAD + chunk(event("hi") + FINISH + USAGE + DONE),
        SSE_HEAD + chunk(event("hi")) + chunk(FINISH + USAGE) + chunk(DONE),
        response(b'{"choices":[],"usage":{"prompt_tokens":7,"total_tokens":9}}'),
    ],
    ids=["stream at once", "stream in pieces", "whole"],
)
async def test_the_end_is_noted_before_the_client_can_know_of_it(
    tmp_path: Path, answer: bytes
) -> None:
    """The engine sends what ends an answer, and then nothing more."""

    async def behave(exchange: Exchange) -> None:
        await exchange.write(answer)
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        async with recording(tmp_path, engine) as gateway:
            stream = answer.startswith(SSE_HEAD)
            async with gateway.chat(stream) as got:
                text = b""
                while not (text.endswith(DONE) or got.content.at_eof()):
                    text += await got.content.readany()
                # The very bytes that end it are here: so it is on the disk.
                assert ended_rows(tmp_path) == 1
            await gateway.parts.usage.ask(lambda connection: None)
            (row,) = stored(tmp_path)
            assert (row["outcome"], row["prompt_tokens"]) == ("complete", 7)
            assert row["bytes_out"] == len(text)


@pytest.mark.skipif(
    os.environ.get("INFERENCIA_TEST_LOOP") == "uvloop",
    reason="looks into a transport of asyncio's own loop",
)
async def test_nothing_is_said_to_anybody_before_it_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every write to a backend or a client, whatever it is and whoever waits."""
    kind: Any = vars(asyncio.selector_events)["_SelectorSocketTransport"]
    write, early, seen = kind.write, list[bytes](), list[int]()

    async def behave(exchange: Exchange) -> None:
        if len(exchange.request.body) % 3:
            await exchange.write(response(b'{"choices":[],"usage":{"total_tokens":9}}'))
        else:
            await exchange.write(SSE_HEAD + chunk(event("hi")))
            await exchange.write(chunk(FINISH + USAGE + DONE) + LAST_CHUNK)

    async with FakeEngine(behave=behave) as engine:
        async with recording(tmp_path, engine) as gateway:
            book = gateway.parts.usage

            def watched(self: Any, data: bytes) -> None:
                here, there = (self.get_extra_info(n) for n in ("sockname", "peername"))
                if here[1] == gateway.port or (there and there[1] == engine.port):
                    seen.append(here[1])
                    if book._beginning or book._ending:
                        early.append(bytes(data)[:60])
                write(self, data)

            monkeypatch.setattr(kind, "write", watched)
            messages = [{"role": "user", "content": "x" * n} for n in range(30)]
            messages += [{"role": "user", "content": "x" * 200_000}] * 3
            asked = [{"model": "m", "messages": [one]} for one in messages]
            asked += [{"model": "no-such", "messages": messages[:1]}]

            async def ask(body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                async with gateway.post("/v1/chat/completions", data) as answer:
                    await answer.read()

            await asyncio.gather(*map(ask, asked))
    assert early == [] and len(seen) > 2 * len(asked)
    assert len(rows(tmp_path)) == len(asked)


def files(folder: Path, part: str) -> list[str]:
    """Names of files with this in them."""
    return [path.name for path in folder.iterdir() if part in path.name]


def ended_rows(folder: Path) -> int:
    """Requests whose end is written down, in the journal or in the database."""
    path = folder / "usage.sqlite3"
    entries = {row[0] for row in read_pending(path).ended}
    return len(entries | {row["entry"] for row in stored(folder)})


def stored(folder: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(sqlite3.OperationalError):
        return rows(folder)
    return []


async def hold(exchange: Exchange) -> None:
    """Answer nothing until the test or the gateway ends it."""
    await exchange.gone.wait()


async def read(asking: Any) -> bytes:
    async with asking as answer:
        body: bytes = await answer.read()
        return body


async def test_a_client_that_leaves_is_a_cut_with_what_was_used(tmp_path: Path) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("one") + event("two")))
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        async with recording(tmp_path, engine) as gateway:
            async with gateway.chat(True) as answer:
                await answer.content.readany()
                answer.close()
            await eventually(
                lambda: not gateway.parts.usage.state.running, "it was noticed"
            )
    (row,) = rows(tmp_path)
    assert (row["outcome"], row["status"], row["estimated"]) == ("cut", 499, 1)
    assert row["completion_tokens"] == 2
    assert row["prompt_tokens"] == 2  # "hello" has five bytes


async def test_who_leaves_an_answer_in_one_piece_pays_for_what_was_made_of_it(
    tmp_path: Path,
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("one") + event("two")))
        await exchange.gone.wait()

    async with FakeEngine(behave=behave) as engine:
        config = behind(engine, type="llamacpp")
        async with recording(tmp_path, config=config) as gateway:
            asking = asyncio.ensure_future(read(gateway.chat()))
            await engine.next()
            (context,) = gateway.parts.doors.active
            m = context.measurement
            await eventually(lambda: m.completion_so_far == 2, "two tokens have come")
            (told,) = requests([context])
            assert (told["state"], told["completion_tokens"]) == ("answering", 2)
            asking.cancel()
            await eventually(
                lambda: not gateway.parts.usage.state.running, "it was noticed"
            )
    (row,) = rows(tmp_path)
    assert (row["outcome"], row["status"], row["estimated"]) == ("cut", 499, 1)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (2, 2)


async def test_a_request_in_goinfers_words_tells_its_size(tmp_path: Path) -> None:
    async with FakeEngine() as engine, recording(tmp_path, engine) as gateway:
        body = b'{"prompt": "hello", "model": "m"}'
        async with gateway.post("/infer", body) as answer:
            await answer.read()
    (row,) = rows(tmp_path)
    assert (row["endpoint"], row["bytes_in"]) == ("/infer", len(body))


async def test_an_answer_that_breaks_is_cut_and_an_error_is_an_error(
    tmp_path: Path,
) -> None:
    async def breaks(exchange: Exchange) -> None:
        await exchange.write(SSE_HEAD + chunk(event("one")))
        exchange.cut()

    async def refuses(exchange: Exchange) -> None:
        await exchange.answer({"error": {"message": "no", "code": "bad"}}, status=400)

    async with FakeEngine(behave=breaks) as engine:
        async with recording(tmp_path, engine) as gateway:
            await read(gateway.chat(True))
            engine.behave = refuses
            await read(gateway.chat(True))
            await engine.stop()
            await read(gateway.chat(True))
    found = [(row["outcome"], row["status"], row["error"]) for row in rows(tmp_path)]
    assert found == [
        ("cut", 200, "backend_error"),
        ("error", 400, "bad"),
        ("error", 503, "backend_unavailable"),
    ]


@pytest.mark.parametrize(
    ("path", "ask", "answer", "tokens"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x" * 40}]},
            {"choices": [{"message": {"role": "assistant", "content": "y" * 80}}]},
            (10, 20),
        ),
        ("/v1/embeddings", {"input": ["x" * 8, "y" * 8]}, {"data": []}, (4, 0)),
        (
            "/v1/responses",
            {"instructions": "x" * 4, "input": "y" * 4},
            {"output": [{"content": [{"type": "output_text", "text": "ü" * 6}]}]},
            (2, 3),
        ),
        ("/v1/images/generations", {"prompt": "x" * 40}, {"data": []}, (None, None)),
        ("/tokenize", {"content": "x" * 40}, {"tokens": [1]}, (None, None)),
    ],
)
async def test_what_the_engine_does_not_count_is_estimated_and_marked(
    tmp_path: Path,
    path: str,
    ask: dict[str, Any],
    answer: dict[str, Any],
    tokens: tuple[int | None, int | None],
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.answer(answer)

    async with FakeEngine(behave=behave) as engine:
        async with recording(tmp_path, engine) as gateway:
            assert json.loads(await read(gateway.post(path, {"model": "m"} | ask)))
    (row,) = rows(tmp_path)
    assert (row["prompt_tokens"], row["completion_tokens"]) == tokens
    assert row["estimated"] == (tokens[0] is not None)


async def test_timings_and_caches_are_counted(tmp_path: Path) -> None:
    timings = {"prompt_n": 3, "cache_n": 4, "predicted_n": 5}

    async def behave(exchange: Exchange) -> None:
        await exchange.answer({"content": "hi", "timings": timings})

    async with FakeEngine(behave=behave) as engine:
        async with recording(tmp_path, engine) as gateway:
            await read(gateway.post("/completion", {"model": "m", "prompt": "x"}))
    (row,) = rows(tmp_path)
    counted = (row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"])
    assert (*counted, row["estimated"]) == (7, 5, 4, 0)


async def test_a_price_makes_a_cost(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        config = behind(engine, prices={"*": {"prompt": 1.0, "completion": 10.0}})
        async with recording(tmp_path, config=config) as gateway:
            await read(gateway.chat())
    (row,) = rows(tmp_path)
    assert row["cost"] == pytest.approx(27e-6)
    assert row["billed"] == 0  # on this machine it is saved


# --- who asks ----------------------------------------------------------------------


async def test_a_key_is_told_what_it_used_and_nothing_of_others(tmp_path: Path) -> None:
    async with FakeEngine() as engine, recording(tmp_path, engine) as gateway:
        await read(gateway.chat())
        await read(gateway.chat(True))
        await read(gateway.post("/v1/chat/completions", CHAT_OF_ROOT, key=ADMIN))
        usage = json.loads(await read(gateway.get("/v1/usage")))
    assert usage["object"] == "usage" and usage["key"] == "alice"
    assert (usage["requests"], usage["total_tokens"]) == (2, 18)
    assert usage["today"]["requests"] == 2
    assert [(m["model"], m["total_tokens"]) for m in usage["models"]] == [("m", 18)]
    assert [day["requests"] for day in usage["days"]] == [2]
    assert usage["since"].startswith(usage["days"][0]["day"])


async def test_what_all_have_used_is_known_at_once_with_a_database_too(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, recording(tmp_path, engine) as gateway:
        await read(gateway.chat())
        await read(gateway.chat(True))
        assert gateway.parts.usage.totals == (2, 14, 4)


CHAT_OF_ROOT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


async def test_without_a_database_the_totals_are_those_since_the_start(
    tmp_path: Path,
) -> None:
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        await read(gateway.chat())
        usage = json.loads(await read(gateway.get("/v1/usage")))
        assert (usage["requests"], usage["total_tokens"]) == (1, 9)
        assert not gateway.parts.usage.state.is_on
        with pytest.raises(UsageUnavailable, match="off"):
            await gateway.parts.usage.ask(lambda connection: None)


async def test_metrics_tell_how_the_record_is_doing(tmp_path: Path) -> None:
    async with FakeEngine() as engine, recording(tmp_path, engine) as gateway:
        await read(gateway.chat())
        await read(gateway.get("/v1/usage"))  # which waits until it is written
        page = (await read(gateway.get("/metrics", key=ADMIN))).decode()
    for line in (
        "inferencia_usage_rows_total 1",
        "inferencia_usage_pending_bytes 0",
        "inferencia_usage_lost_total 0",
        "inferencia_usage_degraded 0",
    ):
        assert f"\n{line}\n" in page


# --- limits --------------------------------------------------------------------------


async def test_daily_and_minute_limits_survive_a_restart(tmp_path: Path) -> None:
    keys = f"{USER} name=alice daily_tokens=10\n{ADMIN} name=bob tpm=9\n"
    async with FakeEngine() as engine:
        for allowed in (200, 200, 429):  # nine tokens each; the second goes beyond ten
            async with recording(tmp_path, engine, keys=keys) as gateway:
                async with gateway.chat() as answer:
                    assert answer.status == allowed
                    if allowed == 429:
                        error = (await answer.json())["error"]
                        assert error["code"] == "insufficient_quota"
        for allowed in (200, 429):
            async with recording(tmp_path, engine, keys=keys) as gateway:
                async with gateway.post(
                    "/v1/chat/completions", CHAT_OF_ROOT, key=ADMIN
                ) as answer:
                    assert answer.status == allowed


async def test_what_was_spent_today_survives_a_restart(tmp_path: Path) -> None:
    async with FakeEngine() as engine:
        prices = {"*": {"prompt": 1e6, "completion": 0}}
        config = behind(engine, prices=prices, daily_spend=6.5)
        for allowed in (200, 503):
            async with recording(tmp_path, config=config) as gateway:
                async with gateway.chat() as answer:
                    assert answer.status == allowed, await answer.text()


class AliceKey:
    """A key with a budget for each minute and each day."""

    name, rps, burst, concurrency = "alice", None, None, None
    tpm, daily_tokens = 60, 1000


def test_a_debt_is_repaid_by_the_time_that_passed_meanwhile() -> None:
    allowances = Allowances(100, 100)
    allowances.restore({"alice": 300}, {"alice": [(120.0, 200), (60.0, 10)]}, 0, 1e9)
    # 60 - 200 tokens two minutes ago, 60 more a minute ago, -10, and 60 until now.
    refusal = allowances.take(AliceKey(), 0, 1e9)
    assert isinstance(refusal, Refusal) and refusal.kind == "tokens"
    assert refusal.retry_after == pytest.approx(31)
    assert not isinstance(allowances.take(AliceKey(), 32, 1e9), Refusal)


def test_tokens_of_today_count_once_whoever_comes_first() -> None:
    for is_open in (False, True):
        allowances = Allowances(100, 100)
        if is_open:
            assert not isinstance(allowances.take(AliceKey(), 0, 1e9), Refusal)
        allowances.restore({"alice": 1000}, {}, 0, 1e9)
        refusal = allowances.take(AliceKey(), 0, 1e9)
        assert isinstance(refusal, Refusal) and refusal.kind == "daily_tokens"
        assert not isinstance(allowances.take(AliceKey(), 0, 1e9 + 86400), Refusal)


# --- faults of the database --------------------------------------------------------


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again after milliseconds."""
    monkeypatch.setattr(usagewriter, "_FIRST_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(usagewriter, "_LAST_RETRY_SECONDS", 0.04)
    monkeypatch.setattr(usagewriter, "_GATHER_SECONDS", 0.02)


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[UsageBook]:
    book = UsageBook(lambda m: Cost(5 * 10**12, True))
    await book.open(path, YEAR)
    try:
        yield book
    finally:
        await book.close()


def note(book: UsageBook, count: int = 1) -> None:
    for _ in range(count):
        m = done()
        book.begin(m)
        book.end(m)
        book.record(m)  # which is once too often


async def test_a_locked_database_delays_rows_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferencia.usagestore._BUSY_SECONDS", 0.01)
    path = tmp_path / "usage.sqlite3"
    async with opened(path) as book:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        note(book, 30)
        await eventually(lambda: book.state.degraded is not None, "it is degraded")
        assert "locked" in str(book.state.degraded)
        assert book.state.pending_bytes > 0
        other.execute("ROLLBACK")
        other.close()
        await eventually(lambda: book.state.rows == 30, "rows are written")
        await eventually(lambda: book.state.degraded is None, "it has recovered")
    assert len(rows(tmp_path)) == 30


async def test_an_idle_gateway_notices_that_its_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that fail on a full disk are replaced."""

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    no_room = os.statvfs_result((4096, 4096, 10, 0, 0, 10, 0, 0, 0, 255))
    for name in ("posix_fallocate", "pwrite"):
        monkeypatch.setattr(os, name, full)
    monkeypatch.setattr(os, "statvfs", lambda path: no_room)
    async with opened(tmp_path / "usage.sqlite3") as book:
        note(book, 2)
        await eventually(lambda: book.state.degraded is not None, "it is degraded")
        await eventually(lambda: book.state.rows == 2, "the database has room")
        assert "No space left" in str(book.state.degraded)
        monkeypatch.undo()
        await eventually(lambda: book.state.degraded is None, "it has recovered")


@pytest.mark.parametrize("while_running", [False, True])
async def test_a_corrupt_database_is_kept_and_a_new_one_begun(
    tmp_path: Path, while_running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "usage.sqlite3"
    if not while_running:
        path.write_bytes(b"no database at all, for all of its length" * 99)
    async with opened(path) as book:
        if while_running:
            note(book, 5)
            await eventually(lambda: book.state.rows == 5, "rows are written")
            other = sqlite3.connect(path)
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            other.close()
            path.write_bytes(b"spoilt" * 10000)
        note(book, 3)
        await eventually(lambda: bool(files(tmp_path, ".corrupt")), "it is kept")
        await eventually(
            lambda: len(stored(tmp_path)) == 3, "the rows are in a new one"
        )
    assert "was corrupt" in caplog.text


async def test_a_database_that_is_removed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    async with opened(path) as book:
        note(book)
        await eventually(lambda: book.state.rows == 1, "it is written")
        for ending in ("", "-wal", "-shm"):
            path.with_name(path.name + ending).unlink()
        note(book, 2)
        await eventually(lambda: book.state.rows == 3, "they are written")
        note(book)
        # Nor would a kill bring back what was in the old one.
        await eventually(lambda: len(read_pending(path).ended) == 1, "it begins anew")
    assert len(rows(tmp_path)) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_folder_that_cannot_be_written_fails_no_request(tmp_path: Path) -> None:
    folder = tmp_path / "sealed"
    folder.mkdir(mode=0o500)
    async with opened(folder / "usage.sqlite3") as book:
        note(book, 3)
        assert book.state.degraded is not None
        folder.chmod(0o700)
        await eventually(lambda: book.state.rows == 3, "rows are written")


async def test_a_place_where_no_file_can_be_fails_no_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    async with opened(tmp_path / "file" / "usage.sqlite3") as book:
        note(book, 3)
        state = book.state
        assert state.degraded is not None and "file" in state.degraded
        assert book.state.lost == 0
        (tmp_path / "file").unlink()
        await eventually(lambda: book.state.rows == 3, "rows are written")


async def test_a_database_that_cannot_be_asked_still_answers_the_key(
    tmp_path: Path,
) -> None:
    (tmp_path / "usage.sqlite3").mkdir()
    async with FakeEngine() as engine, recording(tmp_path, engine) as gateway:
        await read(gateway.chat())
        usage = json.loads(await read(gateway.get("/v1/usage")))
        assert usage["requests"] == 1
        page = (await read(gateway.get("/metrics", key=ADMIN))).decode()
        assert "\ninferencia_usage_degraded 1\n" in page


async def test_trouble_is_told_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "usage.sqlite3").mkdir()
    async with opened(tmp_path / "usage.sqlite3") as book:
        note(book, 50)
        await asyncio.sleep(0.3)  # a few tries
    assert caplog.text.count("cannot be written down now") == 1


async def test_old_rows_are_removed_in_the_course_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usagewriter, "_FIRST_CLEANING_SECONDS", 0.0)
    path = tmp_path / "usage.sqlite3"
    clock = [time.time() - 2 * YEAR]
    book = UsageBook(wall_clock=lambda: clock[0])
    await book.open(path, YEAR)
    note(book, 3000)
    await book.close()
    book = UsageBook()
    await book.open(path, YEAR)
    note(book)
    await eventually(lambda: len(stored(tmp_path)) == 1, "the old ones are gone")
    await book.close()


async def test_what_was_removed_for_its_age_stays_in_no_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FIRST_CLEANING_SECONDS", "_CLEANING_SECONDS"):
        monkeypatch.setattr(usagewriter, name, 0.0)
    path = tmp_path / "usage.sqlite3"
    clock = [time.time() - 2 * YEAR]
    book = UsageBook(wall_clock=lambda: clock[0])
    await book.open(path, YEAR)
    note(book, 3)
    await eventually(lambda: book.state.rows == 3, "they are written")
    assert len(read_pending(path).ended) == 3
    clock[0] = time.time()

    def is_gone() -> bool:
        note(book)
        return all(row[2] > clock[0] - YEAR for row in read_pending(path).ended)

    await eventually(is_gone, "it is in no file")
    await book.close()


async def test_two_daemons_may_share_a_database(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    async with opened(path) as one, opened(path) as other:
        for _ in range(20):
            note(one, 5)
            note(other, 5)
            await asyncio.sleep(0)
        open_request = done()
        one.begin(open_request)
        async with opened(path) as third:  # takes nothing from those that live
            note(third)
        one.end(open_request)
    found = rows(tmp_path)
    assert len(found) == 202 == len({row["entry"] for row in found})
    assert {row["outcome"] for row in found} == {"complete"}
    assert not files(tmp_path, ".pending")


async def test_a_book_that_is_closed_while_requests_run_leaves_them_to_the_next(
    tmp_path: Path,
) -> None:
    path = tmp_path / "usage.sqlite3"
    async with opened(path) as book:
        book.begin(done(), "b0")
        note(book)
    async with opened(path):
        pass
    outcomes = [(row["outcome"], row["backend"]) for row in rows(tmp_path)]
    assert outcomes == [("interrupted", "b0"), ("complete", None)]


def test_a_thread_that_cannot_write_sleeps_until_its_next_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if meanwhile the time has come to remove old rows."""
    path = tmp_path / "usage.sqlite3"
    writer = usagewriter.Writer(path, Journal(path), keep_seconds=1.0)
    writer.degraded = "the disk is full"
    now = time.monotonic()
    monkeypatch.setattr(writer, "_next_cleaning", now - 60.0)
    monkeypatch.setattr(writer, "_next_try", now + 20.0)
    asked: list[float] = []

    class Sleep:
        def clear(self) -> None:
            pass

        def wait(self, seconds: float) -> None:
            asked.append(seconds)

    monkeypatch.setattr(writer, "_wake", Sleep())
    writer._wait()
    assert 10 < sum(asked) <= 20


async def test_a_stranger_among_the_files_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite3"
    theirs = sqlite3.connect(path)
    theirs.execute("CREATE TABLE mine (x)")
    theirs.commit()
    theirs.close()
    async with opened(path) as book:
        note(book)
        assert "another program" in str(book.state.degraded)
    assert not files(tmp_path, ".corrupt")


async def test_questions_are_answered_with_what_has_just_ended(tmp_path: Path) -> None:
    async with opened(tmp_path / "usage.sqlite3") as book:
        for count in (1, 2, 3):
            note(book)
            usage = await book.of("alice")
            assert usage["requests"] == count
            assert usage["spent"] == 5.0 * count


async def test_a_question_that_fails_ends_nothing_else(tmp_path: Path) -> None:
    async with opened(tmp_path / "usage.sqlite3") as book:
        with pytest.raises(ZeroDivisionError):
            await book.ask(lambda connection: 1 / 0)
        with pytest.raises(UsageUnavailable, match="no such table"):
            await book.ask(lambda connection: connection.execute("SELECT * FROM no"))
        note(book)
        assert (await book.of("alice"))["requests"] == 1


def test_a_store_is_opened_by_one_version_at_a_time(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "u") for _ in range(3)]
    for store in stores:
        store.close()
        store.close()
