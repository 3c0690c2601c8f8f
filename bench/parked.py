"""An agent that keeps many idle connections: what they cost is seen at the relay.

``python -m bench.parked JOB`` where JOB is the JSON of ``Job``. It prints one line with
a number when all of them are there, and keeps them until it is told to end.
"""

import argparse
import asyncio
import json
import signal
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from inferencia.trust import trusting
from inferencia.tunnel import link
from inferencia.tunnel.agent import Agent
from inferencia.tunnel.dialing import relay_origin
from inferencia.tunnel.wire import Model

_LOOK_AGAIN_SECONDS = 0.02
# One that nobody asks for.
_MODEL = "parked"


@dataclass(frozen=True, slots=True)
class Job:
    """Where to, as whom, how many."""

    relay: str
    token: str
    ca_file: str
    count: int


async def _main(job: Job) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    setattr(link, "SPARE_CONNECTIONS", job.count)  # noqa: B010  (mypy: not exported)
    agent = Agent(
        (relay_origin(job.relay),),
        name=None,
        token=job.token,
        context=trusting(Path(job.ca_file)),
        beat=15.0,
        max_streams=lambda: job.count,
        models=lambda: (Model(_MODEL, {"id": _MODEL}),),
        active=lambda: 0,
        serve=asyncio.Protocol,
    )
    running = asyncio.ensure_future(agent.run())
    # An agent tells nobody but its relay.
    while sum(state.connections for state in agent.states) < job.count:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
    print(job.count, flush=True)
    await stop.wait()
    running.cancel()
    await asyncio.wait([running])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.parked", description=__doc__)
    parser.add_argument("job", help="the JSON of a Job")
    asked = Job(**json.loads(parser.parse_args().job))
    machine.run(_main(asked), fast_loop=True)
