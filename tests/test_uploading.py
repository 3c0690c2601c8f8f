"""A GGUF file that is sent here is there whole, or not at all."""

import asyncio
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from ggufs import gguf_bytes
from inferencia.models import uploading
from inferencia.models.quota import Quota
from inferencia.models.uploading import (
    BadName,
    Full,
    NoModel,
    Taken,
    Upload,
    target_of,
)

WORDS = [f"word{number}" for number in range(20_000)]
MODEL = gguf_bytes({"general.architecture": "llama", "tokenizer.ggml.tokens": WORDS})


async def sent(target: Path, data: bytes, step: int = 10_000, **how: Any) -> Path:
    upload = await Upload.open(target, size=len(data), **how)
    try:
        for begin in range(0, len(data), step):
            await upload.write(data[begin : begin + step])
        return await upload.finish()
    finally:
        await upload.abandon()


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("step", [1000, 65_536, len(MODEL)])
async def test_what_was_sent_is_there_under_its_name(tmp_path: Path, step: int) -> None:
    path = await sent(target_of(tmp_path, "Tiny.gguf"), MODEL, step)
    assert path.read_bytes() == MODEL
    assert left(tmp_path) == ["Tiny.gguf"]


async def test_a_folder_is_made_for_it(tmp_path: Path) -> None:
    await sent(target_of(tmp_path, "tiny/Tiny.gguf"), MODEL)
    assert left(tmp_path) == ["tiny", "tiny/Tiny.gguf"]


async def test_a_video_is_refused_after_its_first_bytes(tmp_path: Path) -> None:
    upload = await Upload.open(target_of(tmp_path, "new/x.gguf"), size=10_000)
    with pytest.raises(NoModel, match="not a GGUF file"):
        await upload.write(b"\0\0\0\x20ftypisom" + bytes(100))
    assert upload.received < 200
    await upload.abandon()
    assert left(tmp_path) == []


@pytest.mark.parametrize("end", [0, 3, 20, 1000, len(MODEL) // 2, len(MODEL) - 1])
async def test_half_a_file_leaves_nothing(tmp_path: Path, end: int) -> None:
    with pytest.raises(NoModel):
        await sent(target_of(tmp_path, "Tiny.gguf"), MODEL[:end])
    assert left(tmp_path) == []


async def test_who_says_too_small_a_size_is_refused_once_the_header_is_there(
    tmp_path: Path,
) -> None:
    tensors = (("big", (1000, 1000), 0),)
    data = gguf_bytes({"general.architecture": "llama"}, tensors)
    upload = await Upload.open(target_of(tmp_path, "x.gguf"), size=1000)
    with pytest.raises(NoModel, match="announces"):
        await upload.write(data[:1000])
    await upload.abandon()


async def test_who_leaves_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async def leaving() -> None:
        upload = await Upload.open(target_of(tmp_path, "a/x.gguf"), size=None)
        try:
            await upload.write(MODEL[:5000])
            begun.set()
            await asyncio.Event().wait()
        finally:
            await upload.abandon()

    begun = asyncio.Event()
    task = asyncio.create_task(leaving())
    await begun.wait()
    assert left(tmp_path) == ["a", "a/x.gguf.partial"]
    task.cancel()
    await asyncio.wait((task,))
    assert left(tmp_path) == []


async def test_a_file_that_is_there_is_replaced_only_when_that_is_wanted(
    tmp_path: Path,
) -> None:
    target = target_of(tmp_path, "Tiny.gguf")
    target.write_bytes(b"mine")
    with pytest.raises(Taken, match="there already"):
        await sent(target, MODEL)
    assert target.read_bytes() == b"mine"
    await sent(target, MODEL, replace=True)
    assert target.read_bytes() == MODEL


async def test_a_name_that_is_taken_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = target_of(tmp_path, "Tiny.gguf")
    upload = await Upload.open(target, size=len(MODEL))
    await upload.write(MODEL)
    target.write_bytes(b"somebody else's")
    with pytest.raises(Taken):
        await upload.finish()
    await upload.abandon()
    assert target.read_bytes() == b"somebody else's"
    assert left(tmp_path) == ["Tiny.gguf"]


async def test_two_do_not_send_one_file(tmp_path: Path) -> None:
    target = target_of(tmp_path, "Tiny.gguf")
    first = await Upload.open(target, size=None)
    with pytest.raises(Taken, match="just being"):
        await Upload.open(target, size=None)
    await first.write(MODEL)
    await first.finish()
    assert left(tmp_path) == ["Tiny.gguf"]


async def test_a_download_that_runs_is_not_disturbed(tmp_path: Path) -> None:
    partial = tmp_path / "Tiny.gguf.partial"
    partial.write_bytes(b"so far")
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Taken):
            await Upload.open(target_of(tmp_path, "Tiny.gguf"), size=None)
    assert partial.read_bytes() == b"so far"


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "x.txt",
        ".gguf",
        "../x.gguf",
        "a/../../x.gguf",
        "a/../x.gguf",
        "/etc/x.gguf",
        "a//x.gguf",
        "a/b/c.gguf",
        ".hidden/x.gguf",
        "-x.gguf",
        "a\nb.gguf",
        "a\0.gguf",
        "\u202ex.gguf",
        "x&ctx=1.gguf",
        "C:\\x.gguf",
        "x" * 300 + ".gguf",
        "y" * 300 + "/x.gguf",
    ],
)
def test_names_that_lead_elsewhere_or_mean_something_are_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(BadName):
        target_of(tmp_path, name)


async def test_links_are_not_followed(tmp_path: Path) -> None:
    models, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    models.mkdir()
    elsewhere.mkdir()
    (models / "sub").symlink_to(elsewhere)
    with pytest.raises(BadName, match="link"):
        target_of(models, "sub/x.gguf")
    (elsewhere / "victim").write_bytes(b"precious")
    (models / "x.gguf.partial").symlink_to(elsewhere / "victim")
    with pytest.raises(Taken, match="link"):
        await Upload.open(target_of(models, "x.gguf"), size=None)
    (models / "y.gguf").symlink_to(elsewhere / "victim")
    with pytest.raises(Taken, match="no plain file"):
        await Upload.open(target_of(models, "y.gguf"), size=None, replace=True)
    assert (elsewhere / "victim").read_bytes() == b"precious"
    assert os.readlink(models / "y.gguf") == str(elsewhere / "victim")


async def test_what_does_not_fit_on_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(Full, match="not enough room"):
        await Upload.open(target_of(tmp_path, "x.gguf"), size=2**60)
    assert left(tmp_path) == []


async def test_a_disk_that_fills_up_ends_an_upload_of_unknown_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await Upload.open(target_of(tmp_path, "x.gguf"), size=None)
    # A full disk cannot be had without being root.
    monkeypatch.setattr(uploading, "_free", lambda folder: 1)
    with pytest.raises(Full, match="is full"):
        await upload.write(MODEL)
    await upload.abandon()
    assert left(tmp_path) == []


# --- a quota -------------------------------------------------------------------------


def quota(folder: Path, limit: int) -> Quota:
    """One that leaves so much behind what is there."""
    (folder / "sub").mkdir()
    (folder / "sub" / "other.gguf").write_bytes(bytes(1000))
    (folder / "link").symlink_to("/usr")
    (folder / "link.gguf").symlink_to(folder / "sub" / "other.gguf")
    return Quota(folder, limit + 1000)


async def test_what_fits_into_the_quota_to_the_byte_is_taken(tmp_path: Path) -> None:
    allowed = quota(tmp_path, len(MODEL))
    await sent(target_of(tmp_path, "Tiny.gguf"), MODEL, quota=allowed)
    assert allowed.left() == 0


async def test_what_exceeds_the_quota_is_refused_at_its_beginning(
    tmp_path: Path,
) -> None:
    allowed = quota(tmp_path, len(MODEL) - 1)
    before = left(tmp_path)
    with pytest.raises(Full, match=r"may hold .* \(admin.models_quota\), of which"):
        await Upload.open(
            target_of(tmp_path, "new/Tiny.gguf"), size=len(MODEL), quota=allowed
        )
    assert left(tmp_path) == before


async def test_a_file_of_unknown_size_is_refused_once_it_exceeds_the_quota(
    tmp_path: Path,
) -> None:
    allowed = quota(tmp_path, len(MODEL) - 1)
    before = left(tmp_path)
    upload = await Upload.open(
        target_of(tmp_path, "Tiny.gguf"), size=None, quota=allowed
    )
    with pytest.raises(Full):
        await upload.write(MODEL)
        await upload.finish()
    await upload.abandon()
    assert left(tmp_path) == before


async def test_a_file_that_is_replaced_makes_room_for_the_new_one(
    tmp_path: Path,
) -> None:
    target = target_of(tmp_path, "Tiny.gguf")
    await sent(target, MODEL)
    await sent(target, MODEL, replace=True, quota=Quota(tmp_path, len(MODEL)))


async def test_two_that_come_at_once_do_not_exceed_the_quota_together(
    tmp_path: Path,
) -> None:
    allowed = Quota(tmp_path, 2 * len(MODEL) - 1)
    one, other = [
        await Upload.open(target_of(tmp_path, name), size=len(MODEL), quota=allowed)
        for name in ("a.gguf", "b.gguf")
    ]
    await one.write(MODEL)
    await other.write(MODEL)
    with pytest.raises(Full):
        await one.finish()
    await one.abandon()
    await other.finish()
    assert left(tmp_path) == ["b.gguf"]
