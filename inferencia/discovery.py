"""Finding the language-model servers that run on this machine.

Every known port is asked for a model list at the same time, on both loopback
addresses, and all of it takes no longer than ``PROBE_SECONDS``. Only a server that
answers as OpenAI's API does counts; what its answer says about its make outweighs the
port. Another ``inferencia`` never counts: two of them in front of each other would
send requests round in a circle.
"""

import asyncio
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inferencia.backends.base import is_llama_server
from inferencia.backends.listing import (
    MAX_LIST_BYTES,
    Record,
    base_name,
    is_loading_error,
    parse_json,
    read_list,
)
from inferencia.upstream.answer import Answer, UpstreamError
from inferencia.upstream.origin import Origin
from inferencia.upstream.pool import Upstream

# The usual ports, in the order in which findings are reported. What listens on the
# last three may be several things; most often it is llama-server.
PORTS: Mapping[int, str] = {
    11973: "mlx",  # MSTY
    11434: "ollama",
    1234: "lmstudio",
    8000: "vllm",
    8080: "llamacpp",
    8081: "llamacpp",
    10240: "llamacpp",
}

# Loopback answers in milliseconds; a start that waits longer feels broken.
PROBE_SECONDS = 1.5

_ADDRESSES = ("127.0.0.1", "::1")
_LIST_PATH = "/v1/models"
_HEADERS = (("Accept", "application/json"), ("Accept-Encoding", "identity"))


class State(enum.StrEnum):
    """What came of asking one port."""

    SERVES = "serves"
    NEEDS_A_KEY = "needs a key"
    IS_LOADING = "is loading"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of one port."""

    port: int
    type: str  # of the backend that it would be
    state: State
    url: str  # where it was found, or was looked for
    models: tuple[str, ...] = ()  # as they would be offered

    @property
    def is_usable(self) -> bool:
        """Whether it can be a backend just as it is."""
        return self.state is State.SERVES


async def find_servers(
    ports: Mapping[int, str] | None = None,
    *,
    own_ports: Sequence[int] = (),
    seconds: float = PROBE_SECONDS,
) -> list[Found]:
    """Look for servers.

    Args:
        ports: where to look, and what is probably there; ``PORTS`` if None.
        own_ports: ports that we listen on ourselves; they are left out.
        seconds: how long all of it may take.

    Returns:
        One finding for each port, in the order of ``ports``; ``MISSING`` where nothing
        answers, or nothing that serves language models.
    """
    if ports is None:
        ports = PORTS
    wanted = [port for port in ports if port not in own_ports]
    return list(
        await asyncio.gather(*(_look(port, ports[port], seconds) for port in wanted))
    )


async def who_listens(port: int, *, seconds: float = PROBE_SECONDS) -> str | None:
    """What a taken port belongs to, in words for a person; None if that is not seen."""
    for address in _ADDRESSES:
        url = _url(address, port)
        answered = await _list_at(url, seconds)
        if answered is None:
            continue
        server = answered[0].header("server") or ""
        if _is_ours(server):
            return "another inferencia"
        found = _judged(*answered, Found(port, "openai", State.MISSING, url))
        if found.state is not State.MISSING:
            name = _NAMES.get(found.type, "a server of language models")
            return f"{name} (it looks like one of your backends)"
    return None


_NAMES = {"llamacpp": "llama-server", "mlx": "mlx_lm", "vllm": "vLLM"}


async def _look(port: int, guess: str, seconds: float) -> Found:
    """Ask one port on both addresses; the first address that serves wins."""
    findings = await asyncio.gather(
        *(_ask(address, port, guess, seconds) for address in _ADDRESSES)
    )
    return min(findings, key=lambda found: list(State).index(found.state))


async def _ask(address: str, port: int, guess: str, seconds: float) -> Found:
    url = _url(address, port)
    missing = Found(port, guess, State.MISSING, url)
    answered = await _list_at(url, seconds)
    return missing if answered is None else _judged(*answered, missing)


def _url(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}"


async def _list_at(url: str, seconds: float) -> tuple[Answer, bytes] | None:
    """What a server answers when it is asked for its models; None if nothing."""
    upstream = Upstream(Origin.from_url(url), connect_timeout=seconds, keepalive=0)
    try:
        async with asyncio.timeout(seconds):
            answer = await upstream.send("GET", _LIST_PATH, _HEADERS)
            return answer, await answer.read(MAX_LIST_BYTES)
    except (TimeoutError, UpstreamError):
        return None
    finally:
        await upstream.aclose()


def _is_ours(server: str) -> bool:
    return server.lower().startswith("inferencia")


def _judged(answer: Answer, body: bytes, missing: Found) -> Found:
    """What an answer says about who gave it."""
    server = answer.header("server") or ""
    if _is_ours(server):
        return missing

    def found(state: State, records: Sequence[Record] = ()) -> Found:
        models = tuple(base_name(model_id) for model_id, _ in records)
        make = _make(server, records) or missing.type
        return Found(missing.port, make, state, missing.url, models)

    if answer.status == 200:
        records = read_list(body)
        if server.startswith("BaseHTTP") and (not body.strip() or records == []):
            # mlx_lm without a cache folder; see ``brands.Mlx``.
            return found(State.SERVES, [("default_model", {})])
        return missing if records is None else found(State.SERVES, records)
    if answer.status == 401 and _is_an_error(body):
        return found(State.NEEDS_A_KEY)
    if is_loading_error(answer.status, body):
        return found(State.IS_LOADING)
    return missing


def _make(server: str, records: Sequence[Record]) -> str | None:
    """The type that an answer gives away; None if it does not."""
    if is_llama_server(server):
        return "llamacpp"
    if server.startswith("BaseHTTP"):
        return "mlx"
    owners = {raw.get("owned_by") for _, raw in records}
    if "llama-swap" in owners:
        return "openai"
    if "vllm" in owners:
        return "vllm"
    return None


def _is_an_error(body: bytes) -> bool:
    """Whether a refusal is a language-model server's, not any web page's."""
    try:
        document: Any = parse_json(body)
    except ValueError:
        return False
    return isinstance(document, dict) and "error" in document
