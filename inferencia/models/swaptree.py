"""What is put into a llama-swap configuration before its keys are read.

In this order: ``${env.NAME}``, in all of it; the macros, in each model by its own; and
``${PORT}`` where it is only text. All of it works on the tree that ``yamlfile`` makes,
so that comments mean nothing and a value can never become YAML.

What cannot be replaced is reported and left out of the tree.
"""

from collections.abc import Callable
from dataclasses import replace

from inferencia import yamlfile
from inferencia.fields import Place
from inferencia.models.commandline import without_comments
from inferencia.models.definitions import PID_MACRO, PORT_MACRO
from inferencia.models.macros import MACRO, AlreadyReported, MacroError, Macros
from inferencia.yamlfile import Mapping, Node, Scalar, Sequence, Style

# The keys of a model in which ``${PORT}`` stays until its process is started.
LATER_KEYS = frozenset({"cmd", "cmdStop", "env", "proxy"})
# The keys whose lines may be comments.
COMMAND_KEYS = ("cmd", "cmdStop")
# In these llama-swap expands nothing, so they may hold what only looks like a macro.
LITERAL_KEYS = frozenset({"env", "setParams"})

Change = Callable[[Scalar, Place], Scalar | None]


def changed(place: Place, change: Change) -> Node | None:
    """The tree with ``change`` made to each value and name; None drops it."""
    node = place.node
    if isinstance(node, Scalar):
        return change(node, place)
    if isinstance(node, Sequence):
        items = (changed(place.item(i, n), change) for i, n in enumerate(node.items))
        return Sequence(tuple(n for n in items if n is not None), node.line)
    return changed_mapping(node, place, change)


def changed_mapping(node: Mapping, place: Place, change: Change) -> Mapping:
    """``changed`` for what is known to be a mapping."""
    items: dict[str, Node] = {}
    for key, value in node.items.items():
        here = place.below(key, value)
        inner = changed(here, change)
        name = change(Scalar(key, Style.QUOTED), here) if "${" in key else Scalar(key)
        if inner is None or name is None:
            continue
        if name.text in items or (name.text != key and name.text in node.items):
            place.book.error(here.path, f'there is another "{name.text}" beside it')
            continue
        items[name.text] = inner
    return Mapping(items, node.line)


# --- the environment -------------------------------------------------------------


def with_environment(node: Mapping, place: Place) -> Mapping:
    """The whole configuration with its ``${env.NAME}`` replaced.

    Variables that become keys to servers are noted in the book as secret.
    """
    place.book.secret_variables |= secret_variables(node)
    return changed_mapping(node, place, _with_variables)


def _with_variables(scalar: Scalar, place: Place) -> Scalar | None:
    if "${env." not in scalar.text:
        return scalar
    book = place.book
    for name in scalar.variables:
        value = book.env.get(name)
        if value is None:
            book.error(place.path, f"the environment variable {name} is not set")
            return None
        if any(character in value for character in "\r\n\0"):
            problem = "holds a line end or a null byte"
            book.error(place.path, f"the environment variable {name} {problem}")
            return None
    found = scalar.substituted(lambda name: book.env[name])
    if "${env." in found.text:
        book.error(place.path, "expected ${env.NAME}, the name of a variable")
        return None
    # Bare it may be a number, in quotes it is text: as if the value stood there.
    return replace(found, style=scalar.style)


def secret_variables(root: Mapping) -> set[str]:
    """The variables that end in ``apiKeys`` or a peer's ``apiKey``."""
    macros = _child(root, "macros")
    texts = [scalar.text for scalar in _secrets(root)]
    found: set[str] = set()
    seen: set[str] = set()
    while texts:
        text = texts.pop()
        found.update(Scalar(text).variables)
        for name in set(MACRO.findall(text)) - seen:
            seen.add(name)
            value = macros.items.get(name)
            texts += [value.text] if isinstance(value, Scalar) else []
    return found


def _secrets(root: Mapping) -> list[Scalar]:
    keys = root.items.get("apiKeys")
    found: list[Node] = [*keys.items] if isinstance(keys, Sequence) else []
    for peer in _child(root, "peers").items.values():
        if isinstance(peer, Mapping) and "apiKey" in peer.items:
            found.append(peer.items["apiKey"])
    return [node for node in found if isinstance(node, Scalar)]


def _child(node: Mapping, name: str) -> Mapping:
    child = node.items.get(name)
    return child if isinstance(child, Mapping) else Mapping()


# --- comments in commands --------------------------------------------------------


def without_command_comments(root: Mapping) -> Mapping:
    """The configuration less the lines of commands that begin with ``#``.

    They go first, since a macro or a variable in them means nothing.
    """
    models = _child(root, "models")
    items = {name: _uncommented(model) for name, model in models.items.items()}
    if not items:
        return root
    return replace(root, items={**root.items, "models": replace(models, items=items)})


def _uncommented(model: Node) -> Node:
    if not isinstance(model, Mapping):
        return model
    items = dict(model.items)
    for key in COMMAND_KEYS:
        node = items.get(key)
        if isinstance(node, Scalar) and "#" in node.text:
            items[key] = replace(node, text=without_comments(node.text))
    return replace(model, items=items)


# --- macros ----------------------------------------------------------------------


def with_macros(macros: Macros, place: Place) -> Macros:
    """``macros`` with those of the group at ``place``; what is wrong is reported."""
    items = place.node.items if isinstance(place.node, Mapping) else {}
    node = items.get("macros")
    if node is None or (isinstance(node, Scalar) and node.is_null):
        return macros
    here = place.below("macros", node)
    if not isinstance(node, Mapping):
        place.book.error(here.path, str(here.rejected("expected names with values")))
        return macros
    defined = _macro_values(node, here)
    together = macros.with_more(defined)
    broken = set()
    for name in defined:
        if problem := together.problem_of(name):
            place.book.error(yamlfile.below(here.path, name), problem)
            broken.add(name)
    return macros.with_more(defined, frozenset(broken)) if broken else together


def _macro_values(group: Mapping, place: Place) -> dict[str, Scalar]:
    """The values by name, in the order of definition."""
    found = {}
    for name, node in group.items.items():
        if isinstance(node, Scalar) and not node.is_null:
            found[name] = node
            continue
        here = place.below(name, node)
        expected = "expected text, a number, true or false"
        place.book.error(here.path, f"{expected}, got {here.shown()}")
    return found


def expanded(place: Place, macros: Macros, *, literal: bool = False) -> Node | None:
    """The tree with its macros replaced, in names as well.

    Args:
        place: where it stands.
        macros: those that are known there.
        literal: leave a text with an unknown macro as it is, with a warning.
    """

    def change(scalar: Scalar, here: Place) -> Scalar | None:
        try:
            return macros.expand(scalar)
        except AlreadyReported:
            return None
        except MacroError as error:
            if literal:
                here.book.warn(here.path, f"{error}; left as it is")
                return scalar
            here.book.error(here.path, str(error))
            return None

    return changed(place, change)


def expanded_model(place: Place, macros: Macros) -> Mapping | None:
    """A model with its macros replaced, and without ``macros``.

    None if it is no group of keys, which is reported.
    """
    node = place.node
    if isinstance(node, Scalar) and node.is_null:
        return Mapping()
    if not isinstance(node, Mapping):
        place.book.error(place.path, str(place.rejected("expected a group of keys")))
        return None
    items: dict[str, Node] = {}
    for key, value in node.items.items():
        if key == "macros":
            continue
        here = place.below(key, value)
        new: Node | None
        if key == "filters" and isinstance(value, Mapping):
            new = _expanded_filters(value, here, macros)
        else:
            new = expanded(here, macros, literal=key in LITERAL_KEYS)
        if new is not None:
            items[key] = new
    return replace(node, items=items)


def _expanded_filters(node: Mapping, place: Place, macros: Macros) -> Mapping:
    items: dict[str, Node] = {}
    for key, value in node.items.items():
        here = place.below(key, value)
        new = expanded(here, macros, literal=key in LITERAL_KEYS)
        if new is not None:
            items[key] = new
    return replace(node, items=items)


# --- ports -----------------------------------------------------------------------


def uses_port(model: Mapping) -> bool:
    """Whether its command has a place for a port."""
    command = model.items.get("cmd")
    return isinstance(command, Scalar) and PORT_MACRO in command.text


def with_port(model: Mapping, place: Place, port: int | None) -> Mapping:
    """The model with ``${PORT}`` replaced, where that is not left for later.

    What it may not use is reported and left out: ``${PORT}`` without a port, and
    ``${PID}`` anywhere but in ``cmdStop``.
    """
    items: dict[str, Node] = {}
    for key, value in model.items.items():

        def change(scalar: Scalar, here: Place, key: str = key) -> Scalar | None:
            return _ported(scalar, here, port, key)

        new = changed(place.below(key, value), change)
        if new is not None:
            items[key] = new
    return replace(model, items=items)


def _ported(scalar: Scalar, place: Place, port: int | None, key: str) -> Scalar | None:
    if PID_MACRO in scalar.text and key != "cmdStop":
        place.book.error(place.path, f"{PID_MACRO} is known only in cmdStop")
        return None
    if PORT_MACRO not in scalar.text or (port is not None and key in LATER_KEYS):
        return scalar
    if port is None:
        message = f"{PORT_MACRO} is there only if cmd uses it"
        place.book.error(place.path, message)
        return None
    if scalar.text == PORT_MACRO:
        return replace(scalar, text=str(port), style=Style.PLAIN)
    return replace(scalar, text=scalar.text.replace(PORT_MACRO, str(port)))
