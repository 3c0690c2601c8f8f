"""How much one key may use, and how often one address may fail to log in.

Nothing here reads a clock or waits. The caller passes ``now`` (seconds, from
``time.monotonic``, so that a clock set back or forth changes no rate) and, where days
count, ``wall`` (seconds since 1970, from ``time.time``; days begin at 00:00 UTC). So
every rule can be tested without sleeping. Turning a refusal into a 429 answer is the
work of ``middleware.py``.

A key has one account for all endpoints and all addresses that we listen on. Accounts
go by the key's name, so they outlive a re-read keys file and a rotated secret; rates
that were changed there count from the next request on. Only keys that exist get an
account: a stranger who makes up keys costs no memory.
"""

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

# Without some slack, a caller who waits exactly as long as ``take`` advised can be
# refused again by the rounding of ``now - updated``. A microsecond covers clocks
# up to 1e9 seconds, where a float still resolves 0.12 microseconds.
_SLACK_SECONDS = 1e-6

_DAY_SECONDS = 86400

# What OpenAI's clients are told who ask about a limit that is not there: the largest
# number that every client's integer can hold.
UNLIMITED = 2**31 - 1

# CONTRACT: ten failed logins a minute, twenty at once. Enough for a program that was
# given a wrong key and for the person who mends it, and hopeless against 128 bits.
_FAILURES_PER_SECOND = 10 / 60
_FAILURES_BURST = 20

# Addresses that failed lately. About 3 MB when full; whoever commands more addresses
# than this gains 20 attempts for each one that he pushes out.
MAX_ADDRESSES = 10_000

# The longest form of an IP address (RFC 4291, 2.2) has 45 characters; anything longer
# came from a forged header and is cut.
_MAX_ADDRESS_LENGTH = 64

Kind = Literal["requests", "concurrency", "tokens", "daily_tokens"]
Headers = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class TokenBucket:
    """Holds up to ``burst`` tokens and gains ``rate`` of them a second."""

    rate: float  # tokens per second, above zero
    burst: float  # tokens, at least one
    tokens: float  # as of ``updated``; below zero while a debt is being repaid
    updated: float  # seconds, on the caller's clock

    def take(self, amount: float, now: float) -> float:
        """Spend ``amount`` tokens, or say how long to wait for them.

        Returns:
            0.0 if the tokens were spent; otherwise the seconds until they will be
            there, and nothing is spent. The value fits ``Retry-After``, rounded up.

        Raises:
            ValueError: ``amount`` exceeds ``burst``, so no wait would ever help.
        """
        wait = self.wait_for(amount, now)
        if not wait:
            self.tokens -= amount
        return wait

    def wait_for(self, amount: float, now: float) -> float:
        """As ``take``, but nothing is spent in either case."""
        if amount > self.burst:
            raise ValueError(f"cannot take {amount} tokens, burst is {self.burst}")
        if now > self.updated:
            self.refill(now)
        missing = amount - self.tokens
        if missing > self.rate * _SLACK_SECONDS:
            return missing / self.rate
        return 0.0

    def charge(self, amount: float, now: float) -> None:
        """Spend ``amount`` after the fact, going into debt if need be.

        The length of a completion is known only once it has been sent.
        """
        self.refill(now)
        self.tokens -= amount

    def refill(self, now: float) -> None:
        """Add what was gained since the last call; an earlier ``now`` adds nothing."""
        if now > self.updated:
            tokens = self.tokens + (now - self.updated) * self.rate
            self.tokens = tokens if tokens < self.burst else self.burst
            self.updated = now

    def change(self, rate: float, burst: float, now: float) -> None:
        """Go on with another rate and size; what is there stays, if it fits."""
        self.refill(now)
        self.rate = rate
        self.burst = burst
        self.tokens = min(burst, self.tokens)

    @property
    def remaining(self) -> int:
        """Whole tokens that can be taken, as of the last call; never below zero."""
        whole = math.floor(self.tokens + self.rate * _SLACK_SECONDS)
        return whole if whole > 0 else 0

    @property
    def seconds_until_full(self) -> float:
        """As of the last call."""
        return (self.burst - self.tokens) / self.rate


class Limited(Protocol):
    """What is asked of a key here; ``None`` is the default or no limit."""

    @property
    def name(self) -> str: ...
    @property
    def rps(self) -> float | None: ...
    @property
    def burst(self) -> int | None: ...
    @property
    def tpm(self) -> int | None: ...
    @property
    def concurrency(self) -> int | None: ...
    @property
    def daily_tokens(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a key has to wait."""

    kind: Kind
    retry_after: float  # seconds; as exact as can be computed, above zero
    message: str  # for the client: who, which limit, when again


@dataclass(slots=True)
class _Account:
    """What one key has used."""

    key: Limited  # as of the last call; another object means changed rates
    requests: TokenBucket
    tokens: TokenBucket | None  # only with tpm
    in_flight: int = 0
    day: int = 0  # days since 1970, of ``used_today``
    used_today: int = 0  # tokens

    def used_on(self, day: int) -> int:
        """Tokens used on that day; a new day, or a clock set back, starts at zero."""
        if day != self.day:
            self.day = day
            self.used_today = 0
        return self.used_today

    def is_idle(self, now: float, day: int) -> bool:
        """Whether a fresh account would be no different."""
        if self.in_flight or self.used_on(day):
            return False
        buckets = (
            [self.requests] if self.tokens is None else [self.requests, self.tokens]
        )
        return all(not bucket.wait_for(bucket.burst, now) for bucket in buckets)


@dataclass(slots=True)
class _Earlier:
    """What a key used before this process was started."""

    day: int  # days since 1970, of ``used_today``
    used_today: int
    lately: list[tuple[float, int]]  # moments on our clock, and tokens; oldest first


class Grant:
    """Leave to go on. Returned to ``Allowances.give_back`` when the request ends."""

    __slots__ = ("_account",)

    def __init__(self, account: _Account) -> None:
        self._account: _Account | None = account
        account.in_flight += 1

    def _end(self) -> None:
        if self._account is not None:
            self._account.in_flight -= 1
            self._account = None


class Allowances:
    """What each key may still use.

    A request asks with ``take``, ends with ``give_back``, and is charged for its
    tokens by ``charge`` once their number is known. ``headers`` tells the client.
    """

    def __init__(self, requests_per_second: float, burst: int) -> None:
        """Set what holds for keys that say nothing of their own."""
        self._rps = requests_per_second
        self._burst = burst
        self._accounts: dict[str, _Account] = {}
        self._earlier: dict[str, _Earlier] = {}  # of keys without an account so far

    def restore(
        self,
        used_today: Mapping[str, int],
        lately: Mapping[str, Sequence[tuple[float, int]]],
        now: float,
        wall: float,
    ) -> None:
        """Go on from what keys used before this process was started.

        Args:
            used_today: tokens by key, of the day that ``wall`` is in.
            lately: by key, oldest first: how many seconds ago, and how many tokens.
            now: as everywhere.
            wall: as everywhere.
        """
        for name in used_today.keys() | lately.keys():
            moments = [(now - ago, tokens) for ago, tokens in lately.get(name, ())]
            earlier = _Earlier(_day(wall), used_today.get(name, 0), moments)
            account = self._accounts.get(name)
            if account is None:
                self._earlier[name] = earlier
            else:
                _go_on_from(earlier, account)

    def change_defaults(
        self, requests_per_second: float, burst: int, now: float
    ) -> None:
        """Let other defaults hold from now on, for the accounts that are open too."""
        self._rps = requests_per_second
        self._burst = burst
        for account in self._accounts.values():
            self._apply_rates(account, account.key, now)

    def take(
        self, key: Limited, now: float, wall: float, *, costs_tokens: bool = True
    ) -> Grant | Refusal:
        """Let one request of ``key`` begin, or say why not.

        A refusal spends nothing. If several limits refuse, the slower kind is told:
        tokens of the day, tokens a minute, concurrency, requests a second. The first
        two hold only for what may cost tokens.
        """
        account = self._account(key, now)
        refusal = None
        if costs_tokens:
            refusal = _refused_for_today(account, wall) or _refused_for_tokens(
                account, now
            )
        refusal = refusal or _refused_for_concurrency(account)
        if refusal is not None:
            return refusal
        wait = account.requests.take(1, now)
        if wait:
            return Refusal("requests", wait, _requests_message(account, wait))
        return Grant(account)

    def give_back(self, grant: Grant) -> None:
        """Free the request's place. A second call for the same grant does nothing."""
        grant._end()

    def charge(self, name: str, tokens: int, now: float, wall: float) -> None:
        """Count tokens, prompt and completion together, that a request has used.

        They may exceed what was left. The debt delays later requests; the next day
        begins without it.
        """
        account = self._accounts.get(name)
        if account is None or tokens <= 0:
            return
        if account.tokens is not None:
            account.tokens.charge(tokens, now)
        account.used_today = account.used_on(_day(wall)) + tokens

    def headers(self, key: Limited, now: float, wall: float) -> Headers:
        """The headers that tell a client where it stands; for every counted answer.

        ``X-RateLimit-*`` as Go-inferencia sent them, and OpenAI's ``x-ratelimit-*``
        (https://platform.openai.com/docs/guides/rate-limits). The request limit is the
        burst. The token limit is ``tpm``, else ``daily_tokens``; a key that has
        neither gets 2147483647 for limit and remaining, and a reset of ``0s``.
        """
        account = self._account(key, now)
        requests = account.requests
        if now > requests.updated:  # after ``take`` it is not
            requests.refill(now)
        limit = str(int(requests.burst))
        remaining = str(requests.remaining)
        token_limit, tokens_remaining, tokens_reset = _token_state(account, now, wall)
        return (
            ("X-RateLimit-Limit", limit),
            ("X-RateLimit-Remaining", remaining),
            ("x-ratelimit-limit-requests", limit),
            ("x-ratelimit-remaining-requests", remaining),
            (
                "x-ratelimit-reset-requests",
                go_duration(requests.seconds_until_full),
            ),
            ("x-ratelimit-limit-tokens", str(token_limit)),
            ("x-ratelimit-remaining-tokens", str(tokens_remaining)),
            ("x-ratelimit-reset-tokens", go_duration(tokens_reset)),
        )

    def in_flight(self, name: str) -> int:
        """Requests of that key that have begun and not ended."""
        account = self._accounts.get(name)
        return 0 if account is None else account.in_flight

    def used_today(self, name: str, wall: float) -> int:
        """Tokens that the key has used since 00:00 UTC."""
        day = _day(wall)
        account = self._accounts.get(name)
        if account is not None:
            return account.used_on(day)
        earlier = self._earlier.get(name)
        return 0 if earlier is None or earlier.day != day else earlier.used_today

    def drop_idle(self, known: Container[str], now: float, wall: float) -> int:
        """Forget the accounts of keys that are gone, and say how many.

        To be called after the keys changed. An account that still differs from a fresh
        one is kept, so removing a key and adding it again wins nothing.
        """
        idle = [
            name
            for name, account in self._accounts.items()
            if name not in known and account.is_idle(now, _day(wall))
        ]
        for name in idle:
            del self._accounts[name]
        return len(idle)

    def __len__(self) -> int:
        """How many accounts there are."""
        return len(self._accounts)

    def _account(self, key: Limited, now: float) -> _Account:
        account = self._accounts.get(key.name)
        if account is None:
            account = self._opened(key, now)
            self._accounts[key.name] = account
        elif account.key is not key:
            self._apply_rates(account, key, now)
        return account

    def _opened(self, key: Limited, now: float) -> _Account:
        rate, burst = self._rates(key)
        tokens = None if key.tpm is None else _per_minute(key.tpm, now)
        account = _Account(key, TokenBucket(rate, burst, burst, now), tokens)
        earlier = self._earlier.pop(key.name, None)
        if earlier is not None:
            _go_on_from(earlier, account)
        return account

    def _apply_rates(self, account: _Account, key: Limited, now: float) -> None:
        account.key = key
        account.requests.change(*self._rates(key), now)
        if key.tpm is None:
            account.tokens = None
        elif account.tokens is None:
            account.tokens = _per_minute(key.tpm, now)
        else:
            account.tokens.change(key.tpm / 60, key.tpm, now)

    def _rates(self, key: Limited) -> tuple[float, int]:
        rate = self._rps if key.rps is None else key.rps
        return rate, self._burst if key.burst is None else key.burst


def _go_on_from(earlier: _Earlier, account: _Account) -> None:
    """Charge an account with what its key used earlier."""
    if account.day in (0, earlier.day):
        account.day = earlier.day
        account.used_today += earlier.used_today
    bucket = account.tokens
    if bucket is None or not earlier.lately:
        return
    debt = _per_minute(int(bucket.burst), earlier.lately[0][0])
    for moment, tokens in earlier.lately:
        debt.charge(tokens, moment)
    debt.refill(bucket.updated)
    bucket.tokens -= debt.burst - debt.tokens


def _per_minute(amount: int, now: float) -> TokenBucket:
    return TokenBucket(amount / 60, amount, amount, now)


def _day(wall: float) -> int:
    return int(wall // _DAY_SECONDS)


def _seconds_left_today(wall: float) -> float:
    return _DAY_SECONDS - wall % _DAY_SECONDS


def _refused_for_today(account: _Account, wall: float) -> Refusal | None:
    limit = account.key.daily_tokens
    if limit is None or account.used_on(_day(wall)) < limit:
        return None
    message = (
        f'key "{account.key.name}" has used its {limit} tokens for today; '
        "more from 00:00 UTC on"
    )
    return Refusal("daily_tokens", _seconds_left_today(wall), message)


def _refused_for_tokens(account: _Account, now: float) -> Refusal | None:
    """Refuse while the bucket is empty or in debt.

    How much the request will cost is not known yet; one whole token opens the door.
    """
    if account.tokens is None:
        return None
    wait = account.tokens.wait_for(1, now)
    if not wait:
        return None
    message = (
        f'key "{account.key.name}" may use {_count(account.key.tpm, "token")} '
        f"a minute; try again in {_wait_text(wait)}"
    )
    return Refusal("tokens", wait, message)


def _refused_for_concurrency(account: _Account) -> Refusal | None:
    limit = account.key.concurrency
    if limit is None or account.in_flight < limit:
        return None
    message = (
        f'key "{account.key.name}" may have {_count(limit, "request")} running at a '
        "time; try again when one has ended"
    )
    return Refusal("concurrency", 1.0, message)


def _requests_message(account: _Account, wait: float) -> str:
    return (
        f'key "{account.key.name}" may send '
        f"{_count(account.requests.rate, 'request')} a second; "
        f"try again in {_wait_text(wait)}"
    )


def _token_state(account: _Account, now: float, wall: float) -> tuple[int, int, float]:
    """Limit, remaining tokens, and seconds until all of them are back."""
    tokens = account.tokens
    if tokens is not None:
        if now > tokens.updated:
            tokens.refill(now)
        return int(tokens.burst), tokens.remaining, tokens.seconds_until_full
    daily = account.key.daily_tokens
    if daily is None:
        return UNLIMITED, UNLIMITED, 0.0
    used = account.used_on(_day(wall))
    return daily, max(0, daily - used), _seconds_left_today(wall) if used else 0.0


def _count(number: float | None, noun: str) -> str:
    return f"{number:.15g} {noun}" + ("" if number == 1 else "s")


def _wait_text(seconds: float) -> str:
    """Seconds, rounded up so that waiting that long is enough: ``0.4 s``, ``12 s``."""
    if seconds < 10:
        return f"{math.ceil(seconds * 10) / 10:g} s"
    return f"{math.ceil(seconds)} s"


def go_duration(seconds: float) -> str:
    """A duration as Go prints it, rounded up to milliseconds: ``6m0s``, ``120ms``.

    That is the form of OpenAI's reset headers.
    """
    milliseconds = math.ceil(seconds * 1000 - _SLACK_SECONDS)
    if milliseconds <= 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    whole, thousandths = divmod(milliseconds, 1000)
    fraction = f".{thousandths:03d}".rstrip("0") if thousandths else ""
    minutes, whole = divmod(whole, 60)
    if not minutes:
        return f"{whole}{fraction}s"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{whole}{fraction}s"


class FailedLogins:
    """How often an address has presented a bad key lately.

    Only failures are counted, and a good key is never asked about here: behind a
    proxy all clients may share one address, and a stranger must not lock them out.
    """

    def __init__(self, max_addresses: int = MAX_ADDRESSES) -> None:
        self._max_addresses = max_addresses
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()  # oldest first

    def failed(self, address: str, now: float) -> float:
        """Count one failure.

        Returns:
            0.0 if it is to be answered 401; otherwise 429, and the seconds until a
            failure will be answered 401 again. Those do not count, so the wait ends
            for a program that keeps trying.
        """
        network = _network(address)
        bucket = self._buckets.get(network)
        if bucket is None:
            bucket = TokenBucket(
                _FAILURES_PER_SECOND, _FAILURES_BURST, _FAILURES_BURST, now
            )
            self._buckets[network] = bucket
            if len(self._buckets) > self._max_addresses:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(network)
        return bucket.take(1, now)

    def allowed(self, address: str, now: float) -> bool:
        """Whether another failure of this address would be answered 401."""
        bucket = self._buckets.get(_network(address))
        return bucket is None or not bucket.wait_for(1, now)

    def __len__(self) -> int:
        """How many addresses are remembered."""
        return len(self._buckets)


def _network(address: str) -> str:
    """Whom to count an address as.

    An IPv6 customer has a /64 at least (RFC 6177), so single addresses mean nothing.
    What is not an IP address (a Unix socket's peer) counts as itself.
    """
    address = address[:_MAX_ADDRESS_LENGTH]
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return (ip.packed[:8]).hex()
