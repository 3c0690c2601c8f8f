"""Models have the names that goinfer's users know."""

import pytest

from inferencia.models.naming import Shard, model_name, name_and_flags, shard

LONG = "Devstral-2-123B-Instruct-2512"


# A path below the folder that is searched, without ".gguf", and the model's name.
@pytest.mark.parametrize(
    ("path", "name"),
    [
        # (a) what llama-server downloads
        ("ggml-org_gpt-oss-120b-GGUF_gpt-oss-120b-mxfp4", "ggml-org/gpt-oss-120b"),
        ("unsloth_X-GGUF_UD-Q4_K_XL_X-UD-Q4_K_XL", "unsloth/X:UD-Q4_K_XL"),
        (
            f"unsloth_{LONG}-GGUF_UD-Q4_K_XL_{LONG}-UD-Q4_K_XL",
            f"unsloth/{LONG}:UD-Q4_K_XL",
        ),
        ("unsloth_X-GGUF_Y-Q8_0", "unsloth/X:Y-Q8_0"),
        # (b) the first underscore
        ("example-com_m", "example-com/m"),
        ("te_llama", "te_llama"),
        ("tea_llama-1", "tea_llama-1"),
        ("team_llama-1", "team/llama-1"),
        ("model_name", "model/name"),
        ("model-name", "model-name"),
        ("team-org_model_name", "team-org/model_name"),
        ("abcdefghi_fr_9", "abcdefghi/fr_9"),
        ("abcdefghij_fr_10", "abcdefghij_fr_10"),
        ("abcdefgh-ai_x", "abcdefgh-ai/x"),
        ("abcdefgh-com_x", "abcdefgh-com_x"),
        ("UI_WEB_name", "UI_WEB_name"),
        ("model1_2", "model1_2"),
        ("_llama-1", "_llama-1"),
        ("-_llama-1", "-_llama-1"),
        ("-abcd_llama-1", "-abcd_llama-1"),
        ("x-co_llama-1", "x-co_llama-1"),
        ("abc-fr_llama-1", "abc-fr_llama-1"),
        ("abcd-fr_llama-1", "abcd-fr/llama-1"),
        ("ab-cd-ef_x", "ab-cd-ef_x"),
        ("group/abcd-fr_llama-1", "abcd-fr/llama-1"),
        # (c) the folder
        ("rolex/m", "rolex/m"),
        ("sub/rolex/granite3.3_8b_Q4_K_M", "rolex/granite3.3_8b_Q4_K_M"),
        ("30b/m", "m"),
        ("granite3.3_8b_Q4_K_M", "granite3.3_8b_Q4_K_M"),
        ("group/abcd-f_llama-1", "group/abcd-f_llama-1"),
        ("30b/abcd-f_llama-1", "abcd-f_llama-1"),
        ("mistral-ai/abcd-f_llama-1", "mistral-ai/abcd-f_llama-1"),
        ("mistral-ai/mistral-ai_llama-1", "mistral-ai/llama-1"),
        ("sub-directory/granite3.3_8b", "granite3.3_8b"),
        ("folder/example-four/granite3.3_8b", "granite3.3_8b"),
        ("folder/example-o/granite3.3_8b", "granite3.3_8b"),
        ("abcdefghijklm/m", "abcdefghijklm/m"),
        ("abcdefghijklmn/m", "m"),
        # (d) the rest of a repository's name
        ("30b/Devstral-Small-2507-GGUF_", "Devstral-Small-2507"),
        ("30b/Devstral-Small-2507-GGUF", "Devstral-Small-2507"),
        ("30b/Devstral-Small-2507_", "Devstral-Small-2507"),
        ("Devstral-Small-2507-GGUF_Q8_K_XL", "Devstral-Small-2507:Q8_K_XL"),
        ("Devstral-Small-2507-GGUF:Q8_K_XL", "Devstral-Small-2507:Q8_K_XL"),
        # what would leave nothing
        ("abcd_", "abcd"),
        ("grp_-GGUF_x", "grp_:x"),
    ],
)
def test_a_name_is_made_of_the_file_s(path: str, name: str) -> None:
    folders, _, stem = path.rpartition("/")
    assert model_name(stem, folders.rpartition("/")[2]) == name


@pytest.mark.parametrize(
    ("stem", "name", "flags"),
    [
        ("plain_model", "plain_model", ()),
        ("model2&foo=1&bar=2", "model2", ("-foo", "1", "-bar", "2")),
        ("m&c=4096", "m", ("-c", "4096")),
        ("m&a=b=c", "m", ("-a", "b=c")),
        ("m&jinja&=x&c=", "m", ("-c", "")),
        ("m&grammar-file=$DIR/a b", "m", ("-grammar-file", "$DIR/a b")),
    ],
)
def test_flags_stand_behind_an_ampersand(
    stem: str, name: str, flags: tuple[str, ...]
) -> None:
    assert name_and_flags(stem) == (name, flags)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("big-00002-of-00003", Shard("big", 2, 3)),
        ("big-Q4-00001-of-00001", Shard("big-Q4", 1, 1)),
        ("big-00004-of-00003", None),
        ("big-00000-of-00003", None),
        ("-00001-of-00003", None),
        ("big-1-of-3", None),
        ("big-00001-of-00003-x", None),
        ("out-of-time", None),
    ],
)
def test_a_split_model_s_files_know_each_other(
    stem: str, expected: Shard | None
) -> None:
    assert shard(stem) == expected


def test_a_shard_names_the_others() -> None:
    assert Shard("big", 1, 12).file_name(3) == "big-00003-of-00012.gguf"
