"""The bench measures what it says: mock and load generator agree on correctness.

Nothing here looks at a time; figures are for ``python -m bench`` alone.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

# The installed package comes first; only ``bench``, which is not installed, is found
# in the checkout.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import __main__ as program
from bench import gateway, load, machine, mock, page, peers, report, wire
from bench.cells import CELLS, GOALS, HELD_STEP, MOST_HELD, ROWS
from bench.children import Children


@asynccontextmanager
async def running_mock() -> AsyncIterator[int]:
    server = await mock.serve()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def tally_of(port: int, order: wire.Order, *, count: int = 1) -> load.Tally:
    """Ask for ``order`` that often on one connection; what came of it."""
    tally = load.Tally(is_counting=True)
    job = load.Job("requests", port, "sk-any", count=count)
    (connection,) = await load.connect(job, tally, order)
    connection.ask()
    async with asyncio.timeout(10):
        await connection.finished
    return tally


async def test_a_plain_answer_arrives_byte_for_byte_on_a_kept_connection() -> None:
    async with running_mock() as port:
        tally = await tally_of(port, wire.Order(), count=5)
    assert tally.errors == {}
    assert tally.answers == len(tally.latencies_ns) == 5


@pytest.mark.parametrize("interval_us", [0, 500])
async def test_a_stream_arrives_whole_paced_or_not(interval_us: int) -> None:
    async with running_mock() as port:
        tally = await tally_of(port, wire.Order(40, interval_us), count=2)
    assert tally.errors == {}
    assert tally.answers == 2
    assert tally.events == len(tally.lags_ns) == 80
    assert min(tally.lags_ns) >= 0


async def test_streams_side_by_side_do_not_mix() -> None:
    async with running_mock() as port:
        tallies = await asyncio.gather(
            *(tally_of(port, wire.Order(20 + n)) for n in range(8))
        )
    assert [tally.events for tally in tallies] == list(range(20, 28))
    assert all(tally.errors == {} for tally in tallies)


@pytest.mark.parametrize("cut_after", [1, 17, 39])
async def test_a_cut_stream_is_noticed(cut_after: int) -> None:
    async with running_mock() as port:
        tally = await tally_of(port, wire.Order(40, cut_after=cut_after))
    assert tally.errors == {"connection cut": 1}
    assert tally.answers == 0
    assert tally.events == cut_after


async def test_an_answer_that_was_changed_on_the_way_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mock, "_ANSWER", mock._ANSWER.replace(b"bench b", b"bench B"))
    async with running_mock() as port:
        tally = await tally_of(port, wire.Order())
    assert tally.errors == {"answer differs": 1}


async def test_a_refusal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mock, "_ANSWER", mock._NOT_FOUND)
    async with running_mock() as port:
        tally = await tally_of(port, wire.Order())
    assert tally.errors == {"status 404": 1}


async def test_every_kind_of_job_ends_without_errors() -> None:
    async with running_mock() as port:
        for kind in load.KINDS:
            # The others end by their count.
            seconds = 10 if kind in ("requests", "first_byte", "turns") else 0.2
            job = load.Job(
                kind,
                port,
                "sk-any",
                connections=1 if kind == "turns" else 3,
                seconds=seconds,
                count=9,
                ports={"one": port, "other": port},
            )
            result = await load.carry_out(job)
            assert result.errors == {}, kind
            counted = "events" if kind in ("flood", "beside") else "answers"
            assert result.values[counted] >= 1, kind


async def test_who_leaves_a_flood_has_made_no_error() -> None:
    async with running_mock() as port:
        job = load.Job("flood", port, "sk-any", connections=2, seconds=0.05)
        result = await load.carry_out(job)
    assert result.errors == {}
    assert result.values["events"] < 2 * load.FLOOD_CHUNKS


async def test_ways_are_asked_in_turns_and_one_that_is_cut_stops_nobody() -> None:
    async with running_mock() as port:
        ports = {"one": port, "other": port}
        job = load.Job("turns", 0, "sk-any", seconds=10, count=5, ports=ports)
        result = await load.carry_out(job)
        assert result.errors == {}
        assert result.values["answers"] == 10
        assert result.values["one_added_p50_us"] == 0
        assert "other_added_p99_us" in result.values
        broken = load.Turned(load.Tally(), b"nonsense", 9, chunks=2)
        await asyncio.get_running_loop().create_connection(
            lambda: broken, "127.0.0.1", port
        )
        asking = asyncio.ensure_future(broken.ask_once())
        await asyncio.sleep(0)
        broken.close()
        await asyncio.wait_for(asking, 10)


async def test_the_cpu_of_further_processes_is_read_by_name() -> None:
    async with running_mock() as port:
        pids = {"relay": [os.getpid()], "helpers": []}
        job = load.Job("paced", port, "sk-any", seconds=0.1, pids=pids)
        result = await load.carry_out(job)
    assert result.errors == {}
    assert result.values["relay_cpu_s"] >= 0
    assert result.values["helpers_cpu_s"] == 0


def test_a_process_and_its_children_are_counted_together() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in machine.offspring_of(os.getpid())
        assert os.getpid() in machine.offspring_of(os.getpid())
    finally:
        child.kill()
        child.wait()


async def test_a_large_prompt_is_read_to_its_end() -> None:
    async with running_mock() as port:
        job = load.Job("requests", port, "sk-any", count=3, body_bytes=3 << 20)
        result = await load.carry_out(job)
    assert result.errors == {}
    assert result.values["answers"] == 3


async def test_a_target_that_does_not_listen_is_an_error_not_a_crash() -> None:
    job = load.Job("requests", gateway.free_port(), "sk-any")
    result = await load.carry_out(job)
    assert [why.split(":")[0] for why in result.errors] == ["cannot connect"]


async def test_usage_is_streamed_only_to_who_asked() -> None:
    async def raw(body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(wire.request(body, "sk-any", "localhost"))
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return answer

    body = wire.body(wire.Order(3))
    asked = body.replace(b"{", b'{"stream_options":{"include_usage": true},', 1)
    async with running_mock() as port:
        assert b'"usage"' not in await raw(body)
        assert b'"completion_tokens":3' in await raw(asked)


async def test_the_mock_lists_its_model() -> None:
    async with running_mock() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"]}")
        writer.close()
        await writer.wait_closed()
    assert wire.MODEL.encode() in answer


def streamed(chunks: int) -> bytes:
    """A whole streamed answer, as it stands on the wire."""
    events = [wire.event(number, 7) for number in range(chunks)]
    events.append(wire.FINISH + wire.DONE)
    framed = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + framed + b"0\r\n\r\n"


def read(pieces: list[bytes], chunks: int) -> tuple[load.AnswerParser, bool]:
    parser, reader = load.AnswerParser(), load.StreamReader(chunks)
    for piece in pieces:
        reader.feed(parser.feed(piece))
    return parser, reader.is_whole


def test_a_stream_is_whole_however_it_is_cut_into_pieces() -> None:
    answer = streamed(2)
    for at in range(1, len(answer)):
        parser, is_whole = read([answer[:at], answer[at:]], 2)
        assert parser.complete and is_whole, f"cut at {at}"
    parser, is_whole = read([answer[at : at + 1] for at in range(len(answer))], 2)
    assert parser.complete and is_whole


def test_a_stream_that_ends_early_is_not_complete_at_any_cut() -> None:
    answer = streamed(2)
    for at in range(1, len(answer)):
        parser, _ = read([answer[:at]], 2)
        assert not parser.complete, f"cut at {at}"


@pytest.mark.parametrize(
    ("events", "why"),
    [
        (wire.event(0, 1) + wire.event(2, 1), "event out of order"),
        (wire.event(0, 1) + wire.event(0, 1), "event out of order"),
        (wire.event(0, 1) + wire.USAGE % (1, 1), "usage that was not asked for"),
        (b'data: {"error":{"message":"gone"}}\n\n', "error event"),
        (b"data: what is this\n\n", "foreign event"),
    ],
)
def test_events_that_do_not_belong_are_noticed(events: bytes, why: str) -> None:
    reader = load.StreamReader(2)
    reader.feed(events)
    assert reader.errors == [why]


def test_comments_are_allowed_between_events() -> None:
    reader = load.StreamReader(1)
    reader.feed(b": waiting\n\n" + wire.event(0, 1) + b": still\n\n" + wire.DONE)
    assert reader.is_whole


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n\r\n",
        streamed(1) + b"more",
    ],
)
def test_broken_framing_is_noticed(answer: bytes) -> None:
    with pytest.raises(load.Malformed):
        load.AnswerParser().feed(answer)


def test_an_event_has_its_size_and_is_read_as_written() -> None:
    raw = wire.event(12345678, 10**18)
    assert len(raw) == wire.EVENT_BYTES
    assert wire.read_event(raw[:-2]) == (12345678, 10**18)


@pytest.mark.parametrize("size", [1024, 1 << 20])
def test_a_body_has_its_size_and_carries_its_order(size: int) -> None:
    order = wire.Order(100_000, 7000, 3)
    body = wire.body(order, size)
    assert len(body) == size
    assert wire.Order.find(body[: wire.ORDER_WITHIN]) == order
    assert len(wire.ANSWER) == 1024


def samples(gateway_rate: float, gateway_cpu: float) -> report.Samples:
    taken = []
    for number in range(3):
        for target, rate, cpu in (
            (report.YARDSTICK, 1000.0, 30.0),
            (report.GATEWAY, gateway_rate, gateway_cpu),
        ):
            taken += [
                report.Sample(number, "rps32", target, {"per_second": rate}),
                report.Sample(number, "paced128", target, {"cpu_us": cpu}),
            ]
    return report.Samples(taken)


@pytest.mark.parametrize(
    ("rate", "cpu", "passed"),
    [
        (1000, 30, [True, True]),
        (1500, 20, [True, True]),
        (999, 30, [False, True]),
        (1000, 31, [True, False]),
    ],
)
def test_the_goals_are_judged_against_the_yardstick(
    rate: float, cpu: float, passed: list[bool]
) -> None:
    verdicts = report.verdicts(samples(rate, cpu))
    assert [verdict.passed for verdict in verdicts] == passed


def test_a_goal_with_errors_in_its_cell_is_missed() -> None:
    good = samples(2000, 10)
    bad = report.Sample(3, "rps32", report.GATEWAY, {}, {"connection cut": 1})
    verdicts = report.verdicts(report.Samples([*good.all, bad]))
    assert [verdict.passed for verdict in verdicts] == [False, True]
    assert any("connection cut" in note for note in report.notes(report.Samples([bad])))


def test_a_goal_that_was_not_measured_is_neither_reached_nor_missed() -> None:
    verdicts = report.verdicts(report.Samples([]))
    assert [verdict.passed for verdict in verdicts] == [None, None]
    assert report.judgement(verdicts).count("not measured") == len(GOALS)


def test_the_ratio_is_taken_within_each_round() -> None:
    slow_round = [
        report.Sample(9, "rps32", report.YARDSTICK, {"per_second": 10.0}),
        report.Sample(9, "rps32", report.GATEWAY, {"per_second": 15.0}),
    ]
    taken = report.Samples([*samples(1500, 20).all, *slow_round])
    verdict = report.verdicts(taken)[0]
    assert verdict.ratio == 1.5


def test_every_row_belongs_to_a_cell() -> None:
    assert {row.cell for row in ROWS} == {cell.name for cell in CELLS}
    text = report.table(report.lines(samples(1500, 20)))
    assert "1.50" in text and "0.67" in text


def test_the_gateways_folder_is_private_and_complete(tmp_path: Path) -> None:
    key = gateway.new_key()
    config = gateway.write_config(tmp_path, port=1, mock_port=2, key=key)
    keys = tmp_path / "keys.txt"
    assert keys.stat().st_mode & 0o077 == 0
    assert keys.read_text().startswith(f"{key} name=bench role=user")
    assert "http://127.0.0.1:2" in config.read_text()


def test_ones_own_cpu_and_memory_can_be_read() -> None:
    assert machine.cpu_seconds(os.getpid()) >= 0
    assert machine.rss_bytes(os.getpid()) > 1 << 20


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:01.23", 1.23), ("01:02:03", 3723), ("2-00:00:01", 172801)],
)
def test_times_of_ps_are_understood(text: str, seconds: float) -> None:
    assert machine._clock(text) == pytest.approx(seconds)


@pytest.mark.parametrize("name", report.PEERS)
async def test_a_peer_passes_answers_and_streams_on(name: str, tmp_path: Path) -> None:
    if peers.program(name) is None:
        pytest.skip(f"no {name} here (apt-get install nginx-light haproxy)")
    async with running_mock() as mock_port:
        port = gateway.free_port()
        command = peers.command(name, tmp_path, port=port, mock_port=mock_port)
        with Children() as children:
            children.run(command, core=None, log=tmp_path / "log", speaks=False)
            # Neither program says when it listens; to try is all there is.
            async with asyncio.timeout(10):
                while not await _listens(port):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            for order, count in ((wire.Order(), 5), (wire.Order(40, 500), 2)):
                tally = await tally_of(port, order, count=count)
                assert tally.errors == {}, (tmp_path / "log").read_text()
                assert tally.answers == count


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@pytest.mark.parametrize("limit", [0, 63, 64, 65, 500, 512, 1023, 1024, 9999])
def test_the_most_streams_are_found_exact_to_a_step(limit: int) -> None:
    asked: list[int] = []

    def holds(streams: int) -> bool:
        asked.append(streams)
        return streams <= limit

    found = program.most_held(holds)
    assert found == min(limit, MOST_HELD) // HELD_STEP * HELD_STEP
    assert len(asked) <= 6
    assert min(asked) > 0


def test_peers_are_in_the_table_only_where_they_were_measured() -> None:
    without = samples(1500, 20)
    assert peers.NGINX not in report.table(report.lines(without))
    nginx = report.Sample(0, "rps32", peers.NGINX, {"per_second": 80000.0})
    taken = report.Samples([*without.all, nginx])
    assert "80,000" in report.table(report.lines(taken))


def test_errors_of_a_peer_are_told_but_decide_no_goal() -> None:
    bad = report.Sample(0, "rps32", peers.NGINX, {}, {"connection cut": 1})
    taken = report.Samples([*samples(1500, 20).all, bad])
    assert [verdict.passed for verdict in report.verdicts(taken)] == [True, True]
    assert any("connection cut" in note for note in report.notes(taken))


def test_an_unknown_cell_is_bad_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["--only", "nothing"])
    assert ended.value.code == 2


def test_the_views_that_are_timed_are_those_of_the_page() -> None:
    views = Path(__file__).parent.parent / "inferencia" / "web" / "views"
    files = {path.stem for path in views.glob("*.js")} - {"entrance"}
    timed = {name.split()[0] for name, _ in page.views()}
    assert timed - {"configuration"} == files - {"config"}
    asked = [path for _, paths in page.views() for path in paths]
    assert "/admin/api/usage?by=week,key&since=400d" in asked
    assert '"24h": "hour", "400d": "week"' in (views / "usage.js").read_text()
