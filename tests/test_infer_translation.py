"""goinfer's ``/infer`` in the engines' words, their answers as llama.cpp's."""

import base64
import json
from typing import Any

import pytest

from inferencia.errors import InvalidRequest
from inferencia.metering import Usage, usage_of
from inferencia.translate.infer import (
    MEDIA_MARKER,
    FromCompletions,
    for_completions,
    read,
)

PIXEL = base64.b64encode(b"not really a picture").decode()


def events(data: bytes) -> list[dict[str, Any]]:
    return [
        json.loads(event.removeprefix(b"data: "))
        for event in data.split(b"\n\n")
        if event
    ]


def test_a_bare_prompt_gets_goinfers_defaults() -> None:
    asked = read({"prompt": "Hello", "model": "m"})

    assert asked.members == {
        "prompt": "Hello",
        "stop": ["</s>"],
        "n_predict": 512,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "temperature": 0.2,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repeat_penalty": 1.0,
        "tfs_z": 1.0,
    }
    assert asked.timeout is None
    assert not asked.wants_stream


def test_what_is_given_wins_and_what_is_unknown_goes_on() -> None:
    asked = read(
        {
            "prompt": "x",
            "max_tokens": 7,
            "tfs": 0.5,
            "ctx": 4096,
            "timeout": 2.5,
            "stream": True,
            "temperature": None,
            "mirostat": 2,
            "grammar": "root ::= [0-9]",
        }
    )

    assert asked.members["n_predict"] == 7
    assert asked.members["tfs_z"] == 0.5
    assert asked.members["temperature"] == 0.2
    assert asked.members["mirostat"] == 2
    assert asked.members["grammar"] == "root ::= [0-9]"
    assert not {"ctx", "timeout", "max_tokens", "tfs"} & asked.members.keys()
    assert asked.timeout == 2.5
    assert asked.wants_stream


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "x", "top_k": "40"}, "top_k"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens"),
        ({"prompt": "x", "stop": [1]}, "stop"),
        ({"prompt": "x", "stream": "yes"}, "stream"),
        ({"prompt": "x", "timeout": "5s"}, "timeout"),
        ({"prompt": "x", "images": "abc"}, "images"),
        ({"prompt": "x", "images": ["%%%"]}, "images"),
        ({"prompt": "x", "audios": [5]}, "audios"),
    ],
)
def test_a_member_of_the_wrong_kind_is_named(
    values: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(values)
    assert refused.value.param == param


def test_images_get_a_place_in_the_prompt_unless_they_have_one() -> None:
    asked = read(
        {"prompt": "What is it?", "images": [f"data:image/png;base64,{PIXEL}"]}
    )
    placed = read({"prompt": f"See {MEDIA_MARKER}!", "images": [PIXEL]})

    assert asked.has_media
    assert asked.members["prompt"] == {
        "prompt_string": f"{MEDIA_MARKER}What is it?",
        "multimodal_data": [PIXEL],
    }
    assert placed.members["prompt"]["prompt_string"] == f"See {MEDIA_MARKER}!"


def test_a_cloud_is_sent_only_what_openai_knows() -> None:
    members = read({"prompt": "x", "max_tokens": 3, "stream": True, "odd": 1}).members

    cloud = for_completions(members, is_local=False)
    local = for_completions(members, is_local=True)

    assert cloud == {
        "prompt": "x",
        "max_tokens": 3,
        "temperature": 0.2,
        "top_p": 0.95,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop": ["</s>"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert local == cloud | {
        "top_k": 40,
        "min_p": 0.05,
        "repeat_penalty": 1.0,
        "odd": 1,
    }


def test_a_whole_answer_becomes_llama_cpps() -> None:
    answer = FromCompletions(is_stream=False, model="m")
    body = {
        "choices": [{"text": "Hi, ü!", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }

    fed = answer.feed(json.dumps(body).encode())
    result = json.loads(answer.finish())

    assert fed == b""
    assert result["content"] == "Hi, ü!"
    assert result["stop"] is True
    assert result["stop_type"] == "limit"
    assert (result["tokens_evaluated"], result["tokens_predicted"]) == (3, 4)
    assert usage_of(result) == Usage(3, 4)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_stream_becomes_llama_cpps_however_it_was_cut(step: int) -> None:
    answer = FromCompletions(is_stream=True, model="m")
    stream = (
        b'data: {"choices":[{"text":"Hel"}]}\n\n: waiting\n\n'
        b'data: {"choices":[{"text":"lo","finish_reason":"stop"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":5}}\n\n'
        b"data: [DONE]\n\n"
    )

    made = b"".join(
        answer.feed(stream[at : at + step]) for at in range(0, len(stream), step)
    )
    made += answer.finish()

    assert b": waiting\n\n" in made
    first, second, last = events(made.replace(b": waiting\n\n", b""))
    assert first == {"content": "Hel", "stop": False}
    assert second == {"content": "lo", "stop": False}
    assert (last["content"], last["stop"], last["stop_type"]) == ("", True, "eos")
    assert last["tokens_predicted"] == 5


def test_an_error_in_a_stream_is_passed_on_and_nothing_follows() -> None:
    answer = FromCompletions(is_stream=True, model="m")
    error = b'data: {"error":{"message":"out of memory"}}\n\n'

    assert answer.feed(error) == error
    assert answer.finish() == b""


def test_an_answer_without_choices_is_no_answer() -> None:
    answer = FromCompletions(is_stream=False, model="m")
    answer.feed(b'{"object":"list"}')
    with pytest.raises(ValueError, match="choices"):
        answer.finish()
