"""Names that stand for models: aliases, selectors, profiles, bare names of peers.

The dialect of llama-swap has four ways to call a model by another name:

=========  =====================================================================
alias      always the same model; may be shown in the list
selector   one of several targets, chosen anew at each request
profile    a set of pins that somebody switches on: while it is active, a pinned
           name means another one, or nothing; it comes before everything else
peer       ``peer/model`` is its full name; the bare one does where no other
           peer offers the same
=========  =====================================================================

None of them leads to another: a selector's target is a model, not a selector.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from inferencia.models.definitions import Profile, Selector, SwapConfig


class Loads(Protocol):
    """What has to be known of a model to choose it."""

    def is_ready(self, model: str) -> bool: ...

    def is_starting(self, model: str) -> bool: ...

    def in_flight(self, model: str) -> int: ...


class VirtualNames:
    """The names of one configuration; see ``catalogue.choosing.Names``."""

    def __init__(self, loads: Loads) -> None:
        self._loads = loads
        self._aliases: dict[str, str] = {}
        self._selectors: dict[str, Selector] = {}
        self._profiles: dict[str, Profile] = {}
        self._fixed: tuple[dict[str, Any], ...] = ()
        self.active: Profile | None = None

    def take(self, swap: SwapConfig, *, created: int) -> None:
        """Know these names from now on; no profile is active any more.

        Args:
            swap: the configuration.
            created: what the list says of their age, seconds since 1970.
        """
        self.active = None
        self._aliases = {
            alias: model.id for model in swap.models for alias in model.aliases
        }
        offered = Counter(name for peer in swap.peers for name in peer.models)
        for peer in swap.peers:
            for name in peer.models:
                if offered[name] == 1:
                    self._aliases.setdefault(name, f"{peer.id}/{name}")
        self._selectors = {selector.id: selector for selector in swap.selectors}
        self._profiles = {profile.name: profile for profile in swap.profiles}
        shown = [_selector_entry(s, created) for s in swap.selectors if not s.unlisted]
        if swap.include_aliases_in_list:
            for model in swap.models:
                if not model.unlisted:
                    shown += [_entry(a, "alias", created) for a in model.aliases]
        self._fixed = tuple(shown)

    @property
    def profiles(self) -> Mapping[str, Profile]:
        """All profiles by name, in the order of the configuration."""
        return self._profiles

    def activate(self, name: str | None) -> None:
        """Switch to a profile; None switches off.

        Raises:
            KeyError: there is none of that name.
        """
        self.active = None if name is None else self._profiles[name]

    # What the catalogue asks.

    def pinned(self, requested: str) -> str | None:
        """What the active profile makes of a name; None: it refuses it."""
        if self.active is None or requested not in self.active.pins:
            return requested
        return self.active.pins[requested] or None

    def alias_of(self, name: str) -> str | None:
        """What a name stands for now."""
        selector = self._selectors.get(name)
        return self._aliases.get(name) if selector is None else self._chosen(selector)

    def entries(self) -> Sequence[dict[str, Any]]:
        """What the list shows of such names."""
        return self._fixed

    def _chosen(self, selector: Selector) -> str:
        targets = selector.targets
        if selector.strategy == "warm":
            ready = (t for t in targets if self._loads.is_ready(self._model_of(t)))
            starts = (t for t in targets if self._loads.is_starting(self._model_of(t)))
            return next(ready, None) or next(starts, targets[0])
        if selector.strategy == "spillover":
            for target in targets:
                if self._loads.in_flight(self._model_of(target)) < selector.spillover:
                    return target
            return targets[-1]
        return targets[0]

    def _model_of(self, target: str) -> str:
        return self._aliases.get(target, target)


def _selector_entry(selector: Selector, created: int) -> dict[str, Any]:
    entry = _entry(selector.id, "selector", created)
    if selector.name:
        entry["name"] = selector.name
    if selector.description:
        entry["description"] = selector.description
    entry["meta"] = {"llamaswap": dict(selector.metadata) | {"type": "selector"}}
    return entry


def _entry(name: str, kind: str, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "inferencia",
        "meta": {"llamaswap": {"type": kind}},
    }
