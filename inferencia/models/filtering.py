"""What a model's owner wants changed in requests (llama-swap's ``filters``; pure)."""

from collections.abc import Mapping
from typing import Any

from inferencia.members import REMOVED
from inferencia.models.definitions import Filters


def filtered(
    filters: Filters, requested: str | None, values: Mapping[str, Any]
) -> dict[str, Any]:
    """What filters change in a request: new values, or ``REMOVED``.

    Stripped first, then set, then set for the name that was asked for; ``model`` is
    nobody's to change here.

    Args:
        filters: the model's.
        requested: the model's name as the client wrote it.
        values: the request's top-level members.
    """
    changes: dict[str, Any] = {
        name: REMOVED for name in filters.strip_params if name in values
    }
    changes |= filters.set_params
    if requested is not None:
        changes |= filters.set_params_by_id.get(requested, {})
    changes.pop("model", None)
    return changes
