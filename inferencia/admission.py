"""Who may come in, as it is decided at the start and at each reload.

Keys are those that the configuration names; where nothing was configured, two are made.
``--no-api-key`` lets everybody in who is plainly on this machine.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inferencia import folders
from inferencia.addresses import addresses
from inferencia.config import Loaded
from inferencia.downstream.listener import is_loopback
from inferencia.firstkeys import KEYS_FILE, FirstKeys, first_keys
from inferencia.folders import state_folder
from inferencia.keys import Key, KeyRing, KeysError, Role
from inferencia.middleware import Anonymous, today
from inferencia.settings import Config


class StartFailed(Exception):
    """The daemon cannot start; ``str()`` says why and what to do."""

    def __init__(self, message: str, *, is_usage: bool = False) -> None:
        super().__init__(message)
        self.exit_code = 2 if is_usage else 1


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys in force, and the two files where nothing was configured."""

    ring: KeyRing
    first: FirstKeys | None


def open_keys(loaded: Loaded, env: Mapping[str, str]) -> Keys:
    """Read the keys that the configuration names, or make the first two.

    Raises:
        StartFailed: the keys file is wrong, or no key in it can be used.
    """
    config = loaded.config
    auth, given = config.auth, config.server.api_key
    listed = None if auth.api_keys is None else [key.reveal() for key in auth.api_keys]
    admin = given.admin.reveal() if given.admin else None
    user = given.user.reveal() if given.user else None
    first, path = None, keys_path(loaded, env)
    try:
        if uses_first_keys(loaded):
            first = first_keys(state_folder(env))
            admin, user = first.admin, first.user
        swap = config.swap_config.api_keys if config.swap_config else ()
        ring = KeyRing(path, listed=listed, admin=admin, user=user, swap=swap)
    except KeysError as error:
        raise StartFailed(str(error), is_usage=True) from error
    except ValueError as error:
        raise StartFailed(str(error), is_usage=True) from error
    except OSError as error:
        raise StartFailed(
            f"cannot keep keys: {_reason(error)}; name a folder that can be written by "
            "INFERENCIA_STATE, or give keys by INFERENCIA_API_KEYS"
        ) from error
    if not ring.usable(today()) and not config.is_open:
        raise StartFailed(_no_usable_key(loaded, ring, path, env), is_usage=True)
    return Keys(ring, first)


def _no_usable_key(
    loaded: Loaded, ring: KeyRing, path: Path, env: Mapping[str, str]
) -> str:
    """What was found instead of a key, a line each, and how to make one."""
    remedy = "make one with: inferencia keys add NAME"
    if loaded.config.auth.api_keys is not None:
        where = "INFERENCIA_API_KEYS"
        remedy = f"unset it and {remedy}"
    else:
        where = str(path) if path.exists() else f"{path}, which does not exist"
        if loaded.source is not None and loaded.source != folders.find_config(
            None, env
        ):
            remedy += f" -c {loaded.source}"
    doubts = [warning for warning in ring.warnings if warning != ring.problem]
    return "\n".join((*doubts, f"no usable key in {where}; {remedy}"))


def keys_path(loaded: Loaded, env: Mapping[str, str]) -> Path:
    """The keys file that the daemon follows and ``inferencia keys`` edits."""
    auth = loaded.config.auth
    if _has_no_file_of_its_own(loaded):
        with contextlib.suppress(OSError):  # whoever has no home has to name a file
            return state_folder(env) / KEYS_FILE
    return auth.keys_file


def _reason(error: OSError) -> str:
    """An OSError for a person: what happened, and to which file."""
    if error.filename is None:
        return error.strerror or str(error)
    return f"{error.filename}: {error.strerror}"


def uses_first_keys(loaded: Loaded) -> bool:
    """Whether nothing says which keys there are, so that two are made."""
    config = loaded.config
    given = config.server.api_key
    is_told = config.auth.api_keys is not None or given.admin or given.user
    if config.swap_config is not None and config.swap_config.api_keys:
        is_told = True
    return _has_no_file_of_its_own(loaded) and not is_told


def _has_no_file_of_its_own(loaded: Loaded) -> bool:
    """Whether nobody named a keys file, and there is none where one is usual.

    Without a configuration none is looked for. A predecessor's configuration says
    nothing of such a file, but one may have been put beside it.
    """
    auth = loaded.config.auth
    if auth.is_keys_file_given:
        return False
    return loaded.source is None or (loaded.is_foreign and not auth.keys_file.exists())


def open_terms(config: Config) -> Anonymous | None:
    """The terms of ``--no-api-key``; ``None`` without it.

    Raises:
        StartFailed: others than this machine could connect.
    """
    if not config.is_open:
        return None
    hosts = {"localhost", "127.0.0.1", "::1"}
    for address in addresses(config.server):
        if not is_loopback(address.host):
            raise StartFailed(
                f"--no-api-key is refused on {address.host}: anybody could use your "
                "models. Listen on 127.0.0.1, or make a key with: inferencia keys add "
                "NAME",
                is_usage=True,
            )
        hosts.add(address.host.lower())
    key = Key(name="anonymous", digest=b"", role=Role.USER)
    return Anonymous(key, frozenset(hosts), frozenset(config.server.origins))
