"""What the gateway promises about time: leaving, ending, restarting, waiting."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import wait_for_models
from engines.real import (
    Engine,
    Installed,
    Reply,
    chat_engine,
    embedding_engine,
    until,
)

pytestmark = pytest.mark.e2e

PATH = "/v1/chat/completions"
# Runs for about a minute if nobody stops it.
LONG = {
    "model": "gemma-270m",
    "messages": [{"role": "user", "content": "Count: one, two, three,"}],
    "max_tokens": 4000,
    "temperature": 0,
}
EMBED = {"model": "minilm", "input": "a cat"}
LEAVE_SECONDS = 1.0  # a client's leaving ends the work upstream within this

MakeGateway = Callable[[str], Engine]


@pytest.fixture(autouse=True)
def idle(llama: Engine) -> Iterator[None]:
    """Nothing of one test runs on into the next."""
    until(lambda: llama.busy_slots() == 0, 30, "earlier work is done")
    yield
    until(lambda: llama.busy_slots() == 0, 30, "this test's work is done")


@pytest.fixture
def own_engine(
    installed: Installed, llama_server: Path, tmp_path: Path
) -> Iterator[Engine]:
    """An embedding engine that a test may stop and start; it loads in 0.2 s."""
    engine = embedding_engine(installed, llama_server, tmp_path / "engine.log")
    with engine.running():
        yield engine


def in_front_of(engine: Engine, model: str) -> str:
    return (
        f'backends: [{{name: own, type: llamacpp, url: "{engine.url}", '
        f"models: [{model}]}}]\n"
    )


class Chat:
    """One long chat whose client can leave."""

    def __init__(self, gateway: Engine, **changes: Any) -> None:
        body = json.dumps({**LONG, **changes}).encode()
        self._connection = gateway.send("POST", PATH, body)
        self._socket: socket.socket = self._connection.sock
        self._answer: http.client.HTTPResponse | None = None

    @property
    def answer(self) -> http.client.HTTPResponse:
        """The answer, as soon as its head is there."""
        if self._answer is None:
            self._answer = self._connection.getresponse()
        return self._answer

    def whole(self) -> Reply:
        """The answer, read to its end."""
        return Reply(self.answer.status, self.answer.headers, self.answer.read())

    def leave(self) -> None:
        """Close the socket; an answer holds a second handle of it."""
        if self._answer is not None:
            self._answer.close()
        self._socket.close()
        self._connection.close()


Begin = Callable[..., Chat]


@pytest.fixture
def begin(idle: None) -> Iterator[Begin]:
    """Begins long chats, and leaves those that a failed test left open."""
    begun: list[Chat] = []

    def begin(gateway: Engine, **changes: Any) -> Chat:
        begun.append(Chat(gateway, **changes))
        return begun[-1]

    yield begin
    for chat in begun:
        chat.leave()


# Leaving


def test_a_client_that_leaves_a_stream_ends_the_engines_work(
    gateway: Engine, llama: Engine, begin: Begin
) -> None:
    chat = begin(gateway, stream=True)
    for _ in range(8):
        assert chat.answer.readline()
    assert llama.busy_slots() == 1
    chat.leave()
    until(lambda: llama.busy_slots() == 0, LEAVE_SECONDS, "the slot is free")


def test_a_client_that_leaves_before_a_whole_answer_ends_the_engines_work(
    gateway: Engine, llama: Engine, begin: Begin
) -> None:
    chat = begin(gateway)
    until(lambda: llama.busy_slots() == 1, 10, "the engine works")
    chat.leave()
    until(lambda: llama.busy_slots() == 0, LEAVE_SECONDS, "the slot is free")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_the_engine_queues_it_costs_it_no_answer(
    gateway: Engine, llama: Engine, begin: Begin, stream: bool
) -> None:
    """Two slots: the third request waits inside the engine.

    llama-server looks at a waiting request's connection only when its turn has come, so
    what is left of it then is one token.
    """
    first = [begin(gateway, stream=True) for _ in range(2)]
    until(lambda: llama.busy_slots() == 2, 10, "both slots work")
    third = begin(gateway, stream=stream)
    until(lambda: deferred(llama) == 1, 10, "the third waits")
    third.leave()
    for chat in first:
        chat.leave()
    until(lambda: llama.busy_slots() == 0, 2 * LEAVE_SECONDS, "all slots are free")
    assert deferred(llama) == 0


def deferred(llama: Engine) -> int:
    """How many requests wait inside a llama-server for a slot."""
    name = "llamacpp:requests_deferred "
    text = llama.get("/metrics").body.decode()
    (line,) = [row for row in text.splitlines() if row.startswith(name)]
    return int(float(line.removeprefix(name)))


def test_many_clients_that_leave_leave_nothing_behind(
    gateway: Engine, llama: Engine, begin: Begin
) -> None:
    for number in range(20):
        chat = begin(gateway, stream=bool(number % 2))
        if number % 4 < 2:
            until(lambda: llama.busy_slots() > 0, 10, "the engine works")
        chat.leave()
    until(lambda: llama.busy_slots() == 0, 5 * LEAVE_SECONDS, "all slots are free")
    assert gateway.post(PATH, {**LONG, "max_tokens": 2}).status == 200


# Ending


def test_a_stream_in_progress_may_finish_after_sigterm(
    make_gateway: MakeGateway, llama: Engine, begin: Begin
) -> None:
    gateway = make_gateway(in_front_of(llama, "gemma-270m"))
    gateway.start()
    chat = begin(gateway, stream=True, max_tokens=30)
    chat.answer.readline()
    assert gateway.process is not None
    gateway.process.signal(signal.SIGTERM)
    assert chat.whole().events()[-1] == b"[DONE]"
    assert gateway.process.wait(5) == 0, gateway.process.last_words()


def test_new_work_is_refused_while_draining_and_a_long_stream_ends_with_an_error(
    make_gateway: MakeGateway, llama: Engine, begin: Begin
) -> None:
    gateway = make_gateway(in_front_of(llama, "gemma-270m"))
    gateway.start()
    chat = begin(gateway, stream=True)
    chat.answer.readline()
    assert gateway.get("/health/ready").status == 200
    assert gateway.process is not None
    gateway.process.signal(signal.SIGTERM)
    until(lambda: gateway.get("/health/ready").status == 503, 1, "it is not ready")
    refused = gateway.post(PATH, LONG)
    assert refused.status == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert int(refused.headers["Retry-After"]) >= 1
    *_, last = chat.whole().events()
    assert json.loads(last)["error"]["code"] == "shutting_down"
    assert gateway.process.wait(5) == 0, gateway.process.last_words()
    until(lambda: llama.busy_slots() == 0, LEAVE_SECONDS, "the slot is free")


def test_a_second_signal_ends_it_at_once(
    make_gateway: MakeGateway, llama: Engine, begin: Begin
) -> None:
    gateway = make_gateway(in_front_of(llama, "gemma-270m"))
    gateway.start()
    begin(gateway, stream=True).answer.readline()
    assert gateway.process is not None
    gateway.process.signal(signal.SIGTERM)
    until(lambda: gateway.get("/health/ready").status == 503, 1, "it drains")
    asked = time.monotonic()
    gateway.process.signal(signal.SIGTERM)
    gateway.process.wait(5)
    assert time.monotonic() - asked < 1.0
    until(lambda: llama.busy_slots() == 0, LEAVE_SECONDS, "the slot is free")


# Engines that come and go


def test_an_engine_that_was_restarted_while_idle_is_used_at_once(
    make_gateway: MakeGateway, own_engine: Engine
) -> None:
    gateway = make_gateway(in_front_of(own_engine, "minilm"))
    gateway.start()
    assert gateway.post("/v1/embeddings", EMBED).status == 200
    own_engine.stop()
    own_engine.start()
    answer = gateway.post("/v1/embeddings", EMBED)
    assert answer.status == 200, answer.body


def test_idle_connections_outlive_neither_the_engines_clock_nor_its_count(
    make_gateway: MakeGateway, own_engine: Engine
) -> None:
    """llama-server closes a connection after 100 requests and after 5 s of idling."""
    gateway = make_gateway(in_front_of(own_engine, "minilm"))
    gateway.start()
    for _ in range(250):
        assert gateway.post("/v1/embeddings", EMBED).status == 200
    for pause in (4.9, 5.0, 5.1):
        time.sleep(pause)  # the engine's own clock runs; nothing tells when
        assert gateway.post("/v1/embeddings", EMBED).status == 200


def test_an_engine_that_is_down_is_said_to_be_and_is_used_again_when_it_is_back(
    make_gateway: MakeGateway, own_engine: Engine
) -> None:
    gateway = make_gateway(in_front_of(own_engine, "minilm"))
    gateway.start()
    assert gateway.post("/v1/embeddings", EMBED).status == 200
    own_engine.stop()
    answer = gateway.post("/v1/embeddings", EMBED)
    assert answer.status == 503
    assert answer.json()["error"]["code"] == "backend_unavailable"
    assert int(answer.headers["Retry-After"]) >= 1
    until(lambda: gateway.get("/health/ready").status == 503, 10, "it is seen down")
    assert gateway.get("/health").status == 200
    still_listed = gateway.get("/v1/models/minilm")
    assert still_listed.status == 200, still_listed.body

    own_engine.start()
    until(lambda: gateway.get("/health/ready").status == 200, 15, "it is seen up")
    assert gateway.post("/v1/embeddings", EMBED).status == 200


def test_an_engine_that_dies_in_the_middle_of_a_stream_ends_it_with_an_error(
    make_gateway: MakeGateway,
    installed: Installed,
    llama_server: Path,
    tmp_path: Path,
    begin: Begin,
) -> None:
    engine = chat_engine(installed, llama_server, tmp_path / "engine.log")
    gateway = make_gateway(in_front_of(engine, "gemma-270m"))
    with engine.running():
        gateway.start()
        wait_for_models(gateway, {"gemma-270m"})
        chat = begin(gateway, stream=True)
        chat.answer.readline()
        assert engine.process is not None
        engine.process.signal(signal.SIGKILL)
        *_, last = chat.whole().events()
        assert json.loads(last)["error"]["type"] == "backend_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_loading_is_waited_for(
    make_gateway: MakeGateway,
    installed: Installed,
    llama_server: Path,
    tmp_path: Path,
    stream: bool,
) -> None:
    engine = chat_engine(installed, llama_server, tmp_path / "engine.log")
    engine.command.append("--no-mmap")  # reads the whole file, so loads longer
    gateway = make_gateway(in_front_of(engine, "gemma-270m"))
    gateway.start()
    try:
        engine.begin()
        until(lambda: is_loading(engine), 10, "the engine is loading")
        answer = gateway.post(PATH, {**LONG, "max_tokens": 3, "stream": stream})
        assert answer.status == 200, answer.body
        if not stream:
            assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        engine.stop()


def is_loading(engine: Engine) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return engine.get("/health").status == 503
    return False


# Many at once


def test_streams_at_the_same_time_do_not_mix(gateway: Engine) -> None:
    """Each asks for its own word back by a schema that allows nothing else."""
    words = [f"word{number}" for number in range(8)]
    answers: dict[str, str] = {}

    def ask(word: str) -> None:
        schema = {"name": "w", "schema": {"enum": [word]}, "strict": True}
        shape = {"type": "json_schema", "json_schema": schema}
        reply = gateway.post(
            PATH,
            {**LONG, "max_tokens": 16, "response_format": shape, "stream": True},
        )
        deltas = [chunk["choices"][0]["delta"] for chunk in reply.chunks()]
        answers[word] = "".join(delta.get("content") or "" for delta in deltas)

    threads = [threading.Thread(target=ask, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {word: json.dumps(word) for word in words}
