"""The language of the keys file."""

import hashlib
import random
import string
from datetime import date

import pytest

from inferencia.keylines import (
    MAX_PROBLEMS,
    Key,
    KeysError,
    Line,
    LineError,
    Role,
    compose,
    digest_of,
    parse,
    parse_line,
    unique_name,
    with_digest,
)

SECRET = "sk-0123456789abcdefghij"
DIGEST = hashlib.sha256(SECRET.encode()).digest()


def line_of(text: str) -> Line:
    line = parse_line(text)
    assert line is not None
    return line


def key_of(text: str) -> Key:
    return line_of(text).key


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(KeysError) as caught:
        parse(text, "keys.txt")
    return caught.value.problems


def test_a_bare_secret_is_a_user_named_after_its_digest() -> None:
    line = line_of(SECRET)
    assert line.key == Key(f"key-{DIGEST.hex()[:8]}", digest=DIGEST)
    assert line.key.role is Role.USER
    assert line.is_bare
    assert not line.is_short
    assert not line.is_placeholder


def test_every_option_is_read() -> None:
    assert key_of(
        f"{SECRET} name=alice role=admin models=qwen*,gpt-* rps=2.5 burst=10 tpm=20000 "
        "concurrency=2 daily_tokens=500000 priority=-10 expires=2027-01-31"
    ) == Key(
        name="alice",
        role=Role.ADMIN,
        models=("qwen*", "gpt-*"),
        rps=2.5,
        burst=10,
        tpm=20000,
        concurrency=2,
        daily_tokens=500000,
        priority=-10,
        expires=date(2027, 1, 31),
        digest=DIGEST,
    )


@pytest.mark.parametrize("hex_digits", [DIGEST.hex(), DIGEST.hex().upper()])
def test_a_digest_may_stand_for_the_secret(hex_digits: str) -> None:
    line = line_of(f"sha256:{hex_digits} name=alice")
    assert line.key == Key("alice", digest=DIGEST)
    assert not line.is_short


@pytest.mark.parametrize(
    "text",
    ["", "   ", "\t", "\r", "# all", "  # all", "#", "\ufeff", "\ufeff# all", "#sk-x"],
)
def test_blank_lines_and_comments_say_nothing(text: str) -> None:
    assert parse_line(text) is None


@pytest.mark.parametrize(
    "text",
    [
        f"{SECRET} name=alice # her laptop, role=admin",
        f"{SECRET} name=alice\t#",
        f"  {SECRET}   name=alice  ",
        f"{SECRET} name=alice\r",
        f"\ufeff{SECRET} name=alice",
        f"{SECRET}\u00a0name=alice",  # as copied from a page
        f"{SECRET} name=alice # caf\udce9",  # a comment in another encoding
    ],
)
def test_comments_blanks_and_line_ends_do_not_matter(text: str) -> None:
    assert key_of(text) == Key("alice", digest=DIGEST)


def test_a_hash_sign_inside_a_secret_belongs_to_it() -> None:
    assert key_of("sk-0123456789#abcdef").digest == digest_of(b"sk-0123456789#abcdef")


def test_an_equals_sign_inside_a_secret_belongs_to_it() -> None:
    assert key_of("c2VjcmV0IHNlY3JldA==").digest == digest_of(b"c2VjcmV0IHNlY3JldA==")


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ("colour=red", "unknown option; known are name, role"),
        ("rols=admin", 'unknown option "rols"; did you mean role?'),
        ("Name=alice", "did you mean name?"),
        ("alice", "only options NAME=VALUE may follow"),
        ("name=", "name must be 1 to 64"),
        ("name=" + "a" * 65, "name must be 1 to 64"),
        ("name=a/b", "name must be 1 to 64"),
        ("name=-a", "name must be 1 to 64"),
        ("name=ä", "name must be 1 to 64"),
        ("name=a name=b", "name is given twice"),
        ("role=root", "role must be one of user, admin, agent, metrics"),
        ("role=Admin", "role must be one of"),
        ("models=", "models must be patterns"),
        ("models=a,,b", "models must be patterns"),
        ("models=a,", "models must be patterns"),
        ("models=a\x01", "models must be patterns"),
        ("rps=0", "rps must be a number above zero"),
        ("rps=0.0", "rps must be a number above zero"),
        ("rps=-1", "rps must be a number above zero"),
        ("rps=nan", "rps must be a number above zero"),
        ("rps=inf", "rps must be a number above zero"),
        ("rps=1e9", "rps must be a number above zero"),
        ("rps=1_0", "rps must be a number above zero"),
        ("rps=٣", "rps must be a number above zero"),
        ("burst=0", "burst must be a whole number"),
        ("burst=1.5", "burst must be a whole number"),
        ("tpm=20k", "tpm must be a whole number"),
        ("tpm=" + "9" * 13, "tpm must be a whole number"),
        ("concurrency=+1", "concurrency must be a whole number"),
        ("daily_tokens=", "daily_tokens must be a whole number"),
        ("priority=high", "priority must be a whole number"),
        ("priority=1000", "priority must be a whole number"),
        ("expires=2027-13-01", "expires must be a date"),
        ("expires=20270131", "expires must be a date"),
        ("expires=2027-W01-1", "expires must be a date"),
        ("expires=30d", "expires must be a date"),
        ("expires=tomorrow", "expires must be a date"),
    ],
)
def test_a_wrong_option_is_an_error_that_says_what_is_right(
    rest: str, told: str
) -> None:
    with pytest.raises(LineError) as caught:
        parse_line(f"{SECRET} {rest}")
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"name=alice {SECRET}", "the secret must come first"),
        ("role=admin", "the secret must come first"),
        ("sk-schlüssel-0123456789", "printable ASCII"),
        ("sk-\x07-0123456789abcdef", "printable ASCII"),
        ("sk-\udcff-0123456789abcdef", "printable ASCII"),
        ("sha256:", "64 hex digits"),
        ("sha256:" + "0" * 63, "64 hex digits"),
        ("sha256:" + "g" * 64, "64 hex digits"),
        ("sha256:" + "0" * 65, "64 hex digits"),
    ],
)
def test_a_wrong_secret_is_an_error(text: str, told: str) -> None:
    with pytest.raises(LineError, match=told):
        parse_line(text)


@pytest.mark.parametrize(
    "text",
    [
        f"x {SECRET}",
        f"x {SECRET}=1",
        f"x name={SECRET}/",
        f"x role={SECRET}",
        f"x rps={SECRET}",
        f"x models={SECRET},",
        f"x expires={SECRET}",
        f"name={SECRET}",
        f"{SECRET}ü",
        f"sha256:{SECRET}",
    ],
)
def test_no_error_repeats_what_might_be_a_secret(text: str) -> None:
    (problem,) = problems_of(text)
    assert problem.startswith("keys.txt:1: ")
    assert "0123456789" not in problem


def test_all_wrong_lines_are_named_with_their_numbers() -> None:
    text = f"# keys\n{SECRET} rps=x\n\nsk-another-good-0001\nsk-another-good-0002 y\n"
    assert [problem.partition(": ")[0] for problem in problems_of(text)] == [
        "keys.txt:2",
        "keys.txt:5",
    ]


def test_a_file_that_is_no_keys_file_gets_a_bounded_number_of_errors() -> None:
    assert len(problems_of("ü\n" * 100_000)) == MAX_PROBLEMS


def test_a_name_or_a_secret_may_stand_there_once() -> None:
    assert problems_of("sk-1234567890123 name=a\nsk-1234567890124 name=a") == (
        'keys.txt:2: name "a" is taken by line 1',
    )
    assert problems_of(f"{SECRET} name=a\n# two\nsha256:{DIGEST.hex()} name=b") == (
        "keys.txt:3: the same secret as on line 1",
    )


def test_only_line_feeds_end_lines() -> None:
    first, second = parse(f"sk-1234567890123 # a\x0bb\u2028c\n{SECRET}", "keys.txt")
    assert (first.number, second.number) == (1, 2)


def test_names_of_nameless_keys_never_clash() -> None:
    taken = f"key-{DIGEST.hex()[:8]}"
    text = f"{SECRET}\nsk-1234567890123456 name={taken}\n"
    names = [line.key.name for line in parse(text, "keys.txt")]
    assert names == [f"key-{DIGEST.hex()[:9]}", taken]
    alike = bytes.fromhex("abcdef01" + "11" * 28), bytes.fromhex("abcdef01" + "12" * 28)
    text = "".join(f"sha256:{digest.hex()}\n" for digest in alike)
    names = [line.key.name for line in parse(text, "keys.txt")]
    assert names == ["key-abcdef01", "key-abcdef011"]


def test_a_digest_whose_every_name_is_taken_keeps_the_longest() -> None:
    taken = {f"key-{DIGEST.hex()[:digits]}" for digits in range(8, 65)}
    assert unique_name(DIGEST, taken) == f"key-{DIGEST.hex()}"


@pytest.mark.parametrize(
    "text",
    [
        "sk-your-key-here",
        "sk-your-key-here name=alice",
        "PLEASE SET SECURE API KEY",
        "PLEASE SET USER API KEY  # then restart",
        "sk-key1",
    ],
)
def test_example_lines_of_the_predecessors_are_known_as_placeholders(text: str) -> None:
    assert line_of(text).is_placeholder


def test_the_same_example_twice_is_no_error() -> None:
    assert len(parse("sk-your-key\nsk-your-key\n", "keys.txt")) == 2


def test_a_short_secret_works_and_is_marked() -> None:
    assert line_of("sk-test").is_short


@pytest.mark.parametrize(
    ("models", "model", "visible"),
    [
        ((), "anything", True),
        (("qwen*", "gpt-4?"), "qwen3:8b", True),
        (("qwen*", "gpt-4?"), "gpt-4o", True),
        (("qwen*", "gpt-4?"), "gpt-4", False),
        (("qwen*",), "Qwen3", False),
        (("qwen*",), "my-qwen3", False),
        (("*/qwen[0-9]",), "org/qwen3", True),
        (("qwen3",), "qwen3\n", False),
    ],
)
def test_globs_say_which_models_a_key_may_see(
    models: tuple[str, ...], model: str, visible: bool
) -> None:
    assert Key("alice", models=models).may_see(model) is visible


def test_a_key_is_good_through_its_last_day() -> None:
    key = Key("alice", expires=date(2027, 1, 31))
    assert not key.has_expired(date(2027, 1, 31))
    assert key.has_expired(date(2027, 2, 1))
    assert not Key("bob").has_expired(date(9999, 12, 31))


def test_a_printed_key_shows_no_digest() -> None:
    assert DIGEST.hex() not in repr(key_of(SECRET))
    assert "digest" not in repr(key_of(SECRET))


def test_a_composed_line_reads_back_in_the_documented_order() -> None:
    text = compose(DIGEST, {"expires": "2027-01-31", "rps": "5", "name": "alice"})
    assert text == f"sha256:{DIGEST.hex()} name=alice rps=5 expires=2027-01-31"
    assert key_of(text) == Key(
        "alice", rps=5.0, expires=date(2027, 1, 31), digest=DIGEST
    )


@pytest.mark.parametrize("value", ["a b", "a\nsk-evil role=admin", "a\u3000b", "a\x00"])
def test_a_composed_value_cannot_smuggle_in_anything(value: str) -> None:
    for option in ("name", "role", "models", "rps", "burst", "expires"):
        with pytest.raises(LineError):
            compose(DIGEST, {option: value})


def test_another_secret_leaves_the_rest_of_the_line_as_it_was() -> None:
    text = f"  {SECRET}   name=alice  rps=5 # hers\r"
    new = digest_of(b"new")
    changed = with_digest(text, line_of(text), new)
    assert changed == f"  sha256:{new.hex()}   name=alice  rps=5 # hers\r"


def test_a_nameless_key_keeps_its_name_with_another_secret() -> None:
    line, new = line_of(SECRET), digest_of(b"new")
    changed = line_of(with_digest(SECRET, line, new))
    assert changed.key == Key(line.key.name, digest=new)


@pytest.mark.parametrize("seed", range(30))
def test_any_text_is_either_understood_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    words = ["sk-a", "sha256:", DIGEST.hex(), "=", "name=", "rps=", "1", "#", ",", "ü"]
    alphabet = [*words, *string.whitespace, "\ufeff", "\udcff", "\x00", "models=*"]
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 12)))
        try:
            lines = parse(text, "keys.txt")
        except KeysError as error:
            assert all(one.startswith("keys.txt:") for one in error.problems)
            continue
        assert len({line.key.name for line in lines}) == len(lines)
        assert all(len(line.key.digest) == 32 for line in lines)
