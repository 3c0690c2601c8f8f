"""Requests leave nothing to the garbage collector: what is over is freed at once.

Objects that know each other in a circle are found only by a search through all that
lives, which is costly under load: one such circle in each request once took a fifth of
the gateway's time.
"""

import asyncio
import gc
from pathlib import Path

import pytest

from gateway import FakeEngine, behind, running
from inferencia.__main__ import main
from rawclient import connected, request

REQUESTS = {
    "an answer": (request(), 200),
    "a stream": (
        request(body=b'{"model":"m","messages":[{"role":"user"}],"stream":true}'),
        200,
    ),
    "a list": (request("/v1/models", method="GET"), 200),
}


@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_request_that_went_well_leaves_no_circle(
    tmp_path: Path, kind: str
) -> None:
    sent, status = REQUESTS[kind]
    async with FakeEngine() as engine, running(tmp_path, behind(engine)) as gateway:
        async with connected(gateway) as wire:

            async def ask() -> None:
                await wire.send(sent)
                assert (await wire.reply()).status == status
                await asyncio.sleep(0)

            await ask()  # what is made once is made now
            gc.freeze()  # and not looked at below
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                for _ in range(5):
                    await ask()
                gc.collect()
                left = [type(o) for o in gc.garbage]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
    ours = [kind for kind in left if kind.__module__.startswith("inferencia")]
    assert not ours, f"left behind: {sorted({kind.__qualname__ for kind in ours})}"


def test_after_the_start_it_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["inferencia", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert gc.isenabled()
    assert capsys.readouterr().out
