"""The parts of the SGLang integration that need no SGLang: conventions, pools, steps, arguments. The engine itself runs
in tests/engines/sglang."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_core import AttentionSpec, ModelSpec, get_platform
from attn_core.errors import AttnCoreError, BadInputError
from attn_core.integrations import sglang
from attn_core.integrations.sglang import arguments, layers, mla, pool, question, step

SPEC = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_dim=32, dtype="float32", sliding_window=16, logit_softcap=5.0, scale=0.25
)


def layer(**changes: Any) -> Any:
    """A ``RadixAttention`` that asks for SPEC, in SGLang's conventions."""
    said = {
        "layer_id": 3, "tp_q_head_num": 4, "tp_k_head_num": 2, "qk_head_dim": 32, "v_head_dim": 32, "scaling": 0.25,
        "sliding_window_size": 15, "logit_cap": 5.0, "attn_type": SimpleNamespace(value="decoder"),
        "is_cross_attention": False, "pos_encoding_mode": "NONE", "logit_capping_method": "tanh",
        "xai_temperature_len": -1,
    }  # fmt: skip
    return SimpleNamespace(**{**said, **changes})


def check(spec: AttentionSpec = SPEC, **changes: Any) -> None:
    group = SimpleNamespace(name="full", spec=spec)
    layers.check_layer(layer(**changes), group)  # type: ignore[arg-type]


# registration


def test_both_plugins_are_declared() -> None:
    for group, function in (("sglang.srt.platforms", "platform"), ("sglang.srt.plugins", "register")):
        (found,) = (e for e in entry_points(group=group) if e.name == sglang.NAME)
        assert found.load() is getattr(sglang, function)


def test_the_platform_answers_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "cuda", "other"):
        monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
        if value is not None:
            monkeypatch.setenv("SGLANG_PLATFORM", value)
        assert sglang.platform() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "attn_core")
    assert sglang.platform() == "attn_core.integrations.sglang.cpu:CpuPlatform"


def test_the_entry_points_import_neither_torch_nor_sglang() -> None:
    code = "import sys, attn_core.integrations.sglang as s; s.platform(); print({'torch', 'sglang'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# layers


def test_a_layer_that_says_what_was_decided_passes() -> None:
    check()
    check(scaling=0.25 * (1 + 1e-9))


@pytest.mark.parametrize(("theirs", "ours"), [(15, 16), (0, 1), (-1, None), (None, None), (4095, 4096)])
def test_windows(theirs: int | None, ours: int | None) -> None:
    assert layers.window(theirs) == ours


def test_no_softcap() -> None:
    assert layers.softcap(0.0) is None
    assert layers.softcap(50.0) == 50.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sliding_window_size": 16}, r"sliding_window=17 \(decided for 16\)"),
        ({"sliding_window_size": -1}, r"sliding_window=None \(decided for 16\)"),
        ({"logit_cap": 0.0}, r"logit_softcap=None \(decided for 5.0\)"),
        ({"scaling": 0.2}, r"scale=0.2 \(decided for 0.25\)"),
        ({"tp_k_head_num": 4, "v_head_dim": 16}, r"kv heads=4 \(decided for 2\), v_head_dim=16 \(decided for 32\)"),
        ({"attn_type": SimpleNamespace(value="encoder_only")}, r"attn_type=encoder_only \(decided for decoder\)"),
    ],
)
def test_a_layer_that_asks_for_something_else_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInputError, match=f"layer 3 .* group 'full' asks for other attention.*{told}"):
        check(**changes)


@pytest.mark.parametrize(
    "changes", [{"is_cross_attention": True}, {"logit_capping_method": "other"}, {"xai_temperature_len": 1024}]
)
def test_what_no_group_describes_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AttnCoreError, match=f"{next(iter(changes))}=.* is not supported"):
        check(**changes)


# pools


class MHATokenToKVPool:
    """Two layers of 8 slots after the null page of 4, as SGLang lays them out."""

    kv_cache_layout = "nhd"

    def __init__(self, slots: int = 12) -> None:
        self.keys = [torch.randn(slots, 2, 32) for _ in range(2)]
        self.values = [torch.randn(slots, 2, 32) for _ in range(2)]

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.keys[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.values[layer]


class HybridPool(MHATokenToKVPool):
    """Layer 0 keeps a window in a smaller pool; requests' slots 4 to 7 have moved out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers_mapping = {0: (0, True), 1: (0, False)}
        self.swa_kv_pool, self.full_kv_pool = MHATokenToKVPool(8), MHATokenToKVPool()
        self.keys[0], self.values[0] = self.swa_kv_pool.keys[0], self.swa_kv_pool.values[0]
        self.mapping = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 4, 5, 6, 7, -1])

    def translate_loc_from_full_to_swa(self, slots: torch.Tensor) -> torch.Tensor:
        return self.mapping[slots]


def test_a_layer_is_wrapped_without_a_copy() -> None:
    rows = MHATokenToKVPool(13)
    cache = pool.wrap_layer(rows, 1, layout="NHD", page_size=4, scales=(0.5, 2.0))
    assert (cache.layout, cache.num_pages, cache.page_size) == ("NHD", 3, 4)
    assert (cache.k_scale, cache.v_scale) == (0.5, 2.0)
    assert cache.k.data_ptr() == rows.keys[1].data_ptr()
    assert torch.equal(cache.v[2, 3], rows.values[1][11])


def test_a_pool_that_reorders_rows_is_refused() -> None:
    rows = MHATokenToKVPool()
    rows.kv_cache_layout = "hnd"
    with pytest.raises(AttnCoreError, match=r"MHATokenToKVPool \(layout hnd\); .* reads MHATokenToKVPool \(layout nhd"):
        pool.wrap_layer(rows, 0, layout="NHD", page_size=4, scales=(1.0, 1.0))


def test_pages_of_requests() -> None:
    """Stale slots past a request's length do not matter: row 1 has 5 tokens, so its second page is not full."""
    table = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0], [8, 9, 10, 11, 4, 0, 0, 0], [4, 5, 6, 7, 8, 9, 0, 0]])
    got = pool.page_table(table.int(), torch.tensor([2, 1]), 5, 4, None)
    assert got.dtype == torch.int32
    assert got.tolist() == [[1, 2], [2, 1]]


def test_pages_of_window_layers() -> None:
    hybrid = HybridPool()
    move = pool.translation(hybrid, 0)
    assert pool.translation(hybrid, 1) is None
    assert pool.translation(MHATokenToKVPool(), 0) is None
    table = torch.tensor([[4, 5, 6, 7, 8, 9]], dtype=torch.int32)
    assert pool.page_table(table, torch.tensor([0]), 6, 4, move).tolist() == [[0, 1]]
    cache = pool.wrap_layer(hybrid, 0, layout="NHD", page_size=4, scales=(1.0, 1.0))
    assert cache.num_pages == 2
    assert cache.k.data_ptr() == hybrid.swa_kv_pool.keys[0].data_ptr()


# MLA

LATENT = AttentionSpec(
    kind="mla", num_heads=4, head_dim=48, latent_dim=64, rope_dim=16, nope_dim=32, v_head_dim=32, dtype="float32"
)


class MLATokenToKVPool:
    def __init__(self) -> None:
        self.rows = torch.randn(12, 1, 80)

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.rows


def test_a_latent_pool_is_wrapped_without_a_copy() -> None:
    rows = MLATokenToKVPool()
    cache = pool.wrap_layer(rows, 0, layout="MLA", page_size=4, scales=(1.0, 1.0))
    assert (cache.layout, cache.num_pages, cache.page_size) == ("MLA", 3, 4)
    assert cache.data[0].data_ptr() == rows.rows.data_ptr()
    assert torch.equal(cache.data[0][2, 3], rows.rows[11, 0])


def test_the_absorbed_one_of_two_attentions_is_taken() -> None:
    of_cache = layer(
        tp_k_head_num=1, qk_head_dim=80, v_head_dim=64, scaling=48**-0.5, sliding_window_size=-1, logit_cap=0
    )
    of_prefill = layer(tp_k_head_num=4, qk_head_dim=48, scaling=48**-0.5, sliding_window_size=-1, logit_cap=0)
    assert [mla.expanded(x, LATENT) for x in (of_cache, of_prefill)] == [False, True]
    layers.check_layer(of_cache, SimpleNamespace(name="full", spec=LATENT))  # type: ignore[arg-type]
    assert not mla.expanded(layer(tp_k_head_num=4), SPEC)


def test_new_latent_rows() -> None:
    k = torch.randn(5, 1, 80)
    latent, rope = mla.new_rows(k, k[..., :64], LATENT)
    assert torch.equal(torch.cat([latent, rope], -1), k[:, 0])
    v = torch.randn(5, 2, 32)
    assert mla.new_rows(k, v, SPEC) == (k, v)


@pytest.mark.parametrize(
    ("materialised", "query", "told"), [(True, "packed", "materialised prefill"), (False, "split", "split queries")]
)
def test_other_forms_are_refused(materialised: bool, query: str, told: str) -> None:
    group = SimpleNamespace(name="full", spec=LATENT, materialised=materialised, mla_query=query)
    with pytest.raises(AttnCoreError, match=f"decided for {told}"):
        mla.require_absorbed(group)  # type: ignore[arg-type]
    mla.require_absorbed(SimpleNamespace(spec=SPEC, materialised=False))  # type: ignore[arg-type]


# steps


def forward_batch(mode: str, query: list[int] | None, kv: list[int], **more: Any) -> Any:
    tokens = sum(query or [1] * len(kv))
    said = {
        "forward_mode": SimpleNamespace(name=mode, is_decode=lambda: mode == "DECODE"),
        "seq_lens": torch.tensor(kv), "seq_lens_cpu": torch.tensor(kv), "extend_seq_lens_cpu": query,
        "extend_seq_lens": None,
        "req_pool_indices": torch.arange(len(kv)) + 7, "out_cache_loc": torch.arange(tokens) + 100,
    }  # fmt: skip
    return SimpleNamespace(**{**said, **more})


def test_a_decode_step() -> None:
    read = step.read_step(forward_batch("DECODE", None, [9, 4]))
    assert (read.query_lens, read.kv_lens, read.tokens) == ([1, 1], [9, 4], None)
    assert read.slots.dtype == torch.int64


def test_rows_of_one_token_come_first() -> None:
    """SGLang puts chunks before decode rows; the last row of a prompt may be one token long anywhere."""
    read = step.read_step(forward_batch("MIXED", [3, 1, 2, 1], [10, 5, 2, 8]))
    assert read.query_lens == [1, 1, 3, 2]
    assert read.kv_lens == [5, 8, 10, 2]
    assert read.requests.tolist() == [8, 10, 7, 9]
    assert read.tokens is not None
    assert read.tokens.tolist() == [3, 6, 0, 1, 2, 4, 5]
    assert read.slots.tolist() == [103, 106, 100, 101, 102, 104, 105]


def test_lengths_that_only_the_device_has() -> None:
    batch = forward_batch("EXTEND", None, [4, 6], seq_lens_cpu=None, extend_seq_lens=torch.tensor([2, 3]))
    read = step.read_step(batch)
    assert (read.query_lens, read.kv_lens) == ([2, 3], [4, 6])


def test_other_modes_are_refused() -> None:
    with pytest.raises(AttnCoreError, match="TARGET_VERIFY is not supported"):
        step.read_step(forward_batch("TARGET_VERIFY", [2], [4]))


# the question


class Config(dict):  # type: ignore[type-arg]
    def to_dict(self) -> dict[str, Any]:
        return dict(self)


LLAMA = Config(
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=64, num_attention_heads=2,
    num_key_value_heads=2, num_hidden_layers=2, head_dim=32, intermediate_size=64, vocab_size=64,
)  # fmt: skip


def test_the_model_in_the_dtype_it_runs_in() -> None:
    spec = question.model_spec(SimpleNamespace(hf_config=LLAMA, dtype=torch.float16))
    assert spec.groups["full"].dtype == "float16"


def test_models_that_are_not_run_are_refused() -> None:
    bert = Config(LLAMA, architectures=["BertModel"], model_type="bert")
    with pytest.raises(AttnCoreError, match=r"has attn_type='encoder_only'; .* runs attn_type='decoder' only"):
        question.model_spec(SimpleNamespace(hf_config=bert, dtype=torch.float32))


def test_pins_and_what_sglang_cannot_mix() -> None:
    pins = question.options(ModelSpec.of(SPEC), page_size=8, kv_cache_dtype=None, tensor_parallel=2, deterministic=True)
    decision = get_platform("cpu").resolve(ModelSpec.of(SPEC), **pins)
    assert decision.options.uniform == "groups"
    assert decision.values["page_size"] == 8
    assert decision.values["kv_layout"] == "NHD"
    assert question.sglang_kv_dtype(decision, decision.model) == "auto"
    question.require_bound(decision)


def test_a_cache_dtype_that_sglang_has_no_name_for_is_refused() -> None:
    spec = ModelSpec.of(SPEC)
    for dtype, name in (("fp8_e4m3", "fp8_e4m3"), ("int8", None)):
        pins = question.options(spec, page_size=None, kv_cache_dtype=dtype, tensor_parallel=1, deterministic=False)
        decision = get_platform("cpu").resolve(spec, **pins)
        if name is None:
            with pytest.raises(AttnCoreError, match="a cache of int8 was decided, which SGLang cannot allocate"):
                question.sglang_kv_dtype(decision, spec)
        else:
            assert question.sglang_kv_dtype(decision, spec) == name


def test_a_kernel_that_is_only_declared_is_refused_before_weights_load() -> None:
    decision = get_platform("cpu").resolve(ModelSpec.of(SPEC))
    group = decision.groups["full"]
    declared = replace(group, choices={**group.choices, "decode": replace(group.choices["decode"], bind=None)})
    with pytest.raises(AttnCoreError, match=r"decode of group 'full' .* which attn-core does not bind itself yet"):
        question.require_bound(replace(decision, groups={"full": declared}))


# arguments


def server(**changes: Any) -> Any:
    plain = {name: fine[0] for name, fine in arguments.UNSUPPORTED.items()}
    return SimpleNamespace(**{**plain, **dict.fromkeys(arguments.BACKENDS), **changes})


@pytest.mark.parametrize(
    ("base", "prefill", "decode", "ours"),
    [
        (None, None, None, False),
        ("triton", None, None, False),
        ("attn_core", None, None, True),
        (None, "attn_core", "attn_core", True),
        ("triton", "attn_core", "attn_core", True),
        ("attn_core", "fa3", "fa3", False),
    ],
)
def test_ours_is_selected(base: str | None, prefill: str | None, decode: str | None, ours: bool) -> None:
    asked = server(attention_backend=base, prefill_attention_backend=prefill, decode_attention_backend=decode)
    assert arguments.selected(asked) is ours


@pytest.mark.parametrize("names", [(None, "attn_core", None), ("attn_core", None, "fa3"), ("fa3", "attn_core", None)])
def test_ours_for_one_phase_is_refused(names: tuple[str | None, ...]) -> None:
    with pytest.raises(AttnCoreError, match="attn_core serves both phases"):
        arguments.selected(server(**dict(zip(arguments.BACKENDS, names))))


def test_arguments_that_cannot_be_served_are_refused() -> None:
    arguments.refuse_unsupported(server())
    with pytest.raises(AttnCoreError, match=r"--speculative-algorithm=EAGLE is not supported .* allowed: None"):
        arguments.refuse_unsupported(server(speculative_algorithm="EAGLE"))
