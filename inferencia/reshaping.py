"""An upstream answer that reaches its client in another shape.

``Reshaped`` stands between an answer and whoever takes it, and is an ``Answer`` itself:
back-pressure, silence and cancelling go straight through, only the bytes are other
ones. What makes the other bytes is a ``Shape``, a pure translation.
"""

from typing import Protocol

from inferencia.upstream.answer import Answer, BadAnswer, Sink, UpstreamError


class Shape(Protocol):
    """Turns the bytes of one answer into those of another."""

    def feed(self, data: bytes) -> bytes:
        """What these bytes become; perhaps nothing yet."""

    def finish(self) -> bytes:
        """What is left at the end.

        Raises:
            ValueError: what came is not what was expected.
        """


class Reshaped(Answer):
    """An answer whose body goes through a ``Shape``."""

    def __init__(self, answer: Answer, shape: Shape) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self.length = None  # of what will come nothing is known
        self._answer = answer
        self._shape = shape
        self._sink: Sink | None = None

    @property
    def last_byte(self) -> float:  # type: ignore[override]
        return self._answer.last_byte

    @property
    def silence_seconds(self) -> float:
        return self._answer.silence_seconds

    @silence_seconds.setter
    def silence_seconds(self, seconds: float) -> None:
        self._answer.silence_seconds = seconds

    def attach(self, sink: Sink) -> None:
        self._sink = sink
        self._answer.attach(self)

    def pause(self) -> None:
        self._answer.pause()

    def resume(self) -> None:
        self._answer.resume()

    def cancel(self) -> None:
        self._answer.cancel()

    # As the sink of the answer behind it.

    def data(self, data: bytes) -> None:
        assert self._sink is not None
        if made := self._shape.feed(data):
            self._sink.data(made)

    def end(self) -> None:
        assert self._sink is not None
        try:
            rest = self._shape.finish()
        except ValueError as error:
            self._sink.failed(BadAnswer(str(error)))
            return
        if rest:
            self._sink.data(rest)
        self._sink.end()

    def failed(self, error: UpstreamError) -> None:
        assert self._sink is not None
        self._sink.failed(error)
