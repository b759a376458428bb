"""Continuous batching of transformers on our kernels: the tokens of eager generation, request by request.

The reference is ``generate`` with eager attention, one request at a time and without any paged cache.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from gpt_oss_tiny import generate_eager, make_prompts

from attn_core import AttnCoreError, BadInputError, ModelSpec, NoBackendError
from attn_core.integrations import hf_paged, hf_paged_cache

if find_spec("transformers.generation.continuous_batching.cache_allocators") is None:
    pytest.skip("this transformers has another paged cache", allow_module_level=True)

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCABULARY, WINDOW, NEW = 256, 10, 14
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False,
    "dtype": "float32", "attn_implementation": "eager", "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral, all layers sliding": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None,
         "query_pre_attn_scalar": 12, "hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gpt-oss": ("GptOss", {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def make(name: str, **changes: Any) -> Any:
    """A random model whose tokens depend on everything: matrices N(0, 0.12²), embeddings and sinks N(0, 1)."""
    kind, more = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if parameter.endswith(("embed_tokens.weight", "sinks")):
                weight.normal_(0.0, 1.0, generator=generator)
            elif not parameter.endswith("norm.weight"):
                weight.normal_(0.0, 0.12, generator=generator)
    return model


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture
def model_of(made: dict[str, Any]) -> Any:
    """Models with what eager generation says, made once."""

    def get(name: str) -> tuple[Any, list[list[int]]]:
        if name not in made:
            model = make(name)
            made[name] = model, [generate_eager(model, p, NEW) for p in PROMPTS]
        return made[name]

    return get


PREFIX = make_prompts(1, shortest=16, longest=16, seed=3)[0]
PROMPTS = [
    *make_prompts(6, shortest=2, longest=45, seed=4),
    *([*PREFIX, *p] for p in make_prompts(3, longest=8, seed=5)),
]

ROOMY = {"page_size": 8, "num_blocks": 100, "max_batch_tokens": 400}
TIGHT = {"page_size": 4, "num_blocks": 26, "max_batch_tokens": 20}
"""Less room than the requests need at once, and prompts cut into chunks."""


def serve(model: Any, prompts: list[list[int]] | None = None, *, new: int = NEW, **config: Any) -> list[list[int]]:
    """Greedy tokens of every request, in order; raises where one failed."""
    outputs = model.generate_batch(
        PROMPTS if prompts is None else prompts,
        generation_config=transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**{**TIGHT, **config}),
    )
    return [list(o.generated_tokens) if o.error is None else [] for o in outputs.values()]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What transformers did. Its cache's own update, which gathers all keys, must not run at all."""
    counts: Counter[str] = Counter()
    match, offload = PagedAttentionCache.search_prefix_match, OffloadingManager.offload_requests

    def matched(self: Any, *args: Any) -> int:
        found = match(self, *args)
        counts["shared"] += found > 0
        return found

    def offloaded(self: Any) -> bool:
        counts["evicted"] += 1
        return offload(self)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        counts["gathered"] += 1
        raise AssertionError("transformers gathered keys")

    monkeypatch.setattr(PagedAttentionCache, "search_prefix_match", matched)
    monkeypatch.setattr(OffloadingManager, "offload_requests", offloaded)
    monkeypatch.setattr(PagedAttentionCache, "update", forbidden)
    for allocator in (FullAttentionCacheAllocator, SlidingAttentionCacheAllocator):
        monkeypatch.setattr(allocator, "update", forbidden)
    yield counts
    assert not counts["gathered"]


CASES = [*((name, room) for name in MODELS for room in ("roomy", "tight")), ("gpt-oss", "tight, prompts first")]


@pytest.mark.parametrize(("name", "room"), CASES)
def test_tokens_are_those_of_eager_generation(name, room, model_of, seen):
    model, expected = model_of(name)
    config = {"roomy": ROOMY, "tight": TIGHT, "tight, prompts first": {**TIGHT, "scheduler_type": "prefill_first"}}
    with hf_paged.continuous_batching(model) as attn:
        got = serve(model, **config[room])
    assert got == expected
    assert len({t for out in expected for t in out}) >= 30
    assert attn.calls % 4 == 0
    assert attn.calls >= 4 * NEW
    sliding, tight = name not in ("llama", "qwen3"), room != "roomy"
    assert bool(seen["shared"]) is (tight and not sliding)  # transformers shares prefixes in full layers only
    assert bool(attn.carried_keys) is (tight and sliding)
    if "all layers" not in name:  # rings stop growing
        assert bool(seen["evicted"]) is tight
    assert model.config._attn_implementation == "eager"


def wrong(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Decide for other attention than the model's, with the checks of calls off: what the comparison must notice."""
    real = hf_paged.spec_of

    def spec(config: Any, dtype: torch.dtype) -> ModelSpec:
        right = real(config, dtype)
        groups = {}
        for name, g in right.groups.items():
            new = {k: f(g) for k, f in changes.items() if k != "sliding_window" or g.sliding_window}
            groups[name] = replace(g, **new)
        return replace(right, groups=groups)

    def sinks(group: Any, module: Any, kwargs: Any) -> dict[str, Any]:
        return {"sinks": group.prepare_sinks(kwargs["s_aux"]) if group.spec.sinks else None}

    monkeypatch.setattr(hf_paged, "spec_of", spec)
    monkeypatch.setattr(hf_paged, "check_call", lambda *_: None)
    monkeypatch.setattr(hf_paged, "tensors", sinks)
    monkeypatch.setattr(hf_paged_cache, "check_window", lambda *_: None)


CONTROLS = {
    "right after all": ("gpt-oss", {}),
    "sinks dropped": ("gpt-oss", {"sinks": lambda g: False}),
    "window one short": ("gpt-oss", {"sliding_window": lambda g: g.sliding_window - 1}),
    "window one short, too": ("gemma2", {"sliding_window": lambda g: g.sliding_window - 1}),
    "cap dropped": ("gemma2", {"logit_softcap": lambda g: None}),
    "scale 3% off": ("llama", {"scale": lambda g: 1.03 * g.softmax_scale}),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_wrong_attention_is_noticed(control, model_of, monkeypatch):
    name, changes = CONTROLS[control]
    model, expected = model_of(name)
    wrong(monkeypatch, **changes)
    with hf_paged.continuous_batching(model):
        got = serve(model)
    assert all(got)
    assert (got == expected) is (control == "right after all")


def test_without_us_transformers_drops_the_cap(model_of):
    """paged|eager of transformers (5.20 to 5.23) ignores ``softcap``. Ours, in the very same call, does not."""
    model, expected = model_of("gemma2")
    assert serve(model) != expected
    with hf_paged.continuous_batching(model):
        assert serve(model) == expected


def test_the_cache_is_wrapped_without_a_copy(model_of, monkeypatch):
    model, _ = model_of("gpt-oss")
    seen = []
    real = hf_paged_cache.wrapped

    def watched(theirs: Any, layer: int, group: Any) -> Any:
        cache = real(theirs, layer, group)
        whole = theirs.cache_tensor
        inside = range(whole.data_ptr(), whole.data_ptr() + whole.nbytes)
        seen.append((layer, cache.page_size, all(t.data_ptr() in inside for t in cache.data), whole))
        return cache

    monkeypatch.setattr(hf_paged_cache, "wrapped", watched)
    with hf_paged.continuous_batching(model) as attn:
        serve(model)
    assert [(layer, size, ours) for layer, size, ours, _ in seen] == [(i, 1, True) for i in range(4)]
    assert seen[0][3].any()
    values = attn.decision.values
    assert (values["page_size"], values["kv_cache_dtype"], values["kv_layout"]) == (1, "float32", "NHD")
    seen.clear()
    gc.collect()
    assert not attn._caches


def test_options_reach_the_decision_and_the_caches_geometry_cannot_be_chosen(model_of):
    model, _ = model_of("llama")
    with hf_paged.continuous_batching(model, backend="flex_attention") as attn:
        assert {c.backend for r, c in attn.decision.groups["full"].choices.items() if r != "kv_write"} == {
            "flex_attention"
        }
    for option in ({"page_size": 16}, {"kv_cache_dtype": "float32"}):
        with pytest.raises(BadInputError, match="cannot be chosen"), hf_paged.continuous_batching(model, **option):
            pass
    with pytest.raises(NoBackendError), hf_paged.continuous_batching(model, backend="nobody"):
        pass
    assert model.config._attn_implementation == "eager"


def test_everything_is_as_before_afterwards(model_of):
    model, expected = model_of("llama")
    before = ALL_ATTENTION_FUNCTIONS["paged|eager"]
    with hf_paged.continuous_batching(model):
        assert ALL_ATTENTION_FUNCTIONS["paged|eager"] is not before
    assert ALL_ATTENTION_FUNCTIONS["paged|eager"] is before
    assert "paged|eager" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    with pytest.raises(ZeroDivisionError), hf_paged.continuous_batching(model):
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["paged|eager"] is before
    assert model.config._attn_implementation == "eager"
    assert serve(model, **ROOMY) == expected


def test_somebody_elses_override_comes_back(model_of, monkeypatch):
    model, _ = model_of("llama")

    def theirs(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "paged|eager", theirs)
    with hf_paged.continuous_batching(model):
        serve(model, PROMPTS[:1])
    assert ALL_ATTENTION_FUNCTIONS["paged|eager"] is theirs


def test_two_models_at_once_and_one_that_is_not_ours(model_of):
    (a, expected_a), (b, expected_b), (c, expected_c) = map(model_of, ("llama", "gpt-oss", "qwen3"))
    with hf_paged.continuous_batching(a) as first:
        with hf_paged.continuous_batching(b) as second:
            assert serve(b, PROMPTS[:3]) == expected_b[:3]
            calls = second.calls
            assert serve(c, PROMPTS[:3]) == expected_c[:3]
            with pytest.raises(AttnCoreError, match="served already"), hf_paged.continuous_batching(a):
                pass
        assert serve(a, PROMPTS[:3]) == expected_a[:3]
        assert first.calls > 0
    assert second.calls == calls > 0


def test_errors_in_the_loops_thread_come_out(model_of, monkeypatch):
    model, _ = model_of("llama")
    real = hf_paged.PagedAttention.attend

    def asked_for_more(self: Any, *args: Any) -> Any:
        return real(self, *args[:-1], {**args[-1], "position_skew": 1})

    monkeypatch.setattr(hf_paged.PagedAttention, "attend", asked_for_more)
    served = []
    with (
        pytest.raises(AttnCoreError, match=r"failed in the generation loop.*keyword 'position_skew'"),
        hf_paged.continuous_batching(model),
    ):
        served = serve(model)
    assert served == [[]] * len(PROMPTS)
    assert model.config._attn_implementation == "eager"
    assert "paged|eager" not in ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_manager_that_lives_longer_than_one_call(model_of):
    """Requests that arrive while others run, through the manager's own interface."""
    model, expected = model_of("gemma2")
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    batching = transformers.ContinuousBatchingConfig(**TIGHT)
    got: dict[str, list[int]] = {}
    with hf_paged.continuous_batching(model) as attn:
        with model.continuous_batching_context_manager(config, continuous_batching_config=batching) as manager:
            for i, prompt in enumerate(PROMPTS):
                manager.add_request(prompt, request_id=str(i))
                if i % 3 == 2:
                    result = manager.get_result(timeout=20)
                    got[result.request_id] = list(result.generated_tokens)
            while len(got) < len(PROMPTS):
                result = manager.get_result(timeout=20)
                got[result.request_id] = list(result.generated_tokens)
        assert attn.error is None
    assert [got[str(i)] for i in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_padded_steps(name, model_of, seen, monkeypatch):
    """transformers pads steps when it compiles (here: without compiling, which is slow). Padding rows have no tokens,
    padding tokens no row."""
    model, expected = model_of(name)
    padded, real, start = [], hf_paged_cache.read, ModelRunner.__init__

    def watched(kwargs: Any, *args: Any) -> Any:
        padded.append(len(kwargs["write_index"][0]) - int(kwargs["cu_seq_lens_q"][-1]))
        return real(kwargs, *args)

    def pads(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.pad_inputs = True

    monkeypatch.setattr(hf_paged_cache, "read", watched)
    monkeypatch.setattr(ModelRunner, "__init__", pads)
    with hf_paged.continuous_batching(model):
        got = serve(model, q_padding_interval_size=8)
    assert got == expected
    assert max(padded) > 0


def test_several_sequences_per_request(model_of):
    """transformers forks a request after its prompt: blocks are shared or copied, rings copied."""
    model, expected = model_of("gpt-oss")
    greedy = {"do_sample": True, "top_k": 1}  # transformers takes several sequences only when sampling
    config = transformers.GenerationConfig(max_new_tokens=NEW, eos_token_id=-1, num_return_sequences=2, **greedy)
    batching = transformers.ContinuousBatchingConfig(**ROOMY)
    with hf_paged.continuous_batching(model):
        outputs = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=batching)
    assert [list(o.generated_tokens) for o in outputs.values()] == [tokens for tokens in expected for _ in range(2)]


def test_a_cache_that_outlives_the_block(model_of):
    """What we wrote is what transformers would have written: its own kernels go on with it, prefixes included."""
    model, expected = model_of("qwen3")
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    batching = transformers.ContinuousBatchingConfig(**TIGHT)
    run = {"generation_config": config, "continuous_batching_config": batching, "persistent_manager": True}
    try:
        with hf_paged.continuous_batching(model) as attn:
            inside = model.generate_batch(PROMPTS, **run)
            calls = attn.calls
        outside = model.generate_batch(PROMPTS, **run)
        assert attn.calls == calls
    finally:
        model.destroy_cached_continuous_batching_manager()
    for outputs in (inside, outside):
        assert [list(o.generated_tokens) for o in outputs.values()] == expected


def test_half_precision():
    """bfloat16: the cache has the model's dtype, and most first tokens are those of eager generation."""
    model = make("llama", dtype="bfloat16").to(torch.bfloat16)
    want = [generate_eager(model, p, 1) for p in PROMPTS]
    with hf_paged.continuous_batching(model) as attn:
        got = serve(model)
    assert attn.decision.values["kv_cache_dtype"] == "bfloat16"
    assert sum(g[:1] == w for g, w in zip(got, want)) > len(PROMPTS) // 2


class TestRefusals:
    def test_training_mode(self):
        model = make("llama").train()
        with pytest.raises(AttnCoreError, match=r"call model.eval\(\)"), hf_paged.continuous_batching(model):
            pass

    def test_models_that_are_no_decoders(self):
        tiny = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
        bert = transformers.BertModel(transformers.BertConfig(**tiny)).eval()
        with pytest.raises(AttnCoreError, match="BertModel has no generate_batch"), hf_paged.continuous_batching(bert):
            pass
        config = transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_heads=2, num_layers=1, vocab_size=32)
        t5 = transformers.T5ForConditionalGeneration(config).eval()
        with pytest.raises(AttnCoreError, match="which continuous batching"), hf_paged.continuous_batching(t5):
            pass

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"attn_type": "encoder_only"}, "encoder_only attention"),
            ({"v_head_dim": 8}, "unequal width"),
            ({"attention_chunk": 8}, "chunked attention"),
            ({"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)}, "a bias on the logits"),
        ],
    )
    def test_groups_that_the_cache_cannot_serve(self, changes, what, model_of, monkeypatch):
        model, _ = model_of("llama")
        real = hf_paged.spec_of
        monkeypatch.setattr(
            hf_paged,
            "spec_of",
            lambda *a: replace(s := real(*a), groups={"full": replace(s.groups["full"], **changes)}),
        )
        with pytest.raises(AttnCoreError, match=what), hf_paged.continuous_batching(model):
            pass

    def test_an_ordinary_forward_inside_the_block(self, model_of):
        model, _ = model_of("llama")
        with pytest.raises(AttnCoreError, match="without a paged cache"), hf_paged.continuous_batching(model):
            model(torch.tensor([PROMPTS[0]]), use_cache=False)

    def test_another_dtype(self, model_of):
        model, _ = model_of("llama")
        q, kv = torch.zeros(1, 4, 3, 16, dtype=torch.bfloat16), torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
        layer = model.model.layers[0].self_attn
        told = "runs in torch.bfloat16, the decision was made for torch.float32"
        with pytest.raises(AttnCoreError, match=told), hf_paged.continuous_batching(model):
            ALL_ATTENTION_FUNCTIONS["paged|eager"](layer, q, kv, kv, None, scaling=0.25)

    def test_a_flash_kernels_block_table(self, model_of, monkeypatch):
        model, _ = model_of("llama")
        real = hf_paged_cache.read
        monkeypatch.setattr(
            hf_paged_cache, "read", lambda kwargs, *a: real({**kwargs, "block_table": torch.zeros(1)}, *a)
        )
        with pytest.raises(AttnCoreError, match="for a flash kernel"), hf_paged.continuous_batching(model):
            serve(model)

    def test_another_cache(self, model_of):
        model, _ = model_of("llama")
        with (
            pytest.raises(AttnCoreError, match=r"written for transformers 5\.20 to 5\.23"),
            hf_paged.continuous_batching(model),
        ):
            hf_paged_cache.wrapped(object(), 0, None)

    def test_a_window_that_is_not_the_caches(self, model_of, monkeypatch):
        model, _ = model_of("gpt-oss")
        real = hf_paged.spec_of

        def narrower(*args: Any) -> ModelSpec:
            right = real(*args)
            return replace(
                right,
                groups={n: replace(g, sliding_window=g.sliding_window and 5) for n, g in right.groups.items()},
            )

        monkeypatch.setattr(hf_paged, "spec_of", narrower)
        monkeypatch.setattr(hf_paged, "check_call", lambda *_: None)
        told = "a window of 10, the decision was made for 5"
        with pytest.raises(AttnCoreError, match=told), hf_paged.continuous_batching(model):
            serve(model)
