"""How tasks ended, written down, so that a restart of the gateway leaves it known.

One small JSON file in the state folder, replaced whole. It is a convenience: what
cannot be read or written is said in the log, and nothing else comes of it.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferencia.folders import make_private
from inferencia.rewriting import OwnerLost, rewrite

log = logging.getLogger(__name__)

#: The file in the state folder.
FILE_NAME = "tasks.json"

# Of more than a few kilobytes somebody else is the author.
_MAX_BYTES = 1 << 20

Entry = Mapping[str, Any]


def read(path: Path) -> Mapping[str, Entry]:
    """The last state of each task, by name; none if there is no such file."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_MAX_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("how tasks ended cannot be read: %s: %s", path, error)
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, dict)}


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write the last state of each task; blocks."""
    try:
        make_private(path.parent)
        rewrite(path, json.dumps(entries).encode())
    except (OSError, OwnerLost) as error:
        log.warning("how tasks ended cannot be written: %s: %s", path, error)
