"""Whole engines on the CPU: their greedy tokens are those of transformers, and are not when something is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sglang_models as models

STEPS = models.NEW_TOKENS
"""Prompts that fit one step, then a step for every token but the first."""


@pytest.fixture(scope="module")
def llama(run: Callable[..., Any]) -> Any:
    """Two tensor-parallel ranks with half of the heads each."""
    return run("llama", again=[models.prompts()[3]], tp_size=2)


@pytest.fixture(scope="module")
def gemma2(run: Callable[..., Any]) -> Any:
    return run("gemma2", modes=("softcap dropped", "window one short"))


@pytest.fixture(scope="module")
def gpt_oss(run: Callable[..., Any]) -> Any:
    """The pool of window layers has 160 rows for requests of 283 tokens in all; prompts come in chunks, and chunks
    share steps with decode rows."""
    return run(
        "gpt_oss", modes=("sinks dropped", "window one short"), max_total_tokens=640, swa_full_tokens_ratio=0.25,
        chunked_prefill_size=32, enable_mixed_chunk=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deepseek_v2(run: Callable[..., Any]) -> Any:
    return run(
        "deepseek_v2", modes=("scale of the width",), again=[models.prompts()[3]], chunked_prefill_size=32,
        enable_mixed_chunk=True,
    )  # fmt: skip


def test_llama_is_transformers(llama: Any) -> None:
    assert llama.notes["heads"] == {"full": 2}
    assert llama.score() == models.ALL
    assert llama.said["again"] == [llama.model.want[3]]


def test_our_backend_computed_it(llama: Any, gemma2: Any) -> None:
    """One plan per step and group, one call per step and layer."""
    assert gemma2.notes["plans"] == 2 * STEPS
    assert gemma2.notes["calls"] == models.LAYERS * STEPS
    assert (llama.notes["plans"], llama.notes["calls"]) == (2 * STEPS, 2 * models.LAYERS * STEPS)


def test_cached_prefixes_are_read(llama: Any) -> None:
    """The prompt asked again is not computed again, but for its last page."""
    assert llama.notes["prefix"] == models.PROMPT_LENS[3] // 16 * 16


def test_the_engine_takes_what_was_decided(llama: Any, gpt_oss: Any) -> None:
    for engine in (llama, gpt_oss):
        assert engine.notes["values"]["page_size"] == 16
        assert engine.notes["values"]["kv_cache_dtype"] == "float32"
        assert engine.notes["uniform"] == "groups"


def test_gemma2_is_transformers(gemma2: Any) -> None:
    assert gemma2.score() == models.ALL


def test_gemma2_notices(gemma2: Any) -> None:
    assert gemma2.score("softcap dropped") < models.ALL // 2
    assert gemma2.score("window one short") < models.ALL // 2


def test_gemma2_on_sglangs_own_backend(run: Callable[..., Any]) -> None:
    """Its torch_native ignores the softcap. When this fails, SGLang has mended it: tell docs/engines-compared.md."""
    own = run("gemma2", attention_backend="torch_native")
    assert own.notes == {}
    assert own.score() == 0


def test_gpt_oss_is_transformers(gpt_oss: Any) -> None:
    assert gpt_oss.score() == models.ALL


def test_gpt_oss_lost_keys_that_the_window_had_passed(gpt_oss: Any) -> None:
    """Their rows were given to other tokens: the small pool cannot hold all keys at once."""
    assert gpt_oss.notes["pool"] == "SWAKVPool"
    sliding, full = gpt_oss.notes["pages"]["0"], gpt_oss.notes["pages"]["1"]
    assert (sliding - 1) * 16 == 160 < sum(models.PROMPT_LENS) + models.ALL < (full - 1) * 16
    assert gpt_oss.notes["evicted"] == 112  # of 146: whole pages before the window of 16


def test_gpt_oss_mixed_steps(gpt_oss: Any) -> None:
    """Chunks come before decode rows in SGLang's batches; the kernels want them after."""
    assert gpt_oss.notes["reordered"] > 0
    assert gpt_oss.notes["prefix"] > 0


def test_gpt_oss_notices(gpt_oss: Any) -> None:
    assert gpt_oss.score("sinks dropped") < models.ALL // 2
    assert gpt_oss.score("window one short") < models.ALL // 2


def test_deepseek_v2_is_transformers(deepseek_v2: Any) -> None:
    """Absorbed in both phases, over the latent pool; cached prefixes and mixed steps as well."""
    assert deepseek_v2.score() == models.ALL
    assert deepseek_v2.said["again"] == [deepseek_v2.model.want[3]]
    assert deepseek_v2.notes["pool"] == "MLATokenToKVPool"
    assert deepseek_v2.notes["values"]["kv_layout"] == "MLA"
    assert deepseek_v2.notes["reordered"] > 0
    assert deepseek_v2.notes["prefix"] > 0


def test_deepseek_v2_notices(deepseek_v2: Any) -> None:
    """Its yarn makes the scale another than that of its width."""
    assert deepseek_v2.score("scale of the width") < models.ALL // 2
