"""How much the folder for models may hold, however much room its disk has.

``admin.models_quota`` binds what comes over HTTP, uploads and downloads; whoever sits
at the machine is only told of a full disk.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Quota:
    """What a folder and all below it may hold together."""

    folder: Path
    limit: int  # bytes

    def left(self) -> int:
        """Bytes that may still come; negative if there is more already. Blocks.

        Unfinished files count with what has come of them; links lead elsewhere and
        count nothing.
        """
        return self.limit - sum(_sizes(self.folder))


def _sizes(folder: Path) -> Iterator[int]:
    """The sizes of the files below."""
    for here, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(here, name))
            except OSError:  # gone meanwhile
                continue
            if stat.S_ISREG(found.st_mode):
                yield found.st_size
