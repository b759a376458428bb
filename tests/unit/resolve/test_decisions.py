"""What the resolver decides for models with several groups, values shared among them, pins and constraints."""

from __future__ import annotations

import pytest
from world import CUDA, EVERYTHING, base, both, catalog, decide, row

from attn_core import (
    ANY,
    AttentionSpec,
    BadInputError,
    Constraint,
    Decision,
    Device,
    LinearSpec,
    ModelSpec,
    MultipleOf,
    NoBackendError,
    NoneOf,
    OneOf,
)
from attn_core.catalog import Catalog, DeviceCatalog, Installed

FULL = AttentionSpec(num_heads=64, num_kv_heads=8, head_dim=64, dtype="bfloat16", layers=(1, 3))
SLIDING = AttentionSpec(num_heads=64, num_kv_heads=8, head_dim=64, dtype="bfloat16", sliding_window=128, layers=(0, 2))
WIDE = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=512, dtype="bfloat16")
GEMMA = AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=256, dtype="bfloat16", sliding_window=1024)
VISION = AttentionSpec(num_heads=16, head_dim=72, dtype="bfloat16", attn_type="encoder_only")
GDN = LinearSpec(kind="gdn", num_heads=16, head_dim=128, dtype="bfloat16", num_v_heads=32)

PORTABLE = both("triton", accepts={**EVERYTHING, "head_dim": MultipleOf(8, max=512)}, tier="PORTABLE", plugin="core")


def chosen(d: Decision, group: str) -> tuple[str, ...]:
    return tuple(c.backend for c in d.groups[group].choices.values())


def test_full_and_sliding_groups_get_their_own_backends():
    cat = catalog([*both("fast", tier="BEST"), *PORTABLE])
    d = decide({"full": FULL, "sliding": SLIDING}, cat)
    assert chosen(d, "full") == ("fast", "fast", "torch_native")
    assert chosen(d, "sliding") == ("triton", "triton", "torch_native")
    refused = {(r.backend, r.group, r.field, r.got, r.allowed) for r in d.rejections}
    assert ("fast", "sliding", "sliding_window", 128, (None,)) in refused


def test_shared_values_are_solved_together():
    """The best kernel of one group needs page 64, that of the other 16: the pair that shares a page wins."""
    rows = [
        *both("wants64", tier="BEST", accepts={"page_size": OneOf(64)}),
        *both("wants16", tier="TUNED", accepts={"page_size": OneOf(16), "sliding_window": True}),
        *both("either", tier="TUNED", rank=5, accepts={"page_size": OneOf(16, 64), "sliding_window": True}),
    ]
    d = decide({"full": FULL, "sliding": SLIDING}, catalog(rows))
    assert d.values["page_size"] == 64
    assert chosen(d, "full")[:2] == ("wants64", "wants64")
    assert chosen(d, "sliding")[:2] == ("either", "either")
    missed = [r for r in d.rejections if r.code == "conflict"]
    assert not missed  # wants16 is of the same tier as the winner: no better kernel was lost
    pinned = decide({"full": FULL, "sliding": SLIDING}, catalog(rows), page_size=16)
    assert pinned.values["page_size"] == 16
    assert chosen(pinned, "full")[:2] == ("either", "either") or chosen(pinned, "full")[:2] == ("wants16", "wants16")


def test_a_better_kernel_that_cannot_share_is_named():
    rows = [
        *both("best64", tier="BEST", accepts={"page_size": OneOf(64)}),
        *both("only16", tier="TUNED", accepts={"page_size": OneOf(16), "sliding_window": True}),
        *both("any", tier="TUNED", rank=9),
    ]
    accompanying = [r for r in base() if r.role in ("kv_write", "allreduce_fusion")]
    cat = Catalog({"cuda:sm_90": DeviceCatalog((*rows, *accompanying))})
    d = decide({"full": FULL, "sliding": SLIDING}, cat)
    assert d.values["page_size"] == 16
    (miss,) = {
        (r.backend, r.field, r.got, r.allowed) for r in d.rejections if r.code == "conflict" and r.role == "decode"
    }
    assert miss == ("best64", "page_size", "it needs 64", "the others allow 16")


def test_hybrid_models_leave_linear_layers_to_the_engine():
    d = decide({"full": FULL, "linear": GDN}, catalog(PORTABLE))
    assert chosen(d, "linear") == ("engine", "engine")
    assert d.groups["linear"].choices["linear_prefill"].bind is None
    assert "run by the engine" in d.explain()


def test_groups_of_256_and_512_wide_heads():
    cat = catalog([*both("upto256", tier="BEST", accepts=EVERYTHING), *PORTABLE])
    d = decide({"sliding": GEMMA, "full": WIDE}, cat)
    assert chosen(d, "sliding")[0] == "upto256"
    assert chosen(d, "full")[0] == "triton"


def test_text_and_vision():
    rows = [*PORTABLE, row("encoder", "encode", tier="TUNED", accepts={"attn_type": OneOf("encoder_only")})]
    d = decide({"full": FULL, "vision": VISION}, catalog(rows), page_size=32)
    assert chosen(d, "vision") == ("encoder",)
    assert d.values["page_size"] == 32
    assert "kv_layout" not in d.groups["vision"].values


def test_an_encoder_alone_has_no_cache_values():
    rows = [row("encoder", "encode", tier="TUNED", accepts={"attn_type": OneOf("encoder_only")})]
    d = decide(VISION, catalog(rows))
    assert set(d.values) == {"graph"}


def test_target_and_draft_share_the_cache_values():
    """Alone, each model would take the page its best kernel wants; together they find the one both can live with."""
    rows = [
        *both("p64", tier="BEST", accepts={"page_size": OneOf(64), "head_dim": OneOf(64)}),
        *both("p128", tier="BEST", accepts={"page_size": OneOf(128), "head_dim": OneOf(128)}),
        *PORTABLE,
    ]
    draft = ModelSpec.of(num_heads=8, head_dim=128, dtype="bfloat16")
    assert decide(FULL, catalog(rows)).values["page_size"] == 64
    assert decide(draft, catalog(rows)).values["page_size"] == 128
    joined = decide(ModelSpec.of(FULL).with_draft(draft), catalog(rows))
    names = {group: chosen(joined, group)[0] for group in joined.groups}
    assert names in ({"full": "p64", "draft.full": "triton"}, {"full": "triton", "draft.full": "p128"})
    assert joined.values["page_size"] == (64 if names["full"] == "p64" else 128)


def test_never_buy_a_superb_prefill_with_a_reference_decode():
    small_pages = both("triton", accepts={**EVERYTHING, "page_size": MultipleOf(16, max=128)}, plugin="core")
    rows = [row("superb", "prefill", tier="BEST", accepts={"page_size": OneOf(256)}), *small_pages]
    d = decide(FULL, catalog(rows))
    assert chosen(d, "full")[:2] == ("triton", "triton")


def test_padding_takes_the_narrowest_width_and_keeps_the_models_scale():
    rows = [row("padded", "encode", tier="TUNED", pads={"head_dim"},
                accepts={"attn_type": OneOf("encoder_only"), "head_dim": OneOf(256, 64, 128)})]  # fmt: skip
    mini = AttentionSpec(num_heads=12, head_dim=32, dtype="float16", attn_type="encoder_only")
    d = decide(mini, catalog(rows))
    choice = d.groups["encoder"].choices["encode"]
    assert (choice.head_dim, choice.padded_from) == (64, 32)
    assert d.groups["encoder"].values == {"head_dim": 64, "scale": 32**-0.5}
    assert "padded with zeros from 32 to 64" in d.explain()


def test_native_goes_before_padded_but_after_rank():
    native = both("native", tier="TUNED", rank=1, accepts={"head_dim": OneOf(32)})
    padded = both("padded", tier="TUNED", rank=0, pads={"head_dim"}, accepts={"head_dim": OneOf(64)})
    narrow = AttentionSpec(num_heads=4, head_dim=32, dtype="float16")
    assert chosen(decide(narrow, catalog([*native, *padded])), "full")[0] == "padded"
    same = both("padded", tier="TUNED", rank=1, pads={"head_dim"}, accepts={"head_dim": OneOf(64)})
    assert chosen(decide(narrow, catalog([*native, *same])), "full")[0] == "native"


def test_the_cache_is_as_wide_as_both_phases_can_read():
    """Prefill pads to 64 or 128, decode only to 128: the cache they share is 128 wide."""
    rows = [row("p", "prefill", tier="BEST", pads={"head_dim"}, accepts={"head_dim": OneOf(64, 128)}),
            row("d", "decode", tier="BEST", pads={"head_dim"}, accepts={"head_dim": OneOf(128)})]  # fmt: skip
    d = decide(AttentionSpec(num_heads=4, head_dim=32, dtype="float16"), catalog(rows))
    assert d.groups["full"].values["head_dim"] == 128
    assert {c.head_dim for c in d.groups["full"].choices.values()} == {128}


def test_mla_forms_meet_on_the_latent_cache():
    mla = AttentionSpec(num_heads=16, head_dim=192, v_head_dim=128, dtype="bfloat16", kind="mla",
                        latent_dim=512, rope_dim=64, nope_dim=128)  # fmt: skip
    common = {"kind": OneOf("mla"), "unequal_v": True, "kv_layout": OneOf("MLA"), "head_dim": ANY}
    latent = {**common, "head_dims": OneOf((576, 512)), "page_size": OneOf(64)}
    rows = [
        row("dense", "prefill", tier="BEST", form="materialised", accepts={**common, "head_dims": OneOf((192, 128))}),
        row("flash", "decode", tier="BEST", form="absorbed", accepts=latent),
        row("writer", "kv_write", accepts=common),
    ]
    d = decide(mla, catalog(rows))
    assert chosen(d, "full") == ("dense", "flash", "writer")
    assert (d.values["page_size"], d.values["kv_layout"]) == (64, "MLA")
    assert d.groups["full"].values["mla_query"] == "packed"
    assert d.groups["full"].values["scale"] == 192**-0.5


def test_constraints_bind_only_their_own_plugin():
    rows = [*both("fa3", tier="BEST"), *both("other", tier="BEST", plugin="elsewhere", rank=1)]
    rule = {"name": "pairing", "when": {"prefill": "fa3"}, "then": {"decode": "other"}, "because": "a test"}
    mine = decide(FULL, catalog(rows, (Constraint(**rule, plugin="cuda"),)))
    assert chosen(mine, "full")[:2] in (("fa3", "other"), ("other", "fa3"))
    foreign = decide(FULL, catalog(rows, (Constraint(**rule, plugin="stranger"),)))
    assert chosen(foreign, "full")[:2] == ("fa3", "fa3")


def test_constraints_couple_layout_and_cache_dtype():
    rows = [*both("k", tier="BEST", accepts={"kv_layout": OneOf("HND", "NHD"), "kv_cache_dtype": ["auto", "fp8_e4m3"]})]
    rule = Constraint(name="fp8 is NHD", when={"kv_cache_dtype": "fp8_e4m3"}, then={"kv_layout": "NHD"},
                      because="no HND fp8 kernel", plugin="cuda")  # fmt: skip
    assert decide(FULL, catalog(rows, (rule,))).values["kv_layout"] == "HND"
    assert decide(FULL, catalog(rows, (rule,)), kv_cache_dtype="fp8_e4m3").values["kv_layout"] == "NHD"


def test_a_cache_is_never_quantised_unasked():
    rows = both("k", tier="BEST", accepts={"kv_cache_dtype": ["fp8_e4m3", "auto"]})
    assert decide(FULL, catalog(rows)).values["kv_cache_dtype"] == "bfloat16"


def test_page_size_preferences():
    decode = row("k", "decode", tier="BEST", accepts={"page_size": OneOf(128, 64, 16)})
    prefill = row("k", "prefill", tier="BEST", accepts={"page_size": OneOf(16, 64, 128)})
    assert decide(FULL, catalog([decode, prefill])).values["page_size"] == 128  # decode speaks first
    silent = catalog(both("k", tier="BEST"))
    assert decide(FULL, silent).values["page_size"] == 16
    assert (
        decide(FULL, catalog(both("k", tier="BEST", accepts={"page_size": NoneOf(16, 32)}))).values["page_size"] == 64
    )
    assert decide(FULL, silent, page_size=48).values["page_size"] == 48


def test_uniform_engines():
    rows = [*both("fast", tier="BEST"), row("pf", "prefill", tier="BEST", rank=-1), *PORTABLE]
    groups = {"full": FULL, "sliding": SLIDING}
    mixed = decide(groups, catalog(rows))
    assert chosen(mixed, "full")[:2] == ("pf", "fast")
    assert chosen(mixed, "sliding")[:2] == ("triton", "triton")
    same = decide(groups, catalog(rows), uniform="groups")
    assert {chosen(same, g)[:2] for g in groups} == {("triton", "triton")}
    one = decide(FULL, catalog(rows), uniform="all")
    assert chosen(one, "full")[:2] == ("fast", "fast")


def test_roles_on_different_devices():
    amd = Device(platform="rocm", arch="gfx942", isa=frozenset({"mfma"}))
    rows_amd = [row("aiter", "decode", amd, tier="BEST", accepts={"page_size": OneOf(16, 32)})]
    cuda = catalog([*both("fa3", tier="BEST", accepts={"page_size": OneOf(64, 32)})]).devices["cuda:sm_90"]
    other = DeviceCatalog((*rows_amd, *base(amd)))
    both_devices = Catalog({"cuda:sm_90": cuda, "rocm:gfx942": other})
    d = decide(FULL, both_devices, {"prefill": CUDA, "decode": amd})
    assert chosen(d, "full")[:2] == ("fa3", "aiter")
    assert d.values["page_size"] == 32
    assert [d.groups["full"].choices[r].platform for r in ("prefill", "decode", "kv_write")] == ["cuda", "rocm", "rocm"]
    assert Decision.from_json(d.dumps()) == d
    with pytest.raises(BadInputError, match="no device given for role decode"):
        decide(FULL, both_devices, {"prefill": CUDA})


def test_allreduce_fusion_needs_more_than_one_rank():
    fused = row("flashinfer", "allreduce_fusion", tier="BEST", accepts={"world_size": NoneOf(1), "graph": ANY})
    cat = catalog([*PORTABLE, fused])
    assert decide(FULL, cat).roles["allreduce_fusion"].backend == "unfused"
    assert decide(FULL, cat, tensor_parallel=4).roles["allreduce_fusion"].backend == "flashinfer"


def test_tensor_parallel_heads_are_judged_after_sharding():
    cat = catalog([*both("k", tier="BEST", accepts={"num_heads": MultipleOf(16)}), *PORTABLE])
    assert chosen(decide(FULL, cat, tensor_parallel=4), "full")[0] == "k"
    assert chosen(decide(FULL, cat, tensor_parallel=8), "full")[0] == "triton"
    with pytest.raises(BadInputError, match="tensor_parallel=3"):
        decide(FULL, cat, tensor_parallel=3)


def test_decisions_survive_json_byte_for_byte():
    d = decide({"full": FULL, "sliding": SLIDING, "vision": VISION}, catalog(PORTABLE), installed=Installed({"x": "1"}))
    again = Decision.from_json(d.dumps())
    assert again == d
    assert again.dumps() == d.dumps()
    assert again.digest == d.digest
    for text in ("{}", "[]", "nonsense", '{"schema": 99}'):
        with pytest.raises(BadInputError):
            Decision.from_json(text)


def test_packages_and_toolkits_are_judged():
    rows = [
        *both("new", tier="BEST", requires=("cuda>=12.9",)),
        *both("old", tier="TUNED", requires=("cuda>=12",)),
        *PORTABLE,
    ]
    here = Installed(CUDA.versions)
    d = decide(FULL, catalog(rows), installed=here)
    assert chosen(d, "full")[0] == "old"
    (r,) = [r for r in d.rejections if r.backend == "new" and r.role == "decode"]
    assert (r.code, r.field, r.got, r.allowed) == ("version", "cuda", "12.4", ">=12.9")


def test_pinned_names_that_nobody_offers_are_said_so():
    with pytest.raises(NoBackendError, match=r"no installed plugin offers backend 'tritn'.*did you mean 'triton'"):
        decide(FULL, catalog(PORTABLE), backend="tritn")
    with pytest.raises(BadInputError, match="backend names group 'ful'"):
        decide(FULL, catalog(PORTABLE), backend={"ful": "triton"})
