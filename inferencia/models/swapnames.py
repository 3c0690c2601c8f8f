"""Names in a llama-swap configuration that are no models of this machine.

Models of ``peers``, ``selectors`` that choose a model for each request, and
``profiles`` that give names another meaning. Whether what they point at is there can
be told only when everything was read; that is ``check_targets``.
"""

from dataclasses import dataclass, replace

from inferencia import yamlfile
from inferencia.fields import Place, Rejected, mapping_of, one_of, whole
from inferencia.models.definitions import (
    Filters,
    Peer,
    Profile,
    Selector,
    SwapConfig,
    Timeouts,
)
from inferencia.models.swapgroups import Names
from inferencia.models.swapkeys import (
    NAMES,
    Keys,
    api_key,
    block,
    filters,
    flag,
    free,
    is_null,
    line,
    proxy,
    timeouts,
)
from inferencia.yamlfile import Sequence

STRATEGIES = ("pin", "warm", "spillover")


def read_peers(place: Place) -> tuple[Peer, ...]:
    """``peers``, as they are written."""
    found = mapping_of(_peer)(place)
    return tuple(replace(peer, id=key) for key, peer in found.items())


def read_selectors(place: Place) -> tuple[Selector, ...]:
    """``selectors``, as they are written."""
    found = mapping_of(_selector)(place)
    return tuple(replace(selector, id=key) for key, selector in found.items())


def read_profiles(place: Place) -> tuple[Profile, ...]:
    """``profiles``, as they are written."""
    found = mapping_of(_profile)(place)
    return tuple(replace(profile, name=key) for key, profile in found.items())


def _peer(place: Place) -> Peer:
    with Keys(place) as keys:
        peer = Peer(
            id="",
            proxy=keys.take("proxy", proxy, ""),
            models=keys.several("models", NAMES),
            api_key=keys.take("apiKey", _peer_key, ""),
            filters=keys.take("filters", _peer_filters, Filters()),
            timeouts=keys.take("timeouts", timeouts, Timeouts()),
        )
    for key in ("proxy", "models"):
        if not keys.has(key):
            place.book.error(yamlfile.below(place.path, key), "missing")
    return replace(peer, models=tuple(dict.fromkeys(peer.models)))


def _peer_key(place: Place) -> str:
    return api_key(place) if line(place.secret()) else ""


def _peer_filters(place: Place) -> Filters:
    return filters(place, by_id=False)


def _selector(place: Place) -> Selector:
    with Keys(place) as keys:
        found = Selector(
            id="",
            strategy=keys.take("strategy", one_of(*STRATEGIES), ""),
            targets=keys.several("targets", NAMES),
            spillover=keys.take("settings", _selector_settings, 1),
            name=keys.take("name", line, ""),
            description=keys.take("description", block, ""),
            unlisted=keys.take("unlisted", flag, False),
            metadata=keys.several("metadata", free),
        )
    if not keys.has("strategy"):
        problem = f"missing; there are {', '.join(STRATEGIES)}"
        place.book.error(yamlfile.below(place.path, "strategy"), problem)
    if not found.targets:
        place.book.error(yamlfile.below(place.path, "targets"), "missing")
    return found


def _selector_settings(place: Place) -> int:
    with Keys(place) as keys:
        return keys.take("spillover", whole(1), 1)


def _profile(place: Place) -> Profile:
    if isinstance(place.node, Sequence):
        raise Rejected("expected description and pins; lists are llama-swap's old form")
    with Keys(place) as keys:
        description = keys.take("description", block, "")
        pins = keys.several("pins", mapping_of(_pin))
    if not pins:
        place.book.error(yamlfile.below(place.path, "pins"), "missing")
    return Profile("", description, pins)


def _pin(place: Place) -> str | None:
    return None if is_null(place.node) else line(place) or None


def check_targets(config: SwapConfig, names: Names, place: Place) -> None:
    """Report names that mean two things, and targets that are not there."""
    _Targets(config, names).check(place)


@dataclass(frozen=True, slots=True)
class _Targets:
    config: SwapConfig
    names: Names

    def check(self, place: Place) -> None:
        book = place.book
        remote = {name for peer in self.config.peers for name in peer.models}
        full = {f"{p.id}/{name}" for p in self.config.peers for name in p.models}
        selectors = {selector.id for selector in self.config.selectors}
        for known in sorted(full):
            if self.names.local(known):
                book.error(
                    yamlfile.below(place.path, "peers"),
                    f'"{known}" is a model of a peer, and the name of something else',
                )
        for selector in self.config.selectors:
            here = place.below("selectors", place.node).below(selector.id, place.node)
            self._check_selector(selector, here, remote | full, selectors)
        for profile in self.config.profiles:
            pins = place.below("profiles", place.node).below(profile.name, place.node)
            for pin, target in profile.pins.items():
                if target and not self._is_known(target, remote | full | selectors):
                    path = yamlfile.below(f"{pins.path}.pins", pin)
                    problem = f'"{target}" is not known{self.names.hint(target)}'
                    book.error(path, problem)

    def _is_known(self, target: str, others: set[str]) -> bool:
        return self.names.local(target) is not None or target in others

    def _check_selector(
        self, selector: Selector, place: Place, remote: set[str], selectors: set[str]
    ) -> None:
        if self._is_known(selector.id, remote):
            place.book.error(place.path, "there is a model of the same name")
        for index, target in enumerate(selector.targets):
            path = f"{place.path}.targets[{index}]"
            if target in selectors:
                place.book.error(path, f'"{target}" is a selector itself')
            elif not self._is_known(target, remote):
                problem = f'"{target}" is not known{self.names.hint(target)}'
                place.book.error(path, problem)
            elif selector.strategy == "warm" and not self.names.local(target):
                problem = f'"{target}" is a peer\'s; warm is for models on this machine'
                place.book.error(path, problem)
            elif selector.strategy == "spillover" and self._is_again(selector, index):
                place.book.error(path, f'"{target}" stands there twice')

    def _is_again(self, selector: Selector, index: int) -> bool:
        meant = [self.names.local(target) or target for target in selector.targets]
        return meant[index] in meant[:index]
