"""The keys in force: where they come from, how they are found and followed."""

import ast
import errno
import hashlib
import inspect
import logging
import os
import random
from datetime import date
from pathlib import Path

import pytest

import inferencia.keylines
import inferencia.keys
from inferencia.keys import Key, KeyRing, KeysError, Role

TODAY = date(2026, 6, 1)
ALICE = "sk-alice-0123456789abcdef"
BOB = "sk-bob-0123456789abcdefgh"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.txt", f"{ALICE} name=alice\n")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def found(ring: KeyRing, secret: str, today: date = TODAY) -> str | None:
    key = ring.find(secret.encode(), today)
    return None if key is None else key.name


def refusal(
    path: Path | None = None,
    listed: list[str] | None = None,
    admin: str | None = None,
    user: str | None = None,
) -> str:
    with pytest.raises(KeysError) as caught:
        KeyRing(path, listed=listed, admin=admin, user=user)
    return str(caught.value)


# Finding


def test_a_key_of_the_file_is_found_by_its_secret_alone(path: Path) -> None:
    ring = KeyRing(path)
    assert found(ring, ALICE) == "alice"
    for other in ("", "alice", ALICE[:-1], ALICE + "x", ALICE.upper(), f" {ALICE}"):
        assert found(ring, other) is None
    assert found(ring, f"sha256:{hashlib.sha256(ALICE.encode()).hexdigest()}") is None
    assert ring.find(hashlib.sha256(ALICE.encode()).digest(), TODAY) is None


def test_a_key_that_stands_there_as_digest_is_found_by_its_secret(path: Path) -> None:
    write(path, f"sha256:{hashlib.sha256(BOB.encode()).hexdigest()} name=bob")
    assert found(KeyRing(path), BOB) == "bob"


def test_the_predecessors_file_of_bare_keys_works(path: Path) -> None:
    write(path, f"# one a line\n\n{ALICE}\n  {BOB}  \r\n")
    ring = KeyRing(path)
    assert [key.role for key in ring.keys] == [Role.USER, Role.USER]
    assert found(ring, ALICE) == "key-" + hashlib.sha256(ALICE.encode()).hexdigest()[:8]
    assert ring.warnings == ()


def test_an_expired_key_is_good_through_its_day_and_then_unknown(path: Path) -> None:
    write(path, f"{ALICE} name=alice expires=2026-06-01\n{BOB} name=bob\n")
    ring = KeyRing(path)
    assert found(ring, ALICE) == "alice"
    assert ring.usable(TODAY) == 2
    assert found(ring, ALICE, date(2026, 6, 2)) is None
    assert ring.usable(date(2026, 6, 2)) == 1


@pytest.mark.parametrize("secret", ["sk-your-key-here", "PLEASE SET API KEY"])
def test_a_placeholder_never_authenticates_and_is_warned_about(
    path: Path, secret: str
) -> None:
    ring = KeyRing(write(path, f"{secret}\n"), admin=secret, user="sk-change-me")
    assert found(ring, secret) is None
    assert found(ring, "sk-change-me") is None
    assert ring.usable(TODAY) == 0
    assert len(ring.warnings) == 3
    assert all("placeholder" in warning for warning in ring.warnings)


def test_a_short_key_works_and_is_warned_about_without_being_shown(path: Path) -> None:
    ring = KeyRing(write(path, "hunter2 name=alice"))
    assert found(ring, "hunter2") == "alice"
    assert ring.warnings == (
        f'{path}:1: key "alice" has fewer than 16 characters and may be guessed',
    )


NAUGHTY = [
    "",
    "undefined",
    "null",
    "None",
    "NaN",
    "true",
    "0",
    "1;DROP TABLE keys",
    "' OR 1=1 -- ",
    "' OR ''='",
    "' UNION SELECT NULL,NULL--",
    '" or "a"="a',
    "admin'--",
    "'; EXEC xp_cmdshell('id'); --",
    "1' AND SLEEP(5)#",
    "%s%s%n",
    "${env.HOME}",
    "$(id)",
    "`id`",
    "{{7*7}}",
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "\x00",
    "\r\nX-Admin: 1",
    "Ω≈ç√∫µ≤≥÷",
    "田中さんにあげて下さい",
    "👾 🙇 💁",
    "\u202etest\u202c",
    "\ufeff",
    "ﺍﻟْﻌَﺮَﺑِﻴَّﺔُ",
    "sha256:" + "0" * 64,
    "key-00000000",
    "*",
    "alice",
]


@pytest.mark.parametrize("text", NAUGHTY)
def test_hostile_texts_are_just_unknown_keys(path: Path, text: str) -> None:
    ring = KeyRing(path, admin=BOB)
    assert found(ring, text) is None
    assert ring.find(ALICE.encode() + text.encode() + b"\xff", TODAY) is None


def test_random_bytes_of_any_length_are_unknown_and_raise_nothing(path: Path) -> None:
    ring = KeyRing(path)
    rng = random.Random(7)
    for length in [*range(100), 8190, 100_000]:
        assert ring.find(rng.randbytes(length), TODAY) is None
    assert ring.find(b"\x00" * 32, TODAY) is None


def test_a_ring_without_keys_lets_nobody_in() -> None:
    ring = KeyRing()
    assert ring.find(b"", TODAY) is None
    assert (ring.usable(TODAY), ring.keys, ring.names) == (0, (), frozenset())
    assert ring.poll() is False
    assert ring.reload() == ()


def test_a_key_made_without_a_digest_cannot_be_presented() -> None:
    """The stand-in for a caller without a key has no digest."""
    assert Key("anonymous").digest == b""
    assert KeyRing().find(Key("anonymous").digest, TODAY) is None


def test_nothing_of_a_secret_stays_in_memory(path: Path) -> None:
    ring = KeyRing(path, admin=BOB)
    seen: set[int] = set()
    todo: list[object] = [ring]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        assert "0123456789abcdef" not in repr(thing)
        if isinstance(thing, dict):
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)):
            todo += thing
        slots = getattr(type(thing), "__slots__", ())
        todo += [getattr(thing, name) for name in slots if hasattr(thing, name)]
        todo += list(getattr(thing, "__dict__", {}).values())
    assert len(seen) > 20, "the search looked at nothing"


def test_find_compares_digests_by_compare_digest_and_never_by_equality() -> None:
    source = inspect.getsource(KeyRing.find)
    tree = ast.parse("class _:\n" + source)
    assert "hmac.compare_digest(digest, key.digest)" in source
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    # One way through for all, known or not: nothing is decided before the end.
    (function,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    assert not [n for n in ast.walk(function) if isinstance(n, (ast.If, ast.Try))]
    assert len([n for n in ast.walk(function) if isinstance(n, ast.Return)]) == 1


@pytest.mark.parametrize("module", [inferencia.keys, inferencia.keylines])
def test_no_secret_or_digest_is_compared_by_equality(module: object) -> None:
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(
            node.ops[0], (ast.Eq, ast.NotEq)
        ):
            text = ast.unparse(node)
            assert "secret" not in text, text
            assert "digest" not in text, text


# Sources


def test_keys_of_the_configuration_are_named_admin_and_user(path: Path) -> None:
    ring = KeyRing(path, admin="sk-admin-0123456789", user="sk-user-0123456789")
    assert [(key.name, key.role) for key in ring.keys] == [
        ("admin", Role.ADMIN),
        ("user", Role.USER),
        ("alice", Role.USER),
    ]
    assert found(ring, "sk-admin-0123456789") == "admin"
    assert ring.names == {"admin", "user", "alice"}


def test_unset_keys_of_the_configuration_are_no_keys() -> None:
    assert KeyRing(admin="", user=None).keys == ()


def test_listed_keys_replace_the_file(path: Path) -> None:
    ring = KeyRing(path, listed=[f" {BOB} ", "", BOB, "sk-carol-0123456789"])
    assert found(ring, ALICE) is None
    assert [key.role for key in ring.keys] == [Role.USER, Role.USER]
    assert found(ring, BOB) == "key-" + hashlib.sha256(BOB.encode()).hexdigest()[:8]
    write(path, f"{ALICE} name=alice burst=2")
    assert not ring.poll()
    assert ring.reload() == ()
    assert found(ring, ALICE) is None


def test_listed_keys_leave_those_of_the_configuration(path: Path) -> None:
    ring = KeyRing(path, listed=[BOB], admin=ALICE)
    assert found(ring, ALICE) == "admin"
    assert found(ring, BOB) is not None


def test_a_listed_digest_stands_for_its_secret() -> None:
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    assert found(KeyRing(listed=[f"sha256:{digest}"]), BOB) == f"key-{digest[:8]}"


def test_wrong_keys_outside_the_file_are_named_by_their_place() -> None:
    assert refusal(listed=[BOB, "sk-ä-0123456789"]) == (
        "INFERENCIA_API_KEYS: key 2: "
        "a secret may only have printable ASCII characters, no blanks"
    )
    assert refusal(listed=[f"{BOB} role=admin"]).startswith("INFERENCIA_API_KEYS: key")
    assert refusal(admin="two words").startswith("server.api_key.admin: a secret")


def test_the_same_secret_in_two_places_counts_once_and_is_warned_about(
    path: Path,
) -> None:
    ring = KeyRing(path, admin=ALICE)
    assert found(ring, ALICE) == "admin"
    assert ring.warnings == (
        f"{path}:1: the same secret as server.api_key.admin, which counts",
    )


def test_a_name_of_the_configuration_cannot_be_taken_by_the_file(path: Path) -> None:
    write(path, f"\n{ALICE} name=admin\n")
    assert refusal(path, admin=BOB) == (
        f'{path}:2: name "admin" is taken by server.api_key.admin'
    )
    assert found(KeyRing(path), ALICE) == "admin"


# The file at start


def test_a_broken_file_at_start_is_an_error_with_file_and_line(path: Path) -> None:
    write(path, f"{ALICE} name=alice\n{BOB} rsp=5\n")
    assert refusal(path) == f'{path}:2: unknown option "rsp"; did you mean rps?'


def test_a_missing_file_is_warned_about_and_taken_up_when_it_appears(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys.txt"
    ring = KeyRing(path)
    assert ring.warnings == (f"{path}: no such file",)
    assert not ring.poll()
    write(path, f"{ALICE} name=alice")
    assert ring.poll()
    assert found(ring, ALICE) == "alice"
    assert not ring.warnings


def test_a_missing_file_is_no_worry_where_the_configuration_has_keys(
    tmp_path: Path,
) -> None:
    ring = KeyRing(tmp_path / "keys.txt", admin=ALICE)
    assert ring.warnings == ()
    assert ring.reload() == ()
    write(tmp_path / "keys.txt", f"{BOB} name=bob")
    assert ring.poll()
    assert found(ring, BOB) == "bob"


def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"{tmp_path / 'pipe'}: not a regular file"
    assert refusal(tmp_path) == f"{tmp_path}: not a regular file"
    assert refusal(Path("/dev/zero")) == "/dev/zero: not a regular file"


def test_a_file_that_cannot_be_reached_is_an_error(path: Path) -> None:
    assert refusal(path / "keys.txt") == f"{path / 'keys.txt'}: Not a directory"


def test_a_file_that_is_far_too_large_is_refused(path: Path) -> None:
    os.truncate(path, 1 << 40)  # sparse; it must not be read whole
    assert refusal(path) == f"{path}: larger than 4 MiB"


@pytest.mark.parametrize(
    ("mode", "is_doubtful"),
    [(0o600, False), (0o640, False), (0o400, False), (0o644, True), (0o602, True)],
)
def test_a_file_that_every_user_may_read_or_write_is_warned_about(
    path: Path, mode: int, is_doubtful: bool
) -> None:
    path.chmod(mode)
    warnings = KeyRing(path).warnings
    assert [f"chmod 600 {path}" in warning for warning in warnings] == (
        [True] if is_doubtful else []
    )


def test_a_file_in_another_encoding_works_as_long_as_only_comments_use_it(
    path: Path,
) -> None:
    path.write_bytes(b"\xef\xbb\xbf# caf\xe9\r\n" + ALICE.encode() + b" name=alice\r\n")
    assert found(KeyRing(path), ALICE) == "alice"
    path.write_bytes(f"{ALICE}\n".encode("utf-16"))
    assert refusal(path).startswith(f"{path}:1: ")


# Following the file


def test_an_unchanged_file_changes_nothing(path: Path) -> None:
    ring = KeyRing(path)
    before = ring.keys
    assert [ring.poll() for _ in range(3)] == [False, False, False]
    assert ring.keys == before


def test_added_removed_and_changed_keys_count_from_the_next_poll_on(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write(path, f"{ALICE} name=alice\n{BOB} name=bob\n")
    ring = KeyRing(path)
    write(path, f"{ALICE} name=alice rps=5\nsk-carol-0123456789 name=carol\n")
    assert found(ring, BOB) == "bob"
    assert ring.poll()
    assert found(ring, BOB) is None
    assert found(ring, "sk-carol-0123456789") == "carol"
    assert ring.keys[0].rps == 5
    assert caplog.messages == [
        "keys read again: 2 in force; added carol; removed bob; changed alice"
    ]


def test_a_renamed_key_has_its_new_name(path: Path) -> None:
    ring = KeyRing(path)
    write(path, f"{ALICE} name=alicia\n")
    assert ring.poll()
    assert found(ring, ALICE) == "alicia"


def test_a_file_that_was_replaced_by_renaming_is_noticed(path: Path) -> None:
    ring = KeyRing(path)
    new = write(path.with_name("new"), f"{ALICE} name=alina\n")  # of the same length
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.rename(path)
    assert ring.poll()
    assert found(ring, ALICE) == "alina"


def test_changes_in_quick_succession_are_noticed(path: Path) -> None:
    ring = KeyRing(path)
    for number in range(100):
        write(path, f"{ALICE} name=n{number % 10}\n")
        assert ring.poll(), f"change {number} was missed"
        assert found(ring, ALICE) == f"n{number % 10}"


def test_a_change_within_one_tick_of_the_file_systems_clock_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarse(status: os.stat_result) -> tuple[int, int, int, int]:
        return (0, 0, status.st_size, 0)  # a clock that ticks too rarely to see

    monkeypatch.setattr(inferencia.keys, "_signature", coarse)
    ring = KeyRing(path)
    write(path, f"{ALICE} name=alina\n")  # of the same length
    assert ring.poll()
    assert found(ring, ALICE) == "alina"


def test_a_broken_new_file_leaves_the_old_keys_in_force_and_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ring = KeyRing(path)
    write(path, f"{BOB} name=bob\n{ALICE} role=root\n")
    assert [ring.poll() for _ in range(3)] == [False, False, False]
    assert (found(ring, ALICE), found(ring, BOB)) == ("alice", None)
    problem = f"{path}:2: role must be one of user, admin, agent, metrics"
    assert ring.problem == problem
    assert ring.warnings == (problem,)
    assert caplog.messages == [problem, "keys: the 1 from before stay in force"]
    caplog.clear()
    write(path, f"{ALICE} name=alice\n")
    assert not ring.poll()
    assert ring.problem is None
    assert caplog.messages == ["keys read again: 1 in force"]


def test_another_fault_is_told_again(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(path)
    write(path, f"{ALICE} role=root\n")
    ring.poll()
    caplog.clear()
    write(path, f"{ALICE} rps=no\n")
    ring.poll()
    assert caplog.messages[0].startswith(f"{path}:1: rps must be")


def test_a_vanished_file_leaves_the_old_keys_in_force_and_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(path)
    path.unlink()
    assert [ring.poll() for _ in range(3)] == [False, False, False]
    assert found(ring, ALICE) == "alice"
    assert caplog.messages == [
        f"{path}: no such file",
        "keys: the 1 from before stay in force",
    ]
    write(path, f"{BOB} name=bob\n")
    assert ring.poll()
    assert (found(ring, ALICE), found(ring, BOB)) == (None, "bob")


def test_a_vanished_file_is_told_about_though_the_configuration_has_keys(
    path: Path,
) -> None:
    ring = KeyRing(path, admin=BOB)
    path.unlink()
    assert not ring.poll()
    assert ring.problem == f"{path}: no such file"
    assert (found(ring, ALICE), found(ring, BOB)) == ("alice", "admin")


def test_a_file_emptied_by_somebody_who_is_writing_it_locks_nobody_out(
    path: Path,
) -> None:
    ring = KeyRing(path)
    write(path, "")
    assert not ring.poll()
    assert found(ring, ALICE) == "alice"
    write(path, f"{BOB} name=bob\n")
    assert ring.poll()
    assert found(ring, BOB) == "bob"


def test_a_file_that_stays_empty_is_believed_at_the_second_look(path: Path) -> None:
    ring = KeyRing(path)
    write(path, "")
    assert [ring.poll(), ring.poll()] == [False, True]
    assert found(ring, ALICE) is None


def test_the_last_key_can_be_taken_away(path: Path) -> None:
    ring = KeyRing(path)
    write(path, "# nobody\n")
    assert ring.poll()
    assert ring.usable(TODAY) == 0


def test_a_name_that_the_configuration_has_makes_a_new_file_wrong(path: Path) -> None:
    ring = KeyRing(path, user=BOB)
    write(path, f"{ALICE} name=user\n")
    assert not ring.poll()
    assert (found(ring, ALICE), found(ring, BOB)) == ("alice", "user")


def test_a_new_warning_is_logged_when_it_appears(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(path)
    write(path, "hunter2 name=alice\n")
    assert ring.poll()
    write(path, "hunter2 name=alice burst=3\n")
    assert ring.poll()
    assert [m for m in caplog.messages if "guessed" in m] == list(ring.warnings)


def test_reloading_reads_at_once_and_returns_what_is_wrong(path: Path) -> None:
    ring = KeyRing(path)
    write(path, "")
    assert ring.reload() == ()
    assert ring.keys == ()
    write(path, f"{ALICE} rps=a\n{BOB} rps=b\n")
    assert [problem.partition(": ")[0] for problem in ring.reload()] == [
        f"{path}:1",
        f"{path}:2",
    ]
    path.unlink()
    assert ring.reload() == (f"{path}: no such file",)


def test_a_file_that_becomes_readable_again_is_taken_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(_: Path) -> tuple[bytes, os.stat_result]:
        raise PermissionError(errno.EACCES, "Permission denied")

    ring = KeyRing(path)
    write(path, f"{BOB} name=bob\n")
    with monkeypatch.context() as patch:
        # Where tests run as root, no mode keeps us out.
        patch.setattr(inferencia.keys, "read_file", denied)
        assert not ring.poll()
        assert ring.problem == f"{path}: Permission denied"
    assert found(ring, ALICE) == "alice"
    assert ring.poll()
    assert found(ring, BOB) == "bob"


def test_the_log_never_holds_a_secret(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ring = KeyRing(path)
    for text in (f"{BOB} {ALICE}", f"x name={ALICE}!", f"{BOB} rps={ALICE}", ALICE):
        write(path, f"{text}\n")
        ring.poll()
    assert len(caplog.messages) >= 4
    assert "0123456789" not in caplog.text


def test_the_keys_of_a_llama_swap_configuration_are_user_keys() -> None:
    ring = KeyRing(swap=["swap-key-0123456789abcdef", "swap-key-0123456789abcdef"])

    (key,) = ring.keys
    assert key.role is Role.USER
    assert ring.find(b"swap-key-0123456789abcdef", date(2026, 1, 1)) == key
