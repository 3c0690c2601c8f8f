"""``sendLoadingState``: a chat's client reads what it waits for, as thoughts.

While a model is loaded for a streamed chat, chunks of the chat say so in their
``reasoning_content``, which clients show apart from the answer. The real stream
follows. Everybody else is told by comment lines, which no client shows.

First and last lines are llama-swap's own, letter for letter: programs know them by
these words and leave them out of what they remember.
"""

import asyncio
import json
import time
from collections.abc import Callable

_BAR = "\u2501" * 5
# llama-swap's rhythm.
TICK_SECONDS = 0.75


class LoadingState:
    """Tells one client of one load."""

    def __init__(self, model: str, request_id: str, words: Callable[[], str]) -> None:
        """Get ready; nothing is told yet.

        Args:
            model: the name that chunks have.
            request_id: from which the chunks' id is made.
            words: what is being waited for, whenever asked.
        """
        self._model = model
        self._id = f"chatcmpl-{request_id}"
        self._words = words
        self._created = int(time.time())
        self._said = ""  # the words that were told last
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._tell: Callable[[bytes], None] = lambda event: None

    def begin(self, tell: Callable[[bytes], None]) -> None:
        """Tell that it begins, and from then on how it goes.

        Args:
            tell: writes one event to the client.
        """
        self._tell = tell
        self._say(f"{_BAR}\nllama-swap loading model: {self._model}\n")
        self._arm()

    def done(self) -> None:
        """Tell that the model is there."""
        seconds = self._loop.time() - self._began
        self.end()
        self._say(f"\nDone! ({seconds:.2f}s)\n{_BAR}\n \n")

    def end(self) -> None:
        """Tell no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        words = self._words()
        if words and words != self._said:
            self._say(f"\n{words} ")
            self._said = words
        else:
            self._say(".")
        self._arm()

    def _say(self, text: str) -> None:
        choice = {
            "index": 0,
            "delta": {"reasoning_content": text},
            "finish_reason": None,
        }
        chunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [choice],
        }
        self._tell(b"data: " + json.dumps(chunk).encode() + b"\n\n")
