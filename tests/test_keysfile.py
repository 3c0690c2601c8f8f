"""The keys file changed in place, by functions and by ``inferencia keys``."""

import argparse
import fcntl
import hashlib
import os
import re
import stat
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from inferencia import keycommands, keysfile
from inferencia.keycommands import BAD_USAGE, DONE, FAILED, Outcome
from inferencia.keylines import KeysError, LineError, parse
from inferencia.keys import KeyRing, Role
from inferencia.keysfile import (
    EditError,
    add_key,
    change_key,
    list_keys,
    revoke_key,
    rotate_key,
)

TODAY = date(2026, 6, 1)
ALICE = "sk-alice-0123456789abcdef"
BOB = "sk-bob-0123456789abcdefgh"
SECRET = re.compile(r"sk-[A-Za-z0-9_-]{43}")

FILE = f"""\
# Keys of the house.

{ALICE} name=alice  rps=5 # her laptop
  # the next one is bare
{BOB}

sha256:{"ab" * 32} name=carol role=metrics
"""
BOBS_NAME = "key-" + hashlib.sha256(BOB.encode()).hexdigest()[:8]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.txt"
    path.write_text(FILE)
    path.chmod(0o640)
    return path


def digest_text(secret: str) -> str:
    return "sha256:" + hashlib.sha256(secret.encode()).hexdigest()


def who(path: Path, secret: str) -> str | None:
    key = KeyRing(path).find(secret.encode(), TODAY)
    return None if key is None else key.name


def only_the_keys_file(path: Path) -> bool:
    return os.listdir(path.parent) == [path.name]


# Editing


def test_an_added_key_opens_and_only_its_digest_is_kept(path: Path) -> None:
    secret = add_key(path, "dora", {"role": "admin", "models": "qwen*,gpt-*"})
    assert SECRET.fullmatch(secret)
    assert path.read_text() == FILE + (
        f"{digest_text(secret)} name=dora role=admin models=qwen*,gpt-*\n"
    )
    key = KeyRing(path).find(secret.encode(), TODAY)
    assert key is not None
    assert (key.name, key.role, key.models) == ("dora", Role.ADMIN, ("qwen*", "gpt-*"))


def test_every_new_secret_is_another_one() -> None:
    assert len({keysfile.new_secret() for _ in range(1000)}) == 1000


def test_a_revoked_key_is_gone_and_all_else_stays(path: Path) -> None:
    revoke_key(path, "alice")
    line = f"{ALICE} name=alice  rps=5 # her laptop\n"
    assert path.read_text() == FILE.replace(line, "")
    assert (who(path, ALICE), who(path, BOB)) == (None, BOBS_NAME)


def test_a_nameless_key_is_revoked_by_its_derived_name(path: Path) -> None:
    revoke_key(path, BOBS_NAME)
    assert path.read_text() == FILE.replace(f"{BOB}\n", "")


def test_a_rotated_key_has_another_secret_and_the_same_options(path: Path) -> None:
    secret = rotate_key(path, "alice")
    assert path.read_text() == FILE.replace(ALICE, digest_text(secret))
    assert (who(path, ALICE), who(path, secret)) == (None, "alice")


def test_a_rotated_nameless_key_keeps_its_name(path: Path) -> None:
    secret = rotate_key(path, BOBS_NAME)
    new = f"{digest_text(secret)} name={BOBS_NAME}"
    assert path.read_text() == FILE.replace(BOB, new)
    assert (who(path, BOB), who(path, secret)) == (None, BOBS_NAME)


def test_a_changed_key_has_other_options_and_the_same_secret(path: Path) -> None:
    change_key(path, "alice", {"rps": None, "models": "qwen*", "tpm": "100"})
    line = f"{ALICE} name=alice models=qwen* tpm=100 # her laptop"
    assert path.read_text() == FILE.replace(
        f"{ALICE} name=alice  rps=5 # her laptop", line
    )
    assert who(path, ALICE) == "alice"


def test_a_changed_nameless_key_keeps_its_name(path: Path) -> None:
    change_key(path, BOBS_NAME, {"rps": "2"})
    assert f"\n{BOB} name={BOBS_NAME} rps=2\n" in path.read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"name": "eve"},
        {"colour": "red"},
        {"colour": None},
        {"rps": "0"},
        {"rps": "1 role=admin"},
        {"models": "a\nsk-evil role=admin"},
        {"expires": "tomorrow"},
    ],
)
def test_a_key_is_not_changed_to_what_cannot_be(
    path: Path, options: dict[str, str | None]
) -> None:
    with pytest.raises(LineError):
        change_key(path, "alice", options)
    assert path.read_text() == FILE


def test_adding_revoking_and_rotating_leave_everything_else_byte_for_byte(
    path: Path,
) -> None:
    odd = b"\xef\xbb\xbf# caf\xe9 \x0b\x85\r\n\r\n" + ALICE.encode() + b" name=alice"
    path.write_bytes(odd)
    secret = add_key(path, "dora", {})
    added = f"\r\n{digest_text(secret)} name=dora\r\n".encode()
    assert path.read_bytes() == odd + added
    revoke_key(path, "alice")
    assert path.read_bytes() == odd[: odd.index(b"sk-")] + added[2:]


def test_the_mode_is_kept_and_a_new_file_is_for_its_owner_alone(path: Path) -> None:
    add_key(path, "dora", {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    new = path.with_name("new.txt")
    old_mask = os.umask(0)
    try:
        secret = add_key(new, "alice", {})
    finally:
        os.umask(old_mask)
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    assert who(new, secret) == "alice"
    assert new.read_text().startswith("# ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_is_kept(path: Path) -> None:
    os.chown(path, 1234, 2345)
    add_key(path, "dora", {})
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_whose_owner_cannot_be_kept_stays_as_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    os.chown(path, 1234, 2345)
    # Others than root are refused this, but cannot make such a file for the test.
    monkeypatch.setattr(os, "chown", refused)
    with pytest.raises(EditError, match="belongs to another user"):
        add_key(path, "dora", {})
    assert path.read_text() == FILE
    assert only_the_keys_file(path)


def test_extended_attributes_are_kept(path: Path) -> None:
    try:
        os.setxattr(path, "user.note", b"kept")
    except (OSError, AttributeError):
        pytest.skip("this file system has no extended attributes")
    add_key(path, "dora", {})
    assert os.getxattr(path, "user.note") == b"kept"


def test_a_link_stays_a_link_and_its_target_is_changed(path: Path) -> None:
    folder = path.parent / "elsewhere"
    folder.mkdir()
    link = folder / "link.txt"
    link.symlink_to("../keys.txt")
    secret = add_key(link, "dora", {})
    assert link.is_symlink()
    assert who(path, secret) == "dora"
    assert os.listdir(folder) == ["link.txt"]


def test_a_link_to_nowhere_gets_its_target_made(tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to("real.txt")
    secret = add_key(link, "alice", {})
    assert link.is_symlink()
    assert who(tmp_path / "real.txt", secret) == "alice"


def test_whoever_has_the_old_file_open_sees_it_whole(path: Path) -> None:
    with path.open() as reader:
        inode = os.fstat(reader.fileno()).st_ino
        revoke_key(path, "alice")
        assert reader.read() == FILE
    assert path.stat().st_ino != inode


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # a full disk is not to be had in a test
    with pytest.raises(EditError, match=r"keys\.txt: No space left on device"):
        add_key(path, "dora", {})
    assert path.read_text() == FILE
    assert only_the_keys_file(path)


def test_a_follower_takes_every_edit_up_at_its_next_poll(path: Path) -> None:
    ring = KeyRing(path)
    first = add_key(path, "dora", {})
    assert ring.poll()
    assert ring.find(first.encode(), TODAY)
    second = rotate_key(path, "dora")
    assert ring.poll()
    assert not ring.find(first.encode(), TODAY)
    assert ring.find(second.encode(), TODAY)
    revoke_key(path, "dora")
    assert ring.poll()
    assert not ring.find(second.encode(), TODAY)


def test_revoking_the_only_key_counts_at_the_next_poll(path: Path) -> None:
    path.write_text(f"{ALICE} name=alice\n")
    ring = KeyRing(path)
    revoke_key(path, "alice")
    assert ring.poll()
    assert ring.keys == ()


def test_a_taken_name_is_refused(path: Path) -> None:
    for name in ("alice", "carol", BOBS_NAME):
        with pytest.raises(EditError, match=rf'key "{name}" is in .*keys\.txt already'):
            add_key(path, name, {})
    assert path.read_text() == FILE


def test_an_unknown_name_is_refused_with_the_nearest(path: Path) -> None:
    for edit in (revoke_key, rotate_key):
        with pytest.raises(EditError, match=r'no key "alise" in .*; nearest: "alice"'):
            edit(path, "alise")
    with pytest.raises(EditError, match=r'no key "zz" in .*keys\.txt$'):
        revoke_key(path, "zz")
    assert path.read_text() == FILE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("", {}),
        ("two words", {}),
        ("a\nb", {}),
        ("dora", {"role": "root"}),
        ("dora", {"colour": "red"}),
        ("dora", {"models": "a role=admin"}),
        ("dora", {"rps": ""}),
        ("dora", {"name": "alice name=x"}),
    ],
)
def test_wrong_options_are_refused_before_the_file_is_touched(
    path: Path, name: str, options: dict[str, str]
) -> None:
    with pytest.raises(LineError):
        add_key(path, name, options)
    assert path.read_text() == FILE
    with pytest.raises(LineError):
        add_key(path.with_name("new.txt"), name, options)
    assert only_the_keys_file(path)


def test_a_broken_file_is_not_edited(path: Path) -> None:
    path.write_text(f"{ALICE} name=alice\n{BOB} role=root\n")
    before = path.read_bytes()
    for edit in (
        lambda: add_key(path, "dora", {}),
        lambda: rotate_key(path, "alice"),
        lambda: revoke_key(path, "alice"),
        lambda: list_keys(path),
    ):
        with pytest.raises(KeysError, match=r"keys\.txt:2: role must be"):
            edit()
    assert path.read_bytes() == before


def test_an_example_key_is_not_rotated_but_can_be_revoked(path: Path) -> None:
    path.write_text("PLEASE SET API KEY\n")
    (line,) = list_keys(path)
    with pytest.raises(EditError, match="is an example"):
        rotate_key(path, line.key.name)
    revoke_key(path, line.key.name)
    assert list_keys(path) == ()


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"keys\.txt: No such file"):
        revoke_key(tmp_path / "keys.txt", "alice")
    with pytest.raises(EditError, match="No such file"):
        add_key(tmp_path / "nowhere" / "keys.txt", "alice", {})
    assert os.listdir(tmp_path) == []


# Several editors at once

ADD_MANY = """
import sys
from pathlib import Path
from inferencia.keysfile import add_key, revoke_key, rotate_key
path, name = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
for number in range(15):
    add_key(path, f"{name}-{number}", {})
    rotate_key(path, f"{name}-{number}")
    if number % 3 == 0:
        revoke_key(path, f"{name}-{number}")
"""


def test_editors_at_the_same_time_lose_nothing(path: Path) -> None:
    package = Path(keysfile.__file__).parent.parent
    editors = [
        subprocess.Popen(
            [sys.executable, "-c", ADD_MANY, str(path), name],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(package)},
        )
        for name in ("one", "two", "three")
    ]
    for editor in editors:
        assert editor.stdin is not None
        editor.stdin.write(b"\n")
        editor.stdin.close()
    assert [editor.wait(timeout=60) for editor in editors] == [0, 0, 0]
    names = {line.key.name for line in list_keys(path)}
    expected = {
        f"{name}-{number}"
        for name in ("one", "two", "three")
        for number in range(15)
        if number % 3
    }
    assert names == expected | {"alice", "carol", BOBS_NAME}
    assert path.read_text().startswith(FILE)
    assert only_the_keys_file(path)


def test_a_lock_that_is_never_given_back_is_not_waited_for_forever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keysfile, "LOCK_SECONDS", 0.0)
    holder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(EditError, match=r"another program keeps .* locked"):
            revoke_key(path, "alice")
    finally:
        os.close(holder)
    revoke_key(path, "alice")


# The command


def command(path: Path, *words: str) -> Outcome:
    parser = argparse.ArgumentParser()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-c", dest="config")
    keycommands.register(parser.add_subparsers(), [common])
    return keycommands.run(parser.parse_args(["keys", *words]), path, TODAY)


def test_add_prints_the_secret_alone_and_once(path: Path) -> None:
    outcome = command(path, "add", "dora")
    assert outcome.code == DONE
    secret = outcome.out.removesuffix("\n")
    assert SECRET.fullmatch(secret)
    assert secret not in outcome.err
    assert 'key "dora" added' in outcome.err
    assert secret not in path.read_text()
    assert secret not in command(path, "list").out
    assert who(path, secret) == "dora"


def test_add_takes_every_option(path: Path) -> None:
    words = (
        "--role agent --models qwen*,gpt-* --rps 2.5 --burst 10 --tpm 20000 "
        "--concurrency 2 --daily-tokens 500000 --expires 2027-01-31 -c config.yaml"
    )
    assert command(path, "add", "dora", *words.split()).code == DONE
    assert path.read_text().splitlines()[-1].partition(" ")[2] == (
        "name=dora role=agent models=qwen*,gpt-* rps=2.5 burst=10 tpm=20000 "
        "concurrency=2 daily_tokens=500000 expires=2027-01-31"
    )


@pytest.mark.parametrize(
    ("given", "last_day"),
    [("30d", "2026-07-01"), ("1d", "2026-06-02"), ("2026-06-01", "2026-06-01")],
)
def test_expiry_is_a_date_or_a_number_of_days(
    path: Path, given: str, last_day: str
) -> None:
    assert command(path, "add", "dora", "--expires", given).code == DONE
    assert path.read_text().endswith(f" expires={last_day}\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--expires", "soon"], "expected a date such as 2027-01-31 or days such as"),
        (["--expires", "0d"], "expected a date"),
        (["--expires", "99999999d"], "expected a date"),
        (["--expires", "2026-05-31"], "--expires: 2026-05-31 has passed"),
        (["--expires", ""], "expected a date"),
        (["--rps", "fast"], "rps must be a number above zero"),
        (["--tpm", ""], "tpm must be a whole number"),
        (["--role", "root"], "role must be one of"),
        (["--models", "a b"], "models must be patterns"),
    ],
)
def test_bad_options_are_bad_usage_in_one_line(
    path: Path, words: list[str], told: str
) -> None:
    outcome = command(path, "add", "dora", *words)
    assert (outcome.code, outcome.out) == (BAD_USAGE, "")
    assert told in outcome.err
    assert outcome.err.count("\n") == 1
    assert path.read_text() == FILE


def test_what_cannot_be_done_is_a_failure_in_one_line(path: Path) -> None:
    for words in (["add", "alice"], ["revoke", "nobody"], ["rotate", "nobody"]):
        outcome = command(path, *words)
        assert (outcome.code, outcome.out) == (FAILED, "")
        assert outcome.err.count("\n") == 1


def test_a_broken_file_is_bad_configuration_with_a_line_for_each_error(
    path: Path,
) -> None:
    path.write_text(f"{ALICE} rps=x\n{BOB} tpm=x\n")
    for words in (["add", "dora"], ["list"], ["revoke", "x"], ["rotate", "x"]):
        outcome = command(path, *words)
        assert (outcome.code, outcome.out) == (BAD_USAGE, "")
        assert outcome.err.count("\n") == 2
        assert f"{path}:2: tpm" in outcome.err


def test_rotate_prints_the_new_secret_and_revoke_prints_none(path: Path) -> None:
    outcome = command(path, "rotate", "alice")
    assert outcome.code == DONE
    assert who(path, outcome.out.strip()) == "alice"
    outcome = command(path, "revoke", "alice")
    assert (outcome.code, outcome.out) == (DONE, "")
    assert outcome.err == f'key "alice" removed from {path}\n'


def test_list_shows_aligned_columns_without_secrets(path: Path) -> None:
    path.write_text(
        f"{ALICE} name=alice role=admin rps=0.5 burst=3 models=qwen*,gpt-*\n"
        f"{BOB} name=bob tpm=20000 concurrency=2 daily_tokens=500000 "
        "priority=5 expires=2026-05-31\n"
        "sk-your-key-here name=example\nhunter2 name=h expires=2026-06-01\n"
    )
    outcome = command(path, "list")
    assert outcome == Outcome(
        DONE,
        """\
NAME     ROLE   MODELS       RPS  BURST  TPM    CONCURRENCY  DAILY_TOKENS  PRIORITY  EXPIRES     NOTE
alice    admin  qwen*,gpt-*  0.5  3      -      -            -             -         -
bob      user   all          -    -      20000  2            500000        5         2026-05-31  expired
example  user   all          -    -      -      -            -             -         -           placeholder
h        user   all          -    -      -      -            -             -         2026-06-01  short
""",  # noqa: E501  (as wide as a terminal shows it)
    )
    assert hashlib.sha256(ALICE.encode()).hexdigest()[:8] not in outcome.out


def test_list_of_a_missing_or_empty_file_says_what_to_do(path: Path) -> None:
    path.write_text("# nothing yet\n")
    assert command(path, "list") == Outcome(
        DONE, err=f"{path} has no keys; add one with: inferencia keys add NAME\n"
    )
    path.unlink()
    assert command(path, "list") == Outcome(
        FAILED, err=f"{path} does not exist yet; inferencia keys add NAME makes it\n"
    )
    assert command(path, "add", "alice").code == DONE
    assert len(parse(path.read_text(), "keys.txt")) == 1


def test_a_missing_command_is_bad_usage(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(path)
    assert caught.value.code == BAD_USAGE
    assert "usage:" in capsys.readouterr().err
