"""What waits for the end of a turn of the event loop: made once, in order, by all."""

import asyncio
import logging

import pytest

from inferencia.endofturn import EndOfTurn


async def test_calls_wait_for_the_end_of_the_turn_and_keep_their_order() -> None:
    loop, waiting, calls = asyncio.get_running_loop(), EndOfTurn(), list[int]()
    for number in range(3):
        waiting.call(loop, lambda number=number: calls.append(number))  # type: ignore[misc]
    assert calls == []
    await asyncio.sleep(0)
    assert calls == [0, 1, 2]


async def test_what_others_did_in_the_turn_comes_before_the_calls() -> None:
    loop, waiting, seen = asyncio.get_running_loop(), EndOfTurn(), list[str]()
    ready = [asyncio.Event() for _ in range(3)]

    async def one(event: asyncio.Event) -> None:
        await event.wait()
        seen.append("work")
        waiting.call(loop, lambda: seen.append("call"))

    async with asyncio.TaskGroup() as tasks:
        for event in ready:
            tasks.create_task(one(event))
        await asyncio.sleep(0)
        for event in ready:
            event.set()
    await asyncio.sleep(0)
    assert seen == ["work"] * 3 + ["call"] * 3


async def test_a_call_that_asks_again_is_made_in_the_next_turn() -> None:
    loop, waiting, calls = asyncio.get_running_loop(), EndOfTurn(), list[int]()

    def again() -> None:
        calls.append(1)
        if len(calls) < 3:
            waiting.call(loop, again)

    waiting.call(loop, again)
    for made in (1, 2, 3):
        await asyncio.sleep(0)
        assert len(calls) == made


async def test_a_call_that_fails_is_logged_and_the_others_are_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop, waiting, calls = asyncio.get_running_loop(), EndOfTurn(), list[int]()
    waiting.call(loop, lambda: calls.extend([1, 1 // 0]))
    waiting.call(loop, lambda: calls.append(2))
    with caplog.at_level(logging.ERROR):
        await asyncio.sleep(0)
    assert calls == [2]
    assert "a call at the end of a turn of the loop failed" in caplog.text


async def test_first_calls_are_made_before_all_others_whenever_they_were_asked() -> (
    None
):
    loop, seen = asyncio.get_running_loop(), list[str]()
    waiting = EndOfTurn.of(loop)
    assert waiting is EndOfTurn.of(loop)

    def write() -> None:
        seen.append("write")
        if len(seen) == 2:  # somebody has something to note in the middle of it all
            waiting.call_first(loop, lambda: seen.append("note"))

    waiting.call(loop, write)
    waiting.call(loop, write)
    waiting.call_first(loop, lambda: seen.append("note"))
    await asyncio.sleep(0)
    assert seen == ["note", "write", "note", "write"]


async def test_who_cannot_wait_has_the_first_calls_made_now() -> None:
    loop, seen = asyncio.get_running_loop(), list[str]()
    waiting = EndOfTurn.of(loop)
    waiting.call(loop, lambda: seen.append("write"))
    waiting.call_first(loop, lambda: seen.append("note"))
    waiting.hurry()
    assert seen == ["note"]
    await asyncio.sleep(0)
    assert seen == ["note", "write"]
