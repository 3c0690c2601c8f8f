"""Promises of the log: one harmless line per event, and no secret in it."""

import asyncio
import contextlib
import errno
import io
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from inferencia import loglines, logs
from inferencia.loglines import MAX_FIELD, MAX_MESSAGE, Format, redact
from inferencia.logs import (
    MAX_TEXTS,
    REPEATS,
    WINDOW_SECONDS,
    Output,
    Repeats,
)
from inferencia.measurement import Measurement
from inferencia.members import Members

log = logging.getLogger("inferencia.tests")

HOSTILE = 'a\r\nb\x1b[31mc\x00d\u2028e\x85f\ud800g"h\\i=j k\u202e\x7f'


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The log's state is the process's; give it back as it was."""
    level = logging.root.level
    yield
    logs.close()
    loglines._secrets.clear()
    logging.root.setLevel(level)
    for library in ("asyncio", "aiohttp"):
        logging.getLogger(library).setLevel(logging.NOTSET)


class Log:
    """A log in memory, and its lines."""

    def __init__(self, form: Format = "json", level: str = "info") -> None:
        self.stream = io.StringIO()
        self.output = logs.setup(level, form, self.stream)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    @property
    def lines(self) -> list[str]:
        assert not self.text or self.text.endswith("\n")
        return self.text.split("\n")[:-1]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


def measured(**known: object) -> Measurement:
    m = Measurement(id="req-1", method="POST", client="192.0.2.7", started=100.0)
    m.path, m.key, m.model, m.backend = "/v1/chat/completions", "alice", "qwen3", "mlx"
    m.status, m.stream, m.first_byte = 200, True, 100.25
    m.prompt_tokens, m.completion_tokens = 12, 30
    m.bytes_in, m.bytes_out = 1000, 2000
    for name, value in known.items():
        setattr(m, name, value)
    m.finish(101.75)
    return m


# --- the shape of a line ------------------------------------------------------


def test_a_json_line_has_time_level_message_logger_and_extra_fields() -> None:
    written = Log()
    log.warning("backend %s is down", "mlx", extra={"backend": "mlx", "failures": 3})
    (record,) = written.records
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record.pop("time"))
    assert record == {
        "level": "WARN",
        "msg": "backend mlx is down",
        "logger": "inferencia.tests",
        "backend": "mlx",
        "failures": 3,
    }


def test_a_text_line_has_the_same_in_words() -> None:
    written = Log("text")
    log.info("ready", extra={"url": "http://x:1/v1", "note": "two words", "n": None})
    assert re.fullmatch(
        r"\S+Z INFO ready logger=inferencia\.tests url=http://x:1/v1 "
        r'note="two words" n=null',
        written.lines[0],
    )


def test_time_is_utc_with_milliseconds() -> None:
    stream = io.StringIO()
    moments = iter([0.0, 1795314397.1239, 1795314397.9999, 1795314398.0])
    output = Output(stream, "text", wall_clock=lambda: next(moments))
    for _ in range(4):
        output.write_request(logging.INFO, measured())
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == [
        "1970-01-01T00:00:00.000Z",
        "2026-11-22T02:26:37.123Z",
        "2026-11-22T02:26:37.999Z",
        "2026-11-22T02:26:38.000Z",
    ]


def test_the_level_decides_what_is_written() -> None:
    written = Log(level="warning")
    log.info("no")
    log.warning("yes")
    logs.request_line(measured())
    logs.request_line(measured(status=404))
    assert [record["msg"] for record in written.records] == ["yes", "request"]
    written = Log(level="DEBUG")
    log.debug("this too")
    assert written.records[0]["level"] == "DEBUG"


def test_debug_lines_of_libraries_which_show_what_peers_sent_are_left_out() -> None:
    written = Log(level="debug")
    logging.getLogger("asyncio").debug("no")
    logging.getLogger("aiohttp.server").debug("no")
    logging.getLogger("aiohttp.server").error("yes")
    assert [record["msg"] for record in written.records] == ["yes"]


# --- the line of a request ----------------------------------------------------


def test_a_request_is_one_line_with_all_that_was_measured() -> None:
    written = Log()
    logs.request_line(measured())
    (record,) = written.records
    del record["time"]
    assert record == {
        "level": "INFO",
        "msg": "request",
        "logger": "inferencia.request",
        "id": "req-1",
        "key": "alice",
        "model": "qwen3",
        "backend": "mlx",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "ttfb_ms": 250.0,
        "duration_ms": 1750.0,
        "prompt_tokens": 12,
        "completion_tokens": 30,
        "tokens_per_second": 20.0,
        "bytes_in": 1000,
        "bytes_out": 2000,
        "stream": True,
        "client": "192.0.2.7",
    }


def test_a_request_as_text() -> None:
    written = Log("text")
    logs.request_line(measured(key="two words", error_code="backend_timeout"))
    _, rest = written.lines[0].split(" ", 1)
    assert rest.startswith(
        'ERROR request id=req-1 key="two words" model=qwen3 backend=mlx method=POST '
        "path=/v1/chat/completions status=200 error=backend_timeout ttfb_ms=250.0 "
    )


@pytest.mark.parametrize(
    ("status", "error", "level"),
    [
        (200, None, "INFO"),
        (200, "backend_timeout", "ERROR"),
        (401, "invalid_api_key", "WARN"),
        (499, None, "INFO"),
        (503, "backend_unavailable", "ERROR"),
    ],
)
def test_a_requests_level_follows_its_outcome(
    status: int, error: str | None, level: str
) -> None:
    written = Log()
    logs.request_line(measured(status=status, error_code=error))
    assert written.records[0]["level"] == level
    assert written.records[0].get("error") == error


@pytest.mark.parametrize(("level", "count"), [("info", 1), ("debug", 2)])
def test_a_minor_request_is_for_debugging_unless_it_was_refused(
    level: str, count: int
) -> None:
    written = Log(level=level)
    for status in (200, 404):
        logs.request_line(measured(status=status, is_minor=True))
    assert len(written.records) == count
    assert written.records[-1]["level"] == "WARN"


def test_without_setup_a_request_goes_to_whatever_logging_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        logs.request_line(measured())
    assert vars(caplog.records[0])["model"] == "qwen3"


def test_request_lines_are_never_held_back() -> None:
    written = Log()
    for _ in range(100):
        logs.request_line(measured())
    assert len(written.lines) == 100


# --- nothing that was sent can break or forge a line --------------------------


@pytest.mark.parametrize("form", ["json", "text"])
def test_hostile_text_stays_within_its_line(form: Format) -> None:
    written = Log(form)
    log.info("message %s", HOSTILE, extra={"field": HOSTILE, "odd": [HOSTILE]})
    logs.request_line(measured(id=HOSTILE, key=HOSTILE, model=HOSTILE, client=HOSTILE))
    assert len(written.lines) == 2
    for line in written.lines:
        assert all(" " <= sign <= "~" for sign in line)
    if form == "json":
        assert written.records[0]["field"] == HOSTILE
        assert written.records[1]["model"] == HOSTILE


def test_long_texts_are_cut() -> None:
    written = Log()
    log.info("m" * 100_000, extra={"field": "f" * 100_000, "odd": ["o" * 1000]})
    logs.request_line(measured(model="q" * 5000))
    logs.request_line(measured(id="i" * (MAX_FIELD + 1), key=None, model=None))
    first, second, third = written.records
    assert third["id"] == "i" * (MAX_FIELD - 3) + "..."
    assert first["msg"] == "m" * (MAX_MESSAGE - 3) + "..."
    assert first["field"] == "f" * (MAX_FIELD - 3) + "..."
    assert len(first["odd"]) == MAX_FIELD
    assert second["model"] == "q" * (MAX_FIELD - 3) + "..."


# --- secrets ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    "text",
    [
        "key sk-CANARY-1 refused",
        "{'Authorization': 'Bearer CANARY.x/y+z=='}",
        "authorization: bearer   CANARY",
        "Basic Q0FOQVJZCANARY==",
        "x-api-key: CANARY",
        "(b'X-Api-Key', b'CANARY')",
        '{"x-api-key":"CANARY"}',
        "http://user:CANARY@host/v1",
        "?api_key=sk-CANARY&x=1",
        "registered-CANARY",
        'quoted"registered-CANARY',
    ],
)
def test_what_looks_like_a_key_is_starred(form: Format, text: str) -> None:
    written = Log(form)
    redact("registered-CANARY")
    redact('quoted"registered-CANARY')
    log.info(text)
    log.info("%s", text, extra={"field": text})
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("failed")
    logs.request_line(measured(id=text, key=text, client=text))
    assert len(written.lines) == 4
    assert "CANARY" not in written.text
    assert "***" in written.text


@pytest.mark.parametrize(
    "text",
    [
        "sha256:" + "0123456789abcdef" * 4,
        "task-force, risk-free, desk-top",
        "alice@example.org",
        "sk-",
        "ollama at http://localhost:11434",
        "the key alice-laptop",
    ],
)
def test_what_only_resembles_a_key_stays(text: str) -> None:
    written = Log()
    redact("ollama")  # too short to be a secret
    log.info("%s", text)
    assert written.records[0]["msg"] == text


def test_a_key_at_the_place_of_the_cut_does_not_show() -> None:
    written = Log()
    for lead in range(MAX_FIELD - 20, MAX_FIELD + 1):
        log.info("x", extra={"field": "f" * lead + " sk-CANARYCANARY"})
    assert "CAN" not in written.text


# --- exceptions ---------------------------------------------------------------


def fail_in_our_code() -> None:
    """Raise from within the package, with a foreign exception as its cause."""
    try:
        raise KeyError("prompt-of-a-user")
    except KeyError:
        Members.parse(b"{").get("x")


def test_an_own_fault_is_told_by_type_message_and_our_places_only() -> None:
    written = Log()
    try:
        fail_in_our_code()
    except Exception:
        log.exception("request %s failed", "req-1")
    (record,) = written.records
    assert record["level"] == "ERROR"
    assert record["error"].startswith("InvalidJson: the body is not valid JSON")
    assert re.fullmatch(r"members\.py:\d+( < members\.py:\d+)*", record["at"]), (
        "innermost first, none outside the package"
    )
    assert "prompt-of-a-user" not in written.text
    assert "Traceback" not in written.text


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, RuntimeError])
def test_a_foreign_exception_is_told_by_its_type_for_its_message_may_quote(
    kind: type[Exception],
) -> None:
    written = Log()
    for error in (kind("prompt-of-a-user"), ExceptionGroup("g", [kind("prompt")])):
        try:
            raise error
        except Exception:
            log.exception("request %s failed", "req-1")
    assert [record["error"] for record in written.records] == [kind.__name__] * 2
    assert "prompt" not in written.text


def test_a_warning_with_an_exception_has_no_places() -> None:
    written = Log()
    try:
        fail_in_our_code()
    except Exception:
        log.warning("probe failed", exc_info=True)
    assert "error" in written.records[0]
    assert "at" not in written.records[0]


def test_a_group_of_exceptions_is_told_by_its_first_member() -> None:
    written = Log()
    try:
        raise ExceptionGroup("g", [ExceptionGroup("h", [OSError(28, "full")])])
    except ExceptionGroup:
        log.exception("failed")
    assert written.records[0]["error"] == "OSError: [Errno 28] full"


# --- it never raises ----------------------------------------------------------


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def record_of(message: object, *args: object) -> logging.LogRecord:
    return log.makeRecord("x", logging.INFO, "", 0, message, args, None)


def test_bad_arguments_lose_no_line() -> None:
    stream = io.StringIO()
    output = Output(stream, "json")
    output.emit(record_of("%d pieces", "many"))
    output.emit(record_of("%s", Unprintable()))
    record = record_of("x")
    record.field = Unprintable()
    output.emit(record)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["msg"] for line in lines] == ["%d pieces", "%s", "x"]
    assert lines[2]["field"] == "Unprintable"
    output.emit(record_of(Unprintable()))
    assert output.dropped == 1


class Full(io.StringIO):
    """A stream whose disk is full, or whose reader is gone."""

    error: Exception | None = None

    def flush(self) -> None:
        if self.error is not None:
            raise self.error
        super().flush()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no space left"),
        BrokenPipeError(errno.EPIPE, "gone"),
        ValueError("I/O operation on closed file"),
        RuntimeError("anything else"),
    ],
)
def test_a_failing_stream_never_raises_and_drops_are_counted(error: Exception) -> None:
    stream = Full()
    logs.setup("info", "json", stream)
    stream.error = error
    log.error("one")
    logs.request_line(measured())
    assert logs.dropped() == 2
    stream.error = None
    log.error("two")
    assert logs.dropped() == 2
    assert '"two"' in stream.getvalue()


async def test_requests_that_end_in_one_turn_are_written_together() -> None:
    written = Log()
    for number in range(3):
        logs.request_line(measured(id=f"req-{number}"))
    assert not written.lines
    await asyncio.sleep(0)
    assert [record["id"] for record in written.records] == ["req-0", "req-1", "req-2"]


async def test_lines_keep_their_order() -> None:
    written = Log()
    logs.request_line(measured())
    log.info("between")
    logs.request_line(measured())
    logs.close()
    messages = [record["msg"] for record in written.records]
    assert messages == ["request", "between", "request"]


async def test_each_line_of_a_turn_that_cannot_be_written_is_counted() -> None:
    stream = Full()
    logs.setup("info", "json", stream)
    stream.error = OSError(errno.ENOSPC, "no space left")
    for _ in range(3):
        logs.request_line(measured())
    await asyncio.sleep(0)
    assert logs.dropped() == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_disk_that_is_really_full_does_not_matter() -> None:
    stream = open("/dev/full", "w")
    try:
        logs.setup("info", "text", stream)
        for _ in range(3):
            logs.request_line(measured())
        assert logs.dropped() == 3
    finally:
        logs.close()
        with contextlib.suppress(OSError):
            stream.close()


def test_before_setup_nothing_was_dropped() -> None:
    assert logs.dropped() == 0


def test_setup_again_replaces_the_stream() -> None:
    first = Log()
    second = Log()
    log.info("once")
    assert not first.lines
    assert len(second.lines) == 1
    logs.close()
    logs.close()
    log.info("nowhere")
    assert len(second.lines) == 1


# --- repetition ---------------------------------------------------------------


def test_equal_messages_are_written_ten_times_a_minute_and_then_counted() -> None:
    now = 1000.0
    stream = io.StringIO()
    output = Output(stream, "json", clock=lambda: now)
    record = log.makeRecord("asyncio", logging.ERROR, "", 0, "no %s", ("fd",), None)
    other = log.makeRecord("other", logging.INFO, "", 0, "something", (), None)

    def written() -> list[tuple[str, int | None]]:
        lines = [json.loads(line) for line in stream.getvalue().splitlines()]
        stream.seek(0)
        stream.truncate()
        return [(line["msg"], line.get("repeated")) for line in lines]

    for _ in range(2000):
        now += 0.001
        output.emit(record)
    assert written() == [("no fd", None)] * REPEATS
    output.emit(other)
    assert written() == [("something", None)]
    now += WINDOW_SECONDS
    output.write_request(logging.INFO, measured())
    assert written() == [("no fd", 2000 - REPEATS), ("request", None)]
    output.emit(record)
    output.emit(other)
    assert written() == [("no fd", None), ("something", None)]


def test_what_was_held_back_is_told_at_the_end() -> None:
    written = Log()
    for _ in range(REPEATS + 5):
        log.warning("again\nwith details that vary")
    logs.close()
    last = written.records[-1]
    assert (last["msg"], last["level"], last["repeated"]) == ("again", "WARN", 5)


def test_different_messages_are_not_repetitions() -> None:
    written = Log()
    for number in range(50):
        log.info("backend %d is up", number)
    assert len(written.lines) == 50


def test_remembered_messages_are_bounded() -> None:
    repeats = Repeats()
    for number in range(5 * MAX_TEXTS):
        assert repeats.admit(("l", 20, f"m{number}"), 0.0)
    assert len(repeats._seen) == MAX_TEXTS
    assert repeats.expired(WINDOW_SECONDS) == []
    assert not repeats._seen


async def test_running_out_of_file_descriptors_does_not_flood_the_log() -> None:
    written = Log()
    loop = asyncio.get_running_loop()
    error = OSError(errno.EMFILE, "Too many open files")
    with socket.socket() as listening:
        for _ in range(500):
            # What asyncio's accept loop does when accept() fails with EMFILE.
            loop.call_exception_handler(
                {
                    "message": "socket.accept() out of system resource",
                    "exception": error,
                    "socket": listening,
                }
            )
    assert len(written.lines) == REPEATS
    assert written.records[0]["error"] == "OSError: [Errno 24] Too many open files"


def test_a_real_pipe_that_closes_does_not_matter() -> None:
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    logs.setup("info", "json", stream)
    log.info("heard")
    assert b'"heard"' in os.read(reading, 1000)
    os.close(reading)
    log.info("unheard")
    assert logs.dropped() == 1
    logs.close()
    with contextlib.suppress(BrokenPipeError):
        stream.close()
