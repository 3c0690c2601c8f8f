"""The brands: what each server does differently from ``base.Backend``.

Adding a brand is one small subclass here and its line in ``BRANDS``. Everything said
here was seen on real servers, except Ollama's list, which follows its docs/api.md.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, ClassVar
from urllib.parse import urlsplit

from inferencia.backends.base import (
    Backend,
    ListedModel,
    ListFailed,
    without_version,
)
from inferencia.backends.echo import EchoBackend
from inferencia.backends.listing import Record, read_list, read_records
from inferencia.settings import BackendConfig
from inferencia.upstream.origin import Origin
from inferencia.upstream.pool import Upstream

# What mlx_lm calls the model that it was started with. Any other name, even the path
# that it lists, may make it drop that model and load again.
_MLX_LOADED = "default_model"


class Mlx(Backend):
    """mlx_lm.server and what is built on it (MSTY).

    It answers its list with 200 and an EMPTY body when the Hugging Face cache folder
    does not exist, and with an empty list when nothing but the model of its command
    line is there. That model is always served as ``default_model``; it is the only
    name which never makes the server drop the loaded model.
    """

    type: ClassVar[str] = "mlx"
    # Measured with mlx_lm 0.32: what was not streamed is generated to its end after
    # its client has left; a stream stops within a second.
    assembles_by_default: ClassVar[bool] = True

    def _records(self, body: bytes) -> list[Record]:
        if not body.strip() or read_list(body) == []:
            return [(_MLX_LOADED, {})]
        return super()._records(body)

    def _offered(self, records: Iterable[Record]) -> tuple[ListedModel, ...]:
        models = super()._offered(records)
        paths = [model for model in models if model.upstream_id.startswith("/")]
        if len(paths) != 1:
            return models
        # The one path in its list is that of the model of its command line.
        loaded = replace(paths[0], upstream_id=_MLX_LOADED)
        return tuple(loaded if model is paths[0] else model for model in models)


class Ollama(Backend):
    """Ollama: its own list (``/api/tags``) tells more than its OpenAI one."""

    type: ClassVar[str] = "ollama"
    list_path: ClassVar[str] = "/api/tags"

    async def _fetch(self, seconds: float) -> list[Record]:
        answer, body = await self._get(self.list_path, seconds)
        if answer.status == 404:  # something else that imitates Ollama's OpenAI half
            answer, body = await self._get("/v1/models", seconds)
            self._check(answer, body, "/v1/models")
            return super()._records(body)
        self._check(answer, body, self.list_path)
        return self._records(body)

    def _records(self, body: bytes) -> list[Record]:
        records = read_records(body, "models", "name")
        if records is None:
            raise ListFailed(
                self._says(f"answers GET {self.list_path}, but not as Ollama does")
            )
        return [(name, _as_openai(raw)) for name, raw in records]


class LlamaCpp(Backend):
    """llama-server, alone or as a router.

    While it loads everything is 503, which is no failure. A single-model server
    ignores the name that it is sent. It goes on with a non-streamed request whose
    client has left (measured), so those are asked for as streams.
    """

    type: ClassVar[str] = "llamacpp"
    assembles_by_default: ClassVar[bool] = True


class LmStudio(Backend):
    """LM Studio; it lists what is downloaded and loads it when asked."""

    type: ClassVar[str] = "lmstudio"


class Vllm(Backend):
    """vLLM."""

    type: ClassVar[str] = "vllm"


class OpenAI(Backend):
    """Anything that speaks OpenAI's protocol: OpenAI itself, llama-swap, LocalAI."""

    type: ClassVar[str] = "openai"

    @property
    def is_cloud(self) -> bool:
        """A public host that is given our key; a machine at home is not one."""
        return bool(self.config.api_key) and _is_public(self.config.url)


class OpenRouter(Backend):
    """OpenRouter: hundreds of models, and headers that name the calling app."""

    type: ClassVar[str] = "openrouter"
    passed_headers: ClassVar[tuple[str, ...]] = ("http-referer", "x-title")

    @property
    def is_cloud(self) -> bool:
        return True


BRANDS: dict[str, type[Backend]] = {
    brand.type: brand
    for brand in (
        Mlx,
        Ollama,
        LlamaCpp,
        LmStudio,
        Vllm,
        OpenAI,
        OpenRouter,
        EchoBackend,
    )
}


def make_backend(
    config: BackendConfig, *, instance: str = "", place: str = ""
) -> Backend:
    """Make the backend that a part of the configuration describes.

    Args:
        config: its part of the configuration.
        instance: this process's name for ``Via``.
        place: where it is configured, such as ``backends[0]``, for messages.

    Raises:
        ValueError: the type is unknown, or its URL or a header is unusable.
    """
    if config.type == EchoBackend.type:
        return EchoBackend(config, instance=instance, place=place)
    brand = BRANDS.get(config.type)
    if brand is None:
        known = ", ".join(sorted(BRANDS))
        raise ValueError(f'{place}.type: "{config.type}" is none of {known}')
    upstream = Upstream(
        Origin.from_url(without_version(config.url)),
        connect_timeout=config.connect_timeout,
    )
    return brand(config, upstream, instance=instance, place=place)


def _is_public(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        pass
    # Names without a dot, and the endings of home networks. (RFC 6762, RFC 8375)
    return "." in host and not host.endswith((".local", ".lan", ".home.arpa"))


def _as_openai(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Ollama's record with ``created`` as OpenAI has it; the rest stays."""
    try:
        changed = datetime.fromisoformat(str(raw.get("modified_at"))).timestamp()
    except (ValueError, OverflowError, OSError):
        return raw
    return {**raw, "created": int(changed)}
