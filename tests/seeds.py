"""How many seeds a property test is given.

A few at every change; with ``INFERENCIA_SLOW=1``, as in ``.ci/full``, many.
"""

import os

IS_SLOW = bool(os.environ.get("INFERENCIA_SLOW"))


def seeds(few: int, many: int) -> range:
    """The seeds of one test."""
    return range(many if IS_SLOW else few)
