"""``inferencia models``: what a person types, and what comes of it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ggufs import gguf_bytes, write_gguf, write_projector, write_shards
from hubserver import REPOSITORY, Hub, hub_running, stall_at
from inferencia import cli, inuse, modelcommands, pullcommand
from inferencia.config import load
from inferencia.models.download import Phase, Progress, size_text
from inferencia.overlay import Flags
from inferencia.pullcommand import bar, plain

DONE, FAILED, BAD_USAGE = 0, 1, 2
CODE = str(Path(cli.__file__).parent.parent)
MODEL = gguf_bytes({"general.architecture": "llama", "general.file_type": 15})


@dataclass(slots=True)
class Result:
    """What a command ended with."""

    code: int
    out: str
    err: str


class Place:
    """A home of its own, with a folder for models."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.home = folder / "home"
        self.models = self.home / "models"
        self.models.mkdir(parents=True)
        self._capsys = capsys
        for name in os.environ:
            if name.startswith(("INFERENCIA_", "GI_", "HF_", "XDG_")):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("PATH", str(folder / "bin"))
        # Whatever listens on 8080 of this machine is not asked.
        monkeypatch.setenv("INFERENCIA_PORT", "1")
        monkeypatch.chdir(folder)

    def does(self, *words: str) -> Result:
        code = cli.main(["models", *words])
        return Result(code, *self._capsys.readouterr())

    def names(self) -> list[str]:
        paths = (p for p in self.models.rglob("*") if not p.is_dir())
        return sorted(str(path.relative_to(self.models)) for path in paths)


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    return Place(tmp_path, monkeypatch, capsys)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


# --- list ------------------------------------------------------------------------


def test_the_table_says_what_there_is_and_what_is_wrong_with_it(place: Place) -> None:
    write_gguf(place.models / "tiny-Q4_K_M.gguf", context=8192)
    (place.models / "tiny-Q4_K_M.args").write_text("-ngl 99\n")
    write_shards(place.models, "big-Q8_0", 2, without=[2])
    write_gguf(place.models / "Eyes" / "see-Q4_K_M.gguf")
    write_projector(place.models / "Eyes" / "mmproj-F16.gguf")
    (place.models / "new.gguf.partial").write_bytes(b"x" * 2000)
    done = place.does()
    assert done.code == DONE
    head, big, new, see, tiny = done.out.splitlines()
    assert head.split()[:5] == ["NAME", "SIZE", "PARAMS", "QUANT", "CONTEXT"]
    assert big.startswith("big-Q8_0") and "lacks 1 of its 2 files" in big
    assert new.startswith("new") and "was given up" in new
    assert see.startswith("see-Q4_K_M") and see.endswith("with projector")
    assert "8192" in tiny and "Q4_K_M" in tiny and tiny.endswith("-ngl 99")
    assert place.does("list").out == done.out


def test_json_is_the_answer_of_the_gateways_list(place: Place) -> None:
    path = write_gguf(place.models / "tiny-Q4_K_M.gguf")
    document = json.loads(place.does("--json").out)
    assert document["count"] == 1
    entry = document["models"]["tiny-Q4_K_M"]
    assert (entry["path"], entry["loaded"]) == (str(path), False)
    assert entry["params"]["arch"] == "llama"


def test_with_no_models_it_says_how_to_get_one(place: Place) -> None:
    done = place.does()
    assert (done.code, done.out) == (DONE, "")
    assert f"no GGUF files in {place.models}" in done.err
    assert "inferencia models pull" in done.err


def test_the_folders_of_the_configuration_count(place: Place, tmp_path: Path) -> None:
    write_gguf(place.models / "elsewhere.gguf")
    write_gguf(tmp_path / "gguf" / "tiny.gguf")
    (tmp_path / "here.yaml").write_text("models_dir: [gguf, missing]\n")
    done = place.does("-c", "here.yaml")
    assert "tiny" in done.out and "elsewhere" not in done.out
    assert "missing: no such folder" in done.err


def test_a_configuration_that_is_wrong_is_told(place: Place, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server: {prot: 1}\n")
    done = place.does()
    assert done.code == BAD_USAGE
    assert "did you mean server.port?" in done.err


# --- show ------------------------------------------------------------------------


def test_show_says_all_that_is_known_and_the_command(
    place: Place, tmp_path: Path
) -> None:
    first, _ = write_shards(place.models, "big-Q8_0", 2)
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.touch(mode=0o755)
    done = place.does("show", "BIG-q8_0")
    assert done.code == DONE
    facts = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert facts["name"] == "big-Q8_0"
    assert facts["path"] == f"{first} (2 files)"
    assert facts["kind"] == "writes text"
    assert facts["context"] == "4096 tokens"
    assert facts["memory"].startswith("about ")
    assert facts["command"].startswith(f"{program} --host 127.0.0.1 --port")
    assert f"-m {first}" in facts["command"]
    assert "--jinja" in facts["goinfer"]
    document = json.loads(place.does("show", "GI_big-Q8_0", "--json").out)
    assert len(document["files"]) == 2
    assert document["header"]["block_count"] == 2
    assert document["command"][0] == str(program)


def test_show_names_the_nearest(place: Place) -> None:
    write_gguf(place.models / "Qwen3-8B-Q4_K_M.gguf")
    done = place.does("show", "qwen3-8b-q4km")
    assert (done.code, done.out) == (FAILED, "")
    assert 'nearest: "Qwen3-8B-Q4_K_M"' in done.err


def test_show_describes_a_file_that_cannot_be_served(place: Place) -> None:
    (place.models / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 2000)
    done = place.does("show", "bad")
    assert done.code == DONE
    assert "problem" in done.out and "command" not in done.out


# --- rm --------------------------------------------------------------------------


def test_rm_deletes_all_parts_and_what_only_they_need(place: Place) -> None:
    write_shards(place.models / "big", "big-Q8_0", 3)
    write_gguf(place.models / "tiny.gguf")
    (place.models / "big" / "big-Q8_0.sh").write_text("-ngl 99\n")
    partial = place.models / "big" / "big-Q8_0-00002-of-00003.gguf.partial"
    partial.write_bytes(b"left")
    partial.with_name(f"{partial.name}.json").write_text("{}")
    done = place.does("rm", "big/big-Q8_0", "--yes")
    assert done.code == DONE, done.err
    assert place.names() == ["tiny.gguf"]
    assert not (place.models / "big").exists()
    assert len(done.out.splitlines()) == 1 + 6


def test_rm_keeps_a_projector_that_another_model_uses(place: Place) -> None:
    folder = place.models / "Eyes"
    write_gguf(folder / "see-Q4_K_M.gguf")
    write_gguf(folder / "see-Q8_0.gguf")
    write_projector(folder / "mmproj-F16.gguf")
    assert place.does("rm", "see-Q8_0", "--yes").code == DONE
    assert place.names() == ["Eyes/mmproj-F16.gguf", "Eyes/see-Q4_K_M.gguf"]
    assert place.does("rm", "see-Q4_K_M", "--yes").code == DONE
    assert place.names() == []
    assert place.models.is_dir()


def test_rm_deletes_what_a_link_of_a_cache_leads_to(place: Place) -> None:
    blob = write_gguf(place.models / "blobs" / "0123")
    link = place.models / "snapshots" / "1" / "tiny.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    elsewhere = write_gguf(place.home / "mine.gguf")
    (place.models / "other.gguf").symlink_to(elsewhere)
    assert place.does("rm", "tiny", "--yes").code == DONE
    assert place.does("rm", "other", "--yes").code == DONE
    assert place.names() == []
    assert elsewhere.exists()


def test_rm_asks_once(place: Place) -> None:
    write_gguf(place.models / "tiny.gguf")
    done = place.does("rm", "tiny")
    assert done.code == BAD_USAGE  # nobody is there to be asked
    assert "say --yes" in done.err and "tiny.gguf" in done.err
    asked = []

    def person(answer: str) -> modelcommands.Asking:
        def ask(question: str) -> str:
            asked.append(question)
            return answer

        return modelcommands.Asking(True, ask)

    options = cli._parser().parse_args(["models", "rm", "tiny"])
    loaded = load(None, os.environ, Flags())
    no = modelcommands.run(options, loaded, os.environ, person(""))
    assert (no.code, place.names()) == (FAILED, ["tiny.gguf"])
    yes = modelcommands.run(options, loaded, os.environ, person("Yes"))
    assert (yes.code, place.names()) == (DONE, [])
    assert len(asked) == 2
    assert "tiny.gguf" in asked[0] and "Delete tiny, 1.74 kB?" in asked[0]


def test_rm_leaves_a_script_that_describes_a_model(place: Place) -> None:
    path = write_gguf(place.models / "tiny.gguf")
    (place.models / "fast.sh").write_text(f"llama-server -m {path} -ngl 99\n")
    done = place.does("rm", "fast", "--yes")
    assert done.code == FAILED
    assert "delete that file" in done.err
    assert place.names() == ["fast.sh", "tiny.gguf"]


def test_rm_refuses_while_a_process_uses_the_file(place: Place) -> None:
    first, second = write_shards(place.models, "big", 2)
    waits = "import sys; print(flush=True); sys.stdin.read()"
    for argument in (str(first), f"--model={second}"):
        with subprocess.Popen(
            [sys.executable, "-c", waits, "-m", argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as user:
            assert user.stdout is not None
            user.stdout.readline()
            done = place.does("rm", "big", "--yes")
            assert user.stdin is not None
            user.stdin.close()
        assert done.code == FAILED
        assert f"(process {user.pid}) uses it; stop it first" in done.err
    assert len(place.names()) == 2


GATEWAY = """
import http.server, json, sys

class Gateway(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def version_string(self):
        return sys.argv[2]
    def do_GET(self):
        key = self.headers.get("Authorization")
        if self.path == "/models" and key == "Bearer sk-the-key-of-this-test-9f1c":
            path = sys.argv[1]
            body = {"count": 1, "models": {"tiny": {"path": path, "loaded": True}}}
        else:
            body = {"keys": key}
        text = json.dumps(body).encode()
        self.send_response(200 if "count" in body or self.path == "/health" else 401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *args):
        print("asked", self.path, self.headers.get("Authorization"), flush=True)

server = http.server.HTTPServer(("127.0.0.1", 0), Gateway)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("server", ["inferencia/0.1.0", "SomebodyElse/1.0"])
def test_rm_asks_the_gateway_that_runs_and_nobody_else(
    place: Place, tmp_path: Path, server: str
) -> None:
    path = write_gguf(place.models / "tiny.gguf")
    link = tmp_path / "tiny.gguf"  # the gateway knows the file by another name
    link.symlink_to(path)
    config = tmp_path / "config.yaml"
    with subprocess.Popen(
        [sys.executable, "-c", GATEWAY, str(link), server],
        stdout=subprocess.PIPE,
        text=True,
    ) as gateway:
        assert gateway.stdout is not None
        port = int(gateway.stdout.readline())
        config.write_text(
            f"server: {{listen: {{'127.0.0.1:{port}': models}}, "
            "api_key: {user: sk-the-key-of-this-test-9f1c}}\n"
        )
        listed = place.does()
        done = place.does("rm", "tiny", "--yes")
        gateway.kill()
        said = gateway.stdout.read()
    if server.startswith("inferencia"):
        assert listed.out.splitlines()[1].endswith("loaded")
        assert done.code == FAILED
        assert "the gateway has it loaded; unload it first" in done.err
        assert place.names() == ["tiny.gguf"]
    else:
        assert "loaded" not in listed.out
        assert done.code == DONE
        assert "sk-" not in said, "a stranger got the key"


@pytest.mark.parametrize(
    ("keys", "environment", "is_told"),
    [
        ("sk-the-key-of-this-test-9f1c name=root role=admin", "", True),
        ("sk-an-unknown-key-6d1b22e0\nsk-the-key-of-this-test-9f1c", "", True),
        (f"sha256:{'0' * 64} name=alice", "", False),
        (f"sha256:{'0' * 64} name=alice", "sk-the-key-of-this-test-9f1c", True),
    ],
)
def test_whatever_key_is_written_down_here_tells_what_is_loaded(
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: str,
    environment: str,
    is_told: bool,
) -> None:
    path = write_gguf(place.models / "tiny.gguf")
    with subprocess.Popen(
        [sys.executable, "-S", "-c", GATEWAY, str(path), "inferencia/0.1.0"],
        stdout=subprocess.PIPE,
        text=True,
    ) as gateway:
        assert gateway.stdout is not None
        port = int(gateway.stdout.readline())
        (tmp_path / "keys.txt").write_text(keys + "\n")
        (tmp_path / "config.yaml").write_text(
            f"server: {{listen: {{'127.0.0.1:{port}': goinfer}}}}\n"
        )
        if environment:
            monkeypatch.setenv("INFERENCIA_API_KEY_USER", environment)
        listed = place.does()
        gateway.kill()
    assert listed.code == DONE
    assert listed.out.splitlines()[1].endswith("loaded") is is_told
    why = f"the gateway at 127.0.0.1:{port} runs, but tells nobody without a key"
    assert (why in listed.err) is not is_told


def test_processes_are_found_without_proc(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, where there is no /proc; ``ps`` is the real one."""
    monkeypatch.setattr("inferencia.inuse.os.path.isdir", lambda path: False)
    monkeypatch.setenv("PATH", os.defpath)
    path = tmp_path / "model.gguf"
    waits = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", waits, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as user:
        assert user.stdout is not None
        user.stdout.readline()
        found = inuse.processes_with([path])
        assert user.stdin is not None
        user.stdin.close()
    if found:  # a machine without ps tells nothing
        assert [one.pid for one in found] == [user.pid]


# --- pull ------------------------------------------------------------------------


def test_pull_says_where_the_model_is_and_how_it_is_called(
    place: Place, hub: Hub
) -> None:
    hub.add("ggml-org_tiny-Q4_K_M.gguf", MODEL)
    done = place.does("pull", REPOSITORY)
    path = place.models / "ggml-org_tiny-Q4_K_M.gguf"
    assert (done.code, path.read_bytes()) == (DONE, MODEL)
    assert done.out.split()[0] == "ggml-org/tiny-Q4_K_M"
    assert done.out.endswith(f"{path}\n")
    assert "to serve it, install llama-server" in done.err
    again = place.does("pull", REPOSITORY)
    assert (again.code, again.out) == (DONE, done.out)
    assert "it was here already" in again.err


def test_pull_uses_the_first_folder_of_the_configuration(
    place: Place, hub: Hub, tmp_path: Path
) -> None:
    hub.add("tiny-Q4_K_M.gguf", MODEL)
    (tmp_path / "config.yaml").write_text("models_dir: [one, two]\n")
    done = place.does("pull", REPOSITORY)
    assert done.code == DONE
    assert (tmp_path / "one" / "tiny-Q4_K_M.gguf").read_bytes() == MODEL
    assert "offers it within 5 seconds" in done.err
    (tmp_path / "config.yaml").write_text("backends: [{type: echo}]\n")
    done = place.does("pull", REPOSITORY)
    assert f"config.yaml: models_dir: [{place.models}]" in done.err


def test_pull_lists_the_choices_with_their_sizes(place: Place, hub: Hub) -> None:
    for quant in ("Q2_K", "Q8_0"):
        hub.add(f"tiny-{quant}.gguf", MODEL)
    done = place.does("pull", f"{REPOSITORY}:Q4_0")
    assert (done.code, done.out) == (FAILED, "")
    assert done.err.splitlines()[-3:] == [
        f'inferencia: {REPOSITORY} has no "Q4_0"; name another behind the colon',
        "  Q2_K  1.36 kB",
        "  Q8_0  1.36 kB",
    ]


def test_pull_says_in_a_line_what_is_wrong(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = place.does("pull", "tiny")
    assert done.code == BAD_USAGE
    assert "expected OWNER/NAME or OWNER/NAME:QUANT" in done.err
    done = place.does("pull", "acme/other")
    assert done.code == FAILED
    assert "inferencia: acme/other is not at 127.0.0.1 (401)" in done.err
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    done = place.does("pull", REPOSITORY)
    assert done.code == BAD_USAGE
    assert "HF_ENDPOINT: expected an address" in done.err


def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(
    place: Place, hub: Hub
) -> None:
    data = MODEL * 300
    hub.add("tiny-Q4_K_M.gguf", data)
    hub.faults.append(stall_at(200_000))
    command = [sys.executable, "-m", "inferencia", "models", "pull", REPOSITORY]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": CODE},
        stderr=subprocess.PIPE,
        text=True,
    ) as pull:
        partial = place.models / "tiny-Q4_K_M.gguf.partial"
        while not partial.exists() or not partial.stat().st_size:
            assert pull.poll() is None, "it ended"
            time.sleep(0.005)
        pull.send_signal(signal.SIGINT)
        assert pull.wait(10) == FAILED
        assert pull.stderr is not None
        said = pull.stderr.read()
    left = partial.stat().st_size
    kept = f"{size_text(left)} of 408 kB are kept in {place.models} (*.partial)"
    assert kept in said
    assert f"go on with: inferencia models pull {REPOSITORY}\n" in said
    assert "Traceback" not in said
    done = place.does("pull", REPOSITORY)
    assert done.code == DONE
    assert hub.ranges_asked()[-1] == f"bytes={left}-"
    assert (place.models / "tiny-Q4_K_M.gguf").read_bytes() == data


class Terminal(io.StringIO):
    """A terminal of the standard's 80 columns."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    hub.add("tiny-Q4_K_M.gguf", MODEL)
    loaded = load(None, os.environ, Flags())
    terminal, out = Terminal(), io.StringIO()
    code = pullcommand.run(REPOSITORY, loaded, os.environ, out=out, err=terminal)
    assert code == DONE
    drawn = terminal.getvalue()
    assert drawn.startswith("\rasking what there is")
    assert f"\r{'':79}\r" in drawn  # nothing of it is left
    pipe = io.StringIO()
    pullcommand.run(REPOSITORY, loaded, os.environ, out=out, err=pipe)
    assert pipe.getvalue().startswith("asking what there is\n")
    assert "\r" not in pipe.getvalue()


HALF = Progress(
    phase=Phase.LOADING,
    file="tiny-Q4_K_M.gguf",
    number=2,
    files=3,
    done=2_350_000_000,
    size=4_700_000_000,
    rate=85_000_000,
    seconds_left=27.6,
)


def test_the_bar_has_name_share_rate_and_time_left() -> None:
    line = bar(HALF, 120, can_draw=True)
    assert "2/3 tiny-Q4_K_M.gguf ▕████████████            ▏" in line
    assert line.endswith(" 50 %  2.35 GB of 4.7 GB  85 MB/s  0:28 left")
    assert "[############            ]" in bar(HALF, 120, can_draw=False)
    for width in range(20, 130):
        assert len(bar(HALF, width, can_draw=True)) <= max(width, 49)
    assert plain(HALF).startswith("2/3 tiny-Q4_K_M.gguf:  50 %")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (61, "1:01"), (3599.9, "1:00 h"), (7290, "2:01 h"), (1e7, "days")],
)
def test_time_left_is_short(seconds: float, text: str) -> None:
    assert pullcommand._left(seconds) == text


def test_a_wait_is_shown_with_its_reason() -> None:
    waiting = Progress(Phase.WAITING, note="hub is silent; attempt 2 of 6 in 1 s")
    assert bar(waiting, 80, can_draw=True) == f"{waiting.note} ..."
    assert plain(waiting) == waiting.note
