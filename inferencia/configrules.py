"""What no single value of a configuration can tell: whether all of it fits together.

What cannot work is an error, what works and yet deserves a look is a warning. What can
be written down and is not built yet is refused here.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from inferencia import fields, yamlfile
from inferencia.addresses import unbuilt
from inferencia.fields import Book
from inferencia.quantities import format_size
from inferencia.settings import BackendConfig, Config, LlamaConfig, RoutingConfig
from inferencia.yamlfile import Sequence

NOT_YET = "not in this version"

# What can be written in the file and is not built. A value that differs from its
# default is refused, or, where a predecessor's file may hold it, causes a warning with
# this text. Whoever builds one of these deletes its line.
UNBUILT: Mapping[str, str | None] = {
    "backends[].type=anthropic": None,
    "state": None,
}


def check(config: Config, book: Book) -> None:
    """Note what is wrong or odd with all of it."""
    _check_together(config, book)
    _check_unbuilt(config, book)
    _warn(config, book)


def check_names(
    backends: tuple[BackendConfig, ...],
    speech: tuple[BackendConfig, ...],
    root: yamlfile.Mapping,
    book: Book,
) -> None:
    """Note names that several backends have.

    Args:
        backends: as they were read.
        speech: those of ``tts_backends``.
        root: the tree that they were read from.
        book: takes the errors.
    """
    nodes = root.items.get("backends")
    if isinstance(nodes, Sequence) and len(nodes.items) != len(backends):
        return  # one could not be read at all, so that no index can be told
    named = [(f"backends[{i}]", backend) for i, backend in enumerate(backends)]
    named += [(f"tts_backends[{i}]", backend) for i, backend in enumerate(speech)]
    first: dict[str, str] = {}
    for here, backend in named:
        if backend.name and backend.name in first:
            book.error(
                f"{here}.name",
                f'"{backend.name}" is the name of {first[backend.name]} too;'
                " every backend needs its own",
            )
        first.setdefault(backend.name, here)


def _check_together(config: Config, book: Book) -> None:
    """What is wrong only in combination."""
    _check_aliases(config.routing, book)
    server = config.server
    for name, other in (("cert", "key"), ("key", "cert")):
        if getattr(server.tls, name) is None and getattr(server.tls, other) is not None:
            book.error(f"server.tls.{name}", f"missing; {other} alone is of no use")
    for address, warning in unbuilt(server):
        book.warn(f"server.listen.{address}", warning)
    _check_tunnel(config, book)
    if server.max_body > server.max_body_total:
        book.warn(
            "server.max_body",
            f"{format_size(server.max_body)} is more than server.max_body_total,"
            f" so bodies above {format_size(server.max_body_total)} are refused",
        )


def _check_tunnel(config: Config, book: Book) -> None:
    dial = config.tunnel.dial
    if dial.relays and dial.token is None:
        book.error(
            "tunnel.dial.token",
            "missing; make one at the relay with: inferencia keys add NAME --role agent"
            " --models 'qwen*'",
        )
    for number, relay in enumerate(dial.relays):
        parts = urlsplit(relay)
        if parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
            book.error(
                f"tunnel.dial.relays[{number}]",
                f"{relay} would send the token in clear; use https:// (http:// is for"
                " 127.0.0.1 and localhost)",
            )
    if dial.passthrough and not dial.relays:
        book.warn("tunnel.dial.passthrough", "of no use without tunnel.dial.relays")
    accept = config.tunnel.accept
    if accept.passthrough is not None and not accept.enabled:
        book.error("tunnel.accept.passthrough", "needs tunnel.accept.enabled, too")
    offers = [service for given in config.server.listen.values() for service in given]
    if config.tunnel.accept.enabled and offers and "tunnel" not in offers:
        book.warn(
            "tunnel.accept.enabled", "no address of server.listen offers it (tunnel)"
        )


def _is_this_machine(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_aliases(routing: RoutingConfig, book: Book) -> None:
    """Refuse names that lead back to themselves.

    Only exact names are followed: ``"*": qwen`` is no circle, because the name of a
    model comes before any alias.
    """
    reported: set[str] = set()
    for alias in routing.aliases:
        chain = [alias]
        while (target := routing.aliases.get(chain[-1])) and target not in chain:
            chain.append(target)
        if target == alias and alias not in reported:
            reported.update(chain)
            circle = " -> ".join([*chain, alias])
            book.error(
                yamlfile.below("routing.aliases", alias),
                f"leads back to itself: {circle}",
            )
    for model, nexts in routing.fallbacks.items():
        if model in nexts:
            path = yamlfile.below("routing.fallbacks", model)
            book.error(path, "a model cannot be its own fallback")


def _check_unbuilt(config: Config, book: Book) -> None:
    for path, warning in UNBUILT.items():
        for here in _enabled(config, path):
            if warning is None:
                book.error(here, NOT_YET)
            else:
                book.warn(here, warning)


def _enabled(config: Config, path: str) -> Iterator[str]:
    """Where the keys at or below ``path`` differ from their defaults."""
    path, _, choice = path.partition("=")
    if path.startswith("backends[]."):
        rest = path.removeprefix("backends[].")
        for index, backend in enumerate(config.backends):
            here = f"backends[{index}].{rest}"
            yield from _differing(backend, BackendConfig(), rest, here, choice)
    else:
        yield from _differing(config, Config(), path, path, choice)


def _differing(
    value: object, default: object, names: str, path: str, choice: str
) -> Iterator[str]:
    for name in names.split("."):
        value, default = getattr(value, name), getattr(default, name)
    if choice:
        if value == choice:
            yield f"{path}: {choice}"
        return
    yield from _leaves(value, default, path)


def _leaves(value: Any, default: Any, path: str) -> Iterator[str]:
    if not dataclasses.is_dataclass(default):
        if value != default:
            yield path
        return
    for name in fields.readers(type(default)):
        inner = (getattr(value, name), getattr(default, name))
        yield from _leaves(*inner, f"{path}.{name}")


def _warn(config: Config, book: Book) -> None:
    """What works and yet deserves a look."""
    for folder in config.models_dir:
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            book.warn("models_dir", f"{folder} {problem}")
    for number, backend in enumerate(config.backends):
        if backend.daily_spend is not None and not backend.prices:
            book.warn(
                f"backends[{number}].daily_spend",
                "never reached, because it has no prices",
            )
    _warn_of_llama_server(config, book)


def _warn_of_llama_server(config: Config, book: Book) -> None:
    exe = config.llama.exe
    if shutil.which(exe, path=book.env.get("PATH")):
        return
    if exe != LlamaConfig().exe:
        book.warn("llama.exe", f"{exe} is not there, or not executable")
    elif config.models_dir:  # else nobody has asked for it
        book.warn(
            "llama.exe",
            "there is no llama-server on the PATH, so no GGUF file can be served; "
            "install llama.cpp, or give the program's full path",
        )
