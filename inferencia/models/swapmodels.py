"""``models`` of a llama-swap configuration: from their keys to definitions.

Ports are handed out here: from ``startPort`` upward, in the order of the ids, to those
models whose command has a place for one.
"""

import re
from dataclasses import dataclass, replace

from inferencia import yamlfile
from inferencia.fields import Place, Rejected, list_of, mapping_of, one_of, whole
from inferencia.models import commandline, swaptree
from inferencia.models.definitions import (
    CONCURRENCY_LIMIT,
    HEALTH_CHECK_TIMEOUT,
    PORT_MACRO,
    UNLOAD_TIMEOUT,
    Capabilities,
    Filters,
    ModelDefinition,
    Timeouts,
)
from inferencia.models.macros import Macros
from inferencia.models.swapkeys import (
    NAMES,
    SECONDS,
    Keys,
    block,
    filters,
    flag,
    free,
    line,
    proxy,
    seconds,
    timeouts,
)
from inferencia.yamlfile import Node

# Less is raised to this without a word, as there.
MIN_HEALTH_CHECK = 15.0
# Models of this id get what ComfyUI needs: many requests at once, and its own path.
COMFYUI = "comfyui_auto"
COMFYUI_CONCURRENCY = 50

MAX_PORT = 65535
MODALITIES = ("text", "audio", "image")

_PROXY = f"http://localhost:{PORT_MACRO}"
_NO_COMMAND: tuple[str, ...] = ()
_VARIABLE = re.compile(r"[^=\s\0]+")


@dataclass(frozen=True, slots=True)
class Shared:
    """What the top level says for all models."""

    health_check_timeout: float = HEALTH_CHECK_TIMEOUT
    ttl: float = 0.0
    unload_timeout: float = UNLOAD_TIMEOUT
    send_loading_state: bool = False
    start_port: int = 5800


def health_check(place: Place) -> float:
    """``healthCheckTimeout``, in seconds."""
    return max(seconds(place), MIN_HEALTH_CHECK)


def read_models(place: Place, shared: Shared, macros: Macros) -> list[ModelDefinition]:
    """The models, sorted by id.

    Those that cannot be read at all are reported and left out.
    """
    nodes = mapping_of(_as_it_is)(place)
    found: list[ModelDefinition] = []
    port = shared.start_port
    for model_id in sorted(nodes):
        here = place.below(model_id, nodes[model_id])
        known = swaptree.with_macros(macros.in_model(model_id), here)
        tree = swaptree.expanded_model(here, known)
        if tree is None:
            continue
        written = Keys(here)
        # One whose macros are wrong may well have used a port.
        is_broken = written.has("cmd") and "cmd" not in tree.items
        own_port = port if is_broken or swaptree.uses_port(tree) else None
        if own_port is not None and port > MAX_PORT:
            here.book.error(here.path, "no port is left for it; lower startPort")
            break
        port += own_port is not None
        tree = swaptree.with_port(tree, here, own_port)
        model = _model(replace(here, node=tree), model_id, shared)
        if not written.has("cmd"):
            path = yamlfile.below(here.path, "cmd")
            here.book.error(path, "missing; it is the command that starts the model")
        elif model.command and own_port is None and not written.has("proxy"):
            path = yamlfile.below(here.path, "proxy")
            here.book.error(
                path,
                f"missing; since cmd does not use {PORT_MACRO},"
                " it has to say where the server listens",
            )
        found.append(replace(model, port=own_port))
    return with_aliases(found, place)


def _as_it_is(place: Place) -> Node:
    return place.node


def _model(place: Place, model_id: str, shared: Shared) -> ModelDefinition:
    with Keys(place) as keys:
        keys.take("macros", lambda here: None, None)  # put in before, and gone
        command = keys.take("cmd", _command, _NO_COMMAND)
        own = ModelDefinition(
            id=model_id,
            command=command,
            path=commandline.model_file(command),
            proxy=keys.take("proxy", proxy, _PROXY),
            stop_command=keys.take("cmdStop", _words, _NO_COMMAND),
            env=keys.several("env", _environment),
            check_endpoint=keys.take("checkEndpoint", _endpoint, "/health"),
            health_check_timeout=keys.take(
                "healthCheckTimeout", health_check, shared.health_check_timeout
            ),
            ttl=_inherited(keys.take("ttl", _ttl, -1.0), -1.0, shared.ttl),
            unload_timeout=_inherited(
                keys.take("unloadTimeout", seconds, 0.0), 0.0, shared.unload_timeout
            ),
            use_model_name=keys.take("useModelName", line, ""),
            concurrency_limit=keys.take("concurrencyLimit", SECONDS, 0)
            or CONCURRENCY_LIMIT,
            filters=keys.take("filters", filters, Filters()),
            timeouts=keys.take("timeouts", timeouts, Timeouts()),
            ignore_websockets=keys.take("compat", _compat, False),
            name=keys.take("name", line, ""),
            description=keys.take("description", block, ""),
            aliases=keys.several("aliases", NAMES),
            unlisted=keys.take("unlisted", flag, False),
            send_loading_state=keys.take(
                "sendLoadingState", flag, shared.send_loading_state
            ),
            capabilities=keys.take("capabilities", _capabilities, None),
            metadata=keys.several("metadata", free),
        )
    if model_id == COMFYUI:
        limit = max(own.concurrency_limit, COMFYUI_CONCURRENCY)
        own = replace(own, concurrency_limit=limit, ignore_websockets=True)
    return own


def _inherited(value: float, nothing_said: float, shared: float) -> float:
    return shared if value == nothing_said else value


# --- values ----------------------------------------------------------------------


def _command(place: Place) -> tuple[str, ...]:
    if found := _words(place):
        return found
    raise Rejected("expected a command, got nothing")


def _words(place: Place) -> tuple[str, ...]:
    try:
        return commandline.words(block(place))
    except ValueError as error:
        raise Rejected(str(error)) from None


def _environment(place: Place) -> tuple[tuple[str, str], ...]:
    return list_of(_variable)(place)


def _variable(place: Place) -> tuple[str, str]:
    name, sign, value = block(place).partition("=")
    if not sign or not _VARIABLE.fullmatch(name):
        raise Rejected("expected NAME=value")  # not shown: it may be a secret
    return name, value


def _endpoint(place: Place) -> str:
    value = line(place)
    if value == "none" or value.startswith("/"):
        return value
    if "://" in value:
        raise place.rejected("expected a path such as /health, or none")
    return f"/{value}"


def _ttl(place: Place) -> float:
    return float(whole(-1, 100 * 366 * 86400)(place))


def _compat(place: Place) -> bool:
    with Keys(place) as keys:
        return keys.take("ignoreWebsockets", flag, False)


def _capabilities(place: Place) -> Capabilities | None:
    modalities = list_of(one_of(*MODALITIES))
    with Keys(place) as keys:
        found = Capabilities(
            inputs=keys.several("in", modalities),
            outputs=keys.several("out", modalities),
            tools=keys.take("tools", flag, False),
            reranker=keys.take("reranker", flag, False),
            context=keys.take("context", whole(0), 0),
        )
    return None if found == Capabilities() else found


# --- names -----------------------------------------------------------------------


def with_aliases(models: list[ModelDefinition], place: Place) -> list[ModelDefinition]:
    """The models, each with its aliases; no name means two of them.

    The names in ``filters.setParamsByID`` are aliases, except the model's own id.
    """
    owner = {model.id: model.id for model in models}
    found = []
    for model in models:
        here = yamlfile.below(place.path, model.id)
        aliases: list[str] = []
        by_id = f"{here}.filters.setParamsByID"
        named = [(f"{here}.aliases[{i}]", a) for i, a in enumerate(model.aliases)]
        named += [(by_id, alias) for alias in model.filters.set_params_by_id]
        for path, alias in named:
            if owner.get(alias) == model.id and path == by_id:
                continue  # its own id, or one of its aliases
            if alias == model.id:
                place.book.warn(path, f'"{alias}" is the id of the model itself')
            elif alias in owner:
                problem = f'"{alias}" is a name of the model {owner[alias]} already'
                place.book.error(path, problem)
            else:
                owner[alias] = model.id
                aliases.append(alias)
        found.append(replace(model, aliases=tuple(aliases)))
    return found
