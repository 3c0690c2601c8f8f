"""The backends that nobody has configured: servers beside us on this machine.

Without a configuration whatever runs here is served, and as long as nothing does, the
built-in model: a first try needs nothing else. How servers are found is the work of
``discovery``; here they become part of a configuration.
"""

import asyncio
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from inferencia.discovery import Found, State, find_servers
from inferencia.localmodels import has_files
from inferencia.settings import BackendConfig, Config

# The built-in model.
ECHO = BackendConfig(name="echo", type="echo")


def looks_around(config: Config) -> bool:
    """Whether the backends are whatever servers run on this machine.

    Whoever says which models to start does not mean other programs' models.
    """
    has_own = bool(config.models_dir) or config.swap_config is not None
    return config.discover and not config.is_demo and not has_own


async def with_backends(
    config: Config, env: Mapping[str, str], *, own_ports: Sequence[int] = ()
) -> tuple[Config, Sequence[Found]]:
    """The configuration with its backends, and what was found if it was looked for.

    Args:
        config: as it was read.
        env: the environment, for the usual folders of models.
        own_ports: where we listen ourselves.
    """
    if config.is_demo:
        return replace(config, backends=(ECHO,)), ()
    if not looks_around(config):
        return config, ()
    found = await find_servers(own_ports=own_ports)
    backends = backends_of(found)
    if not backends and not await _has_other_models(config, env):
        backends = (ECHO,)
    return replace(config, backends=backends), found


async def _has_other_models(config: Config, env: Mapping[str, str]) -> bool:
    """Whether models are started here, or may be offered by agents."""
    if config.tunnel.accept.enabled:
        return True
    return await asyncio.to_thread(has_files, config, env)


def newcomers(
    backends: Sequence[BackendConfig], found: Sequence[Found]
) -> tuple[BackendConfig, ...]:
    """Those servers that are not among ``backends`` yet."""
    known = {urlsplit(backend.url).port for backend in backends}
    new = [one for one in found if one.port not in known]
    return backends_of(new, taken={backend.name for backend in backends})


def backends_of(
    found: Sequence[Found], taken: Container[str] = ()
) -> tuple[BackendConfig, ...]:
    """A backend for each server that was found, with names not yet ``taken``."""
    backends: list[BackendConfig] = []
    for one in found:
        if one.state not in (State.SERVES, State.IS_LOADING):
            continue
        is_new = one.type not in taken and all(b.name != one.type for b in backends)
        name = one.type if is_new else f"{one.type}-{one.port}"
        backends.append(BackendConfig(name=name, type=one.type, url=one.url))
    return tuple(backends)
