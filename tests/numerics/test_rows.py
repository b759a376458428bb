"""What the built-in rows do not claim is refused when resolving, and reading them costs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kernel_cases import CPU, SLOPES, bind, mla_spec, rows, spec

from attn_core.backends import flex_attention, torch_native
from attn_core.errors import NoBackendError
from attn_core.spec import Device, LinearSpec, Tier

REFUSED = {
    "nvfp4": (spec(), {"kv_cache_dtype": "nvfp4"}),
    "graphs on a CPU": (spec(), {"graph": "full"}),
    "private layouts": (spec(), {"kv_layout": "DSA_FP8"}),
    "heads in a latent layout": (spec(), {"kv_layout": "MLA"}),
    "windows over an encoder's keys": (spec(attn_type="cross", sliding_window=4), {}),
    "tree masks over an encoder's keys": (spec(attn_type="cross"), {"tree_mask": True, "verify_width": 3}),
    "spans in an encoder": (spec(attn_type="encoder_only", bidirectional_prefix=True), {}),
    "alibi on latents": (mla_spec(alibi_slopes=SLOPES), {}),
    "softcap with indices": (spec(sparse="dsa", topk=4, logit_softcap=3.0), {}),
    "windows with indices": (mla_spec(sparse="dsa", topk=4, sliding_window=3), {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_torch_native_refuses(what):
    made, options = REFUSED[what]
    with pytest.raises(NoBackendError):
        bind(made, **options)


@pytest.mark.parametrize(
    "made",
    [
        spec(head_dim=20), spec(bias=True), spec(bidirectional_prefix=True), spec(sparse="dsa", topk=4), mla_spec(),
        spec(head_dim=32, v_head_dim=8),
    ],
)  # fmt: skip
def test_flex_attention_refuses(made):
    with pytest.raises(NoBackendError):
        bind(made, "flex_attention")


def test_materialised_prefill_needs_lengths_on_the_host():
    with pytest.raises(NoBackendError):
        bind(mla_spec(), form="materialised", host_lengths="bounds")


def test_linear_layers_are_decided_for_the_engine_to_run():
    found = [r for r in rows("torch_native") if r.backend == "engine"]
    assert {r.role for r in found} == set(LinearSpec.roles)
    assert all(r.bind is None for r in found)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_tiers(platform):
    device = CPU if platform == "cpu" else Device(platform=platform, arch="x")
    assert {r.tier for r in torch_native.backends(device)} == {Tier.REFERENCE}
    assert {(r.tier, r.rank) for r in flex_attention.backends(device)} == {
        (Tier.REFERENCE, 10) if platform == "cpu" else (Tier.PORTABLE, 50)
    }


def test_reading_the_tables_imports_no_torch():
    code = """
import sys
from attn_core.backends import builtin, flex_attention, torch_native
from attn_core.spec import Device

device = Device(platform="cpu", arch="x")
found = [r for table in (builtin, flex_attention, torch_native) for r in table.backends(device)]
sys.exit(0 if found and "torch" not in sys.modules else 1)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
