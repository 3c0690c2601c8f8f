"""``inferencia init`` writes what can be run at once, and overwrites nothing."""

import argparse
import asyncio
import json
import os
import re
import shlex
import signal
import socket
import stat
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import pytest

from daemons import result, running
from ggufs import write_gguf
from inferencia import cli, initcommand
from inferencia.config import ConfigErrors, load
from inferencia.discovery import Found, State
from inferencia.initcommand import Machine, config_text
from inferencia.keycommands import BAD_USAGE, DONE, Outcome
from inferencia.keys import KeyRing, Role
from inferencia.overlay import Flags
from localengine import llama_server, models
from scripted import Scripted, always, listed, response

NO_PORTS: Mapping[int, str] = {}


class Place:
    """A folder to work in, and a home."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.env = {"HOME": str(self.home), "PATH": str(self.bin)}

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def keys(self) -> Path:
        return self.folder / "keys.txt"

    def does(self, *words: str, ports: Mapping[int, str] = NO_PORTS) -> Outcome:
        options: argparse.Namespace = cli._parser().parse_args(["init", *words])
        return initcommand.run(options, self.env, ports=ports)

    def llama_server(self, where: Path | None = None) -> Path:
        path = (where or self.bin) / "llama-server"
        path.touch(mode=0o755)
        return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def secrets_in(text: str) -> dict[str, str]:
    return dict(re.findall(r"^  (user|admin) +(sk-[\w-]{40,})$", text, re.M))


# --- what it writes --------------------------------------------------------------


def test_models_and_program_become_a_configuration_that_loads(
    place: Place, tmp_path: Path
) -> None:
    folder = tmp_path / 'my "models": #1'
    write_gguf(folder / "tiny.gguf")
    other = tmp_path / "tools" / "llama-server"
    other.parent.mkdir()
    other.touch(mode=0o755)
    done = place.does(
        "--models-dir", str(folder), "--llama-server", "tools/llama-server"
    )
    assert done.code == DONE, done.err
    loaded = load(place.config, place.env, Flags())
    assert loaded.warnings == ()
    assert loaded.config.models_dir == (folder,)
    assert loaded.config.llama.exe == str(other)
    assert loaded.config.backends == ()
    assert loaded.config.auth.keys_file == place.keys
    assert f"found    1 model in {folder}" in done.out


def test_several_folders_may_be_named_and_need_not_exist(place: Place) -> None:
    place.llama_server()
    (place.home / "one").mkdir()
    done = place.does("--models-dir", "~/one", "--models-dir", "two")
    loaded = load(place.config, place.env, Flags())
    assert loaded.config.models_dir == (place.home / "one", place.folder / "two")
    assert f"{place.folder / 'two'} does not exist yet" in done.err
    assert "inferencia models pull" in done.err


def test_the_usual_folders_are_taken_where_they_hold_models(place: Place) -> None:
    exe = place.llama_server()
    write_gguf(place.home / "models" / "tiny.gguf")
    (place.home / ".lmstudio" / "models").mkdir(parents=True)
    done = place.does()
    loaded = load(place.config, place.env, Flags())
    assert loaded.config.models_dir == (place.home / "models",)
    assert loaded.config.llama.exe == str(exe)
    assert '"model":"tiny"' in done.out


def test_models_without_a_program_are_left_out(place: Place) -> None:
    write_gguf(place.home / "models" / "tiny.gguf")
    place.does()
    assert load(place.config, place.env, Flags()).config.models_dir == ()
    done = place.does("--models-dir", "~/models", "--force")
    assert "there is no llama-server on PATH" in done.err
    assert load(place.config, place.env, Flags()).config.llama.exe == "llama-server"


def test_servers_that_run_become_backends() -> None:
    machine = Machine(
        servers=(
            Found(1, "ollama", State.SERVES, "http://127.0.0.1:1", ("qwen", "llama")),
            Found(2, "ollama", State.IS_LOADING, "http://127.0.0.1:2"),
            Found(3, "vllm", State.NEEDS_A_KEY, "http://[::1]:3"),
            Found(4, "mlx", State.MISSING, "http://127.0.0.1:4"),
        )
    )
    text = config_text(machine)
    assert 'name: ollama, type: ollama, url: "http://127.0.0.1:1"' in text
    assert 'name: ollama-2, type: ollama, url: "http://127.0.0.1:2"' in text
    assert "# vllm at http://[::1]:3 wants a key" in text
    assert ":4" not in text


async def test_a_server_is_found_and_written(place: Place) -> None:
    async with Scripted(always(response(listed("qwen3:8b")))) as engine:
        ports = {engine.port: "ollama"}
        # In a thread, since it runs a loop of its own.
        done = await asyncio.to_thread(place.does, ports=ports)
    assert f"found    ollama at http://127.0.0.1:{engine.port}: qwen3:8b" in done.out
    (backend,) = load(place.config, place.env, Flags()).config.backends
    assert (backend.type, backend.url) == ("ollama", f"http://127.0.0.1:{engine.port}")


def test_with_nothing_found_each_start_looks_again(place: Place) -> None:
    done = place.does()
    assert "nothing to serve yet" in done.out
    assert '"model":"echo"' in done.out
    config = load(place.config, place.env, Flags()).config
    assert config.discover
    assert (config.backends, config.models_dir) == ((), ())


def test_a_port_that_is_taken_is_passed_over(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken, socket.socket() as free:
        for one in (taken, free):
            one.bind(("127.0.0.1", 0))
        taken.listen()
        ports = (taken.getsockname()[1], free.getsockname()[1])
        free.close()
        monkeypatch.setattr(initcommand, "_PORTS", ports)
        done = place.does()
    assert load(place.config, place.env, Flags()).config.server.port == ports[1]
    assert f"http://127.0.0.1:{ports[1]}/v1" in done.out


def test_comments_that_are_uncommented_load_too(place: Place, tmp_path: Path) -> None:
    """What is offered for later is right, too."""
    for machine in (Machine(), Machine(folders=(tmp_path,), exe="/bin/true")):
        text = config_text(machine)
        keys = "(?:models_dir|llama|backends|args|memory|  exe):|  -|     "
        keys = rf"^(\s*)# ((?:{keys}).*)$"
        place.config.write_text(re.sub(keys, r"\1\2", text, flags=re.M))
        env = {**place.env, "OPENROUTER_API_KEY": "sk-or-1"}
        config = load(place.config, env, Flags()).config
        assert config.models_dir
        assert config.llama.memory == (None if not machine.folders else 20 * 1024**3)
        assert len(config.backends) in (0, 2)


# --- keys ------------------------------------------------------------------------


def test_two_keys_are_shown_once_and_kept_as_digests(place: Place) -> None:
    done = place.does()
    secrets = secrets_in(done.out)
    assert stat.S_IMODE(place.keys.stat().st_mode) == 0o600
    kept = place.keys.read_text() + place.config.read_text()
    ring = KeyRing(place.keys)
    for role in (Role.USER, Role.ADMIN):
        secret = secrets[role.value]
        assert secret not in kept
        key = ring.find(secret.encode(), date(2026, 1, 1))
        assert key is not None and key.role is role
    assert done.out.count(secrets["admin"]) == 1
    assert ring.warnings == ()


def test_keys_of_the_environment_take_none_of_their_names(place: Place) -> None:
    place.does()
    KeyRing(
        place.keys, admin="sk-admin-of-the-environment-1", user="sk-user-1f5b7c3a9e"
    )


# --- what it never does ----------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "keys.txt"])
def test_nothing_is_overwritten(place: Place, name: str) -> None:
    (place.folder / name).write_text("mine")
    before = sorted(os.listdir(place.folder))
    done = place.does()
    assert done.code == BAD_USAGE
    assert f"{name} is there already" in done.err and "--force" in done.err
    assert (place.folder / name).read_text() == "mine"
    assert sorted(os.listdir(place.folder)) == before


def test_what_is_replaced_is_kept(place: Place) -> None:
    place.config.write_text("mine")
    place.keys.touch(mode=0o600)
    place.keys.write_text("my keys")
    done = place.does("--force")
    assert done.code == DONE
    assert (place.folder / "config.yaml.old").read_text() == "mine"
    old = place.folder / "keys.txt.old"
    assert (old.read_text(), stat.S_IMODE(old.stat().st_mode)) == ("my keys", 0o600)
    assert "kept     config.yaml.old" in done.err
    assert load(place.config, place.env, Flags()).warnings == ()


def test_a_folder_is_not_replaced_by_force(place: Place) -> None:
    place.config.mkdir()
    done = place.does("--force")
    assert (done.code, "is a folder" in done.err) == (BAD_USAGE, True)


def test_a_program_that_is_not_there_is_refused(place: Place) -> None:
    (place.bin / "text").write_text("no program")
    for name in ("nowhere", str(place.bin / "text")):
        done = place.does("--llama-server", name)
        assert done.code == BAD_USAGE
        assert f"--llama-server: {name} is not there" in done.err
    assert not place.config.exists() and not place.keys.exists()


def test_an_environment_that_cannot_be_run_with_leaves_nothing(place: Place) -> None:
    place.env["INFERENCIA_PORT"] = "often"
    before = sorted(os.listdir(place.folder))
    with pytest.raises(ConfigErrors, match="INFERENCIA_PORT"):
        place.does()
    assert sorted(os.listdir(place.folder)) == before


# --- where -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "variable", "path"),
    [
        (("-o", "a/b/one.yaml"), "", "a/b/one.yaml"),
        (("--output", "~/two.yaml"), "three.yaml", "home/two.yaml"),
        (("--config=four.yaml",), "", "four.yaml"),
        ((), "five.yaml", "five.yaml"),
        ((), "", "config.yaml"),
    ],
)
def test_it_is_written_where_it_is_wanted(
    place: Place, words: tuple[str, ...], variable: str, path: str
) -> None:
    place.env["INFERENCIA_CONFIG"] = variable
    done = place.does(*words)
    written = place.folder / path
    assert load(written, place.env, Flags()).source == written
    assert written.with_name("keys.txt").exists()
    (start,) = re.findall(r"^  start +(.*)$", done.out, re.M)
    is_found_by_itself = not words
    assert (start == "inferencia") == is_found_by_itself
    if not is_found_by_itself:
        assert (place.folder / start.split("-c ")[1]).samefile(written)


async def test_the_next_command_and_its_curl_line_work(tmp_path: Path) -> None:
    """The whole of it: init, serve, and one request to a model that is started."""
    exe = llama_server(tmp_path)
    folder = models(tmp_path / "gguf", "tiny")
    words = ("--models-dir", str(folder), "--llama-server", str(exe))
    code, out, err = await result(tmp_path, "init", *words)
    assert code == DONE, err
    assert load(tmp_path / "config.yaml", {}, Flags()).warnings == ()
    (line,) = re.findall(r"^  try it +(.*)$", out, re.M)
    arguments = shlex.split(line)
    secret = secrets_in(out)["user"]
    assert f"Authorization: Bearer {secret}" in arguments
    async with running(tmp_path, "--port", "0") as daemon:
        assert json.loads(arguments[-1])["model"] == "tiny"
        assert await daemon.models(secret) == ["tiny"]
        async with daemon.post(json.loads(arguments[-1]), secret) as answer:
            assert answer.status == 200
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        daemon.signal(signal.SIGTERM)
        assert await daemon.ended() == 0
