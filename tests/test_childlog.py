"""Promises of ``models/childlog.py``: bounded, harmless, followed without waiting."""

import asyncio
import random

import pytest

from inferencia.models.childlog import (
    ERROR_LINES,
    MAX_BEHIND,
    MAX_ERROR,
    MAX_LINE,
    ChildLog,
    Follower,
    Log,
    Logs,
    harmless,
)

# What llama-server 0.1.0-dev (7e4c0a9) printed for a file that is not there, cut.
LLAMA_MISSING = b"""\
0.00.003.054 I cmn  common_param: common_params_print_info: verbosity = 3
0.00.004.958 I srv    load_model: loading model '/nonexistent.gguf'
0.00.005.244 E gguf_init_from_file: failed to open GGUF file '/nonexistent.gguf' \
(No such file or directory)
0.00.005.273 E llama_model_load: error loading model: llama_model_loader: failed to \
load model from /nonexistent.gguf
0.00.005.297 E llama_model_load_from_file_impl: failed to load model
0.00.005.347 E srv    load_model: failed to load model, '/nonexistent.gguf'
0.00.005.372 I srv    operator(): operator(): cleaning up before exit...
0.00.005.758 E srv  llama_server: exiting due to model loading error
"""
# And for one that is cut off: nothing that the owner could mend is named.
LLAMA_CUT = b"""\
0.00.063.331 E gguf_init_from_reader: failed to read key-value pairs
0.00.063.391 E llama_model_load: error loading model: llama_model_loader: failed to \
load model from /tmp/cut.gguf
0.00.063.410 E srv    load_model: failed to load model, '/tmp/cut.gguf'
0.00.063.412 I srv    operator(): operator(): cleaning up before exit...
"""
LLAMA_PORT = b"""\
0.00.003.071 E srv         start: couldn't bind HTTP server socket, hostname: \
127.0.0.1, port: 28998
0.00.003.080 I srv    operator(): operator(): cleaning up before exit...
0.00.003.209 E srv  llama_server: exiting due to HTTP server error
"""
PYTHON = b"""\
Traceback (most recent call last):
  File "server.py", line 7, in <module>
    main()
RuntimeError: CUDA driver is too old
"""


def fed(*pieces: bytes) -> ChildLog:
    log = ChildLog()
    for piece in pieces:
        log.feed(piece)
    return log


async def told(follower: Follower) -> str:
    async with asyncio.timeout(5):
        return await anext(follower)


# --- lines ------------------------------------------------------------------------


def test_output_becomes_the_same_lines_wherever_it_is_cut() -> None:
    data = "one\r\ntw\u00f6 \u20ac\n\n10%\r20%\rthr\x1b[31mee\x1b[0m\nfour".encode()
    expected = "one\ntwö €\nthree\nfour\n"
    for cut in range(len(data) + 1):
        log = fed(data[:cut], data[cut:])
        log.end()
        assert log.history() == expected, cut
    log = fed(*(data[place : place + 1] for place in range(len(data))))
    log.end()
    assert log.history() == expected


def test_the_oldest_lines_go_when_there_are_too_many() -> None:
    log = ChildLog(max_bytes=100)
    for number in range(50):
        log.feed(b"line %d \xe2\x82\xac\n" % number)
    assert len(log.history().encode()) <= 100
    assert log.history().endswith("line 48 €\nline 49 €\n")


def test_a_line_without_end_is_cut_and_the_next_one_is_whole_again() -> None:
    log = fed(*[b"x" * 1000] * 50, b" end\nnext\n")
    first, second = log.history().splitlines()
    assert first.startswith("xxx") and first.endswith("...")
    assert len(first) < 2 * MAX_LINE
    assert second == "next"


def test_a_long_line_in_one_piece_is_cut() -> None:
    log = fed(b"y" * 100_000 + b"\nnext\n")
    assert [len(line) for line in log.history().splitlines()] == [MAX_LINE + 3, 4]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("plain ünïcode\t1", "plain ünïcode\t1"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("\x1bcreset", "reset"),
        ("bell\x07", "bell\ufffd"),
        ("c1\x9b31m", "c1\ufffd31m"),
        ("\u202eevil", "\ufffdevil"),
        ("two\u2028lines", "two\ufffdlines"),
        ("end\x1b", "end"),
    ],
)
def test_nothing_that_a_terminal_would_obey_gets_out(line: str, shown: str) -> None:
    assert harmless(line) == shown


def test_random_bytes_do_no_harm() -> None:
    rng = random.Random(7)
    log = ChildLog(max_bytes=5000)
    for _ in range(300):
        log.feed(rng.randbytes(rng.randrange(400)))
    text = log.history()
    assert len(text.encode()) <= 5000
    assert all(line == harmless(line) for line in text.splitlines())
    assert text.count("\n") == len(text.splitlines())


# --- last words -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            LLAMA_MISSING,
            "gguf_init_from_file: failed to open GGUF file '/nonexistent.gguf' "
            "(No such file or directory)",
        ),
        (
            LLAMA_CUT,
            "llama_model_load: error loading model: llama_model_loader: failed to "
            "load model from /tmp/cut.gguf",
        ),
        (
            LLAMA_PORT,
            "srv         start: couldn't bind HTTP server socket, hostname: "
            "127.0.0.1, port: 28998",
        ),
        (PYTHON, "RuntimeError: CUDA driver is too old"),
        (b"hello\ngood bye\n", "good bye"),
        (b"error: invalid argument: --bogus", ""),  # not yet a line
        (b"", ""),
    ],
)
def test_the_line_that_says_why_is_found(output: bytes, line: str) -> None:
    assert fed(output).last_error_line == line


def test_a_new_process_has_no_last_words_yet_but_the_old_ones_can_be_read() -> None:
    log = fed(b"error: bad\n....")
    log.begin()
    assert (log.last_line, log.last_error_line, log.progress) == ("", "", None)
    assert log.history() == "error: bad\n....\n"


def test_an_error_of_long_ago_is_not_the_reason() -> None:
    log = fed(b"error: early\n", *[b"fine %d\n" % n for n in range(ERROR_LINES)])
    assert log.last_error_line == f"fine {ERROR_LINES - 1}"


def test_a_line_for_a_message_is_cut() -> None:
    assert len(fed(b"error: " + b"x" * 1000 + b"\n").last_error_line) == MAX_ERROR


# --- progress ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "progress"),
    [
        (b"loading model\n", None),
        (b"." * 37, 0.37),
        (b"." * 100 + b"\n", 1.0),
        (b"." * 500, 1.0),
        (b"wait...", None),
        (b"Loading safetensors checkpoint shards:  50% Completed | 2/4", 0.5),
        (b"Fetching: 10%\rFetching: 20%\rFetching: 30%|###", 0.3),
        (b"load progress 12.5%\n", 0.125),
        (b"GPU memory 90%\n", None),
        (b"loading 900%\n", 1.0),
    ],
)
def test_progress_is_read_off_the_output(output: bytes, progress: float | None) -> None:
    assert fed(output).progress == progress
    assert fed(*(output[n : n + 1] for n in range(len(output)))).progress == progress


# --- followers --------------------------------------------------------------------


async def test_a_follower_gets_what_is_kept_and_then_what_comes() -> None:
    log = fed(b"before\n")
    with log.follow() as follower:
        assert await told(follower) == "before\n"
        waiting = asyncio.ensure_future(told(follower))
        await asyncio.sleep(0)
        log.feed(b"now\nand then\nnot yet")
        assert await waiting == "now\nand then\n"
    assert log.followers == 0


async def test_a_follower_may_leave_out_what_was_before() -> None:
    log = fed(b"before\n")
    with log.follow(history=False) as follower:
        log.feed(b"after\n")
        assert await told(follower) == "after\n"


async def test_a_slow_follower_loses_the_oldest_and_is_told_how_much() -> None:
    log = ChildLog()
    with log.follow(history=False) as follower:
        line = b"x" * 999 + b"\n"
        for _ in range(300):
            log.feed(line)
        text = await told(follower)
        notice, _, rest = text.partition("\n")
        assert len(rest) <= MAX_BEHIND
        assert notice == f"[{300_000 - len(rest)} bytes are missing here: " + (
            "they came too fast]"
        )
        log.feed(b"again\n")
        assert await told(follower) == "again\n"


async def test_following_ends_when_it_is_closed() -> None:
    log = fed(b"text\n")
    follower = log.follow()

    async def read() -> list[str]:
        return [text async for text in follower]

    reading = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    follower.close()
    follower.close()
    async with asyncio.timeout(5):
        assert await reading in ([], ["text\n"])


async def test_a_follower_that_is_cancelled_loses_nothing() -> None:
    log = Log()
    with log.follow() as follower:
        waiting = asyncio.ensure_future(anext(follower))
        await asyncio.sleep(0)
        waiting.cancel()
        log.add("text")
        assert await told(follower) == "text\n"


# --- all of them ------------------------------------------------------------------


async def test_the_logs_of_all_models_and_our_own_flow_together() -> None:
    logs = Logs()
    with logs.everything.follow() as everything, logs.upstream.follow() as upstream:
        logs.model("a").feed(b"from a\n")
        logs.proxy.add("from us\nin two lines")
        logs.model("b").feed(b"from b\n")
        assert await told(everything) == "from a\nfrom us\nin two lines\nfrom b\n"
        assert await told(upstream) == "from a\nfrom b\n"
    assert logs.proxy.history() == "from us\nin two lines\n"
    assert logs.model("a").history() == "from a\n"


async def test_a_log_is_found_by_its_name() -> None:
    logs = Logs()
    assert logs.find("") is logs.everything
    assert logs.find("proxy") is logs.proxy
    assert logs.find("upstream") is logs.upstream
    assert logs.find("a") is None
    assert logs.find("a") is None  # asking makes none
    log = logs.model("a")
    assert logs.find("a") is log is logs.model("a")
    with log.follow() as follower:
        logs.forget("a")
        with pytest.raises(StopAsyncIteration):
            await told(follower)
    assert logs.find("a") is None
