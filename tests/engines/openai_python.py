"""Does with OpenAI's own Python client what its users do; fails with a traceback.

    python openai_python.py BASE_URL KEY

Runs in the engines' venv, where the client is installed.
"""

import json
import sys

import openai  # type: ignore[import-not-found, unused-ignore]

CHAT = {
    "model": "gemma-270m",
    "messages": [{"role": "user", "content": "The capital of France is"}],
    "max_tokens": 12,
    "temperature": 0,
}
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}


def main(base_url: str, key: str) -> None:
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
    listing(client)
    text = chat(client)
    streaming(client, text)
    structured_output(client)
    embeddings(client)
    responses(client)
    errors(client, base_url)
    print("all is well")


def listing(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert {"gemma-270m", "minilm"} <= set(names), names
    assert client.models.retrieve("minilm").id == "minilm"


def chat(client: openai.OpenAI) -> str:
    answer = client.chat.completions.create(**CHAT)
    assert answer.usage.completion_tokens == 12, answer.usage
    text: str = answer.choices[0].message.content
    assert text
    raw = client.chat.completions.with_raw_response.create(**CHAT)
    assert raw.headers["x-request-id"] and raw.parse()._request_id
    assert int(raw.headers["x-ratelimit-remaining-requests"]) > 0
    return text


def streaming(client: openai.OpenAI, text: str) -> None:
    options = {"include_usage": True}
    with client.chat.completions.create(
        **CHAT, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    parts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(parts) == text
    assert chunks[-1].usage.completion_tokens == 12
    with client.chat.completions.create(**CHAT, stream=True) as stream:
        assert all(chunk.choices and not chunk.usage for chunk in stream)
    with client.chat.completions.stream(**CHAT) as events:
        deltas = [e.delta for e in events if e.type == "content.delta"]
    assert "".join(deltas) == text


def structured_output(client: openai.OpenAI) -> None:
    wanted = {"name": "place", "strict": True, "schema": PLACE}
    shape = {"type": "json_schema", "json_schema": wanted}
    answer = client.chat.completions.create(
        **{**CHAT, "max_tokens": 32}, response_format=shape
    )
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def embeddings(client: openai.OpenAI) -> None:
    """The client asks for base64 when nothing is said, and decodes it."""
    texts = ["a cat", "a kitten", "a tax form"]
    answer = client.embeddings.create(model="minilm", input=texts)
    assert [len(item.embedding) for item in answer.data] == [384] * 3
    plain = client.embeddings.create(
        model="minilm", input="a cat", encoding_format="float"
    )
    pairs = zip(plain.data[0].embedding, answer.data[0].embedding, strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-3


def responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="gemma-270m", input="Once upon", max_output_tokens=8
    )
    assert answer.output_text


def errors(client: openai.OpenAI, base_url: str) -> None:
    try:
        client.chat.completions.create(**{**CHAT, "model": "nope"})
        raise AssertionError("an unknown model was taken")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
        assert error.request_id
    try:
        openai.OpenAI(base_url=base_url, api_key="sk-nobody").models.list()
        raise AssertionError("an unknown key was taken")
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key", error
    try:
        long = [{"role": "user", "content": "word " * 20_000}]
        client.chat.completions.create(**{**CHAT, "messages": long})
        raise AssertionError("a prompt that does not fit was taken")
    except openai.BadRequestError as error:
        assert "context" in error.message, error


if __name__ == "__main__":
    main(*sys.argv[1:])
