"""What may be handed to ``from_hf_config``, and what is said when it is no model config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attn_core.errors import BadInputError
from attn_core.spec import ModelSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
    "torch_dtype": "float16",
}


class Config:
    """Looks like a PretrainedConfig."""

    def __init__(self, data: object) -> None:
        self.data = data

    def to_dict(self) -> object:
        return self.data


def test_paths_folders_dicts_and_config_objects_read_the_same(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("\ufeff" + json.dumps(LLAMA), encoding="utf-8")
    expected = ModelSpec.from_hf_config(LLAMA)
    assert expected.groups["full"].num_kv_heads == 4
    for source in (file, str(file), tmp_path, str(tmp_path), Config(LLAMA)):
        assert ModelSpec.from_hf_config(source) == expected


def test_nested_config_objects_count_as_their_dicts() -> None:
    nested = {"model_type": "llava", "text_config": Config(LLAMA), "torch_dtype": "bfloat16"}
    model = ModelSpec.from_hf_config(nested)
    assert (model.groups["full"].dtype, model.groups["full"].head_dim) == ("float16", 64)


def bad(source: object) -> str:
    with pytest.raises(BadInputError) as error:
        ModelSpec.from_hf_config(source)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"GGUF\x03\x00\x00\x00", "b'GGUF"),
        (b"", "it is empty"),
        (b"{'model_type': 'llama'}", "is not JSON"),
        (b'{"model_type": "llama",', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "JSON list"),
        (b'"llama"', "JSON str"),
        (b"null", "JSON NoneType"),
        (b"{}", "neither architectures nor model_type"),
        (b'{"version": 1, "name": "x"}', "found: name, version"),
    ],
)
def test_files_that_hold_no_config(content: bytes, found: str, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(content)
    text = bad(file)
    assert str(file) in text
    assert found in text


def test_missing_files_and_folders_without_config(tmp_path: Path) -> None:
    assert "meta-llama/Llama-3.1-8B" in (text := bad("meta-llama/Llama-3.1-8B"))
    assert "no such file or folder (models are not downloaded)" in text
    (tmp_path / "params.json").write_text("{}")
    assert "no config.json in this folder, which holds params.json" in bad(tmp_path)
    assert "a\0b" in bad("a\0b")


@pytest.mark.parametrize("source", [None, 3, object(), ["config.json"], Config, Config("not a dict")])
def test_objects_that_are_no_config(source: object) -> None:
    assert "config.json" in bad(source)


def test_every_message_of_the_reader_names_the_source(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA, "num_attention_heads": "many"}))
    assert bad(file).startswith(f"{file}: LlamaForCausalLM: num_attention_heads='many'")
    assert bad({**LLAMA, "hidden_size": None}).startswith("config dict: LlamaForCausalLM: missing hidden_size")
    odd = bad(Config({**LLAMA, "num_attention_heads": 3, "head_dim": 64}))
    assert odd.startswith("Config: AttentionSpec: num_heads=3 is not a multiple of num_kv_heads=4")


def test_dtype_is_the_text_models_then_the_models_then_assumed() -> None:
    def dtype(**changes: object) -> tuple[str, int]:
        model = ModelSpec.from_hf_config({**LLAMA, **changes})
        return model.groups["full"].dtype, len(model.notes)

    assert dtype() == ("float16", 0)
    assert dtype(dtype="torch.bfloat16") == ("bfloat16", 0)
    assert dtype(torch_dtype=None) == dtype(torch_dtype="auto") == ("bfloat16", 1)
    assert "dtype='float8_e4m3fn'" in bad({**LLAMA, "torch_dtype": "float8_e4m3fn"})
