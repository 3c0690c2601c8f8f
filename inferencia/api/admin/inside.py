"""What the admin API shows and steers, as it is handed in by those who made it.

These are the daemon's parts as far as administrators have to do with them. What stands
on a higher floor (the life of the daemon, the models in step with their folders) comes
as a protocol.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from inferencia import folders
from inferencia.bodies import Bodies
from inferencia.catalogue.choosing import Catalogue
from inferencia.config import Loaded
from inferencia.limits import Allowances
from inferencia.middleware import Doors
from inferencia.models.finding import Findings
from inferencia.models.fleet import Fleet
from inferencia.models.quota import Quota
from inferencia.settings import Config
from inferencia.tunnel.agent import RelayState
from inferencia.tunnel.relay import AgentState
from inferencia.usage import UsageBook
from inferencia.waiting import Line


class CannotLoad(Exception):
    """A configuration cannot be run with; each problem is ``path.to.key: message``."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Local(Protocol):
    """The models of this machine."""

    @property
    def fleet(self) -> Fleet: ...
    @property
    def findings(self) -> Findings: ...
    @property
    def folders(self) -> tuple[Path, ...]: ...
    @property
    def budget(self) -> int | None: ...

    async def look(self) -> bool:
        """Look through the folders now."""


class Daemon(Protocol):
    """The life of the daemon."""

    @property
    def loaded(self) -> Loaded:
        """The configuration in force, as it was read."""

    @property
    def keys_file(self) -> Path:
        """The keys file that is followed, whether or not it is there."""

    @property
    def has_first_keys(self) -> bool:
        """Whether two keys were made because nobody said which there are."""

    def check(self, content: bytes | None = None) -> Loaded:
        """Load a configuration without putting it into force; blocks.

        Args:
            content: instead of what is in the file.

        Raises:
            CannotLoad: it is wrong.
        """

    async def reload(self) -> tuple[str, ...]:
        """Read configuration and keys again; returns what is wrong with them."""

    def keys_changed(self) -> None:
        """Tell everybody that other keys are in force."""

    def restart(self) -> None:
        """Begin to drain, and start the program anew behind that."""


@dataclass(slots=True)
class Inside:
    """All of it."""

    doors: Doors
    bodies: Bodies
    allowances: Allowances
    catalogue: Catalogue
    local: Local
    line: Line
    usage: UsageBook
    agents: Callable[[], Sequence[AgentState]]
    relays: Callable[[], Sequence[RelayState]]
    accepts_agents: bool
    env: Mapping[str, str]
    config: Config  # in force; changes at a reload
    # Set when the daemon runs; its parts alone, in a test, have none.
    daemon: Daemon | None = None
    endpoint: str | None = None  # base URL of the service openai

    @property
    def models_quota(self) -> Quota | None:
        """What that folder may hold, if somebody has set bounds."""
        folder, limit = self.models_folder, self.config.admin.models_quota
        return None if folder is None or limit is None else Quota(folder, limit)

    @property
    def models_folder(self) -> Path | None:
        """Where new models go; None if nobody knows where home is."""
        if self.config.models_dir:
            return self.config.models_dir[0]
        try:
            return folders.home(self.env) / "models"
        except OSError:
            return None
