"""The backend ``echo``: the built-in model behind the interface of a server.

It needs no server and no socket. ``Echo`` stands behind the same interface as
``upstream.pool.Upstream``, and ``EchoAnswer`` behind the same as a socket's answer: it
can be paused, cancelled, silent and broken off. What it says, and the member ``echo``
by which a test asks for pauses and failures, is in ``echo_model.py``.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar

from inferencia.backends.base import Backend
from inferencia.backends.echo_model import MODEL, Reply, reply_to
from inferencia.settings import BackendConfig
from inferencia.upstream.answer import Answer, Silent, Sink, Truncated, UpstreamError

log = logging.getLogger(__name__)


class EchoBackend(Backend):
    """The backend whose carrier is ``Echo``."""

    type: ClassVar[str] = MODEL

    def __init__(
        self, config: BackendConfig, *, instance: str = "", place: str = ""
    ) -> None:
        self.echo = Echo()
        super().__init__(config, self.echo, instance=instance, place=place)

    @property
    def address(self) -> str:
        return "(built in)"

    @property
    def running(self) -> int:
        """How many requests are being worked on."""
        return self.echo.running


class Echo:
    """Takes requests and answers them from within this process."""

    def __init__(self) -> None:
        self._count = 0  # answers so far, for their ids
        self._waiting = 0  # requests whose head has not been given yet
        self._open: set[EchoAnswer] = set()  # answers that are not finished

    @property
    def open_connections(self) -> int:
        """None: nothing leaves this process."""
        return 0

    @property
    def running(self) -> int:
        """Requests from ``send`` until their end, failure or cancellation."""
        return self._waiting + len(self._open)

    async def send(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]],
        body: bytes = b"",
        *,
        silence_seconds: float = 0,
        on_wire: Callable[[], None] | None = None,
    ) -> Answer:
        """Answer a request. See ``upstream.pool.Upstream.send``.

        Raises:
            Silent: the request asked for a longer pause before the head than allowed.
        """
        self._count += 1
        self._waiting += 1
        try:
            if on_wire is not None:
                on_wire()
            reply = reply_to(method, target, body, self._count)
            await _pause(reply.pace.head_seconds, silence_seconds)
        finally:
            self._waiting -= 1
        answer = EchoAnswer(reply, silence_seconds, self._open.discard)
        self._open.add(answer)
        return answer

    async def aclose(self) -> None:
        """Cancel what is running. Calling it again does nothing."""
        for answer in tuple(self._open):
            answer.cancel()


class EchoAnswer(Answer):
    """An answer in the making; the interface is ``upstream.answer.Answer``'s.

    One task brings the body, from ``attach`` on; ``cancel`` stops it.
    """

    def __init__(
        self,
        reply: Reply,
        silence_seconds: float,
        on_finish: Callable[["EchoAnswer"], None],
    ) -> None:
        self.status = reply.status
        self.headers: tuple[tuple[str, str], ...] = reply.headers
        self.length = reply.length
        self._reply = reply
        self._on_finish = on_finish
        self._loop = asyncio.get_running_loop()
        self._sink: Sink | None = None  # from attach to the end
        self._task: asyncio.Task[None] | None = None  # from attach to the end
        self._is_finished = False
        self._may_go = asyncio.Event()  # cleared while paused
        self._may_go.set()
        self.last_byte = self._loop.time()
        self._quiet_since = self.last_byte  # the same, or when a pause ended
        self._silence_seconds = silence_seconds
        self._alarm: asyncio.TimerHandle | None = None  # rings when it was silent

    @property
    def silence_seconds(self) -> float:
        return self._silence_seconds

    @silence_seconds.setter
    def silence_seconds(self, seconds: float) -> None:
        self._silence_seconds = seconds
        self._quiet_since = self._loop.time()
        self._set_alarm()

    def attach(self, sink: Sink) -> None:
        """Start to bring the body to ``sink``."""
        if self._is_finished:
            sink.failed(Truncated("the answer was cancelled before"))
            return
        self._sink = sink
        self._quiet_since = self._loop.time()
        self._task = self._loop.create_task(self._bring())
        self._set_alarm()

    def pause(self) -> None:
        """Bring nothing more until ``resume``."""
        self._may_go.clear()
        self._set_alarm()

    def resume(self) -> None:
        """Go on after a pause."""
        if self._may_go.is_set():
            return
        self._quiet_since = self._loop.time()
        self._may_go.set()
        self._set_alarm()

    def cancel(self) -> None:
        """Stop at once; the sink hears nothing more. Idempotent."""
        task = self._task
        self._finish()
        if task is not None:
            task.cancel()

    async def _bring(self) -> None:
        pace = self._reply.pace
        await asyncio.sleep(pace.first_seconds)
        for number, piece in enumerate(self._reply.words):
            if number == pace.silent_after:
                await _for_ever()
            if number == pace.fail_after:
                await self._break_off(number)
                return
            # Even without a pause each word is a turn of the event loop, so that a
            # long answer holds nobody up.
            await asyncio.sleep(pace.word_seconds if number else 0)
            await self._hand_over(piece)
        if pace.silent_after is not None:
            await _for_ever()
        if pace.fail_after is not None:
            await self._break_off(pace.fail_after)
            return
        await self._hand_over(self._reply.last)
        self._end(None)

    async def _break_off(self, words: int) -> None:
        """End in the middle: of the words, or of a plain answer's body."""
        if self.length is not None:
            await self._hand_over(self._reply.last[: self.length // 2])
        self._end(Truncated(f"echo broke off after {words} words, as asked"))

    async def _hand_over(self, data: bytes) -> None:
        await self._may_go.wait()
        if not data or self._sink is None:
            return
        self.last_byte = self._quiet_since = self._loop.time()
        self._set_alarm()
        try:
            self._sink.data(data)
        except Exception as error:
            log.exception("passing on an answer failed by our own fault")
            self._end(UpstreamError(f"the taker of the answer raised {error!r:.200}"))

    def _end(self, error: UpstreamError | None) -> None:
        sink = self._sink
        self._finish()
        if sink is None:
            return
        if error is None:
            sink.end()
        else:
            sink.failed(error)

    def _finish(self) -> None:
        self._is_finished = True
        self._sink = None
        self._task = None
        self._set_alarm()
        self._on_finish(self)

    def _set_alarm(self) -> None:
        """Have silence noticed; there is none before attach or in a pause."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        seconds = self._silence_seconds
        if seconds > 0 and self._sink is not None and self._may_go.is_set():
            self._alarm = self._loop.call_at(
                self._quiet_since + seconds, self._was_silent
            )

    def _was_silent(self) -> None:
        task = self._task
        self._end(_too_silent(self._silence_seconds))
        if task is not None:
            task.cancel()


async def _pause(seconds: float, silence_seconds: float) -> None:
    if 0 < silence_seconds < seconds:
        await asyncio.sleep(silence_seconds)
        raise _too_silent(silence_seconds)
    await asyncio.sleep(seconds)


def _too_silent(seconds: float) -> Silent:
    return Silent(seconds, f"echo was silent for {seconds:g} s, as asked")


async def _for_ever() -> None:
    await asyncio.Event().wait()
