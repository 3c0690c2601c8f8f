"""GGUF files become models as soon as they are there, and none stops the others."""

import fcntl
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from ggufs import Value, gguf_bytes, write_gguf, write_projector, write_shards
from inferencia.models import tree
from inferencia.models.definitions import PORT_MACRO, ModelDefinition
from inferencia.models.finding import Finder, FoundModel, Headers, find_models
from inferencia.models.memory import estimate_command
from inferencia.models.offering import (
    goinfer_listing,
    shipped_template,
    to_definitions,
)
from inferencia.models.presets import (
    BadPreset,
    Preset,
    parse_params,
    script_preset,
    sidecar_flags,
)


def only(folder: Path) -> FoundModel:
    (model,) = find_models([folder]).models
    return model


def names(*folders: Path) -> list[str]:
    return [model.name for model in find_models(folders).models]


# Which files are models


def test_files_are_found_in_all_folders_under_their_names(tmp_path: Path) -> None:
    one, two = tmp_path / "One", tmp_path / "Two"
    write_gguf(one / "b.gguf")
    write_gguf(one / "deep" / "er" / "Rolex" / "a.gguf")
    write_gguf(one / "mistral-ai" / "7B.gguf")
    write_gguf(two / "team_c.GGUF")
    (two / "notes.txt").write_text("not a model")
    (two / "small.gguf").write_bytes(b"GGUF" * 10)
    (two / "._team_c.gguf").write_bytes(bytes(4096))
    assert names(one, two) == ["a", "b", "mistral-ai/7B", "team/c"]


def test_a_model_is_described_by_its_header(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", context=8192, template="{{ x }}")
    model = only(tmp_path)
    assert (model.name, model.path, model.size) == ("tiny", path, path.stat().st_size)
    assert (model.flags, model.origin, model.error) == ((), "", "")
    assert model.params
    assert (model.params.architecture, model.params.context_length) == ("llama", 8192)
    assert model.params.has_template and model.is_usable


def test_a_missing_folder_is_a_problem_and_no_more(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a" / "m.gguf")
    findings = find_models([tmp_path / "gone", tmp_path / "a"])
    assert findings.problems == (f"{tmp_path / 'gone'}: no such folder",)
    assert len(findings.models) == 1


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"not a model " * 100, "not a GGUF file"),
        (b"GGUF" + bytes(2000), "version 0"),
        (gguf_bytes({"general.name": "x"}), "which architecture"),
        (gguf_bytes({"general.architecture": "x"}, order=">"), "byte order"),
        (
            gguf_bytes({"general.architecture": "x", "general.type": "adapter"}),
            "LoRA adapter",
        ),
        (gguf_bytes({"general.architecture": "x"}, ()) + bytes(1000), "no weights"),
    ],
)
def test_what_cannot_be_served_is_listed_with_the_reason(
    tmp_path: Path, content: bytes, error: str
) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    write_gguf(tmp_path / "good.gguf")
    bad, good = find_models([tmp_path]).models
    assert error in bad.error and not bad.is_usable
    assert good.is_usable


def test_a_file_that_is_still_coming_is_not_offered_before_it_is_whole(
    tmp_path: Path,
) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    finder = Finder([tmp_path])
    for size in (1000, 1200, len(whole) - 1):
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        (model,) = finder.scan().models
        assert not model.is_usable
        assert f"{size} of {len(whole)} bytes" in model.error
    (tmp_path / "m.gguf").write_bytes(whole)
    assert finder.scan().models[0].is_usable


@pytest.mark.parametrize("suffix", ["partial", "part", "downloadInProgress"])
def test_a_download_is_listed_until_the_file_is_there(
    tmp_path: Path, suffix: str
) -> None:
    partial = write_gguf(tmp_path / f"team_m&c=9-00001-of-00002.gguf.{suffix}")
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as our own downloads hold it
        model = only(tmp_path)
    assert (model.name, model.error) == ("team/m", "is still being downloaded")
    assert model.is_arriving and not model.is_usable
    partial.rename(tmp_path / "m.gguf")
    assert only(tmp_path).is_usable
    (tmp_path / f"m.gguf.{suffix}").write_bytes(bytes(10))
    assert only(tmp_path).is_usable


def test_a_download_that_was_given_up_is_told_from_one_that_goes_on(
    tmp_path: Path,
) -> None:
    ours = write_gguf(tmp_path / "ours.gguf.partial")
    theirs = write_gguf(tmp_path / "theirs.gguf.crdownload")
    now = theirs.stat().st_mtime
    finder = Finder([tmp_path], wall_clock=lambda: now)
    with ours.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [model.is_arriving for model in finder.scan().models] == [True, True]
    now += 600
    found = finder.scan().models  # although no file has changed
    assert [model.is_arriving for model in found] == [False, False]
    assert {model.error for model in found} == {
        "is not whole: its download or upload was given up"
    }


def test_a_split_model_is_one_model(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, "big", 3)
    model = only(tmp_path)
    assert (model.name, model.path) == ("big", paths[0])
    assert model.size == sum(path.stat().st_size for path in paths)
    assert model.params and model.params.parameters == 900
    assert model.is_usable


@pytest.mark.parametrize(
    ("without", "error"),
    [
        ([2], "lacks 1 of its 3 files: big-00002-of-00003.gguf is not there"),
        ([1, 2], "lacks 2 of its 3 files: big-00001-of-00003.gguf is not there"),
    ],
)
def test_a_split_model_with_a_part_missing_is_not_offered(
    tmp_path: Path, without: list[int], error: str
) -> None:
    write_shards(tmp_path, "big", 3, without=without)
    model = only(tmp_path)
    assert (model.name, model.error, model.is_usable) == ("big", error, False)


def test_a_part_that_is_cut_off_makes_the_model_incomplete(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, "big", 2)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    assert "cut off" in only(tmp_path).error


def test_of_two_with_one_name_the_later_is_offered(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "A" / "m.gguf")
    second = write_gguf(tmp_path / "B" / "m.gguf")
    model = only(tmp_path)
    assert (model.path, model.is_usable) == (second, True)
    assert model.error == f"two files have this name; {first} is not offered"
    second.write_bytes(b"broken" * 1000)
    model = only(tmp_path)
    assert (model.path, model.is_usable) == (first, True)


def test_a_file_by_two_paths_is_one_and_a_link_with_a_name_is_another(
    tmp_path: Path,
) -> None:
    models, again = tmp_path / "Models", tmp_path / "Again"
    real = write_gguf(models / "m.gguf")
    again.symlink_to(models)
    (models / "Loop").symlink_to(tmp_path)
    (models / "gpt-4.gguf").symlink_to(real)
    (models / "dangling.gguf").symlink_to(tmp_path / "gone.gguf")
    findings = find_models([models, again])
    assert [(m.name, m.error) for m in findings.models] == [("gpt-4", ""), ("m", "")]
    assert findings.models[1].path == real
    assert findings.problems == (f"{models}/dangling.gguf: No such file or directory",)


def test_pipes_and_names_that_are_no_text_are_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(tmp_path / "pipe.sh")
    (tmp_path / "other.sh").write_text(f"/bin/llama-server -m {tmp_path}/pipe.gguf")
    write_gguf(tmp_path / "line\nbreak.gguf")
    with open(os.fsencode(tmp_path) + b"/latin\xe9.gguf", "wb") as file:
        file.write(bytes(2000))
    findings = find_models([tmp_path])
    assert [(m.name, m.error) for m in findings.models] == [("other", "is not there")]
    assert len(findings.problems) == 2
    assert all(problem.isprintable() for problem in findings.problems)


def test_a_folder_with_too_much_in_it_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "MAX_ENTRIES", 20)
    for number in range(30):
        (tmp_path / f"{number}").mkdir()
    write_gguf(tmp_path / "m.gguf")
    findings = find_models([tmp_path])
    assert findings.models == ()
    assert findings.problems == (
        f"{tmp_path}: not searched, the folders hold too much",
    )


# Looking again


def test_nothing_is_read_again_while_nothing_changes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    finder = Finder([tmp_path])
    first = finder.scan()
    assert finder.changed
    # The same size and time: whoever read the file again would see the damage.
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert finder.scan() is first
    assert not finder.changed
    write_gguf(tmp_path / "other.gguf")
    models = finder.scan().models
    assert finder.changed
    assert [(model.name, model.is_usable) for model in models] == [
        ("m", True),
        ("other", True),
    ]


def test_what_comes_goes_and_changes_is_noticed(tmp_path: Path) -> None:
    finder = Finder([tmp_path])
    assert finder.scan().models == ()
    assert not finder.changed
    path = write_gguf(tmp_path / "m.gguf")
    assert finder.scan().models[0].flags == ()
    (tmp_path / "m.sh").write_text("-c 1024")
    assert finder.scan().models[0].flags == ("-c", "1024")
    write_projector(tmp_path / "mmproj.gguf")
    assert finder.scan().models[0].mmproj
    path.unlink()
    assert finder.scan().models == ()
    assert finder.changed


def test_a_file_that_a_script_names_is_watched_too(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "m.gguf"
    folder = tmp_path / "Models"
    folder.mkdir()
    (folder / "fast.sh").write_text(f"/usr/bin/llama-server -m {elsewhere} -c 512")
    finder = Finder([folder])
    (model,) = finder.scan().models
    assert (model.name, model.error) == ("fast", "is not there")
    write_gguf(elsewhere)
    (model,) = finder.scan().models
    assert finder.changed and model.is_usable
    assert finder.scan().models == (model,)
    assert not finder.changed


def test_headers_are_read_again_when_the_file_changed(tmp_path: Path) -> None:
    headers = Headers()
    path = tmp_path / "m.gguf"
    assert headers.read(str(path)) is None
    write_gguf(path, context=1)
    first = headers.read(str(path))
    assert first and first.context_length == 1
    assert headers.read(str(path)) is first
    path.write_bytes(b"broken")
    assert headers.read(str(path)) is None
    assert headers.read(str(tmp_path)) is None


# Flags


def test_flags_come_from_the_first_place_that_has_some(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m&c=9.gguf")
    model = only(tmp_path)
    assert (model.name, model.flags, model.origin) == ("m", ("-c", "9"), "file name")
    (tmp_path / "m&c=9.args").write_text("-c 8")
    model = only(tmp_path)
    assert (model.flags, model.origin) == (("-c", "8"), f"{tmp_path}/m&c=9.args")
    (tmp_path / "m&c=9.sh").write_text("#!/bin/sh\n-c 7 \\\n --grammar '$DIR/a b'\n")
    model = only(tmp_path)
    assert model.name == "m"
    assert model.flags == ("-c", "7", "--grammar", f"{tmp_path}/a b")


def test_a_split_model_s_flags_are_beside_it_under_the_common_name(
    tmp_path: Path,
) -> None:
    write_shards(tmp_path, "big", 2)
    (tmp_path / "big.sh").write_text("-ngl 99")
    assert only(tmp_path).flags == ("-ngl", "99")


def test_flags_that_cannot_be_read_keep_the_model_from_being_offered(
    tmp_path: Path,
) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.args").write_text("-c 1\n--json '{")
    model = only(tmp_path)
    assert (model.error, model.is_usable) == ("line 2: no closing quotation", False)


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("-foo bar -baz qux", ["-foo", "bar", "-baz", "qux"]),
        (
            "# -a\n\n  -b 1 \\\n\t--c '{\"d\": 2}'\n echo -e\n",
            ["-b", "1", "--c", '{"d": 2}'],
        ),
        ("-c 10240  # --no-context-shift", ["-c", "10240"]),
        ("llama-server \\\n --port 80 --host 0.0.0.0 \\\n -m x.gguf \\\n -v", ["-v"]),
        ("--api-key secret --jinja --port=80", ["--jinja"]),
        ("", []),
    ],
)
def test_a_sidecar_s_lines_with_a_dash_are_flags(text: str, flags: list[str]) -> None:
    assert list(sidecar_flags(text)) == flags


EFFORT = '--chat-template-kwargs \'{"reasoning_effort": "high"}\''


@pytest.mark.parametrize(
    ("script", "model", "flags"),
    [
        ("/bin/llama-server --port 5800 -m /m.gguf -c 0", "/m.gguf", "-c 0"),
        ("/llama-server\t-m\t~/m.gguf\t-c\t0", "~/m.gguf", "-c 0"),
        ("llama-server --model $DIR/m.gguf", "$DIR/m.gguf", ""),
        (
            f"#!/bin/sh\n/p/llama-server --host 0.0.0.0 --jinja \\\n --model /m.gguf"
            f" {EFFORT} \\\n -c 1 \\\n#\t--no-context-shift\n",
            "/m.gguf",
            f"--jinja {EFFORT} -c 1",
        ),
        ("#!/p/llama-server -v \\\n -m /m.gguf \\\n# -x\n", "/m.gguf", "-v"),
        ('exec /p/llama-server -m /m.gguf -v "$@" >log 2>&1 &', "/m.gguf", "-v"),
        ("cd /x && /p/llama-server -m a.gguf; echo 'it''s'", "a.gguf", ""),
    ],
)
def test_a_script_s_server_is_a_preset(script: str, model: str, flags: str) -> None:
    assert script_preset(script) == Preset(model, tuple(shlex.split(flags)))


@pytest.mark.parametrize(
    "script",
    [
        "",
        "# /p/llama-server -m /m.gguf",
        "/p/llama-server --models-preset models.ini",
        "/p/llama-server -m",
        "./build/llama-server-old -m x",
        "echo don't",
    ],
)
def test_other_scripts_are_none(script: str) -> None:
    assert script_preset(script) is None


def test_a_preset_is_offered_under_the_script_s_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "gemma.gguf")
    write_projector(tmp_path / "mmproj-gemma.gguf")
    (tmp_path / "long.sh").write_text("/bin/llama-server -m gemma.gguf -c 99")
    (tmp_path / "odd.sh").write_text('/bin/llama-server -m "$MODEL"')
    (tmp_path / "broken.sh").write_text("/bin/llama-server -m 'x")
    findings = find_models([tmp_path])
    gemma, long = findings.models
    assert (long.name, long.path, long.flags) == ("long", gemma.path, ("-c", "99"))
    assert long.origin == str(tmp_path / "long.sh")
    assert long.mmproj == gemma.mmproj == tmp_path / "mmproj-gemma.gguf"
    assert findings.problems == (
        f"{tmp_path}/broken.sh: line 1: no closing quotation",
        f"{tmp_path}/odd.sh: the model $MODEL is not a file's name",
    )


def test_params_files_are_applied_where_nothing_else_says_more(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_gguf(tmp_path / f"{name}.gguf")
    (tmp_path / "b.sh").write_text("--jinja -c 5")
    (tmp_path / "params.yml").write_text(
        "a: {name: a, ctx: 4096, flags: --top-k 5}\nb: {ctx: 1, flags: -x}\nd: 7\n"
    )
    (tmp_path / "templates.yml").write_text('{"c": {"template": "x", "ctx": 2048}}')
    flags = {m.name: m.flags for m in find_models([tmp_path]).models}
    assert flags == {
        "a": ("--top-k", "5", "-c", "4096"),
        "b": ("--jinja", "-c", "5"),
        "c": ("-c", "2048"),
    }
    (tmp_path / "params.yml").write_text("a: [")
    findings = find_models([tmp_path])
    assert len(findings.problems) == 1 and "params.yml: " in findings.problems[0]
    assert findings.models[0].flags == ()


def test_params_of_any_form_are_read_or_refused() -> None:
    assert parse_params(b"- a\n- b\n") == {}
    assert parse_params(b"a: {ctx: many, flags: null}")["a"].added_to(()) == ()
    assert parse_params(b"a: {flags: [-c, 5]}")["a"].added_to(()) == ("-c", "5")
    with pytest.raises(BadPreset):
        parse_params(b"\xff\xff")


# Projectors


LLAVA: dict[str, Value] = {"llama.embedding_length": 5120}


@pytest.mark.parametrize(
    ("models", "seeing", "expected"),
    [
        # one model, one projector
        ({"ggml-model-q4_k": {}}, ["mmproj-model-f16"], {"ggml-model-q4_k": 0}),
        # by name, among others; the best precision
        (
            {"gemma-3-4b-it-Q4_K_M": {}, "gemma-3-12b-it-Q4_K_M": {}, "qwen3-8b": {}},
            ["mmproj-gemma-3-4b-it-BF16", "mmproj-gemma-3-4b-it-f16"],
            {"gemma-3-4b-it-Q4_K_M": 1},
        ),
        ({"gemma-3-4b-it-Q4_0": {}}, ["gemma-3-4b-it.mmproj-Q8_0"], None),
        # without a name: all quantisations of the one model
        (
            {"X-UD-Q4_K_XL": {}, "X-Q8_0": {}},
            ["mmproj-BF16", "mmproj-F16", "mmproj-F32"],
            {"X-UD-Q4_K_XL": 1, "X-Q8_0": 1},
        ),
        ({"a": {}, "b": LLAVA}, ["mmproj-F16"], {}),
        # another model's: only if it fits
        ({"qwen3-8b": LLAVA}, ["mmproj-gemma-3-4b-f16"], {}),
        ({"my-finetune": {}}, ["mmproj-gemma-3-4b-f16"], {"my-finetune": 0}),
        # a named one and one for the rest
        (
            {"a-7b": {}, "b-7b": {}},
            ["mmproj-F16", "mmproj-a-7b"],
            {"a-7b": 1, "b-7b": 0},
        ),
    ],
)
def test_a_projector_goes_with_its_model(
    tmp_path: Path,
    models: Mapping[str, Mapping[str, Value]],
    seeing: list[str],
    expected: Mapping[str, int] | None,
) -> None:
    for name, keys in models.items():
        write_gguf(tmp_path / f"{name}.gguf", keys=keys)
    for name in seeing:
        write_projector(tmp_path / f"{name}.gguf")
    found = find_models([tmp_path])
    if expected is None:
        expected = dict.fromkeys(models, 0)
    chosen = {m.path.stem: m.mmproj.stem for m in found.models if m.mmproj}
    assert chosen == {model: seeing[place] for model, place in expected.items()}
    assert {model.path.stem for model in found.models} == set(models)
    # Somebody put it there: where it goes with no model, that is said.
    assert len(found.problems) == (0 if expected else len(seeing))


def test_a_projector_is_known_by_its_header_whatever_its_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    write_projector(tmp_path / "vision.gguf")
    assert only(tmp_path).mmproj == tmp_path / "vision.gguf"


def test_a_broken_projector_is_said_and_not_used(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "mmproj-m.gguf").write_bytes(b"x" * 5000)
    findings = find_models([tmp_path])
    assert findings.models[0].mmproj is None and findings.models[0].is_usable
    assert "mmproj-m.gguf: is not a GGUF file" in findings.problems[0]


def test_flags_that_name_a_projector_are_followed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    write_projector(tmp_path / "mmproj.gguf")
    (tmp_path / "m.sh").write_text("--mmproj $DIR/mmproj.gguf")
    assert only(tmp_path).mmproj is None
    (tmp_path / "m.sh").write_text("--no-mmproj")
    assert only(tmp_path).mmproj is None


# What is offered

COMMON = "--props --no-warmup"
GOINFER = "--jinja --chat-template-file template.jinja"


def offered(folder: Path, base: Path) -> dict[str, ModelDefinition]:
    definitions = to_definitions(
        find_models([folder]),
        exe="llama-server",
        common=COMMON,
        goinfer=GOINFER,
        base=base,
        start_port=6000,
    )
    assert [d.id for d in definitions] == sorted(d.id for d in definitions)
    return {definition.id: definition for definition in definitions}


def test_each_model_is_offered_plain_and_for_goinfer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m&c=9.gguf")
    (tmp_path / "broken.gguf").write_bytes(bytes(2000))
    models = offered(tmp_path, tmp_path)
    assert list(models) == ["GI_m", "m"]
    begin = ("llama-server", "--host", "127.0.0.1", "--port", PORT_MACRO)
    common = ("--props", "--no-warmup")
    end = ("-m", str(path), "-c", "9")
    plain, goinfer = models["m"], models["GI_m"]
    template = ("--jinja", "--chat-template-file", str(shipped_template()))
    assert plain.command == begin + common + end
    assert goinfer.command == begin + common + template + end
    assert (plain.unlisted, plain.upstream_id) == (False, "m")
    assert (goinfer.unlisted, goinfer.upstream_id) == (True, "m")
    assert (goinfer.port, plain.port) == (6000, 6001)
    assert plain.proxy == "http://127.0.0.1:${PORT}"
    assert (plain.check_endpoint, plain.path) == ("/health", str(path))


def test_the_user_s_own_template_comes_first(tmp_path: Path) -> None:
    write_gguf(tmp_path / "models" / "m.gguf")
    own = tmp_path / "template.jinja"
    own.write_text("{{ messages }}")
    assert str(own) in offered(tmp_path, tmp_path)["GI_models/m"].command
    own.unlink()
    command = offered(tmp_path, tmp_path)["GI_models/m"].command
    assert str(shipped_template()) in command
    assert shipped_template().is_file()


def test_a_projector_is_named_in_the_command(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    projector = write_projector(tmp_path / "mmproj.gguf")
    command = shlex.join(offered(tmp_path, tmp_path)["m"].command)
    assert command.endswith(f"-m {tmp_path}/m.gguf --mmproj {projector}")


@pytest.mark.parametrize(
    ("keys", "flags", "option"),
    [
        ({"x.pooling_type": 1}, "", "--embeddings"),
        ({"x.pooling_type": 4}, "", "--reranking"),
        ({"x.pooling_type": 1}, "--rerank", "--rerank"),
        ({}, "", None),
    ],
)
def test_a_model_that_only_embeds_is_started_to_do_so(
    tmp_path: Path, keys: Mapping[str, Value], flags: str, option: str | None
) -> None:
    write_gguf(tmp_path / "m.gguf", arch="x", keys=keys)
    (tmp_path / "m.sh").write_text(flags)
    command = offered(tmp_path, tmp_path)["m"].command
    options = {"--embeddings", "--reranking", "--rerank"} & set(command)
    assert options == ({option} if option else set())


def test_a_found_model_s_memory_can_be_estimated_from_its_command(
    tmp_path: Path,
) -> None:
    write_shards(tmp_path, "big", 2)
    finder = Finder([tmp_path])
    finder.scan()
    command = offered(tmp_path, tmp_path)["big"].command
    assert (estimate_command(command, finder.headers.read) or 0) > 2400


def test_arguments_with_an_open_quotation_mark_name_their_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"llama\.args\.goinfer: no closing"):
        to_definitions(
            find_models([tmp_path]), exe="x", common="", goinfer="'", base=tmp_path
        )


def test_the_list_has_goinfer_s_form(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m&c=4096.gguf", template="x")
    projector = write_projector(tmp_path / "mmproj.gguf")
    (tmp_path / "bad.gguf").write_bytes(bytes(1000))
    listing = goinfer_listing(find_models([tmp_path]), {"GI_m"})
    assert listing["count"] == 2
    assert listing["models"]["m"] == {
        "path": str(path),
        "size": path.stat().st_size,
        "flags": "-c 4096",
        "params": {
            "arch": "llama",
            "parameters": 300,
            "quant": "Q4_K_M",
            "ctx": 4096,
            "template": True,
            "mmproj": str(projector),
        },
        "loaded": True,
    }
    bad = listing["models"]["bad"]
    assert (bad["loaded"], bad["params"]["arch"]) == (False, "")
    assert "is not a GGUF file" in bad["error"]
