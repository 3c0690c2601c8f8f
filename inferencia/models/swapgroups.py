"""Which models go together: groups, matrix and priorities of a llama-swap file.

``groups`` and ``matrix`` stand at the top, or below ``routing.router.settings`` where
``routing.router.use`` chooses between them; never at both places.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from inferencia import yamlfile
from inferencia.fields import Place, Rejected, mapping_of, nearest, one_of, whole
from inferencia.models import matrix
from inferencia.models.definitions import Group, MatrixSets
from inferencia.models.swapkeys import NAMES, Keys, block, flag, line, name

# The group of all models that are in none. It cannot be written.
DEFAULT_GROUP = "(default)"

_INTEGER = whole(-(10**9))


@dataclass(frozen=True, slots=True)
class Names:
    """Every name that a request or a key may call a model by."""

    ids: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)  # to the id

    def local(self, name: str) -> str | None:
        """The id of the model on this machine that ``name`` means."""
        return name if name in self.ids else self.aliases.get(name)

    def hint(self, name: str) -> str:
        """``; did you mean X?`` or nothing."""
        return nearest(name, (*sorted(self.ids), *self.aliases))


@dataclass(frozen=True, slots=True)
class Routing:
    """What was said of models together."""

    groups: tuple[Group, ...] = ()
    matrix: MatrixSets | None = None
    priorities: Mapping[str, int] = field(default_factory=dict)  # by id


@dataclass(slots=True)
class _Router:
    use: str = "group"
    groups: Place | None = None
    matrix: Place | None = None


def read_routing(top: Keys, names: Names) -> Routing:
    """``groups``, ``matrix`` and ``routing``, wherever they stand."""
    book = top.place.book
    groups = top.take("groups", _here, None)
    sets = top.take("matrix", _here, None)
    router, priorities = top.several("routing", _routing)
    if (groups or sets) and (router.groups or router.matrix):
        where = groups or sets
        assert where is not None
        book.error(where.path, "stands here and in routing.router; keep one of them")
    elif router.groups or router.matrix:
        groups, sets = _chosen(router)
    elif router.use == "matrix" and sets is None:
        path = yamlfile.below(top.place.path, "routing.router.use")
        book.error(path, "says matrix, but routing.router.settings.matrix is missing")
    if groups and sets:
        book.error(sets.path, "groups and matrix exclude each other; keep one of them")
        return Routing()
    return Routing(
        _tried_groups(groups, names) if groups else (),
        _tried_matrix(sets, names) if sets else None,
        _priorities(priorities, names) if priorities else {},
    )


def _here(place: Place) -> Place | None:
    """The place itself, to be read later; None where it holds nothing."""
    node = place.node
    is_empty = isinstance(node, yamlfile.Mapping) and not node.items
    return None if is_empty else place


def _routing(place: Place) -> tuple[_Router, Place | None]:
    with Keys(place) as keys:
        router = keys.take("router", _router, _Router())
        return router, keys.take("scheduler", _scheduler, None)


def _router(place: Place) -> _Router:
    with Keys(place) as keys:
        use = keys.take("use", one_of("group", "matrix"), "group")
        return keys.take("settings", lambda here: _settings(here, use), _Router(use))


def _settings(place: Place, use: str) -> _Router:
    with Keys(place) as keys:
        groups = keys.take("groups", _here, None)
        return _Router(use, groups, keys.take("matrix", _here, None))


def _chosen(router: _Router) -> tuple[Place | None, Place | None]:
    """Of groups and matrix below ``routing`` the one that ``use`` says."""
    unused = router.groups if router.use == "matrix" else router.matrix
    if unused:
        unused.book.warn(unused.path, f"not used: routing.router.use is {router.use}")
    if router.use == "group":
        return router.groups, None
    if router.matrix is None and router.groups:
        path = router.groups.path.removesuffix("groups") + "matrix"
        router.groups.book.error(path, "missing, and routing.router.use is matrix")
    return None, router.matrix


def _scheduler(place: Place) -> Place | None:
    with Keys(place) as keys:
        keys.take("use", _fifo, "fifo")
        return keys.take("settings", _scheduler_settings, None)


def _fifo(place: Place) -> str:
    value = line(place)
    if value != "fifo":
        raise Rejected(f"there is one scheduler, fifo, got {place.shown()}")
    return value


def _scheduler_settings(place: Place) -> Place | None:
    with Keys(place) as keys:
        return keys.take("fifo", _fifo_settings, None)


def _fifo_settings(place: Place) -> Place | None:
    with Keys(place) as keys:
        return keys.take("priority", _here, None)


def _priorities(place: Place, names: Names) -> dict[str, int]:
    found = {}
    try:
        read = mapping_of(_INTEGER)(place)
    except Rejected as rejected:
        place.book.error(place.path, str(rejected))
        return {}
    for key, value in read.items():
        if model_id := names.local(key):
            found[model_id] = value
        else:
            path = yamlfile.below(place.path, key)
            place.book.error(path, f"there is no such model{names.hint(key)}")
    return found


# --- groups ----------------------------------------------------------------------


def _tried_groups(place: Place, names: Names) -> tuple[Group, ...]:
    try:
        read = mapping_of(lambda here: _group(here, names))(place)
    except Rejected as rejected:
        place.book.error(place.path, str(rejected))
        return ()
    groups = tuple(
        Group(key, group.members, group.swap, group.exclusive, group.persistent)
        for key, group in read.items()
    )
    _check_members(groups, place)
    return groups


def _group(place: Place, names: Names) -> Group:
    with Keys(place) as keys:
        members = keys.several("members", NAMES)
        swap = keys.take("swap", flag, True)
        exclusive = keys.take("exclusive", flag, True)
        persistent = keys.take("persistent", flag, False)
    known = []
    for index, member in enumerate(members):
        path = f"{place.path}.members[{index}]"
        if member in known:
            place.book.error(path, f'"{member}" stands there twice')
        elif member in names.ids:
            known.append(member)
        elif member in names.aliases:
            owner = names.aliases[member]
            place.book.warn(path, f'"{member}" is an alias; write its model: {owner}')
        else:
            problem = f'"{member}" is not one of the models{names.hint(member)}'
            place.book.warn(path, problem)
    return Group("", tuple(known), swap, exclusive, persistent)


def _check_members(groups: tuple[Group, ...], place: Place) -> None:
    """A model is in one group at most, and a group is not called ``(default)``."""
    owner: dict[str, str] = {}
    for group in groups:
        path = yamlfile.below(place.path, group.name)
        if group.name == DEFAULT_GROUP:
            problem = "the name of the group of all models that are in no other"
            place.book.error(path, problem)
        for member in group.members:
            if member in owner:
                problem = f'"{member}" is in the group {owner[member]} already'
                place.book.error(f"{path}.members", problem)
            owner.setdefault(member, group.name)


# --- matrix ----------------------------------------------------------------------


def _tried_matrix(place: Place, names: Names) -> MatrixSets | None:
    try:
        return _matrix(place, names)
    except Rejected as rejected:
        place.book.error(place.path, str(rejected))
        return None


def _matrix(place: Place, names: Names) -> MatrixSets | None:
    with Keys(place) as keys:
        variables = keys.several("vars", mapping_of(name))
        costs = keys.several("evict_costs", mapping_of(whole(1)))
        sets = keys.several("sets", mapping_of(block))
    for key, model in variables.items():
        path = yamlfile.below(f"{place.path}.vars", key)
        if model not in names.ids:
            problem = f'"{model}" is not one of the models{names.hint(model)}'
            place.book.error(path, problem)
    if not sets:
        place.book.error(f"{place.path}.sets", "missing; a matrix needs at least one")
        return None

    def model_of(word: str) -> str | None:
        return variables.get(word, word if word in names.ids else None)

    resolved = {}
    for key, cost in costs.items():
        if (model_id := model_of(key)) is not None:
            resolved[model_id] = cost
            continue
        path = yamlfile.below(f"{place.path}.evict_costs", key)
        place.book.error(path, f"neither a model nor one of vars{names.hint(key)}")
    try:
        return MatrixSets(matrix.worked_out(sets, model_of), resolved)
    except matrix.MatrixError as error:
        path = f"{place.path}.sets"
        if error.set_name is not None:
            path = yamlfile.below(path, error.set_name)
        place.book.error(path, error.message)
        return None
