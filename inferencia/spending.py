"""What requests cost at each backend, and which backends have spent enough for today.

A backend's ``prices`` say what a million tokens of its models cost; ``daily_spend`` is
the most that may be spent there between 00:00 UTC and the next. One counter serves
both the limit and what is reported, so they cannot disagree. A backend without a
matching price costs nothing. What models are worth whose work costs nothing (those of
this machine, of agents, of servers in its network) is said by ``usage.prices``. The
amounts have the currency of the configuration, which nothing here needs to know.

Everything is counted in whole millionths of a millionth (1e-12) of the currency, so
that the sum of many small amounts is exact. One million tokens at 0.15 are 150,000
such units for each token.

The limit is looked at before a request, while its cost is known only after it: what is
under way when the limit is reached may exceed it. What was spent earlier in the day is
restored from the database of usage at a start (``restore``).
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fnmatch import fnmatchcase
from ipaddress import ip_address
from types import MappingProxyType
from urllib.parse import urlsplit

from inferencia.measurement import Measurement
from inferencia.settings import BackendConfig

UNITS = 10**12

_TOKENS_OF_A_PRICE = 10**6
_DAY_SECONDS = 86400

# Model names whose price is remembered; a backend's list has at most a few hundred.
_MAX_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class Price:
    """What one token costs, in units."""

    prompt: int = 0
    completion: int = 0


_FREE = Price()


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request cost, or would have cost."""

    units: int
    is_billed: bool  # somebody else's machine worked, and will want the money


@dataclass(frozen=True, slots=True)
class Spent:
    """What a backend has cost, in the currency of its prices."""

    backend: str
    today: float
    total: float  # since the daemon started
    limit: float | None  # ``daily_spend``


class _Prices:
    """Prices by model."""

    def __init__(
        self, written: Mapping[str, Mapping[str, float]], prefix: str = ""
    ) -> None:
        """
        Args:
            written: as configured, by pattern.
            prefix: of the models' names, which patterns may leave out.
        """
        prices = [(glob, _price(price)) for glob, price in written.items()]
        prices.sort(key=lambda pair: any(c in pair[0] for c in "*?["))
        self._prices = prices  # exact names first, then globs, in order
        self._prefix = prefix
        self._found: dict[str, Price | None] = {}

    def __bool__(self) -> bool:
        return bool(self._prices)

    def of(self, model: str) -> Price | None:
        """The price of a model, if there is one."""
        if model in self._found:
            return self._found[model]
        price = self._looked_up(model)
        if len(self._found) < _MAX_REMEMBERED:
            self._found[model] = price
        return price

    def _looked_up(self, model: str) -> Price | None:
        bare = model.removeprefix(self._prefix)
        for glob, price in self._prices:
            if fnmatchcase(model, glob) or fnmatchcase(bare, glob):
                return price
        return None


@dataclass(slots=True)
class _Account:
    """One backend's."""

    config: BackendConfig
    prices: _Prices
    limit: int | None  # units
    day: int = 0  # days since 1970, of ``today``
    today: int = 0  # units
    total: int = 0  # units

    def price_of(self, model: str) -> Price:
        return self.prices.of(model) or _FREE

    def spent_on(self, day: int) -> int:
        """Units spent on that day; a new day, or a clock set back, starts at zero."""
        if day != self.day:
            self.day = day
            self.today = 0
        return self.today


class Spending:
    """The account of every backend."""

    def __init__(
        self,
        backends: Iterable[BackendConfig] = (),
        worth: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Open an account for each backend that has prices.

        Args:
            backends: as configured.
            worth: ``usage.prices``, by pattern.
            wall_clock: seconds since 1970; days begin at 00:00 UTC.
        """
        self._wall_clock = wall_clock
        self._accounts: dict[str, _Account] = {}
        self.change(backends, worth)

    def change(
        self,
        backends: Iterable[BackendConfig],
        worth: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    ) -> None:
        """Take over other prices and limits; what was spent stays, by name."""
        before, self._accounts = self._accounts, {}
        self._worth = _Prices(worth) if worth else None
        self._billed: set[str] = set()  # names of backends that want money
        for config in backends:
            if _is_billed(config):
                self._billed.add(config.name)
            if not config.prices and config.daily_spend is None:
                continue
            account = _opened(config)
            old = before.get(config.name)
            if old is not None:
                account.day, account.today = old.day, old.today
                account.total = old.total
            self._accounts[config.name] = account

    def record(self, m: Measurement) -> None:
        """Charge a request that is over to the backend that served it."""
        account = self._accounts.get(m.backend or "")
        if account is None or not (m.prompt_tokens or m.completion_tokens):
            return
        self.charge(
            account.config.name,
            m.model or "",
            prompt=m.prompt_tokens or 0,
            completion=m.completion_tokens or 0,
        )

    def cost_of(self, m: Measurement) -> Cost | None:
        """What a request costs or is worth, if there are prices for it."""
        if self._worth is None and not self._accounts:
            return None
        backend, model = m.backend or "", m.model or ""
        account = self._accounts.get(backend)
        is_billed = backend in self._billed
        price = None if account is None else account.prices.of(model)
        if price is None and self._worth is not None and not is_billed:
            price = self._worth.of(model)
        if price is None:
            if account is None or not account.prices:
                return None
            price = _FREE
        units = (m.prompt_tokens or 0) * price.prompt
        units += (m.completion_tokens or 0) * price.completion
        return Cost(units, is_billed)

    def restore(self, spent_today: Mapping[str, float]) -> None:
        """Go on from what was spent today before this process was started.

        Args:
            spent_today: by backend, in the currency of the prices.
        """
        day = self._day()
        for name, amount in spent_today.items():
            account = self._accounts.get(name)
            if account is not None:
                account.today = account.spent_on(day) + units(amount)

    def charge(self, backend: str, model: str, *, prompt: int, completion: int) -> None:
        """Charge tokens to a backend.

        Args:
            backend: its name; one without prices is not charged.
            model: the name as it is listed, with the backend's prefix.
            prompt: tokens of the prompt, cached ones too.
            completion: tokens of the completion.
        """
        account = self._accounts.get(backend)
        if account is None:
            return
        price = account.price_of(model)
        cost = prompt * price.prompt + completion * price.completion
        account.today = account.spent_on(self._day()) + cost
        account.total += cost

    def is_over(self, backend: str) -> bool:
        """Whether a backend has spent what it may today."""
        account = self._accounts.get(backend)
        if account is None or account.limit is None:
            return False
        return account.spent_on(self._day()) >= account.limit

    @property
    def seconds_left_today(self) -> float:
        """Until every limit begins anew."""
        return _DAY_SECONDS - self._wall_clock() % _DAY_SECONDS

    def report(self) -> list[Spent]:
        """What every backend that has prices or a limit has cost."""
        day = self._day()
        return [
            Spent(
                name,
                account.spent_on(day) / UNITS,
                account.total / UNITS,
                account.config.daily_spend,
            )
            for name, account in self._accounts.items()
        ]

    def _day(self) -> int:
        return int(self._wall_clock() // _DAY_SECONDS)


def units(amount: float) -> int:
    """An amount of the configuration in units.

    It is taken as it was written: 0.1 is a tenth, not the nearest binary fraction.
    """
    return _rounded(Decimal(repr(amount)) * UNITS)


def _opened(config: BackendConfig) -> _Account:
    limit = None if config.daily_spend is None else units(config.daily_spend)
    return _Account(config, _Prices(config.prices, config.prefix), limit)


def _is_billed(config: BackendConfig) -> bool:
    """Whether a backend's prices are paid to somebody.

    What runs on this machine or in its network costs nothing; there the prices say
    what the same work would have cost elsewhere.
    """
    host = urlsplit(config.url).hostname or ""
    try:
        return ip_address(host).is_global
    except ValueError:
        is_of_here = host.endswith((".local", ".lan", ".internal", ".home.arpa"))
        return "." in host and not is_of_here


def _price(price: Mapping[str, float]) -> Price:
    return Price(**{name: _per_token(amount) for name, amount in price.items()})


def _per_token(amount: float) -> int:
    """A price of a million tokens as units of one; exact to its sixth decimal."""
    return _rounded(Decimal(repr(amount)) * UNITS / _TOKENS_OF_A_PRICE)


def _rounded(amount: Decimal) -> int:
    return int(amount.to_integral_value(ROUND_HALF_UP))
