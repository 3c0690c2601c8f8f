"""What each key has used since the daemon started. Kept in memory."""

from dataclasses import dataclass
from datetime import UTC, datetime

from inferencia.measurement import Measurement


@dataclass(slots=True)
class _Total:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class UsageBook:
    """Totals by key name."""

    def __init__(self) -> None:
        self._since = datetime.now(UTC)
        self._totals: dict[str, _Total] = {}

    def record(self, measurement: Measurement) -> None:
        """Add one finished request of a known key."""
        if not measurement.key:
            return
        total = self._totals.setdefault(measurement.key, _Total())
        total.requests += 1
        total.prompt_tokens += measurement.prompt_tokens or 0
        total.completion_tokens += measurement.completion_tokens or 0

    def of(self, key: str) -> dict[str, object]:
        """One key's totals, as ``GET /v1/usage`` answers them."""
        total = self._totals.get(key, _Total())
        return {
            "object": "usage",
            "key": key,
            "since": self._since.isoformat(timespec="seconds"),
            "requests": total.requests,
            "prompt_tokens": total.prompt_tokens,
            "completion_tokens": total.completion_tokens,
            "total_tokens": total.prompt_tokens + total.completion_tokens,
        }
