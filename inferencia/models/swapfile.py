"""A llama-swap configuration, read: from its text to a ``SwapConfig``.

Every key of llama-swap is known here, with its default and its meaning; what we do in
another way is listed in docs/llama-swap.md. All that is wrong is collected, each as
``path.to.key: message``, and what is only odd is a warning.

Before the keys are read, variables and macros are put in (``swaptree``). The keys of
models are read in ``swapmodels``, those that say which models go together in
``swapgroups``, names that are no models in ``swapnames``, and the rest here.
``swapkeys`` is how any of them is read.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from inferencia import fields, yamlfile
from inferencia.fields import Book, Place, Rejected, list_of, one_of, whole
from inferencia.models import swaptree
from inferencia.models.definitions import (
    UNLOAD_TIMEOUT,
    LogTo,
    ModelDefinition,
    SwapConfig,
)
from inferencia.models.macros import Budget, Macros
from inferencia.models.swapgroups import Names, Routing, read_routing
from inferencia.models.swapkeys import (
    SECONDS,
    Keys,
    api_key,
    flag,
    line,
    name,
    seconds,
)
from inferencia.models.swapmodels import MAX_PORT, Shared, health_check, read_models
from inferencia.models.swapnames import (
    check_targets,
    read_peers,
    read_profiles,
    read_selectors,
)
from inferencia.yamlfile import Node, Scalar

# Files of a page, which a browser asks for by itself.
IGNORED_PATHS = (r".*\.(js|json|css|png|gif|jpg|jpeg|ico|txt)$",)
MAX_PATTERN = 1000

TIME_FORMATS = (
    "ansic",
    "unixdate",
    "rubydate",
    "rfc822",
    "rfc822z",
    "rfc850",
    "rfc1123",
    "rfc1123z",
    "rfc3339",
    "rfc3339nano",
    "kitchen",
    "stamp",
    "stampmilli",
    "stampmicro",
    "stampnano",
)

_NOTHING_COMES_OF_IT = "no effect here; see docs/llama-swap.md"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text says, and what there is to say of it."""

    config: SwapConfig
    errors: tuple[str, ...]  # each "path.to.key: message"; then config is incomplete
    warnings: tuple[str, ...]
    # Environment variables that no child process may see.
    secret_variables: frozenset[str]


def read_swap(content: str | bytes, env: Mapping[str, str]) -> Reading:
    """Read a llama-swap configuration; whatever it holds, nothing is raised.

    Args:
        content: the text of the file.
        env: where ``${env.NAME}`` is looked up.
    """
    book = Book(env, Path.cwd())
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    try:
        document = yamlfile.parse(content, merge_keys=True)
    except yamlfile.YamlError as error:
        return Reading(SwapConfig(), (str(error),), (), frozenset())
    book.errors.extend(document.problems)
    config = read_tree(document.root, book, "")
    secret = frozenset(book.secret_variables)
    return Reading(config, tuple(book.errors), tuple(book.warnings), secret)


def read_tree(root: Node, book: Book, path: str) -> SwapConfig:
    """Read a configuration that is a tree already.

    Args:
        root: the tree, as ``yamlfile`` makes it, with ``${env.NAME}`` still in it.
        book: takes errors, warnings and the names of secret variables.
        path: of ``root`` within its file; "" if it is all of it.

    Returns:
        what could be understood; everything, if ``book`` has no new errors.
    """
    place = Place(root, path, book)
    if isinstance(root, Scalar) and root.is_null:
        root = yamlfile.Mapping()
    if not isinstance(root, yamlfile.Mapping):
        book.error(path, f"expected keys such as models, got {place.shown()}")
        return SwapConfig()
    root = swaptree.without_command_comments(root)
    root = swaptree.with_environment(root, place)
    return _config(replace(place, node=root))


def _config(place: Place) -> SwapConfig:
    macros = swaptree.with_macros(Macros({}, Budget()), place)
    place = replace(place, node=_expanded(place, macros))
    with Keys(place, extensible=True) as keys:
        keys.take("macros", lambda here: None, None)  # read above
        shared = _shared(keys)
        models = keys.several("models", lambda here: read_models(here, shared, macros))
        ids = frozenset(model.id for model in models)
        names = Names(ids, {a: model.id for model in models for a in model.aliases})
        routing = read_routing(keys, names)
        _read_what_is_unused(keys)
        config = SwapConfig(
            models=_by_priority(models, routing),
            groups=routing.groups,
            matrix=routing.matrix,
            has_groups=bool(routing.groups or routing.matrix),
            selectors=keys.several("selectors", read_selectors),
            profiles=keys.several("profiles", read_profiles),
            peers=keys.several("peers", read_peers),
            preload=keys.several("hooks", lambda here: _hooks(here, names)),
            api_keys=keys.several("apiKeys", _api_keys),
            ignore_paths=keys.take("upstream", _upstream, IGNORED_PATHS),
            include_aliases_in_list=keys.take("includeAliasesInList", flag, False),
            start_port=shared.start_port,
            log_level=keys.take("logLevel", _log_level, "info"),
            log_to=LogTo(keys.take("logToStdout", one_of(*LogTo), LogTo.PROXY.value)),
            log_time_format=keys.take("logTimeFormat", _time_format, ""),
        )
    if not config.models and not config.peers:
        place.book.warn(yamlfile.below(place.path, "models"), "there are none")
    check_targets(config, names, place)
    return config


def _by_priority(
    models: list[ModelDefinition], routing: Routing
) -> tuple[ModelDefinition, ...]:
    return tuple(
        replace(model, priority=routing.priorities.get(model.id, 0)) for model in models
    )


# --- macros ----------------------------------------------------------------------


def _expanded(place: Place, macros: Macros) -> yamlfile.Mapping:
    """All but the models, which have macros of their own, and regular expressions."""
    assert isinstance(place.node, yamlfile.Mapping)
    items: dict[str, Node] = {}
    for key, node in place.node.items.items():
        if key in ("macros", "models", "upstream"):
            items[key] = node
            continue
        new = swaptree.expanded(place.below(key, node), macros)
        if new is not None:
            items[key] = new
    return replace(place.node, items=items)


# --- single keys -----------------------------------------------------------------


def _shared(keys: Keys) -> Shared:
    usual = Shared()
    return Shared(
        health_check_timeout=keys.take(
            "healthCheckTimeout", health_check, usual.health_check_timeout
        ),
        ttl=keys.take("globalTTL", seconds, usual.ttl),
        unload_timeout=keys.take("unloadTimeout", seconds, 0.0) or UNLOAD_TIMEOUT,
        send_loading_state=keys.take("sendLoadingState", flag, False),
        start_port=keys.take("startPort", whole(1, MAX_PORT), usual.start_port),
    )


def _read_what_is_unused(keys: Keys) -> None:
    """Keys of a log of requests, a database and pages that are not llama-swap's."""
    why = _NOTHING_COMES_OF_IT
    keys.without_effect("logRequests", flag, "deprecated, and no effect here")
    keys.without_effect("metricsMaxInMemory", SECONDS, why)
    keys.without_effect("captureBuffer", SECONDS, why)
    keys.without_effect("store", _store, why)
    keys.without_effect("ui", _ui, why)
    keys.without_effect("performance", _performance, why)


def _store(place: Place) -> None:
    with Keys(place) as keys:
        keys.take("path", name, "")


def _ui(place: Place) -> None:
    with Keys(place) as keys:
        keys.take("activity", _ui_activity, None)


def _ui_activity(place: Place) -> None:
    with Keys(place) as keys:
        keys.several("session_id", list_of(line))


def _performance(place: Place) -> None:
    with Keys(place) as keys:
        keys.take("disabled", flag, False)
        keys.take("every", fields.duration(), 5.0)


def _log_level(place: Place) -> str:
    return one_of("debug", "info", "warn", "error", warning="warn")(place)


def _time_format(place: Place) -> str:
    return line(place) and one_of(*TIME_FORMATS)(place)


def _api_keys(place: Place) -> tuple[str, ...]:
    return list_of(api_key)(place.secret())


def _hooks(place: Place, names: Names) -> tuple[str, ...]:
    with Keys(place) as keys:
        return keys.several("on_startup", lambda here: _on_startup(here, names))


def _on_startup(place: Place, names: Names) -> tuple[str, ...]:
    with Keys(place) as keys:
        written = keys.several("preload", list_of(line))
    found: dict[str, None] = {}
    for index, text in enumerate(written):
        model_id = names.local(text)
        if model_id is not None:
            found[model_id] = None
        elif text:
            path = f"{place.path}.preload[{index}]"
            problem = f'"{text}" is not one of the models{names.hint(text)}'
            place.book.warn(path, problem)
    return tuple(found)


def _upstream(place: Place) -> tuple[str, ...]:
    with Keys(place) as keys:
        return keys.several("ignorePaths", list_of(_pattern)) or IGNORED_PATHS


def _pattern(place: Place) -> str:
    """A regular expression that Python reads too. llama-swap's are RE2."""
    value = line(place)
    if len(value) > MAX_PATTERN:
        raise Rejected(f"expected at most {MAX_PATTERN} characters")
    try:
        with warnings.catch_warnings():
            # What may mean something else one day, such as [[:alpha:]], is refused.
            warnings.simplefilter("error")
            re.compile(value)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise place.rejected(f"expected a regular expression ({error})") from None
    return value
