"""What ``inferencia check`` says of a configuration that is right; no secrets."""

from pathlib import Path

from inferencia.addresses import Address, addresses
from inferencia.models.definitions import SwapConfig
from inferencia.quantities import format_duration, format_size
from inferencia.secret import MASK
from inferencia.settings import (
    BackendConfig,
    Config,
    RoutingConfig,
    ServerConfig,
    TunnelConfig,
)


def summary(config: Config, keys_file: Path) -> list[str]:
    """A line for each thing that matters.

    Args:
        config: as loaded.
        keys_file: the one that the daemon follows.
    """
    server, limits, log = config.server, config.ratelimit, config.log
    lines = [
        *(f"listen    {_listen_summary(one, server)}" for one in addresses(server)),
        f"keys      {_keys_summary(config, keys_file)}",
        f"limits    {limits.requests_per_second:g} requests a second and key,"
        f" burst {limits.burst}; bodies to {format_size(server.max_body)}",
    ]
    lines += [f"backend   {_backend_summary(backend)}" for backend in config.backends]
    if config.models_dir:
        where = ", ".join(map(str, config.models_dir))
        lines.append(f"models    in {where}, run by {config.llama.exe}")
    if config.swap_config is not None:
        lines.append(f"swap      {_swap_summary(config.swap_config)}")
    elif config.discover and not config.models_dir:
        lines.append("backends  none configured: local servers are looked for")
    lines += _tunnel_summary(config.tunnel)
    lines += _routing_summary(config.routing)
    lines.append(f"log       {log.level}, {log.format}")
    return lines


def _swap_summary(swap: SwapConfig) -> str:
    noun = "model" if len(swap.models) == 1 else "models"
    parts = [f"{len(swap.models)} {noun} of the llama-swap configuration"]
    if swap.peers:
        parts.append(f"peers {' '.join(peer.id for peer in swap.peers)}")
    return ", ".join(parts)


def _listen_summary(address: Address, server: ServerConfig) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    parts = [f"{host}:{address.port}"]
    if server.tls.cert:
        parts.append(f"TLS by {server.tls.cert}")
    if address.services is not None:
        parts.append(" ".join(sorted(address.services)))
    return ", ".join(parts)


def _keys_summary(config: Config, keys_file: Path) -> str:
    if config.is_open:
        return "none asked for (--no-api-key)"
    keys = config.auth.api_keys
    sources = []
    if keys is not None:
        sources.append(f"{len(keys)} from INFERENCIA_API_KEYS ({MASK})")
    else:
        sources.append(str(keys_file))
    for role in ("admin", "user"):
        if getattr(config.server.api_key, role):
            sources.append(f"server.api_key.{role} {MASK}")
    return ", ".join(sources)


def _backend_summary(backend: BackendConfig) -> str:
    parts = [f"{backend.name} ({backend.type})"]
    if backend.type != "echo":
        silence = format_duration(backend.timeout) if backend.timeout else "none"
        parts.append(f"{backend.url}, timeout {silence}")
    if backend.api_key:
        parts.append(f"api_key {MASK}")
    parts += [f"{name}: {MASK}" for name, _ in backend.headers]
    if backend.max_concurrency:
        parts.append(f"{backend.max_concurrency} at once")
    if backend.models:
        parts.append(f"models {' '.join(backend.models)}")
    return ", ".join(parts)


def _tunnel_summary(tunnel: TunnelConfig) -> list[str]:
    lines = []
    if tunnel.accept.enabled:
        lines.append("tunnel    agents may dial in")
    if tunnel.accept.passthrough is not None:
        lines.append(
            f"tunnel    TLS is passed on by name at {tunnel.accept.passthrough}"
        )
    if tunnel.dial.relays:
        lines.append(f"tunnel    serves {', '.join(tunnel.dial.relays)} as an agent")
    for host, pair in tunnel.dial.passthrough.items():
        lines.append(f"tunnel    TLS for {host} ends here, by {pair.cert}")
    return lines


def _routing_summary(routing: RoutingConfig) -> list[str]:
    lines = []
    if routing.default_model:
        lines.append(f"default   {routing.default_model}")
    lines += [f"alias     {name} -> {to}" for name, to in routing.aliases.items()]
    for model, nexts in routing.fallbacks.items():
        lines.append(f"fallback  {model} -> {', '.join(nexts)}")
    return lines
