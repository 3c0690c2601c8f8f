"""Where this program finds and keeps its files.

    configuration   -c FILE, $INFERENCIA_CONFIG, ./config.yaml,
                    ~/.config/inferencia/config.yaml, /etc/inferencia/config.yaml
    state           $INFERENCIA_STATE, $STATE_DIRECTORY, $XDG_STATE_HOME/inferencia,
                    ~/.local/state/inferencia

The environment is handed in, so that tests need not change their own. A variable that
is set but empty counts as not set (XDG Base Directory Specification).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

SYSTEM_CONFIG = Path("/etc/inferencia/config.yaml")


def home(env: Mapping[str, str]) -> Path:
    """The user's home: ``$HOME``, else what the system's user database says.

    Raises:
        OSError: neither knows one, as in a container that runs as a bare number.
    """
    if env.get("HOME"):
        return Path(env["HOME"])
    try:
        return Path.home()
    except RuntimeError:
        raise OSError("this user has no home folder; set HOME") from None


def expand(path: str, env: Mapping[str, str]) -> Path:
    """``path`` with a leading ``~`` or ``~/`` replaced by the user's home."""
    if path == "~" or path.startswith("~/"):
        return home(env) / path[2:]
    return Path(path)


def state_folder(env: Mapping[str, str]) -> Path:
    """Where keys, records and what must be remembered are kept; not yet created.

    systemd's ``$STATE_DIRECTORY`` may name several folders separated by colons
    (systemd.exec(5)): the first is ours.
    """
    if env.get("INFERENCIA_STATE"):
        return expand(env["INFERENCIA_STATE"], env).absolute()
    if first := env.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(first).absolute()
    # A relative XDG_STATE_HOME is to be ignored, says its specification.
    if env.get("XDG_STATE_HOME", "").startswith("/"):
        return Path(env["XDG_STATE_HOME"], "inferencia")
    return (home(env) / ".local" / "state" / "inferencia").absolute()


def make_private(folder: Path) -> Path:
    """Create ``folder`` for this user alone (mode 0700) unless it is there already.

    The mode of an existing folder is left as it is: it may be shared on purpose, and
    what lies in it is written with modes of its own.

    Raises:
        OSError: it cannot be created, or something else has its name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        # mkdir's mode is cut by the umask, never widened; a umask of 0o277 would
        # leave us a folder in which we cannot write.
        folder.chmod(0o700)
    return folder


def config_candidates(env: Mapping[str, str]) -> Iterator[Path]:
    """Where a configuration is looked for when nobody named one, in order."""
    yield Path("config.yaml")
    with contextlib.suppress(OSError):
        yield home(env) / ".config" / "inferencia" / "config.yaml"
    yield SYSTEM_CONFIG


def find_config(asked: Path | None, env: Mapping[str, str]) -> Path | None:
    """The configuration file to load, or None for "with no configuration".

    One that was asked for by ``-c`` or ``$INFERENCIA_CONFIG`` is returned whether it
    exists or not: loading it then says that it is missing, instead of silently
    running with another one.
    """
    if asked is not None:
        return expand(str(asked), env)
    if env.get("INFERENCIA_CONFIG"):
        return expand(env["INFERENCIA_CONFIG"], env)
    # os.path.exists is True for a folder, too: better to hear that config.yaml is
    # none than to wonder why it was passed over. A dangling link counts as well.
    found = (path for path in config_candidates(env) if os.path.lexists(path))
    return next(found, None)


def model_folders(env: Mapping[str, str]) -> Iterator[Path]:
    """Where people and other programs keep GGUF files, whether or not it exists.

    ``~/models``, the cache of Hugging Face's tools, and LM Studio's folders.
    """
    with contextlib.suppress(OSError):
        own = home(env)
        yield own / "models"
        yield _hub_cache(own, env)
        yield own / ".lmstudio" / "models"
        yield own / ".cache" / "lm-studio" / "models"


def _hub_cache(own: Path, env: Mapping[str, str]) -> Path:
    if env.get("HF_HUB_CACHE"):
        return expand(env["HF_HUB_CACHE"], env)
    if env.get("HF_HOME"):
        return expand(env["HF_HOME"], env) / "hub"
    cache = env.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache.startswith("/") else own / ".cache"
    return base / "huggingface" / "hub"
