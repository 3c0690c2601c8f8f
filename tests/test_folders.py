"""Where files are found and kept."""

import os
import stat
from pathlib import Path

import pytest

from inferencia.folders import expand, find_config, make_private, state_folder


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"HOME": "/h"}, "/h/.local/state/inferencia"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/x"}, "/x/inferencia"),
        ({"HOME": "/h", "XDG_STATE_HOME": "x"}, "/h/.local/state/inferencia"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/x", "STATE_DIRECTORY": "/s"}, "/s"),
        ({"HOME": "/h", "STATE_DIRECTORY": "/s:/t"}, "/s"),
        ({"HOME": "/h", "STATE_DIRECTORY": "/s", "INFERENCIA_STATE": "/i"}, "/i"),
        ({"HOME": "/h", "STATE_DIRECTORY": "", "INFERENCIA_STATE": ""},
         "/h/.local/state/inferencia"),
        ({"HOME": "/h", "INFERENCIA_STATE": "~/i"}, "/h/i"),
    ],
)  # fmt: skip
def test_the_state_folder_follows_the_environment(
    env: dict[str, str], folder: str
) -> None:
    assert state_folder(env) == Path(folder)


def test_a_new_state_folder_is_for_its_user_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        made = make_private(tmp_path / "a" / "b")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_an_existing_state_folder_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    make_private(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


def test_a_file_in_place_of_the_state_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(FileExistsError):
        make_private(tmp_path / "state")


def test_a_tilde_is_the_users_home_only_at_the_beginning() -> None:
    env = {"HOME": "/h"}
    assert expand("~/a", env) == Path("/h/a")
    assert expand("~", env) == Path("/h")
    assert expand("a/~/b", env) == Path("a/~/b")
    assert expand("~other/a", env) == Path("~other/a")


def test_the_configuration_is_looked_for_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    users = home / ".config" / "inferencia" / "config.yaml"
    users.parent.mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    system = tmp_path / "etc.yaml"
    monkeypatch.setattr("inferencia.folders.SYSTEM_CONFIG", system)
    env = {"HOME": str(home)}
    assert find_config(None, env) is None
    system.touch()
    assert find_config(None, env) == system
    users.touch()
    assert find_config(None, env) == users
    Path("config.yaml").touch()
    assert find_config(None, env) == Path("config.yaml")
    env["INFERENCIA_CONFIG"] = "~/named.yaml"
    assert find_config(None, env) == home / "named.yaml"
    assert find_config(Path("asked.yaml"), env) == Path("asked.yaml")
