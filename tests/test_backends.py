"""Promises of ``backends``: honest lists, closed lips upwards, words that help."""

import json
import random
from typing import Any

import pytest

from inferencia import __version__
from inferencia.backends.base import Backend, ListedModel, ListFailed, StillLoading
from inferencia.backends.brands import BRANDS, make_backend
from inferencia.backends.headers import (
    MAX_VALUE_LENGTH,
    has_met_us,
    upstream_headers,
    via_name,
)
from inferencia.backends.listing import MAX_LIST_BYTES, MAX_MODELS, base_name, read_list
from inferencia.breaker import State
from inferencia.secret import Secret
from inferencia.settings import BackendConfig
from inferencia.upstream.answer import Untrusted, UpstreamError
from scripted import Script, Scripted, always, listed, response

LOADING = {
    "error": {"message": "Loading model", "type": "unavailable_error", "code": 503}
}
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

# As recorded from llama-server, mlx_lm (with a model folder) and Ollama's docs/api.md.
LLAMA_RECORD = {
    "id": "gemma-270m",
    "aliases": ["gemma-270m"],
    "object": "model",
    "created": 1795308189,
    "owned_by": "llamacpp",
    "meta": {"n_ctx": 4096, "n_params": 268098176, "ftype": "Q4_K - Medium"},
}
OLLAMA_RECORD = {
    "name": "deepseek-r1:latest",
    "model": "deepseek-r1:latest",
    "modified_at": "2025-05-10T08:06:48.639712648-07:00",
    "size": 4683075271,
    "digest": "0a8c266910232fd3291e71e5ba1e058cc5af9d411192cf88b6d30e92b6e73163",
    "details": {"format": "gguf", "family": "qwen2", "parameter_size": "7.6B"},
}


async def listed_by(
    script: Script, kind: str = "openai", **config: Any
) -> tuple[ListedModel, ...]:
    """What a backend in front of a scripted server lists."""
    async with Scripted(script) as server:
        backend = make_backend(
            BackendConfig(name="box", type=kind, url=server.url, **config),
            place="backends[0]",
        )
        try:
            return await backend.list_models(2.0)
        finally:
            await backend.aclose()


async def trouble_of(script: Script, kind: str = "openai", **config: Any) -> str:
    """Why a backend in front of a scripted server has no list."""
    with pytest.raises(ListFailed) as failure:
        await listed_by(script, kind, **config)
    return str(failure.value)


def ids(models: tuple[ListedModel, ...]) -> list[tuple[str, str]]:
    return [(model.id, model.upstream_id) for model in models]


# Model lists.


@pytest.mark.parametrize("kind", ["llamacpp", "lmstudio", "vllm", "openai", "mlx"])
async def test_a_list_of_openais_shape_is_read_by_every_brand(kind: str) -> None:
    answer = response({"object": "list", "data": [LLAMA_RECORD]})
    models = await listed_by(always(answer), kind)
    assert ids(models) == [("gemma-270m", "gemma-270m")]
    assert models[0].raw == LLAMA_RECORD


@pytest.mark.parametrize("body", [b"", b"\n", b'{"object":"list","data":[]}'])
async def test_mlx_without_a_list_offers_its_loaded_model(body: bytes) -> None:
    answer = response(body, server="BaseHTTP/0.6 Python/3.11.7", version="1.0")
    models = await listed_by(always(answer), "mlx")
    assert ids(models) == [("default_model", "default_model")]


async def test_an_http_1_0_answer_without_a_length_is_read_to_its_end() -> None:
    body = listed("/models/mlx-a")
    answer = response(body, version="1.0", length=False)
    assert ids(await listed_by(always(answer), "mlx")) == [("mlx-a", "default_model")]


async def test_several_paths_of_an_mlx_server_are_asked_for_as_they_are() -> None:
    answer = response(listed("/m/a", "/m/b"))
    got = await listed_by(always(answer), "mlx")
    assert ids(got) == [("a", "/m/a"), ("b", "/m/b")]


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("/models/mlx-a", "mlx-a"),
        ("/models/mlx-a/", "mlx-a"),
        ("C:\\models\\qwen.gguf", "qwen.gguf"),
        ("mlx-community/Qwen3-4B", "mlx-community/Qwen3-4B"),
        ("qwen3:8b", "qwen3:8b"),
        ("/", "/"),
    ],
)
def test_a_file_path_is_offered_by_its_base_name(model_id: str, name: str) -> None:
    assert base_name(model_id) == name


async def test_two_paths_with_one_base_name_both_stay_usable() -> None:
    models = await listed_by(always(response(listed("/a/m", "/b/m", "/a/m"))))
    assert ids(models) == [("m", "/a/m"), ("/b/m", "/b/m")]


async def test_ollama_is_asked_for_its_own_list() -> None:
    models = await listed_by(
        lambda got: (
            response({"models": [OLLAMA_RECORD]})
            if got.target == "/api/tags"
            else response(b"", status=404)
        ),
        "ollama",
    )
    assert ids(models) == [("deepseek-r1:latest", "deepseek-r1:latest")]
    assert models[0].raw["created"] == 1746889608
    assert models[0].raw["details"] == OLLAMA_RECORD["details"]


async def test_what_only_imitates_ollama_is_asked_for_openais_list() -> None:
    models = await listed_by(
        lambda got: (
            response(listed("a"))
            if got.target == "/v1/models"
            else response(b"not here", status=404)
        ),
        "ollama",
    )
    assert ids(models) == [("a", "a")]


async def test_globs_filter_and_the_prefix_comes_before_the_name() -> None:
    models = await listed_by(
        always(response(listed("qwen3", "/models/qwen2", "llama"))),
        models=("qwen*",),
        prefix="box/",
    )
    assert ids(models) == [("box/qwen3", "qwen3"), ("box/qwen2", "/models/qwen2")]


async def test_entries_that_are_unusable_are_left_out() -> None:
    good = {"id": "good"}
    bad: list[Any] = [
        {},
        {"id": None},
        {"id": 5},
        {"id": ""},
        {"id": "a\nb"},
        {"id": "a\x00b"},
        {"id": "\ud800"},
        {"id": "\u2028"},
        {"id": "x" * 257},
        "good",
        None,
        [good],
    ]
    models = await listed_by(always(response({"data": [*bad, good, good]})))
    assert ids(models) == [("good", "good")]


async def test_a_list_is_cut_at_its_limit() -> None:
    body = {"data": [{"id": str(number)} for number in range(MAX_MODELS + 5)]}
    assert len(await listed_by(always(response(body)))) == MAX_MODELS


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"data": {}}',
        b'{"data": null}',
        b'{"data": [NaN]}',
        b"\xff\xfe",
        b'{"data": ' + b"[" * 100_000,
        b'{"data": ' + b"9" * 10_000 + b"}",
        b'{"data": [' + b" " * MAX_LIST_BYTES + b"]}",
    ],
)
async def test_what_is_no_list_is_a_failure_and_nothing_worse(body: bytes) -> None:
    assert 'backend "box" at 127.0.0.1:' in await trouble_of(always(response(body)))


@pytest.mark.parametrize("seed", range(20))
def test_reading_a_damaged_list_never_raises(seed: int) -> None:
    rng = random.Random(seed)
    whole = json.dumps({"data": [LLAMA_RECORD, OLLAMA_RECORD]}).encode()
    for _ in range(100):
        body = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        read_list(bytes(body[: rng.randrange(len(body) + 1)]))


# Why there is none.


async def test_a_refused_connection_is_told_with_its_remedy() -> None:
    async with Scripted(always(None)) as server:
        url = server.url
    backend = make_backend(
        BackendConfig(name="mlx", type="mlx", url=url), place="backends[0]"
    )
    with pytest.raises(ListFailed) as failure:
        await backend.list_models()
    assert str(failure.value) == (
        f'backend "mlx" at {url.removeprefix("http://")} refuses connections; is the '
        "server running? (start it, or fix backends[0].url)"
    )
    assert backend.trouble == str(failure.value)
    await backend.aclose()


async def test_a_server_that_says_nothing_is_given_up() -> None:
    trouble = await trouble_of(always(None), health_timeout=0.05)
    assert "0.05 s" in trouble


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"garbage\r\n\r\n", "does not answer well"),
        (b"", "does not answer well"),
        (response(b"no", status=404), "has no /v1/models (404)"),
        (response(b"no", status=401), "wants a key (401)"),
        (response(b"no", status=500), "status 500"),
        (response(b"", status=302), "status 302"),
        (response(b"hello"), "not with a model list"),
    ],
)
async def test_each_failure_has_words_of_its_own(answer: bytes, said: str) -> None:
    assert said in await trouble_of(always(answer))


async def test_a_refused_key_is_told_and_not_shown() -> None:
    trouble = await trouble_of(
        always(response(b"", status=403)), api_key=Secret("sk-canary")
    )
    assert "refuses the key" in trouble and "backends[0].api_key" in trouble
    assert "canary" not in trouble


async def test_loading_is_not_the_same_as_down() -> None:
    async with Scripted(always(response(LOADING, status=503))) as server:
        backend = make_backend(
            BackendConfig(name="box", type="llamacpp", url=server.url)
        )
        with pytest.raises(StillLoading):
            await backend.list_models(2.0)
        assert backend.found_loading
        server.script = always(response(listed("m")))
        await backend.list_models(2.0)
        assert not backend.found_loading
        await backend.aclose()


async def test_an_empty_list_is_no_failure_but_explained() -> None:
    async with Scripted(always(response(listed()))) as server:
        backend = make_backend(BackendConfig(name="box", url=server.url))
        assert await backend.list_models() == ()
        assert "lists no models" in backend.trouble
        await backend.aclose()


async def test_globs_that_match_nothing_are_explained() -> None:
    async with Scripted(always(response(listed("a", "b")))) as server:
        config = BackendConfig(name="box", url=server.url, models=("c*",))
        backend = make_backend(config, place="backends[3]")
        assert await backend.list_models() == ()
        assert "lists 2 models, but none matches" in backend.trouble
        assert "backends[3].models" in backend.trouble
        await backend.aclose()


async def test_a_list_that_comes_clears_the_trouble() -> None:
    async with Scripted(always(response(b"", status=500))) as server:
        backend = make_backend(BackendConfig(name="box", url=server.url))
        with pytest.raises(ListFailed):
            await backend.list_models()
        server.script = always(response(listed("a")))
        await backend.list_models()
        assert backend.trouble == ""
        await backend.aclose()


# What goes up.


async def sent_up(
    client_headers: list[tuple[str, str]], kind: str = "openai", **config: Any
) -> dict[str, list[str]]:
    """The header fields that a real server receives."""
    async with Scripted(always(response({}))) as server:
        backend = make_backend(
            BackendConfig(name="box", type=kind, url=server.url, **config),
            instance="here",
        )
        answer = await backend.send("POST", "/v1/x", client_headers, b"{}")
        await answer.read(100)
        await backend.aclose()
    fields: dict[str, list[str]] = {}
    for name, value in server.received[0].headers:
        fields.setdefault(name.lower(), []).append(value)
    return fields


HOSTILE = [
    ("Authorization", "Bearer sk-canary"),
    ("X-Api-Key", "sk-canary"),
    ("Api-Key", "sk-canary"),
    ("Cookie", "canary=1"),
    ("Set-Cookie", "canary=1"),
    ("Proxy-Authorization", "Basic canary"),
    ("Proxy-Connection", "keep-alive"),
    ("Connection", "close, authorization, X-Secret"),
    ("Keep-Alive", "timeout=5"),
    ("TE", "trailers"),
    ("Trailer", "X-Canary"),
    ("Transfer-Encoding", "chunked"),
    ("Content-Length", "999"),
    ("Content-Encoding", "gzip"),
    ("Upgrade", "websocket"),
    ("Expect", "100-continue"),
    ("Host", "canary.example"),
    ("Forwarded", "for=canary"),
    ("X-Forwarded-For", "canary"),
    ("X-Forwarded-Host", "canary"),
    ("X-Forwarded-Proto", "https"),
    ("X-Real-Ip", "canary"),
    ("X-Original-Url", "/canary"),
    ("X-Rewrite-Url", "/canary"),
    ("X-Http-Method-Override", "DELETE"),
    ("Cf-Connecting-Ip", "canary"),
    ("True-Client-Ip", "canary"),
    ("Origin", "https://canary.example"),
    ("Referer", "https://canary.example"),
    ("HTTP-Referer", "https://canary.example"),
    ("X-Title", "canary"),
    ("User-Agent", "canary"),
    ("Accept-Encoding", "gzip, br"),
    ("Accept-Language", "canary"),
    ("Range", "bytes=0-1"),
    ("If-None-Match", "canary"),
    ("Sec-Fetch-Site", "cross-site"),
    ("Sec-WebSocket-Key", "canary"),
    ("X-Request-Id", "canary"),
    ("X-Stainless-Lang", "canary"),
    ("X-Session-Id", "canary"),
    ("Content_Type", "canary"),
    ("content_length", "999"),
    ("X_Api_Key", "canary"),
    ("Anthropic_Version", "canary"),
    ("OpenAI-Organization", "canary"),
    ("OpenAI-Project", "canary"),
    ("Anthropic-Dangerous-Direct-Browser-Access", "true"),
    ("Content-Type ", "canary"),
    (" accept", "canary"),
    ("", "canary"),
    ("Accept\r\nX-Canary", "1"),
    ("Traceparent", "canary"),
    ("Tracestate", "canary=1"),
    ("Anthropic-Beta", "one\r\nX-Canary: 1"),
    ("OpenAI-Beta", "canary\x00"),
    ("Anthropic-Version", "canary\udcff"),
    ("Accept", "canary\x7f"),
    ("Accept", "canary" * MAX_VALUE_LENGTH),
    ("Via", "1.1 canary\nX-Canary: 1"),
]


async def test_of_sixty_hostile_headers_exactly_our_own_arrive() -> None:
    assert len(HOSTILE) >= 60
    fields = await sent_up(HOSTILE, api_key=Secret("sk-ours"))
    assert {name: values for name, values in fields.items() if name != "host"} == {
        "authorization": ["Bearer sk-ours"],
        "accept-encoding": ["identity"],
        "user-agent": [f"inferencia/{__version__}"],
        "via": ["1.1 inferencia-here"],
        "content-length": ["2"],
        "connection": fields["connection"],
    }
    assert "canary" not in str(fields)
    assert len(fields["host"]) == 1


async def test_the_allowed_headers_arrive_unchanged() -> None:
    allowed = {
        "content-type": 'multipart/form-data; boundary="a b"',
        "accept": "text/event-stream",
        "traceparent": TRACE,
        "tracestate": "a=1,b=2",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "tools-2024",
        "openai-beta": "assistants=v2",
    }
    fields = await sent_up([(name.upper(), v) for name, v in allowed.items()])
    assert {name: fields[name] for name in allowed} == {
        name: [value] for name, value in allowed.items()
    }


@pytest.mark.parametrize("name", ["content-type", "anthropic-version", "accept"])
def test_a_header_that_connection_names_stays_here(name: str) -> None:
    headers = [(name, "x"), ("Connection", f"keep-alive,\t{name.upper()} ")]
    assert name not in dict(lowered(upstream_headers(headers)))


def lowered(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in headers]


def test_of_a_repeated_header_the_first_counts_and_lists_are_joined() -> None:
    headers = upstream_headers(
        [
            ("Content-Type", "application/json"),
            ("Content-Type", "text/plain"),
            ("Anthropic-Beta", "a"),
            ("anthropic-beta", "b"),
        ]
    )
    assert ("content-type", "application/json") in lowered(headers)
    assert ("anthropic-beta", "a, b") in lowered(headers)
    assert len(headers) == len(dict(lowered(headers)))


@pytest.mark.parametrize(
    "trace", ["", "00-abc", TRACE.upper(), TRACE + "-x", TRACE + "\n", "x" * 55]
)
def test_a_trace_that_is_malformed_is_dropped_with_its_state(trace: str) -> None:
    headers = upstream_headers([("traceparent", trace), ("tracestate", "a=1")])
    assert not {"traceparent", "tracestate"} & set(dict(lowered(headers)))


def test_our_via_comes_after_the_one_that_is_there() -> None:
    headers = upstream_headers(
        [("Via", "1.0 a"), ("via", "1.1 b")], via=via_name("here")
    )
    assert ("via", "1.0 a, 1.1 b, 1.1 inferencia-here") in lowered(headers)


def test_meeting_ourselves_is_noticed_and_meeting_another_is_not() -> None:
    ours = [("Via", f"1.1 x, {via_name('here').upper()}, 1.1 y")]
    assert has_met_us(ours, "here")
    assert not has_met_us([("Via", via_name("there")), ("X", "here")], "here")
    assert not has_met_us([("Via", via_name("here") + "-2")], "here")


async def test_openrouter_alone_is_told_the_calling_app() -> None:
    fields = await sent_up(HOSTILE, "openrouter")
    assert fields["http-referer"] == ["https://canary.example"]
    assert fields["x-title"] == ["canary"]


async def test_configured_headers_are_sent_and_replace_ours() -> None:
    fields = await sent_up(
        [("Content-Type", "application/json")],
        api_key=Secret("sk-ours"),
        headers=(("X-Team", "home"), ("authorization", "Token t"), ("ACCEPT", "*/*")),
    )
    assert fields["x-team"] == ["home"]
    assert fields["authorization"] == ["Token t"]
    assert fields["accept"] == ["*/*"]


def test_the_content_type_and_request_id_that_we_found_replace_the_clients() -> None:
    headers = upstream_headers(
        [
            ("Content-Type", "application/x-www-form-urlencoded"),
            ("X-Request-Id", "theirs"),
        ],
        content_type="application/json",
        request_id="ours",
    )
    assert ("content-type", "application/json") in lowered(headers)
    assert ("x-request-id", "ours") in lowered(headers)


@pytest.mark.parametrize("name", ["Host", "content-length", "Transfer-Encoding"])
def test_a_configured_header_cannot_touch_the_framing(name: str) -> None:
    config = BackendConfig(name="a", url="http://127.0.0.1:1", headers=((name, "x"),))
    with pytest.raises(ValueError, match=r"backends\[1\]: header"):
        make_backend(config, place="backends[1]")


# Brands.


def test_every_brand_of_the_contract_is_there() -> None:
    assert set(BRANDS) == {
        "mlx",
        "ollama",
        "llamacpp",
        "lmstudio",
        "vllm",
        "openai",
        "openrouter",
        "echo",
    }
    assert all(brand.type == name for name, brand in BRANDS.items())


def test_an_unknown_type_is_refused_by_name() -> None:
    config = BackendConfig(name="a", type="anthropic", url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r'backends\[0\]\.type: "anthropic"'):
        make_backend(config, place="backends[0]")


@pytest.mark.parametrize(
    "ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/models/"]
)
async def test_a_url_may_end_in_v1_or_be_that_of_an_endpoint(ending: str) -> None:
    async with Scripted(always(response(listed("a")))) as server:
        backend = make_backend(
            BackendConfig(name="box", url=f"{server.url}/base{ending}")
        )
        await backend.list_models()
        await backend.aclose()
    assert server.received[0].target == "/base/v1/models"


def backend_of(kind: str = "openai", **config: Any) -> Backend:
    url = config.pop("url", "http://127.0.0.1:1")
    return make_backend(BackendConfig(name="box", type=kind, url=url, **config))


@pytest.mark.parametrize("kind", sorted(BRANDS))
def test_engines_that_do_not_notice_a_leaving_client_are_assembled(kind: str) -> None:
    assert backend_of(kind).assembles is (kind in ("llamacpp", "mlx"))
    assert backend_of(kind, assemble=True).assembles
    assert not backend_of(kind, assemble=False).assembles


async def test_an_answer_of_llama_server_turns_assembling_on() -> None:
    answer = response(listed("a"), server="llama.cpp")
    async with Scripted(always(answer)) as server:
        backend = backend_of(url=server.url)
        await backend.list_models()
        assert backend.assembles
        await backend.aclose()


@pytest.mark.parametrize(
    ("kind", "url", "key", "is_cloud"),
    [
        ("openai", "https://api.openai.com/v1", "sk-a", True),
        ("openai", "https://8.8.8.8", "sk-a", True),
        ("openai", "https://api.openai.com", None, False),
        ("openai", "http://127.0.0.1:8080", "sk-a", False),
        ("openai", "http://192.168.1.5:8080", "sk-a", False),
        ("openai", "http://localhost:8080", "sk-a", False),
        ("openai", "http://box:8080", "sk-a", False),
        ("openai", "http://box.local:8080", "sk-a", False),
        ("openai", "http://[::1]:8080", "sk-a", False),
        ("openrouter", "https://openrouter.ai/api", None, True),
        ("llamacpp", "https://gpu.example.com", "sk-a", False),
    ],
)
def test_clouds_are_polled_seldom(
    kind: str, url: str, key: str | None, is_cloud: bool
) -> None:
    backend = backend_of(kind, url=url, api_key=Secret(key) if key else None)
    assert backend.is_cloud is is_cloud
    assert backend.poll_seconds(30.0) == (600.0 if is_cloud else 30.0)


@pytest.mark.parametrize(
    ("status", "body", "is_loading"),
    [
        (503, json.dumps(LOADING).encode(), True),
        (500, json.dumps(LOADING).encode(), False),
        (503, b'{"error": {"type": "overloaded"}}', False),
        (503, b'{"error": "unavailable_error"}', False),
        (503, b"unavailable_error", False),
        (503, b"[" * 100_000, False),
        (503, b"[]", False),
    ],
)
def test_loading_is_recognised_by_its_type(
    status: int, body: bytes, is_loading: bool
) -> None:
    assert backend_of("llamacpp").is_loading(status, body) is is_loading


def test_configured_names_without_globs_are_known_without_a_list() -> None:
    backend = backend_of(models=("gpt-4o", "qwen*", "a?", "[ab]"), prefix="c/")
    assert ids(backend.exact_models) == [("c/gpt-4o", "gpt-4o")]


def test_a_backend_whose_configuration_is_equal_can_be_kept() -> None:
    backend = backend_of(api_key=Secret("a"), headers=(("X-A", "1"),))
    same = BackendConfig(
        name="box",
        type="openai",
        url="http://127.0.0.1:1",
        api_key=Secret("a"),
        headers=(("X-A", "1"),),
    )
    assert backend.same_as(same)
    assert not backend.same_as(
        BackendConfig(name="box", type="openai", url="http://127.0.0.1:2")
    )


# Turns.


def test_a_turn_is_counted_until_its_end_and_ends_once() -> None:
    backend = backend_of(max_concurrency=2)
    first, second = backend.begin(0.0), backend.begin(0.0)
    assert (backend.in_flight, backend.load, backend.is_full) == (2, 1.0, True)
    first.end()
    first.end()
    assert (backend.in_flight, backend.is_full) == (1, False)
    second.end()
    assert backend.in_flight == 0


def open_breaker(backend: Backend) -> None:
    for _ in range(5):
        turn = backend.begin(0.0)
        turn.failed(0.0)
        turn.end()


def test_failed_turns_open_the_breaker_and_a_good_one_closes_it() -> None:
    backend = backend_of()
    open_breaker(backend)
    assert backend.breaker.state(0.0) is State.OPEN
    turn = backend.begin(10.0)
    turn.succeeded()
    turn.end()
    assert backend.breaker.state(10.0) is State.CLOSED


def test_a_probe_that_ends_without_a_verdict_gives_its_place_back() -> None:
    backend = backend_of()
    open_breaker(backend)
    turn = backend.begin(10.0)
    assert not backend.breaker.admits(10.0)
    turn.end()
    assert backend.breaker.admits(10.0)


async def test_waiting_for_the_last_turn_ends_with_it() -> None:
    backend = backend_of()
    await backend.wait_until_idle()
    turn = backend.begin(0.0)
    turn.end()
    await backend.wait_until_idle()


async def test_no_connection_is_an_upstream_error_in_words() -> None:
    async with Scripted(always(None)) as server:
        url = server.url
    backend = backend_of(url=url)
    with pytest.raises(UpstreamError) as failure:
        await backend.send("GET", "/v1/models", ())
    assert "refuses connections" in backend.why(failure.value)
    await backend.aclose()


def test_what_is_wrong_with_a_certificate_is_told() -> None:
    backend = backend_of(url="https://gpu.home:8443")
    assert backend.why(Untrusted("no TLS", "certificate has expired")) == (
        'backend "box" at gpu.home:8443 shows a certificate that is not trusted: '
        "certificate has expired (add it to the system's or to SSL_CERT_FILE, or fix "
        "its url)"
    )
