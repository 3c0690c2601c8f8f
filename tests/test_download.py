"""Models are fetched whole, verified, or not at all."""

import asyncio
import errno
import hashlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from hubserver import REPOSITORY, Hub, answer, cut_at, hub_running, stall_at
from inferencia.models import download as download_module
from inferencia.models.choice import (
    BadReference,
    NoSuchModel,
    Reference,
    RemoteFile,
    choose,
    is_safe,
    parse_reference,
    remote_file,
)
from inferencia.models.download import (
    MAX_ATTEMPTS,
    Conflict,
    Download,
    Downloaded,
    DownloadError,
    Endpoint,
    NoSpace,
    Phase,
    WrongContent,
    size_text,
)
from inferencia.models.hub import redirected
from inferencia.models.quota import Quota
from inferencia.secret import Secret

TINY = "tiny-Q4_K_M.gguf"
DATA = random.Random(1).randbytes(600_000)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_running() as hub:
        yield hub


class Pauses:
    """Stands for the clock: waits are written down, and are over at once."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def fetching(hub: Hub, into: Path, asked: str = REPOSITORY, **options: Any) -> Download:
    endpoint = options.pop("endpoint", Endpoint(hub.url))
    options = {"pause": Pauses(), **options}
    reference = parse_reference(asked)
    download = Download(reference, into=into, endpoint=endpoint, **options)
    hub.arrived = lambda end: download.progress.file_done >= end
    return download


async def fetch(
    hub: Hub, into: Path, asked: str = REPOSITORY, **options: Any
) -> Downloaded:
    return await fetching(hub, into, asked, **options).run()


def names(folder: Path) -> list[str]:
    """All that is in a folder, at any depth."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(str(path) for path in found if not (folder / path).is_dir())


# --- what is asked for -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repository", "quant"),
    [
        ("acme/tiny-GGUF", "acme/tiny-GGUF", None),
        ("acme/tiny-GGUF:Q4_K_M", "acme/tiny-GGUF", "Q4_K_M"),
        ("https://huggingface.co/acme/tiny-GGUF", "acme/tiny-GGUF", None),
        ("hf.co/acme/tiny-GGUF:UD-Q4_K_XL", "acme/tiny-GGUF", "UD-Q4_K_XL"),
        ("hf:acme/tiny-GGUF:IQ2_XS", "acme/tiny-GGUF", "IQ2_XS"),
        ("acme/tiny:sub/tiny-Q4_K_M.gguf", "acme/tiny", "sub/tiny-Q4_K_M.gguf"),
    ],
)
def test_a_repository_may_be_named_as_people_name_it(
    text: str, repository: str, quant: str | None
) -> None:
    assert parse_reference(text) == Reference(repository, quant)


@pytest.mark.parametrize(
    "text",
    [
        *("", "tiny", "acme/", "/tiny", "../etc/passwd", "acme/..", "a/b/c"),
        *("acme/ti ny", "acme/tiny?x=1", "https://evil.example/a/b"),
        *("acme/tiny:", "acme/tiny:a b", "acme/tiny:\n"),
    ],
)
def test_what_is_no_repository_is_refused(text: str) -> None:
    with pytest.raises(BadReference):
        parse_reference(text)


@pytest.mark.parametrize(
    "path",
    [
        *("../x.gguf", "/x.gguf", "a/../x.gguf", "a//x.gguf", ".x.gguf", "a/.x.gguf"),
        *("a\\x.gguf", "x\n.gguf", "x\0.gguf", "x\u202e.gguf", "-x.gguf", "C:x.gguf"),
        # goinfer's names carry arguments of llama-server, not for strangers to set.
        *("x&path=/.gguf", "x$DIR.gguf", "y" * 240 + ".gguf", ""),
    ],
)
def test_a_name_that_could_do_harm_is_no_choice(path: str) -> None:
    assert not is_safe(path)
    assert remote_file({"path": path, "size": 1}) is None


@pytest.mark.parametrize("size", [-1, 2**60, "7", None, 1.5])
def test_a_file_of_no_size_is_no_choice(size: object) -> None:
    assert remote_file({"path": "x.gguf", "size": size}) is None


def repository(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1000) for path in paths]


def chosen(asked: str | None, *paths: str) -> list[str]:
    choice = choose(repository(*paths), Reference("acme/tiny", asked))
    return [file.path for file in choice.files]


MANY = (
    "t-Q2_K.gguf",
    "t-Q4_K_M.gguf",
    "t-UD-Q4_K_XL.gguf",
    "t-Q8_0.gguf",
    "t.f16.gguf",
)


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        (None, "t-Q4_K_M.gguf"),
        ("q8_0", "t-Q8_0.gguf"),
        ("UD-Q4_K_XL", "t-UD-Q4_K_XL.gguf"),
        ("Q4_K_XL", "t-UD-Q4_K_XL.gguf"),
        ("F16", "t.f16.gguf"),
        ("t-Q2_K.gguf", "t-Q2_K.gguf"),
        ("t-Q2_K", "t-Q2_K.gguf"),
    ],
)
def test_a_quantisation_chooses_a_file(asked: str | None, path: str) -> None:
    assert chosen(asked, *MANY) == [path]


def test_the_exact_quantisation_comes_before_the_dynamic_one() -> None:
    paths = ("t-UD-Q4_K_M.gguf", "t-Q4_K_M.gguf")
    assert chosen("Q4_K_M", *paths) == ["t-Q4_K_M.gguf"]
    assert chosen(None, *paths) == ["t-Q4_K_M.gguf"]


def test_the_only_model_is_meant_whatever_it_is() -> None:
    assert chosen(None, "t.gguf", "imatrix_t.gguf") == ["t.gguf"]


def test_a_folder_may_bear_the_quantisation() -> None:
    paths = ("Q8_0/t.gguf", "BF16/t.gguf")
    assert chosen("bf16", *paths) == ["BF16/t.gguf"]


def test_parts_come_together_and_the_first_of_them_last() -> None:
    parts = [f"Q4_K_M/t-Q4_K_M-0000{n}-of-00003.gguf" for n in (2, 1, 3)]
    found = chosen(None, *parts, "t-Q8_0.gguf")
    assert [path[-19:-14] for path in found] == ["00002", "00003", "00001"]


def test_a_set_that_lacks_a_part_is_refused() -> None:
    with pytest.raises(NoSuchModel, match="lacks 1 of the parts of t-Q4_K_M"):
        chosen(None, "t-Q4_K_M-00001-of-00003.gguf", "t-Q4_K_M-00003-of-00003.gguf")
    with pytest.raises(NoSuchModel, match="lacks"):
        chosen(None, "t-Q4_K_M-00001-of-99999.gguf")


@pytest.mark.parametrize(
    ("projectors", "best"),
    [
        (("mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"), 1),
        (("mmproj-model-f16.gguf", "mmproj-t-Q8_0.gguf"), 0),
        (("t-mmproj.gguf",), 0),
    ],
)
def test_the_projector_comes_along(projectors: tuple[str, ...], best: int) -> None:
    found = chosen("Q8_0", *projectors, "t-Q8_0.gguf", "t-Q4_0.gguf")
    assert found == [projectors[best], "t-Q8_0.gguf"]


def test_without_the_usual_quantisation_all_are_listed_with_their_sizes() -> None:
    with pytest.raises(NoSuchModel, match="several models and no Q4_K_M") as caught:
        chosen(None, "t-Q2_K.gguf", "t-Q8_0.gguf", "mmproj-F16.gguf")
    assert caught.value.choices == (("Q2_K", 1000), ("Q8_0", 1000))
    with pytest.raises(NoSuchModel, match='no "Q3_K"') as caught:
        chosen("Q3_K", "t-Q2_K.gguf", "t.gguf")
    assert caught.value.choices == (("Q2_K", 1000), ("t", 1000))


def test_two_of_one_quantisation_are_told_apart_by_name() -> None:
    paths = ("a-Q4_K_M.gguf", "b-Q4_K_M.gguf")
    with pytest.raises(NoSuchModel, match="2 models") as caught:
        chosen(None, *paths)
    asked = caught.value.choices[1][0]
    assert chosen(asked, *paths) == ["b-Q4_K_M.gguf"]


def test_a_repository_without_gguf_says_so() -> None:
    with pytest.raises(NoSuchModel, match="acme/tiny has no GGUF files"):
        chosen(None, "mmproj-F16.gguf")


# --- the usual way ---------------------------------------------------------------


async def test_a_model_arrives_whole_and_under_its_name(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    hub.add("tiny-Q8_0.gguf", b"other")
    into = tmp_path / "not" / "yet" / "there"
    done = await fetch(hub, into)
    assert done.model == into / TINY
    assert done.model.read_bytes() == DATA
    assert (done.size, done.fetched, done.is_verified) == (len(DATA), len(DATA), True)
    assert names(into) == [TINY]


async def test_a_projector_lies_beside_its_model_in_a_folder_of_theirs(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(f"sub/{TINY}", DATA)
    hub.add("mmproj-F16.gguf", b"eyes")
    done = await fetch(hub, tmp_path)
    assert done.model == tmp_path / "tiny-GGUF" / TINY
    assert names(tmp_path) == ["tiny-GGUF/mmproj-F16.gguf", f"tiny-GGUF/{TINY}"]


async def test_what_is_there_already_is_verified_and_not_fetched_again(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    await fetch(hub, tmp_path)
    done = await fetch(hub, tmp_path)
    assert (done.fetched, done.size) == (0, len(DATA))
    assert len(hub.ranges_asked()) == 1


async def test_another_file_of_this_name_is_never_overwritten(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    for other in (b"mine", DATA[:-1] + b"!"):
        (tmp_path / TINY).write_bytes(other)
        with pytest.raises(Conflict, match="another file"):
            await fetch(hub, tmp_path)
        assert (tmp_path / TINY).read_bytes() == other
    (tmp_path / TINY).unlink()
    (tmp_path / TINY).symlink_to("nowhere")
    with pytest.raises(Conflict):
        await fetch(hub, tmp_path)
    assert hub.ranges_asked() == []


async def test_a_small_file_is_held_against_its_checksum_of_git(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    hub.small.add(TINY)
    assert (await fetch(hub, tmp_path)).is_verified
    (tmp_path / TINY).unlink()
    hub.said[TINY] = {"oid": "0" * 40}
    with pytest.raises(WrongContent):
        await fetch(hub, tmp_path)


async def test_a_listing_of_many_pages_is_read_to_its_end(
    hub: Hub, tmp_path: Path
) -> None:
    for number in range(5):
        hub.add(f"other-Q{number}_0.gguf", b"other")
    hub.add(TINY, DATA)
    hub.page_size = 2
    hub.link_host = "https://somewhere.example"  # a mirror that did not rewrite it
    await fetch(hub, tmp_path)
    assert sum("/api/models/" in asked.path for asked in hub.asked) == 3


async def test_progress_counts_every_byte_of_every_file(
    hub: Hub, tmp_path: Path
) -> None:
    first, second = (f"tiny-Q4_K_M-0000{n}-of-00002.gguf" for n in (1, 2))
    hub.add(first, DATA)
    hub.add(second, DATA)
    hub.faults.append(answer(503))
    hub.faults.append(cut_at(200_000))
    seen = []

    async def look(seconds: float) -> None:
        seen.append(download.progress)

    now = iter(range(1000))
    download = fetching(hub, tmp_path, pause=look, clock=lambda: float(next(now)))
    assert download.progress.phase is Phase.LISTING
    await download.run()
    busy, cut = seen
    assert (busy.phase, busy.file, busy.number) == (Phase.WAITING, second, 1)
    assert "answers 503; attempt 2 of 6" in busy.note
    assert (cut.file_done, cut.done) == (200_000, 200_000)
    assert (cut.file_size, cut.size) == (len(DATA), 2 * len(DATA))
    end = download.progress
    assert (end.phase, end.done, end.size) == (Phase.DONE, 2 * len(DATA), end.size)
    assert end.number == end.files == 2


async def test_rate_and_time_left_are_those_of_the_last_seconds(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    hub.faults.append(stall_at(400_000))
    now = 0.0
    download = fetching(hub, tmp_path, clock=lambda: now)
    task = asyncio.create_task(download.run())
    await until(lambda: download.progress.done == 400_000)
    now = 4.0
    progress = download.progress
    assert progress.rate == 100_000
    assert progress.seconds_left == 2.0
    now = 400.0
    download.progress  # noqa: B018 -- a look is what the rate is measured by
    now = 410.0
    assert download.progress.rate == 0
    assert download.progress.seconds_left is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def until(holds: Any, seconds: float = 10.0) -> None:
    """Ask until it holds: a download tells nobody how far it is, one looks."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not happen"
        await asyncio.sleep(0.002)


# --- interrupted -----------------------------------------------------------------


async def test_a_cut_connection_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, DATA)
    hub.faults += [cut_at(100_000), answer(500), cut_at(100_001), cut_at(300_000)]
    done = await fetch(hub, tmp_path)
    assert done.model.read_bytes() == DATA
    assert done.fetched == len(DATA)
    begun = ["100000", "100000", "100001", "300000"]
    assert hub.ranges_asked() == [None, *(f"bytes={at}-" for at in begun)]


async def test_what_was_cancelled_is_kept_and_taken_up_again(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    hub.faults.append(stall_at(250_000))
    download = fetching(hub, tmp_path)
    task = asyncio.create_task(download.run())
    await until(lambda: download.progress.done == 250_000)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(tmp_path) == [f"{TINY}.partial", f"{TINY}.partial.json"]
    left = (tmp_path / f"{TINY}.partial").stat().st_size
    done = await fetch(hub, tmp_path)
    assert hub.ranges_asked() == [None, f"bytes={left}-" if left else None]
    assert done.fetched == len(DATA) - left
    assert names(tmp_path) == [TINY]


async def half(hub: Hub, into: Path, end: int = 250_000) -> None:
    """Leave the beginning of the model there."""
    hub.faults += [cut_at(end), answer(404)]
    with pytest.raises(DownloadError):
        await fetch(hub, into)
    assert (into / f"{TINY}.partial").stat().st_size == end


async def test_the_beginning_of_an_older_content_is_thrown_away(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    await half(hub, tmp_path)
    hub.add(TINY, DATA[::-1])
    done = await fetch(hub, tmp_path)
    assert hub.ranges_asked()[-1] is None
    assert done.model.read_bytes() == DATA[::-1]


async def test_a_beginning_that_was_spoiled_is_fetched_once_more(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    await half(hub, tmp_path)
    (tmp_path / f"{TINY}.partial").write_bytes(b"spoiled" + DATA[7:250_000])
    done = await fetch(hub, tmp_path)
    assert hub.ranges_asked()[-2:] == ["bytes=250000-", None]
    assert done.model.read_bytes() == DATA


async def test_what_has_all_its_bytes_is_only_verified(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    await half(hub, tmp_path)
    (tmp_path / f"{TINY}.partial").write_bytes(DATA)
    assert (await fetch(hub, tmp_path)).fetched == 0
    assert names(tmp_path) == [TINY]


async def test_a_store_without_ranges_begins_anew(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, DATA)
    hub.ranges = False
    hub.faults += [cut_at(300_000)]
    done = await fetch(hub, tmp_path)
    assert done.model.read_bytes() == DATA
    assert done.fetched == len(DATA) + 300_000


async def test_a_store_that_always_breaks_at_one_place_is_given_up(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    hub.ranges = False
    hub.faults += [cut_at(300_000)] * 50
    with pytest.raises(DownloadError, match=f"after {MAX_ATTEMPTS} attempts"):
        await fetch(hub, tmp_path)
    assert len(hub.ranges_asked()) == MAX_ATTEMPTS


async def test_without_checksums_the_tag_of_the_content_decides(
    hub: Hub, tmp_path: Path
) -> None:
    hub.has_checksums = False
    hub.add(TINY, DATA)
    await half(hub, tmp_path)
    done = await fetch(hub, tmp_path)
    assert (done.fetched, done.is_verified) == (len(DATA) - 250_000, False)
    (tmp_path / TINY).unlink()
    await half(hub, tmp_path)
    hub.add(TINY, DATA[::-1])
    done = await fetch(hub, tmp_path)
    assert done.model.read_bytes() == DATA[::-1]
    tag = f'"{hashlib.md5(DATA).hexdigest()}"'
    assert hub.asked[-1].headers["if-range"] == tag


async def test_two_do_not_fill_one_file(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, DATA)
    hub.faults.append(stall_at(100))
    download = fetching(hub, tmp_path)
    task = asyncio.create_task(download.run())
    await until(lambda: download.progress.done == 100)
    with pytest.raises(Conflict, match="already, by somebody else"):
        await fetch(hub, tmp_path)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- all or nothing --------------------------------------------------------------


PARTS = [f"tiny-Q4_K_M-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


async def test_parts_get_their_names_together(hub: Hub, tmp_path: Path) -> None:
    for part in PARTS:
        hub.add(part, DATA)
    hub.said[PARTS[0]] = {"lfs": {"oid": "0" * 64, "size": len(DATA)}}
    with pytest.raises(WrongContent):
        await fetch(hub, tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".gguf")]
    hub.said.clear()
    done = await fetch(hub, tmp_path)
    assert done.fetched == len(DATA)  # the others were there, and are hashed only
    assert done.model.name == PARTS[0]
    assert names(tmp_path) == PARTS


async def test_parts_lose_their_names_together(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that fails is no fault that a test can provoke for one file of three."""
    for part in PARTS:
        hub.add(part, DATA)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == PARTS[0]:
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(source, target)

    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(DownloadError, match="Input/output error"):
        await fetch(hub, tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".gguf")]
    monkeypatch.undo()
    assert (await fetch(hub, tmp_path)).fetched == 0
    assert names(tmp_path) == PARTS


async def test_damaged_content_is_an_error_and_leaves_nothing(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    hub.said[TINY] = {"lfs": {"oid": "0" * 64, "size": len(DATA)}}
    with pytest.raises(WrongContent, match=f"{TINY} is damaged"):
        await fetch(hub, tmp_path)
    assert names(tmp_path) == []


async def test_a_file_of_another_length_is_refused_before_it_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    for length in (len(DATA) - 1, len(DATA) + 1):
        hub.said[TINY] = {"lfs": {"oid": "0" * 64, "size": length}}
        with pytest.raises(DownloadError, match="not what was listed"):
            await fetch(hub, tmp_path)
    assert names(tmp_path) == []


async def test_a_body_without_end_is_left(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, DATA)

    async def endless(hub: Hub, request: Any, data: bytes) -> Any:
        from aiohttp import web

        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for _ in range(100):
            await response.write(data)
        return response

    hub.faults.append(endless)
    with pytest.raises(DownloadError, match="does not end"):
        await fetch(hub, tmp_path)
    assert TINY not in names(tmp_path)


async def test_room_is_looked_for_before_anything_is_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    hub.said[TINY] = {"lfs": {"oid": "0" * 64, "size": 2**50}}
    with pytest.raises(NoSpace, match=r"1\.13e\+03 TB are needed, .* are free"):
        await fetch(hub, tmp_path)
    assert hub.ranges_asked() == []
    assert names(tmp_path) == []


async def test_what_exceeds_the_folders_quota_is_not_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    with pytest.raises(NoSpace, match=r"admin.models_quota\), of which .* are left"):
        await fetch(hub, tmp_path, quota=Quota(tmp_path, len(DATA) - 1))
    assert hub.ranges_asked() == []
    await fetch(hub, tmp_path, quota=Quota(tmp_path, len(DATA)))


async def test_a_disk_that_fills_up_keeps_what_is_there(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filling a disk takes one that nobody needs; the call that fails is replaced."""
    hub.add(TINY, DATA)
    write = os.write

    def full(handle: int, data: Any) -> int:
        if len(data) < 1000:
            return write(handle, data)
        if os.fstat(handle).st_size >= 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:100_000])

    monkeypatch.setattr("inferencia.models.partial.os.write", full)
    with pytest.raises(NoSpace, match="is full; what is there is kept"):
        await fetch(hub, tmp_path)
    monkeypatch.undo()
    done = await fetch(hub, tmp_path)
    assert done.fetched == len(DATA) - 100_000


# --- servers that refuse, wait, or lead astray -----------------------------------


async def test_the_token_is_for_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, DATA)
    hub.token = "hf_secret"
    await fetch(hub, tmp_path, endpoint=Endpoint(hub.url, Secret("hf_secret")))
    sent = [(asked.place, "authorization" in asked.headers) for asked in hub.asked]
    assert sent == [("hub", True), ("hub", True), ("store", False)]


@pytest.mark.parametrize(
    ("is_gated", "token", "said"),
    [
        (False, None, "is not at 127.0.0.1 .401., or set HF_TOKEN if it is private"),
        (False, "wrong", "or HF_TOKEN is not good for it"),
        (True, None, "only for those who were let in: see http.* set HF_TOKEN"),
    ],
)
async def test_a_closed_repository_says_what_to_do(
    hub: Hub, tmp_path: Path, is_gated: bool, token: str | None, said: str
) -> None:
    hub.add(TINY, DATA)
    hub.token, hub.is_gated = "hf_secret", is_gated
    endpoint = Endpoint(hub.url, Secret(token) if token else None)
    with pytest.raises(DownloadError, match=said) as caught:
        await fetch(hub, tmp_path, endpoint=endpoint)
    assert "hf_secret" not in str(caught.value)


def test_a_token_is_not_sent_where_it_could_be_read() -> None:
    token = Secret("hf_secret")
    assert Endpoint("https://mirror.example", token).shows_token
    assert Endpoint("http://127.0.0.1:9", token).shows_token
    assert not Endpoint("http://mirror.example", token).shows_token


@pytest.mark.parametrize("url", ["ftp://x", "nonsense", "https://a:b@x", "http://x?y"])
def test_an_endpoint_that_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(DownloadError, match="HF_ENDPOINT"):
        Endpoint.from_env({"HF_ENDPOINT": url})


def test_endpoint_and_token_are_from_the_environment() -> None:
    assert Endpoint.from_env({"HF_TOKEN": ""}) == Endpoint("https://huggingface.co")
    env = {"HF_ENDPOINT": "https://mirror.example/hf/", "HF_TOKEN": "hf_x"}
    assert Endpoint.from_env(env) == Endpoint(
        "https://mirror.example/hf", Secret("hf_x")
    )


async def test_a_busy_server_is_given_the_time_that_it_asks_for(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add(TINY, DATA)
    hub.listing += [429]
    hub.retry_after = "17"
    hub.faults.append(answer(429, Retry_After="3"))
    pauses = Pauses()
    await fetch(hub, tmp_path, pause=pauses)
    assert pauses.seconds == [17.0, 3.0]


async def test_nobody_waits_for_an_hour(hub: Hub, tmp_path: Path) -> None:
    hub.listing += [429]
    hub.retry_after = "3600"
    with pytest.raises(DownloadError, match="429: try again in 3600 s"):
        await fetch(hub, tmp_path)


async def test_pauses_grow_and_attempts_end(hub: Hub, tmp_path: Path) -> None:
    hub.listing += [503] * 20
    pauses = Pauses()
    with pytest.raises(DownloadError, match="503; gave up after 6 attempts"):
        await fetch(hub, tmp_path, pause=pauses)
    assert [round(s / 2**n) for n, s in enumerate(pauses.seconds)] == [1] * 5


async def test_nobody_there_is_said_as_it_is(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1: .*onnect"):
        await fetch(hub, tmp_path, endpoint=Endpoint("http://127.0.0.1:1"))


async def test_silence_counts_as_a_broken_connection(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, DATA)
    hub.faults.append(stall_at(100_000))
    pauses = Pauses()
    done = await fetch(hub, tmp_path, silence=0.1, pause=pauses)
    assert done.model.read_bytes() == DATA
    assert len(pauses.seconds) == 1


async def test_a_loop_of_redirects_ends(hub: Hub, tmp_path: Path) -> None:
    hub.add(TINY, DATA)
    hub.redirect_to = f"/{REPOSITORY}/resolve/main/{TINY}"
    with pytest.raises(DownloadError, match="more than 10 redirects"):
        await fetch(hub, tmp_path)


@pytest.mark.parametrize("where", ["http://store.example/x", "ftp://x/", "", "http://"])
def test_a_redirect_never_leads_out_of_tls(where: str) -> None:
    with pytest.raises(DownloadError, match="redirects to"):
        redirected(URL("https://huggingface.co/a"), where)


def test_a_redirect_leads_to_the_address_as_it_is_written() -> None:
    signed = "https://store.example/a?sig=a%2Fb%3D%2B"
    assert str(redirected(URL("https://huggingface.co/a"), signed)) == signed
    assert str(redirected(URL("https://hf.co/a/b"), "/c?x=%2F")) == (
        "https://hf.co/c?x=%2F"
    )


async def test_what_is_not_hugging_face_is_recognised(hub: Hub, tmp_path: Path) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{hub.store_port}")
    hub.files[f"api/models/{REPOSITORY}/tree/main"] = b"<html>"
    hub.faults.append(answer(200, b'{"error": "no list"}'))
    with pytest.raises(DownloadError, match=r"is not at|does not answer as"):
        await fetch(hub, tmp_path, endpoint=endpoint)


# --- its manners in the daemon ---------------------------------------------------


async def test_hashing_does_not_stop_the_event_loop(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written and hashed is so outside of the loop's thread."""
    import threading

    hub.add(TINY, DATA)
    threads: set[str] = set()
    write = os.write

    def watched(handle: int, data: Any) -> int:
        if len(data) > 1000:
            threads.add(threading.current_thread().name)
        return write(handle, data)

    monkeypatch.setattr("inferencia.models.partial.os.write", watched)
    await fetch(hub, tmp_path)
    assert threads == {"download_0"}


async def test_many_at_once_are_independent(hub: Hub, tmp_path: Path) -> None:
    for number in range(2, 7):
        hub.add(f"t-Q{number}_0.gguf", DATA)
    asked = [f"{REPOSITORY}:Q{number}_0" for number in range(2, 7)]
    done = await asyncio.gather(*(fetch(hub, tmp_path, one) for one in asked))
    assert {one.fetched for one in done} == {len(DATA)}
    assert len(names(tmp_path)) == 5


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (4_683_000_000, "4.68 GB")),
        *((999_600, "1 MB"), (27_000_000_000, "27 GB"), (2.5e12, "2.5 TB")),
    ],
)
def test_sizes_are_said_as_people_say_them(size: float, text: str) -> None:
    assert size_text(size) == text


def test_nothing_of_the_terminal_is_known_to_it() -> None:
    source = Path(download_module.__file__).read_text("utf-8")
    assert "print(" not in source and "sys." not in source
