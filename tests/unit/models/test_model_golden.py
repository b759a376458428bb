"""Every model file we ship as test data, read to the last field: what its model card and transformers' code say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from attn_core.spec import AttentionSpec, LinearSpec, ModelSpec

DATA = Path(__file__).parents[2] / "data" / "models"


def full(n: int, kv: int, width: int, layers: Any, dtype: str = "bfloat16", **more: Any) -> AttentionSpec:
    return AttentionSpec(num_heads=n, num_kv_heads=kv, head_dim=width, dtype=dtype, layers=tuple(layers), **more)


def tower(n: int, width: int, layers: Any) -> AttentionSpec:
    return full(n, n, width, layers, attn_type="encoder_only")


def mla(n: int, layers: Any, nope: int = 128, v: int = 128, mscale: float = 1.0, **more: Any) -> AttentionSpec:
    """``mscale`` is YaRN's factor, squared into the scale."""
    scale = None if mscale == 1.0 else (nope + 64) ** -0.5 * mscale**2
    return AttentionSpec(
        kind="mla", num_heads=n, head_dim=nope + 64, v_head_dim=v, latent_dim=512, rope_dim=64, nope_dim=nope,
        dtype="bfloat16", scale=scale, layers=tuple(layers), **more,
    )  # fmt: skip


def linear(kind: str, n: int, width: int, layers: Any, **more: Any) -> LinearSpec:
    return LinearSpec(
        kind=kind, num_heads=n, head_dim=width, conv_kernel=4, dtype="bfloat16", layers=tuple(layers), **more
    )


def but(n: int, *, every: int, at: int) -> list[int]:
    """Layers of n except those at ``at`` modulo ``every``."""
    return [i for i in range(n) if i % every != at]


MIMO_FULL = (0, *range(5, 48, 6))
MIMO_SWA = tuple(i for i in range(48) if i not in MIMO_FULL)
MLLAMA_CROSS = range(3, 40, 5)
NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
KIMI_FULL = (3, 7, 11, 15, 19, 23, 26)

# DeepSeek V2 Lite: factor 40, mscale_all_dim 0.707; V3 and V3.2: 40, 1.0; Kimi K2: 32, 1.0
V2, V3, K2 = 0.1 * 0.707 * math.log(40) + 1, 0.1 * math.log(40) + 1, 0.1 * math.log(32) + 1

GOLDEN: dict[str, dict[str, AttentionSpec | LinearSpec]] = {
    "deepseek-v2-lite": {"full": mla(16, range(27), mscale=V2)},
    "deepseek-v3": {"full": mla(128, range(61), mscale=V3)},
    "deepseek-v3.2": {"full": mla(128, range(61), mscale=V3, sparse="dsa", topk=2048)},
    "glm-5": {"full": mla(64, range(78), nope=192, v=256, sparse="dsa", topk=2048)},
    "kimi-k2-instruct": {"full": mla(64, range(61), mscale=K2)},
    "exaone-4.0-32b": {
        "sliding": full(40, 8, 128, but(64, every=4, at=3), sliding_window=4096),
        "full": full(40, 8, 128, range(3, 64, 4)),
    },
    "gemma-2-9b-it": {
        "sliding": full(16, 8, 256, range(0, 42, 2), scale=0.0625, logit_softcap=50.0, sliding_window=4096),
        "full": full(16, 8, 256, range(1, 42, 2), scale=0.0625, logit_softcap=50.0),
    },
    "gemma-3-12b-it": {
        "sliding": full(
            16, 8, 256, but(48, every=6, at=5), scale=0.0625, sliding_window=1024, bidirectional_prefix=True
        ),
        "full": full(16, 8, 256, range(5, 48, 6), scale=0.0625, bidirectional_prefix=True),
        "vision": tower(16, 72, range(27)),
    },
    "glm-4.5": {"full": full(96, 8, 128, range(92))},
    "gpt-oss-20b": {
        "sliding": full(64, 8, 64, range(0, 24, 2), sliding_window=128, sinks=True),
        "full": full(64, 8, 64, range(1, 24, 2), sinks=True),
    },
    "gte-small": {"encoder": full(12, 12, 32, range(12), "float16", attn_type="encoder_only")},
    "kimi-linear-48b-a3b": {
        "linear": linear("kda", 32, 128, [i for i in range(27) if i not in KIMI_FULL]),
        "full": mla(32, KIMI_FULL),
    },
    "llama-2-7b": {"full": full(32, 32, 128, range(32), "float16")},
    "llama-3.1-8b": {"full": full(32, 8, 128, range(32))},
    "llama-3.2-11b-vision": {
        "full": full(32, 8, 128, [i for i in range(40) if i not in MLLAMA_CROSS]),
        "cross": full(32, 8, 128, MLLAMA_CROSS, attn_type="cross"),
        "vision": tower(16, 80, range(40)),  # 32 layers, then 8 global ones
    },
    "llama-4-scout-17b-16e": {
        "chunked": full(40, 8, 128, but(48, every=4, at=3), attention_chunk=8192),
        "full": full(40, 8, 128, range(3, 48, 4)),
        "vision": tower(16, 88, range(34)),
    },
    "mimo-v2-flash": {
        "full": full(64, 4, 192, MIMO_FULL, v_head_dim=128),
        "sliding": full(64, 8, 192, MIMO_SWA, v_head_dim=128, sliding_window=129, sinks=True),
    },
    "mimo-v2-flash-nosink": {
        "full": full(64, 4, 192, MIMO_FULL, v_head_dim=128),
        "sliding": full(64, 8, 192, MIMO_SWA, v_head_dim=128, sliding_window=129),
    },
    "mistral-7b-v0.3": {"full": full(32, 8, 128, range(32))},
    "modernbert-base": {
        "full": full(12, 12, 64, range(0, 22, 3), "float32", attn_type="encoder_only"),
        "sliding": full(
            12, 12, 64, but(22, every=3, at=0), "float32", attn_type="encoder_only", sliding_window=65
        ),
    },
    "nemotron-h-8b": {
        "linear": linear("mamba2", 128, 64, [i for i, c in enumerate(NEMOTRON) if c == "M"], state_dim=128),
        "full": full(32, 8, 128, [i for i, c in enumerate(NEMOTRON) if c == "*"]),
    },
    "olmo-2-7b": {"full": full(32, 32, 128, range(32))},
    "olmo-3-7b": {
        "sliding": full(32, 32, 128, but(32, every=4, at=3), sliding_window=4096),
        "full": full(32, 32, 128, range(3, 32, 4)),
    },
    "qwen2.5-0.5b": {"full": full(14, 2, 64, range(24))},
    "qwen2.5-7b-instruct-1m": {"full": full(28, 4, 128, range(28), dual_chunk=262144 - 8192)},
    "qwen2.5-vl-7b": {
        "full": full(28, 4, 128, range(28)),
        "vision": tower(16, 80, (7, 15, 23, 31)),
        "vision_window": tower(16, 80, but(32, every=8, at=7)),
    },
    "qwen3-30b-a3b": {"full": full(32, 4, 128, range(48))},
    "qwen3-8b": {"full": full(32, 8, 128, range(36))},
    "qwen3-next-80b-a3b": {
        "linear": linear("gdn", 16, 128, but(48, every=4, at=3), num_v_heads=32),
        "full": full(16, 2, 256, range(3, 48, 4)),
    },
    "qwen3.5-35b-a3b": {
        "linear": linear("gdn", 16, 128, but(40, every=4, at=3), num_v_heads=32),
        "full": full(16, 2, 256, range(3, 40, 4)),
        "vision": tower(16, 72, range(27)),
    },
    "t5-small": {
        "encoder": full(8, 8, 64, range(6), "float32", attn_type="encoder_only", scale=1.0, bias=True),
        "full": full(8, 8, 64, range(6), "float32", scale=1.0, bias=True),
        "cross": full(8, 8, 64, range(6), "float32", attn_type="cross", scale=1.0),
    },
    "whisper-large-v3": {
        "encoder": full(20, 20, 64, range(32), "float16", attn_type="encoder_only"),
        "full": full(20, 20, 64, range(32), "float16"),
        "cross": full(20, 20, 64, range(32), "float16", attn_type="cross"),
    },
}  # fmt: skip

NOTED = {"qwen2.5-vl-7b": "cu_seqlens"}
"""Known models with something to say all the same."""


def test_every_file_has_an_expectation() -> None:
    assert sorted(GOLDEN) == sorted(path.stem for path in DATA.glob("*.json"))


@pytest.mark.parametrize("name", GOLDEN)
def test_file(name: str) -> None:
    model = ModelSpec.from_hf_config(DATA / f"{name}.json")
    assert list(model.groups) == list(GOLDEN[name])
    for group, expected in GOLDEN[name].items():
        got, want = model.groups[group].to_json(), expected.to_json()
        scales = got.pop("scale", None), want.pop("scale", None)
        assert got == want, group
        assert scales[0] == (None if scales[1] is None else pytest.approx(scales[1], rel=1e-12)), group
    notes = " ".join(model.notes)
    assert NOTED[name] in notes if name in NOTED else not notes


@pytest.mark.parametrize("name", GOLDEN)
def test_folder_dict_and_round_trip_agree(name: str, tmp_path: Path) -> None:
    text = (DATA / f"{name}.json").read_text()
    (tmp_path / "config.json").write_text(text)
    model = ModelSpec.from_hf_config(str(tmp_path))
    assert model == ModelSpec.from_hf_config(json.loads(text))
    assert model == ModelSpec.from_json(json.loads(json.dumps(model.to_json())))


def test_group_of_layer_follows_the_pattern() -> None:
    model = ModelSpec.from_hf_config(DATA / "llama-3.2-11b-vision.json")
    assert [model.group_of(i) for i in (0, 3, 4, 38, 39)] == ["full", "cross", "full", "cross", "full"]
    whisper = ModelSpec.from_hf_config(DATA / "whisper-large-v3.json")
    assert {whisper.group_of(i) for i in range(32)} == {"full"}
