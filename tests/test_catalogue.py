"""Promises of the catalogue: the right backend, at once, whatever is broken."""

import asyncio
import logging
import os
import resource
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from inferencia.backends.base import Backend
from inferencia.backends.brands import make_backend
from inferencia.catalogue.affinity import affinity_key
from inferencia.catalogue.choosing import MAX_AFFINITIES, Catalogue, Resolution, nearest
from inferencia.catalogue.watching import REFRESH_SECONDS
from inferencia.errors import BackendUnavailable, ModelNotFound
from inferencia.secret import Secret
from inferencia.settings import BackendConfig, RoutingConfig, WatchdogConfig
from scripted import Scripted, always, listed, response

LOADING = {"error": {"message": "Loading model", "type": "unavailable_error"}}
# Long intervals: what a test sees was asked for by it, and by nothing else.
CALM = WatchdogConfig(interval=3600, fail_threshold=3, request_timeout=5)
EAGER = WatchdogConfig(interval=0.005, fail_threshold=3, request_timeout=5)


def everything(model: str) -> bool:
    return True


class Clock:
    """The clock that breakers and refreshes are asked with."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Changes:
    """Notes each change, so that tests can wait for what they expect."""

    def __init__(self) -> None:
        self.count = 0
        self._came = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._came.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._came.clear()
                await self._came.wait()


def backend_for(url: str, name: str = "box", **config: Any) -> Backend:
    return make_backend(BackendConfig(name=name, url=url, **config), place=name)


def fixed(name: str, *models: str, **config: Any) -> Backend:
    """A backend that is known by its configured names; nothing is ever asked."""
    return backend_for("http://127.0.0.1:1", name, models=models, **config)


def idle(*backends: Backend, clock: Clock | None = None, **routing: Any) -> Catalogue:
    """A catalogue that was not started; its backends count as listed."""
    for backend in backends:
        backend.is_listed = False
    return Catalogue(backends, RoutingConfig(**routing), CALM, clock=clock or Clock())


def found(
    catalogue: Catalogue, requested: str | None = None, **further: Any
) -> Resolution:
    return catalogue.resolve(requested, further.pop("may_see", everything), **further)


def names(resolution: Resolution) -> list[str]:
    return [candidate.backend.name for candidate in resolution.candidates]


def offered(catalogue: Catalogue) -> list[str]:
    return [entry["id"] for entry in catalogue.listing(everything)]


def tasks_of_catalogues() -> list[str]:
    """The names of the functions that tasks of catalogues run."""
    names = [getattr(t.get_coro(), "__qualname__", "") for t in asyncio.all_tasks()]
    return [name for name in names if name.startswith(("Seat.", "Roster."))]


# Names.


async def test_a_name_resolves_exactly_before_all_else() -> None:
    catalogue = idle(
        fixed("a", "qwen", "qwen:latest", "other"), aliases={"qwen": "other"}
    )
    assert found(catalogue, "qwen").model == "qwen"


async def test_latest_is_implied_before_an_alias_is_looked_for() -> None:
    catalogue = idle(fixed("a", "qwen:latest", "other"), aliases={"qwen": "other"})
    assert found(catalogue, "qwen").model == "qwen:latest"


async def test_an_exact_alias_comes_before_globs_and_globs_in_their_order() -> None:
    catalogue = idle(
        fixed("a", "one", "two", "three"),
        aliases={"gpt-*": "one", "gpt-4": "two", "*": "three"},
    )
    assert found(catalogue, "gpt-4").model == "two"
    assert found(catalogue, "gpt-5").model == "one"
    assert found(catalogue, "claude").model == "three"


async def test_an_alias_may_lead_to_an_implied_latest() -> None:
    catalogue = idle(fixed("a", "qwen:latest"), aliases={"x": "qwen"})
    assert found(catalogue, "x").model == "qwen:latest"


async def test_an_alias_that_leads_nowhere_is_unknown_and_says_so() -> None:
    catalogue = await reached(fixed("a", "real"), aliases={"x": "gone"})
    with pytest.raises(ModelNotFound) as failure:
        found(catalogue, "x")
    assert '"x" is not known (an alias of "gone"' in failure.value.message
    await catalogue.aclose()


async def reached(*backends: Backend, **routing: Any) -> Catalogue:
    """As ``idle``, with backends that have listed the models they are fixed to."""
    catalogue = idle(*backends, **routing)
    for seat in catalogue._seats:
        seat.models = seat.backend.exact_models
        seat.backend.is_listed = True
    return catalogue


async def test_names_are_case_sensitive_and_the_nearest_is_told() -> None:
    catalogue = await reached(fixed("a", "qwen3:8b", "llama"))
    with pytest.raises(ModelNotFound) as failure:
        found(catalogue, "Qwen3")
    assert failure.value.message == (
        'model "Qwen3" is not known; nearest: "qwen3:8b". GET /v1/models lists all.'
    )
    assert failure.value.param == "model"


async def test_a_refused_name_gets_the_same_words_as_an_unknown_one() -> None:
    catalogue = await reached(
        fixed("a", "secret-model", "public"), aliases={"alias": "secret-model"}
    )

    def may_see(model: str) -> bool:
        return model == "public"

    messages = set()
    for name in ("secret-model", "secret-modem", "alias", "aliaz"):
        with pytest.raises(ModelNotFound) as failure:
            found(catalogue, name, may_see=may_see)
        messages.add(failure.value.message.replace(name, "NAME"))
    assert messages == {'model "NAME" is not known. GET /v1/models lists all.'}


async def test_the_key_is_asked_about_the_resolved_name() -> None:
    asked = []

    def may_see(model: str) -> bool:
        asked.append(model)
        return True

    catalogue = idle(fixed("a", "real"), aliases={"x": "real"})
    assert found(catalogue, "x", may_see=may_see).model == "real"
    assert set(asked) == {"real"}


@pytest.mark.parametrize("name", ["x" * 100_000, "\x00", "*", "[", "a\nb", "\udcff"])
async def test_odd_names_are_simply_unknown(name: str) -> None:
    catalogue = await reached(fixed("a", "real"), aliases={"y*": "real"})
    with pytest.raises(ModelNotFound) as failure:
        found(catalogue, name)
    assert len(failure.value.body()) < 4000


async def test_without_a_name_the_default_model_is_meant() -> None:
    catalogue = idle(fixed("a", "a", "b"), default_model="x", aliases={"x": "b"})
    assert found(catalogue, None).model == "b"
    assert found(catalogue, "").model == "b"


async def test_without_a_default_it_is_the_first_that_the_key_may_see() -> None:
    catalogue = idle(fixed("a", "b", "c", "a"))
    assert found(catalogue).model == "a"
    assert found(catalogue, may_see=lambda model: model != "a").model == "b"


async def test_without_a_name_a_model_that_is_up_goes_before_one_that_is_down() -> None:
    down = fixed("a", "a")
    catalogue = idle(down, fixed("b", "b"))
    down.is_down = True
    assert found(catalogue).model == "b"


async def test_a_key_that_may_see_nothing_is_told_so() -> None:
    catalogue = await reached(fixed("a", "a"))
    with pytest.raises(ModelNotFound, match="no model is available to this key"):
        found(catalogue, may_see=lambda model: False)


async def test_the_prefix_is_part_of_the_name_and_not_sent_up() -> None:
    catalogue = idle(fixed("a", "m", prefix="box/"))
    (candidate,) = found(catalogue, "box/m").candidates
    assert candidate.upstream_id == "m"


async def test_fallbacks_are_told_for_the_resolved_and_the_requested_name() -> None:
    catalogue = idle(
        fixed("a", "real", "plain"),
        aliases={"x": "real", "y": "plain"},
        fallbacks={"real": ("one", "two"), "y": ("three",), "off": ("four",)},
        default_model="real",
    )
    assert found(catalogue, "real").fallbacks == ("one", "two")
    assert found(catalogue, "x").fallbacks == ("one", "two")
    assert found(catalogue, None).fallbacks == ("one", "two")
    assert found(catalogue, "y").fallbacks == ("three",)
    assert found(catalogue, "plain").fallbacks == ()
    assert catalogue.fallbacks("off") == ("four",)


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("qwen", "qwen3:8b"),
        ("QWEN3", "qwen3:8b"),
        ("lama", "llama-3.1"),
        ("instruct", "Meta-Instruct"),
        ("zzzz", None),
        ("", None),
    ],
)
def test_the_nearest_name_holds_or_resembles_what_was_asked(
    wanted: str, near: str | None
) -> None:
    known = ["qwen3:8b", "qwen3:8b-long", "llama-3.1", "Meta-Instruct"]
    assert nearest(wanted, known) == near


# Order of candidates.


async def test_priority_decides_before_affinity_and_load() -> None:
    low, high = fixed("low", "m", priority=1), fixed("high", "m", priority=2)
    catalogue = idle(low, high)
    key = b"k"
    catalogue.note_served(key, low)
    for _ in range(5):
        high.begin(0.0)
    assert names(found(catalogue, "m", affinity_key=key)) == ["high", "low"]


async def test_affinity_decides_before_load_but_not_for_a_full_backend() -> None:
    one = fixed("one", "m", max_concurrency=2)
    two = fixed("two", "m", max_concurrency=2)
    catalogue = idle(one, two)
    catalogue.note_served(b"k", one)
    one.begin(0.0)
    assert names(found(catalogue, "m", affinity_key=b"k")) == ["one", "two"]
    assert names(found(catalogue, "m", affinity_key=b"other")) == ["two", "one"]
    one.begin(0.0)
    assert names(found(catalogue, "m", affinity_key=b"k")) == ["two", "one"]


async def test_affinity_can_be_switched_off() -> None:
    one, two = fixed("one", "m"), fixed("two", "m")
    catalogue = idle(one, two, affinity=False)
    catalogue.note_served(b"k", one)
    one.begin(0.0)
    assert names(found(catalogue, "m", affinity_key=b"k")) == ["two", "one"]


async def test_remembered_conversations_are_bounded_and_the_oldest_go() -> None:
    one, two = fixed("one", "m"), fixed("two", "m")
    catalogue = idle(one, two)
    catalogue.note_served(b"first", one)
    one.begin(0.0)
    for number in range(MAX_AFFINITIES - 1):
        catalogue.note_served(b"%d" % number, two)
    assert names(found(catalogue, "m", affinity_key=b"first"))[0] == "one"
    catalogue.note_served(b"more", two)  # drops 0, since first was just used
    assert names(found(catalogue, "m", affinity_key=b"first"))[0] == "one"
    for number in range(MAX_AFFINITIES):
        catalogue.note_served(b"%d" % number, two)
    assert names(found(catalogue, "m", affinity_key=b"first"))[0] == "two"


async def test_the_least_loaded_goes_first_by_its_capacity() -> None:
    small = fixed("small", "m", max_concurrency=2)
    large = fixed("large", "m", max_concurrency=8)
    catalogue = idle(small, large)
    small.begin(0.0)
    for _ in range(3):
        large.begin(0.0)
    assert names(found(catalogue, "m")) == ["large", "small"]


async def test_equals_take_turns() -> None:
    catalogue = idle(*(fixed(name, "m") for name in "abc"))
    firsts = Counter(names(found(catalogue, "m"))[0] for _ in range(30))
    assert firsts == {"a": 10, "b": 10, "c": 10}
    assert sorted(names(found(catalogue, "m"))) == ["a", "b", "c"]


async def test_equals_take_turns_beside_others_of_lower_rank() -> None:
    spare = fixed("spare", "m", priority=-1)
    catalogue = idle(fixed("a", "m"), fixed("b", "m"), spare)
    firsts = Counter(names(found(catalogue, "m"))[0] for _ in range(30))
    assert firsts == {"a": 15, "b": 15}


async def test_a_backend_that_is_down_or_broken_is_no_candidate() -> None:
    clock = Clock()
    down, broken, good = fixed("down", "m"), fixed("broken", "m"), fixed("good", "m")
    catalogue = idle(down, broken, good, clock=clock)
    down.is_down = True
    for _ in range(5):
        broken.breaker.failed(clock.now)
    assert names(found(catalogue, "m")) == ["good"]
    clock.now += 10
    assert sorted(names(found(catalogue, "m"))) == ["broken", "good"]


async def test_an_open_breaker_is_unavailable_with_the_time_that_is_left() -> None:
    clock = Clock()
    backend = fixed("box", "m")
    catalogue = idle(backend, clock=clock)
    for _ in range(5):
        backend.breaker.failed(clock.now)
    clock.now += 3
    with pytest.raises(BackendUnavailable) as failure:
        found(catalogue, "m")
    assert failure.value.headers["Retry-After"] == "7"
    assert 'backend "box" failed too often' in failure.value.message


# Conversations.


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_later_turns_of_a_conversation_have_the_same_key() -> None:
    first: dict[str, Any] = {"messages": [turn("system", "s"), turn("user", "hello")]}
    later = {
        "messages": [*first["messages"], turn("assistant", "hi"), turn("user", "more")],
        "temperature": 1,
    }
    assert affinity_key("alice", "m", first) == affinity_key("alice", "m", later)


@pytest.mark.parametrize(
    "other",
    [
        ("bob", "m", {"messages": [turn("system", "s"), turn("user", "hello")]}),
        ("alice", "n", {"messages": [turn("system", "s"), turn("user", "hello")]}),
        ("alice", "m", {"messages": [turn("system", "t"), turn("user", "hello")]}),
        ("alice", "m", {"messages": [turn("system", "s"), turn("user", "hullo")]}),
        ("alice", "m", {"messages": [turn("user", "hello")]}),
    ],
)
def test_other_conversations_have_other_keys(
    other: tuple[str, str, Mapping[str, Any]],
) -> None:
    ours = {"messages": [turn("system", "s"), turn("user", "hello")]}
    assert affinity_key(*other) != affinity_key("alice", "m", ours)


def test_every_api_has_conversations() -> None:
    requests: list[dict[str, Any]] = [
        {"messages": [turn("user", [{"type": "text", "text": "hello"}])]},
        {"system": "s", "messages": [turn("user", "hello")]},
        {"input": "hello"},
        {"instructions": "s", "input": [turn("user", "hello")]},
        {"input": ["hello", "world"]},
        {"prompt": "hello"},
        {"prompt": ["hello"]},
    ]
    keys = [affinity_key("a", "m", request) for request in requests]
    assert all(key is not None and len(key) == 16 for key in keys)


def test_of_a_prompt_only_the_beginning_counts() -> None:
    assert affinity_key("a", "m", {"prompt": "x" * 256}) == affinity_key(
        "a", "m", {"prompt": "x" * 256 + "y"}
    )


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"messages": []},
        {"messages": None},
        {"messages": 5},
        {"input": [1, 2, 3]},
        {"messages": [None]},
        {"prompt": ""},
    ],
)
def test_what_has_no_text_is_no_conversation(values: dict[str, Any]) -> None:
    assert affinity_key("a", "m", values) is None


def test_deep_large_and_odd_conversations_are_taken_calmly() -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    many = turn("user", [{"type": "text", "text": str(n)} for n in range(100_000)])
    for message in (turn("user", deep), many, turn("user", "\ud800" * 10_000_000)):
        affinity_key("a", "m", {"messages": [message]})


# The list for clients.


async def until_asked(server: Scripted, times: int = 1) -> None:
    async with asyncio.timeout(10):
        while len(server.received) < times:
            server.asked.clear()
            await server.asked.wait()


async def test_lists_are_merged_sorted_and_without_doubles() -> None:
    changes = Changes()
    one = response(listed("b", "shared", created=5, owned_by="me", context_length=10))
    two = response(listed("a", "shared"))
    async with Scripted(always(one)) as first, Scripted(always(two)) as second:
        catalogue = Catalogue(
            [backend_for(first.url, "one"), backend_for(second.url, "two")],
            RoutingConfig(),
            CALM,
            on_change=changes,
        )
        async with catalogue:
            await changes.until(lambda: len(offered(catalogue)) == 3)
            a, b, shared = catalogue.listing(everything)
            assert (a["id"], b["id"], shared["id"]) == ("a", "b", "shared")
            assert a["owned_by"] == "two" and type(a["created"]) is int
            expected = {"object": "model", "created": 5, "owned_by": "me"}
            assert b == {"id": "b", **expected, "context_length": 10}
            assert shared == {**b, "id": "shared"}
            assert sorted(names(found(catalogue, "shared"))) == ["one", "two"]
            seen = catalogue.listing(lambda model: model != "b")
            assert [entry["id"] for entry in seen] == ["a", "shared"]


async def test_records_show_nothing_of_the_machine_behind() -> None:
    changes = Changes()
    record = {
        "id": "chat-a",
        "status": {"args": ["/usr/bin/llama-server", "--api-key", "canary"]},
        "root": "/home/canary/models",
        "permission": [{"id": "canary"}],
        "meta": {"n_ctx": 4096},
        "max_model_len": 4096,
        "name": "n" * 100_000,
        "owned_by": 5,
        "created": "yesterday",
    }
    async with Scripted(always(response({"data": [record]}))) as server:
        backends = [backend_for(server.url)]
        catalogue = Catalogue(backends, RoutingConfig(), CALM, on_change=changes)
        async with catalogue:
            await changes.until(lambda: offered(catalogue))
            (entry,) = catalogue.listing(everything)
    assert set(entry) == {
        "id",
        "object",
        "created",
        "owned_by",
        "meta",
        "max_model_len",
    }
    assert entry["owned_by"] == "box"


async def test_a_configured_name_is_offered_before_and_replaced_by_a_list() -> None:
    changes = Changes()
    async with Scripted(always(response(listed("/m/real", "more")))) as server:
        backend = backend_for(server.url, models=("real",))
        catalogue = Catalogue([backend], RoutingConfig(), CALM, on_change=changes)
        assert offered(catalogue) == ["real"]
        assert found(catalogue, "real").candidates[0].upstream_id == "real"
        async with catalogue:
            await until_asked(server)
            await changes.until(
                lambda: found(catalogue, "real").candidates[0].upstream_id == "/m/real"
            )
            assert offered(catalogue) == ["real"]


# The watchdog.


async def test_a_machine_that_says_nothing_holds_up_nobody_else() -> None:
    changes = Changes()
    async with (
        Scripted(always(None)) as silent,
        Scripted(always(response(listed("m")))) as good,
    ):
        catalogue = Catalogue(
            [backend_for(silent.url, "silent"), backend_for(good.url, "good")],
            RoutingConfig(),
            CALM,
            on_change=changes,
        )
        async with catalogue:
            await until_asked(silent)
            await changes.until(lambda: offered(catalogue) == ["m"])
            assert names(found(catalogue, "m")) == ["good"]
        assert len(silent.received) == 1


async def test_it_goes_down_after_failures_in_a_row_and_comes_back_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "inferencia.catalogue")
    changes = Changes()
    async with Scripted(always(response(listed("m")))) as server:
        backend = backend_for(server.url)
        catalogue = Catalogue([backend], RoutingConfig(), EAGER, on_change=changes)
        async with catalogue:
            await changes.until(lambda: offered(catalogue))
            assert catalogue.is_ready
            server.script = always(response(b"", status=500))
            await changes.until(lambda: backend.is_down)
            asked = len(server.received)
            assert not catalogue.is_ready
            assert offered(catalogue) == ["m"]
            with pytest.raises(BackendUnavailable) as failure:
                found(catalogue, "m")
            assert "status 500" in failure.value.message
            assert "Retry-After" in failure.value.headers
            await until_asked(server, asked + 3)  # it stays down, and is still asked
            server.script = always(response(listed("m")))
            await changes.until(lambda: not backend.is_down)
            assert names(found(catalogue, "m")) == ["box"]
    levels = Counter(r.levelname for r in caplog.records if "box" in r.getMessage())
    assert levels["WARNING"] == 1
    assert sum("back in service" in r.getMessage() for r in caplog.records) == 1
    assert sum("out of service" in r.getMessage() for r in caplog.records) == 1


async def test_a_server_is_not_taken_down_when_we_have_no_socket_to_ask_it_with() -> (
    None
):
    async with Scripted(always(response(listed("m")))) as server:
        backend = backend_for(server.url)
        catalogue = Catalogue([backend], RoutingConfig(), EAGER)
        (seat,) = catalogue._seats
        await seat.probe()
        await backend.carrier.aclose()
        backend.carrier = backend_for(server.url).carrier
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open(os.devnull, os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            for _ in range(EAGER.fail_threshold + 1):
                await seat.probe()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(server.received) == 1, "there was a socket"
        assert not backend.is_down and names(found(catalogue, "m")) == ["box"]
        await catalogue.aclose()


async def test_fewer_failures_than_the_threshold_do_not_take_it_down() -> None:
    answers = [b"", b"", response(listed("m"))]
    count = 0

    def script(_: object) -> bytes:
        nonlocal count
        count += 1
        return answers[count % 3]

    changes = Changes()
    async with Scripted(script) as server:
        backend = backend_for(server.url)
        catalogue = Catalogue([backend], RoutingConfig(), EAGER, on_change=changes)
        async with catalogue:
            await until_asked(server, 12)
            assert not backend.is_down
    assert changes.count == 1  # the list came, and nothing else happened


async def test_loading_is_neither_down_nor_does_it_lose_the_list() -> None:
    changes = Changes()
    async with Scripted(always(response(listed("m")))) as server:
        backend = backend_for(server.url, type="llamacpp")
        catalogue = Catalogue([backend], RoutingConfig(), EAGER, on_change=changes)
        async with catalogue:
            await changes.until(lambda: offered(catalogue))
            server.script = always(response(LOADING, status=503))
            await until_asked(server, len(server.received) + 6)
            assert not backend.is_down
            assert names(found(catalogue, "m")) == ["box"]


async def test_a_server_that_loads_from_the_start_is_unavailable_not_unknown() -> None:
    async with Scripted(always(response(LOADING, status=503))) as server:
        backend = backend_for(server.url, type="llamacpp")
        catalogue = Catalogue([backend], RoutingConfig(), CALM)
        async with catalogue:
            await until_asked(server)
            await catalogue.refresh()
            with pytest.raises(BackendUnavailable, match="still loading its model"):
                found(catalogue, "m")
            assert not catalogue.is_ready


async def test_what_may_be_the_model_that_is_being_loaded_is_not_unknown() -> None:
    changes = Changes()
    loading = always(response(LOADING, status=503))
    async with (
        Scripted(loading) as slow,
        Scripted(always(response(listed("m")))) as good,
    ):
        backends = [backend_for(slow.url, "slow"), backend_for(good.url, "good")]
        catalogue = Catalogue(backends, RoutingConfig(), CALM, on_change=changes)
        async with catalogue:
            await catalogue.refresh()
            with pytest.raises(BackendUnavailable, match=r'"slow" .* still loading'):
                found(catalogue, "other")
            assert names(found(catalogue, "m")) == ["good"]


async def test_if_nobody_was_ever_reached_the_remedy_is_told() -> None:
    async with Scripted(always(None)) as server:
        url = server.url
    backend = make_backend(
        BackendConfig(name="mlx", type="mlx", url=url), place="backends[0]"
    )
    catalogue = Catalogue([backend], RoutingConfig(), CALM)
    async with catalogue:
        await catalogue.refresh()
        with pytest.raises(BackendUnavailable) as failure:
            found(catalogue, "anything")
    message = failure.value.message
    assert f'backend "mlx" at {url.removeprefix("http://")} refuses' in message
    assert "backends[0].url" in message


async def test_without_any_backend_that_is_said() -> None:
    catalogue = idle()
    with pytest.raises(BackendUnavailable, match="no backend is configured"):
        found(catalogue, "m")
    assert not catalogue.is_ready
    assert catalogue.listing(everything) == []


async def test_once_somebody_was_reached_an_unknown_name_is_unknown() -> None:
    changes = Changes()
    async with Scripted(always(response(listed("m")))) as server:
        backends = [fixed("off"), backend_for(server.url)]
        catalogue = Catalogue(backends, RoutingConfig(), CALM, on_change=changes)
        async with catalogue:
            await changes.until(lambda: offered(catalogue))
            with pytest.raises(ModelNotFound):
                found(catalogue, "other")


async def test_a_cloud_is_asked_seldom_and_never_taken_down() -> None:
    async with Scripted(always(response(b"", status=500))) as server:
        backend = backend_for(
            server.url, type="openrouter", models=("m",), api_key=Secret("sk-a")
        )
        eager = WatchdogConfig(interval=0.001, fail_threshold=1, request_timeout=5)
        catalogue = Catalogue([backend], RoutingConfig(), eager)
        async with catalogue:
            await until_asked(server, 4)
            assert not backend.is_down
            assert names(found(catalogue, "m")) == ["box"]
            assert catalogue.is_ready
            server.script = always(response(listed("m")))
            await until_asked(server, 5)
            count = len(server.received)
            await catalogue.refresh()
            assert len(server.received) == count


async def test_a_fault_in_a_backends_code_does_not_end_its_watch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = Changes()
    async with Scripted(always(response(listed("m")))) as server:
        backend = backend_for(server.url)
        whole = backend._offered

        def broken(records: Any) -> Any:
            backend._offered = whole  # type: ignore[method-assign]
            raise RuntimeError("our own fault")

        backend._offered = broken  # type: ignore[method-assign]
        catalogue = Catalogue([backend], RoutingConfig(), EAGER, on_change=changes)
        async with catalogue:
            await changes.until(lambda: offered(catalogue) == ["m"])
    assert "our own fault" in caplog.text


# Asking again.


async def test_a_model_that_appears_is_found_by_a_refresh() -> None:
    clock = Clock()
    changes = Changes()
    async with Scripted(always(response(listed("old")))) as server:
        catalogue = Catalogue(
            [backend_for(server.url)],
            RoutingConfig(),
            CALM,
            on_change=changes,
            clock=clock,
        )
        async with catalogue:
            await changes.until(lambda: offered(catalogue))
            server.script = always(response(listed("old", "new")))
            await catalogue.refresh()  # too soon after the last one
            assert offered(catalogue) == ["old"]
            clock.now += REFRESH_SECONDS
            await asyncio.gather(*(catalogue.refresh() for _ in range(50)))
            assert offered(catalogue) == ["new", "old"]
            assert len(server.received) == 2


async def test_a_refresh_right_after_the_start_waits_for_the_first_list() -> None:
    async with Scripted(always(response(listed("m")))) as server:
        backends = [backend_for(server.url)]
        async with Catalogue(backends, RoutingConfig(), CALM) as catalogue:
            await catalogue.refresh()
            assert offered(catalogue) == ["m"]
        assert len(server.received) == 1


async def test_a_refresh_before_the_start_does_nothing() -> None:
    await idle(fixed("a", "m")).refresh()


async def test_a_refresh_does_not_wait_for_a_machine_that_is_down() -> None:
    clock = Clock()
    changes = Changes()
    quick = WatchdogConfig(interval=3600, fail_threshold=1, request_timeout=5)
    async with Scripted(always(b"")) as server:
        backend = backend_for(server.url)
        catalogue = Catalogue(
            [backend], RoutingConfig(), quick, on_change=changes, clock=clock
        )
        async with catalogue:
            await changes.until(lambda: backend.is_down)
            server.script = always(None)  # would hold a waiter up for seconds
            clock.now += REFRESH_SECONDS
            server.asked.clear()
            await asyncio.wait_for(catalogue.refresh(), 1)
            await asyncio.wait_for(server.asked.wait(), 5)  # but it was asked


async def test_asking_for_a_model_that_is_down_has_its_backend_probed_at_once() -> None:
    clock = Clock()
    changes = Changes()
    quick = WatchdogConfig(interval=3600, fail_threshold=1, request_timeout=5)
    async with Scripted(always(b"")) as server:
        backend = backend_for(server.url, models=("m",))
        catalogue = Catalogue(
            [backend], RoutingConfig(), quick, on_change=changes, clock=clock
        )
        async with catalogue:
            await changes.until(lambda: backend.is_down)
            server.script = always(response(listed("m")))
            clock.now += REFRESH_SECONDS
            with pytest.raises(BackendUnavailable):
                found(catalogue, "m")
            await changes.until(lambda: not backend.is_down)
            assert names(found(catalogue, "m")) == ["box"]


async def test_what_failed_before_a_restart_is_not_held_against_an_engine() -> None:
    clock = Clock()
    slow = WatchdogConfig(interval=3600, fail_threshold=3, request_timeout=5)
    async with Scripted(always(response(listed("m")))) as server:
        backend = backend_for(server.url)
        catalogue = Catalogue([backend], RoutingConfig(), slow, clock=clock)
        async with catalogue:
            await catalogue.refresh()
            for _ in range(5):
                backend.breaker.failed(clock.now)
            server.script = always(b"")  # it is gone, and a request asks for it
            asked = len(server.received)
            clock.now += REFRESH_SECONDS
            with pytest.raises(BackendUnavailable):
                found(catalogue, "m")
            await until_asked(server, asked + 1)
            await catalogue.refresh()
            assert not backend.is_down
            assert not backend.breaker.admits(clock.now)
            server.script = always(response(listed("m")))
            clock.now += REFRESH_SECONDS
            await catalogue.refresh()
            assert names(found(catalogue, "m")) == ["box"]


async def test_an_engine_that_was_unreachable_is_taken_back_when_it_lists() -> None:
    clock = Clock()
    async with Scripted(always(response(listed("m")))) as server:
        backend = backend_for(server.url)
        catalogue = Catalogue([backend], RoutingConfig(), CALM, clock=clock)
        async with catalogue:
            await catalogue.refresh()
            for _ in range(5):
                turn = backend.begin(clock.now)
                turn.failed(clock.now, unreachable=True)
                turn.end()
            assert not backend.breaker.admits(clock.now)
            clock.now += REFRESH_SECONDS
            await catalogue.refresh()
            assert names(found(catalogue, "m")) == ["box"]


async def test_listing_models_all_along_does_not_excuse_failed_requests() -> None:
    clock = Clock()
    async with Scripted(always(response(listed("m")))) as server:
        backend = backend_for(server.url)
        catalogue = Catalogue([backend], RoutingConfig(), CALM, clock=clock)
        async with catalogue:
            await catalogue.refresh()
            for _ in range(5):
                backend.breaker.failed(clock.now)
            clock.now += REFRESH_SECONDS
            await catalogue.refresh()
            with pytest.raises(BackendUnavailable):
                found(catalogue, "m")


# Life.


async def test_replacing_keeps_what_stays_and_closes_what_goes_when_it_is_idle() -> (
    None
):
    changes = Changes()
    async with (
        Scripted(always(response(listed("a")))) as first,
        Scripted(always(response(listed("b")))) as second,
        Scripted(always(response(listed("c")))) as third,
    ):
        stays, goes = backend_for(first.url, "stays"), backend_for(second.url, "goes")
        catalogue = Catalogue([stays, goes], RoutingConfig(), CALM, on_change=changes)
        closed = asyncio.Event()
        close = goes.aclose

        async def note_closing() -> None:
            closed.set()
            await close()

        goes.aclose = note_closing  # type: ignore[method-assign]
        async with catalogue:
            await changes.until(lambda: offered(catalogue) == ["a", "b"])
            stays.breaker.failed(0.0)
            stream = goes.begin(0.0)
            comes = backend_for(third.url, "comes")
            await catalogue.replace([comes, stays], RoutingConfig(aliases={"x": "a"}))
            assert offered(catalogue) == ["a"]
            assert found(catalogue, "x").candidates[0].backend is stays
            await changes.until(lambda: offered(catalogue) == ["a", "c"])
            assert catalogue.backends == (comes, stays)
            assert len(first.received) == 1
            assert not closed.is_set()
            stream.end()
            await asyncio.wait_for(closed.wait(), 5)
        assert tasks_of_catalogues() == []


async def test_closing_ends_every_task_at_every_moment() -> None:
    async with Scripted(always(None)) as server:
        for steps in range(6):
            backends = [backend_for(server.url, str(n)) for n in range(3)]
            catalogue = Catalogue(backends, RoutingConfig(), EAGER)
            catalogue.start()
            assert len(tasks_of_catalogues()) == 3
            for _ in range(steps):
                await asyncio.sleep(0)
            await catalogue.aclose()
            await catalogue.aclose()
            assert tasks_of_catalogues() == []


async def test_closing_while_a_replaced_backend_is_still_busy_closes_it_too() -> None:
    backend = fixed("box", "m")
    catalogue = Catalogue([backend], RoutingConfig(), CALM)
    catalogue.start()
    backend.begin(0.0)
    await catalogue.replace([], RoutingConfig())
    assert len(tasks_of_catalogues()) == 1
    await asyncio.wait_for(catalogue.aclose(), 5)
    assert tasks_of_catalogues() == []


async def test_a_configured_name_is_offered_if_the_list_has_nothing_wanted() -> None:
    async with Scripted(always(response(listed("/models/file.gguf")))) as server:
        backend = backend_for(server.url, models=("qwen",))
        async with Catalogue([backend], RoutingConfig(), CALM) as catalogue:
            await catalogue.refresh()
            assert backend.is_listed
            assert offered(catalogue) == ["qwen"]


def test_an_alias_may_lead_to_an_alias_but_not_round_in_a_circle() -> None:
    aliases = {"a": "b", "b": "real", "x": "y", "y": "x"}
    backend = backend_for("http://127.0.0.1:1", models=("real",))
    catalogue = Catalogue([backend], RoutingConfig(aliases=aliases), CALM)
    assert found(catalogue, "a").model == "real"
    backend.is_listed = True
    with pytest.raises(ModelNotFound):
        found(catalogue, "x")
