"""Promises of ``multipart.py``: the right field, untouched files, nothing ambiguous."""

import email.parser
import email.policy
import random

import pytest

from inferencia.errors import InvalidRequest
from inferencia.multipart import (
    MAX_HEAD_BYTES,
    MAX_MODEL_BYTES,
    MAX_PARTS,
    MAX_TEXT_BYTES,
    Form,
    is_form,
)
from seeds import seeds

TYPE = "multipart/form-data; boundary=b0undary"
AUDIO = bytes(range(256)) * 4 + b"\r\n\r\n--b0undar\r\n--\r\n"


def part(head: str, content: bytes) -> bytes:
    return b"--b0undary\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"


def text(name: str, value: str) -> bytes:
    return part(f'Content-Disposition: form-data; name="{name}"', value.encode())


def file(filename: str = "a.wav", content: bytes = AUDIO) -> bytes:
    head = f'Content-Disposition: form-data; name="file"; filename="{filename}"'
    return part(head + "\r\nContent-Type: audio/wav", content)


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b0undary--\r\n"


def test_the_model_is_found_before_and_behind_files() -> None:
    for body in (
        form(text("model", "whisper-1"), file()),
        form(file(), text("model", "whisper-1"), file()),
    ):
        read = Form.parse(body, TYPE)
        assert read.model == read.get("model") == "whisper-1"
        assert read.body is body


def test_other_text_fields_are_found_and_files_are_not_among_them() -> None:
    body = form(
        text("stream", "true"),
        file(),
        text("response_format", "verbose_json"),
        text("timestamp_granularities[]", "word"),
        text("timestamp_granularities[]", "segment"),
        text("prompt", "Übung"),
    )
    assert Form.parse(body, TYPE).texts == {
        "stream": "true",
        "response_format": "verbose_json",
        "timestamp_granularities[]": "word",
        "prompt": "Übung",
    }
    assert Form.parse(body, TYPE).model is None


def test_only_the_models_bytes_change() -> None:
    body = form(file(), text("model", "alias"), text("prompt", "alias"))
    changed = Form.parse(body, TYPE).replaced("org/größer:7b")
    assert changed == form(
        file(), text("model", "org/größer:7b"), text("prompt", "alias")
    )


def test_a_missing_model_is_added() -> None:
    body = form(file(), text("stream", "true"))
    changed = Form.parse(body, TYPE).replaced("whisper-1")
    assert changed == form(text("model", "whisper-1"), file(), text("stream", "true"))
    assert Form.parse(form(), TYPE).replaced("m") == form(text("model", "m"))


def test_an_announced_field_length_follows_the_new_name() -> None:
    head = 'Content-Disposition: form-data; name="model"\r\nContent-Length: '
    body = form(file(), part(head + "5", b"alias"))
    assert Form.parse(body, TYPE).replaced("longer-name") == form(
        file(), part(head + "11", b"longer-name")
    )


@pytest.mark.parametrize("name", ["a\r\nb", "a\nb", "x--b0undary--"])
def test_a_name_that_would_break_the_form_is_never_written(name: str) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Form.parse(form(), TYPE).replaced(name)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; boundary=b0undary",
        "Multipart/Form-Data;boundary=b0undary",
        'multipart/form-data; charset=utf-8; Boundary="b0undary" ; x="a\\"b"',
        'multipart/form-data;  boundary="b0undary"',
    ],
)
def test_the_boundary_is_read_quoted_or_not(content_type: str) -> None:
    assert is_form(content_type)
    assert Form.parse(form(text("model", "m")), content_type).model == "m"


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=b0undary; boundary=other",
        "multipart/form-data; boundary=" + "b" * 71,
        'multipart/form-data; boundary="b0undary',
        'multipart/form-data; boundary="b\\0undary"',
        'multipart/form-data; boundary="b0undary "',
        "multipart/form-data; boundary=b0 undary",
        "multipart/form-data boundary=b0undary",
        "multipart/mixed; boundary=b0undary",
        "application/json",
        "",
    ],
)
def test_a_content_type_without_one_good_boundary_is_refused(content_type: str) -> None:
    with pytest.raises(InvalidRequest):
        Form.parse(form(text("model", "m")), content_type)


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "multipart/mixed; boundary=x", "multipart/form-databases", ""],
)
def test_other_content_types_are_no_form(content_type: str) -> None:
    assert not is_form(content_type)


@pytest.mark.parametrize(
    "disposition",
    [
        "form-data; name=model",
        'Form-Data; Name="model"',
        'form-data;name="model"',
        'form-data; x=y; name="model"',
    ],
)
def test_a_field_is_recognised_however_it_is_written(disposition: str) -> None:
    body = form(part(f"content-disposition:{disposition}", b"m"))
    assert Form.parse(body, TYPE).model == "m"


@pytest.mark.parametrize(
    "filename",
    ["a b.wav", 'a\\"b.wav', "C:\\\\a.wav", "ü;=,.wav", "%22.wav", "a'b.wav", ""],
)
def test_any_usual_file_name_passes(filename: str) -> None:
    body = form(file(filename), text("model", "m"))
    assert Form.parse(body, TYPE).texts == {"model": "m"}


DISPOSITION = "Content-Disposition: form-data; "


@pytest.mark.parametrize(
    "head",
    [
        "Content-Type: text/plain",
        DISPOSITION,
        DISPOSITION + "filename=x",
        DISPOSITION + 'name=""',
        DISPOSITION + 'name="model',
        DISPOSITION + 'name="model"; name="other"',
        DISPOSITION + "name*=utf-8''model",
        DISPOSITION + 'name="other"; name*=model',
        DISPOSITION + 'name="mod\\el"',
        DISPOSITION + 'name="%6dodel"',
        DISPOSITION + 'name="mo\tdel"',
        DISPOSITION + 'name="model" filename="x"',
        DISPOSITION + 'name="file"; filename="a\\"; name=model; x="',
        DISPOSITION + 'name="file"; filename="a\\"; name="model"',
        "Content-Disposition: attachment; name=model",
        "Content-Disposition: form-datax; name=model",
        DISPOSITION + 'name="a"\r\nContent-Disposition: form-data; name="model"',
        DISPOSITION + 'name="a"\r\n ; name="model"',
        DISPOSITION + 'name="a"\nX: y',
        DISPOSITION + 'name="a"\rX: y',
        DISPOSITION + 'name="a"\r\nX : y',
        DISPOSITION + 'name="a"\r\nX',
        DISPOSITION + 'name="a"\r\nX: \x00',
        DISPOSITION + 'name="model"\r\nContent-Transfer-Encoding: base64',
        DISPOSITION + 'name="model"\r\nContent-Type: text/plain; charset=utf-7',
        DISPOSITION + 'name="model"; filename="m.txt"',
    ],
)
def test_a_head_that_parsers_may_read_differently_is_refused(head: str) -> None:
    with pytest.raises(InvalidRequest):
        Form.parse(form(part(head, b"m")), TYPE)


@pytest.mark.parametrize("name", ["model", "stream", "response_format"])
def test_a_field_that_we_act_on_is_refused_twice(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f'"{name}" is there twice') as raised:
        Form.parse(form(text(name, "a"), file(), text(name, "a")), TYPE)
    assert raised.value.param == name


MODEL = text("model", "m")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"--b0undary",
        b"--b0undary\r\n",
        b"--b0undary-",
        b"--other--\r\n",
        MODEL,
        MODEL + b"--b0undary",
        MODEL + b"--b0undary-\r\n",
        MODEL + b"--b0undary \r\n" + MODEL,
        MODEL + b"--b0undaryX\r\n" + MODEL,
        b"\r\n" + form(MODEL),
        b"preamble\r\n" + form(MODEL),
        form(MODEL) + b"epilogue",
        form(MODEL) + form(MODEL),
        form(MODEL).replace(b"\r\n", b"\n"),
        form(file(content=b"x\n" + text("model", "hidden") + b"y")),
        form(file(content=b"x--b0undary y")),
        form(b"--b0undary\r\n\r\nno head\r\n"),
        form(b"--b0undary\r\n"),
        form(part("Content-Disposition: form-data; name=x\xff", b"")).replace(
            b"\xc3", b""
        ),
        form(part('Content-Disposition: form-data; name="model"', b"\xff")),
    ],
)
def test_a_malformed_form_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as raised:
        Form.parse(body, TYPE)
    raised.value.body()


def test_every_bound_holds() -> None:
    Form.parse(form(*[text("x", "")] * MAX_PARTS), TYPE)
    with pytest.raises(InvalidRequest, match="parts"):
        Form.parse(form(*[text("x", "")] * (MAX_PARTS + 1)), TYPE)
    with pytest.raises(InvalidRequest, match="head"):
        Form.parse(form(file("n" * MAX_HEAD_BYTES)), TYPE)
    with pytest.raises(InvalidRequest, match="too long"):
        Form.parse(form(text("model", "m" * (MAX_MODEL_BYTES + 1))), TYPE)
    long = Form.parse(form(text("prompt", "p" * (MAX_TEXT_BYTES + 1)), MODEL), TYPE)
    assert long.texts == {"model": "m"}


def test_what_people_wrote_is_not_in_the_representation() -> None:
    assert "canary" not in repr(Form.parse(form(text("prompt", "canary")), TYPE))


@pytest.mark.parametrize("cut", range(0, 160))
def test_a_form_cut_anywhere_is_refused(cut: int) -> None:
    body = form(MODEL, file(content=b"x" * 20), text("stream", "true"))
    assert cut < len(body) - 2  # without the last CRLF it is complete
    with pytest.raises(InvalidRequest):
        Form.parse(body[:cut], TYPE)


@pytest.mark.parametrize("seed", seeds(30, 100))
def test_any_form_is_read_as_the_standard_library_reads_it(seed: int) -> None:
    rng = random.Random(seed)
    names = ["model", "stream", "prompt", "language", "größe", "include[]"]
    chosen = rng.sample(names, rng.randrange(len(names)))
    parts = [text(name, rng.choice(["", "a", "ü\r\n", "x" * 99])) for name in chosen]
    for _ in range(rng.randrange(3)):
        parts.append(file(content=rng.randbytes(rng.randrange(2000))))
    rng.shuffle(parts)
    body = form(*parts)
    read = Form.parse(body, TYPE)

    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
        b"Content-Type: " + TYPE.encode() + b"\r\n\r\n" + read.replaced("neu")
    )
    assert message.is_multipart()
    models = 0
    for item in message.iter_parts():
        if item.get_param("name", header="content-disposition") == "model":
            models += 1
            assert item.get_payload(decode=True) == b"neu"
    assert models == 1
    assert set(read.texts) == set(chosen)
