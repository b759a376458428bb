"""``select`` on the fields of vLLM's selector: what a vendor's platform answers, and refusals with all reasons."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from attn_core import BadInputError, ModelSpec, NoBackendError
from attn_core.integrations.vllm import refusal
from attn_core.integrations.vllm.selection import NAMES, SelectionError, select

MODELS = Path(__file__).parents[1] / "data" / "models"


class Config(NamedTuple):
    """As ``vllm.v1.attention.selector.AttentionSelectorConfig`` of 0.32; ``dtype`` prints as torch's does."""

    head_size: int = 128
    dtype: Any = "torch.bfloat16"
    kv_cache_dtype: str | None = "auto"
    block_size: int | None = None
    use_mla: bool = False
    has_sink: bool = False
    use_sparse: bool = False
    use_mm_prefix: bool = False
    use_per_head_quant_scales: bool = False
    attn_type: str = "decoder"
    has_sliding_window: bool = False
    use_non_causal: bool = False
    use_batch_invariant: bool = False
    use_kv_connector: bool = False
    use_pcp: bool = False
    use_adaptive_verification: bool = False
    use_dcp: bool = False
    use_rswa: bool = False


H200, B200, SPARK, MI300 = "cuda:h200", "cuda:b200", "cuda:gb10", "rocm:mi300x"


def asked(device: str, config: Config, **more: Any) -> Any:
    """Everything that the plugins know counts as installed."""
    options = {"num_heads": 32, "num_kv_heads": 8, **more}
    return select(config, device, **options)


@pytest.fixture(autouse=True)
def _all_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """``select`` counts what is installed here, which is nothing of a vendor's: assume what ``simulate`` assumes."""
    from attn_core import simulate
    from attn_core.integrations.vllm import selection

    monkeypatch.setattr(selection, "simulate", lambda device, installed: simulate(device))


@pytest.mark.parametrize(
    ("device", "config", "facts", "theirs"),
    [
        (H200, Config(), {}, "FLASH_ATTN"),
        (B200, Config(), {}, "FLASHINFER"),
        (SPARK, Config(), {}, "FLASHINFER"),
        (H200, Config(head_size=64, has_sink=True), {}, "FLASH_ATTN"),
        (H200, Config(head_size=64, has_sink=True, has_sliding_window=True), {"sliding_window": 128}, "FLASH_ATTN"),
        (MI300, Config(), {}, "ROCM_AITER_FA"),
    ],
)
def test_automatic_choice(device: str, config: Config, facts: dict[str, Any], theirs: str) -> None:
    found = asked(device, config, **facts)
    assert found.vllm_name == theirs
    assert NAMES[found.backend][0] == theirs
    group = found.decision.groups[found.group]
    assert {c.backend for role, c in group.choices.items() if role != "kv_write"} == {found.backend}


def test_the_same_question_has_the_same_answer() -> None:
    first, second = (asked(H200, Config()) for _ in range(2))
    assert first.decision.digest == second.decision.digest


def test_a_user_is_honoured() -> None:
    assert asked(H200, Config(), selected="FLASHINFER").backend == "flashinfer"


def test_or_refused_with_the_reasons() -> None:
    with pytest.raises(ValueError, match=r"^Selected backend FLASHINFER is not valid on cuda:sm_121") as e:
        asked(SPARK, Config(head_size=64, has_sink=True), selected="FLASHINFER")
    assert isinstance(e.value, NoBackendError)
    assert {r.backend for r in e.value.rejections} >= {"flashinfer", "trtllm_mha"}
    assert "does not support sinks=true [full decode" in str(e.value)
    assert "FA3" not in str(e.value)


def test_nothing_fits() -> None:
    with pytest.raises(SelectionError, match=r"^No valid attention backend found for cuda:sm_90") as e:
        asked(H200, Config(kv_cache_dtype="nvfp4"))
    text = str(e.value)
    assert "Reasons: {" in text
    assert "FA3: [" in text
    assert "FLASHINFER: [" in text
    assert "way out: without kv_cache_dtype=nvfp4" in text
    assert e.value.relaxations


def test_a_name_nobody_offers() -> None:
    with pytest.raises(
        SelectionError, match=r"no plugin offers FLASH_ATTN_DIFFKV on cuda:sm_90.*offered: .*FLASH_ATTN"
    ):
        asked(H200, Config(), selected="FLASH_ATTN_DIFFKV")


def test_an_enum_member_is_its_name() -> None:
    class Member:
        name = "FLASHINFER"

    assert asked(H200, Config(), selected=Member()).vllm_name == "FLASHINFER"


def test_what_vllm_pins() -> None:
    assert asked(H200, Config(block_size=64)).decision.values["page_size"] == 64
    assert asked(H200, Config(kv_cache_dtype="fp8")).decision.values["kv_cache_dtype"] == "fp8_e4m3"


@pytest.mark.parametrize("field", ["use_dcp", "use_batch_invariant", "use_kv_connector", "use_rswa", "use_non_causal"])
def test_what_nobody_claims_is_refused(field: str) -> None:
    config = Config()._replace(**{field: True})
    with pytest.raises(SelectionError, match=f"{field} is not supported; a platform that sees to it says handles="):
        asked(H200, config)
    assert asked(H200, config, handles=[field]).vllm_name == "FLASH_ATTN"


def test_a_field_of_a_later_version_is_refused_when_set() -> None:
    class Later(NamedTuple):
        head_size: int = 128
        dtype: str = "torch.bfloat16"
        kv_cache_dtype: str | None = None
        block_size: int | None = None
        use_mla: bool = False
        has_sink: bool = False
        use_sparse: bool = False
        use_mm_prefix: bool = False
        attn_type: str = "decoder"
        has_sliding_window: bool = False
        use_something_new: bool = False

    later: Any = Later
    assert asked(H200, later()).vllm_name == "FLASH_ATTN"
    with pytest.raises(SelectionError, match="use_something_new"):
        asked(H200, later(use_something_new=True))
    with pytest.raises(BadInputError, match="handles='use_dcp' is no field of Later"):
        asked(H200, later(), handles=["use_dcp"])


def test_the_layer_within_its_model() -> None:
    model = ModelSpec.from_hf_config(MODELS / "gpt-oss-20b.json")
    for window, group in ((True, "sliding"), (False, "full")):
        config = Config(head_size=64, has_sink=True, has_sliding_window=window)
        found = select(config, H200, model=model)
        assert (found.group, found.vllm_name) == (group, "FLASH_ATTN")
        assert set(found.decision.groups) == {"sliding", "full"}
    with pytest.raises(BadInputError, match=r"no group of GptOssForCausalLM is .*'head_size': 128"):
        select(Config(has_sink=True), H200, model=model)


def test_mla_takes_its_sizes_from_the_model() -> None:
    model = ModelSpec.from_hf_config(MODELS / "deepseek-v3.json")
    config = Config(head_size=576, use_mla=True)
    assert select(config, H200, model=model).vllm_name in {"FLASH_ATTN_MLA", "FLASHMLA"}
    with pytest.raises(BadInputError, match="does not say latent_dim, rope_dim, nope_dim; give model="):
        asked(H200, config)
    facts = {"latent_dim": 512, "rope_dim": 64, "nope_dim": 128, "v_head_dim": 128, "num_kv_heads": 0}
    assert asked(H200, config, **facts).decision.model.groups["full"].head_dim == 192


def test_what_the_config_does_not_say() -> None:
    with pytest.raises(BadInputError, match="does not say num_heads, sliding_window; give model="):
        select(Config(has_sliding_window=True), H200)
    capped = asked(H200, Config(), logit_softcap=50.0)
    assert capped.decision.model.groups["full"].logit_softcap == 50.0


def test_a_platform_names_its_own_classes() -> None:
    own = {"ascend": "vendor.attention.AscendBackend"}
    assert asked("ascend:910b", Config(), names=own).vllm_name == own["ascend"]
    with pytest.raises(SelectionError, match="offered: "):
        asked("ascend:910b", Config(), selected="FLASH_ATTN")


def test_encoders() -> None:
    assert asked(H200, Config(attn_type="encoder_only")).group == "encoder"


def test_reasons_name_where_they_hold() -> None:
    with pytest.raises(SelectionError) as e:
        asked(H200, Config(kv_cache_dtype="nvfp4"))
    found = refusal.reasons(e.value.rejections)
    assert all(text.endswith("]") for texts in found.values() for text in texts)


def test_neither_torch_nor_vllm_is_needed() -> None:
    code = (
        "import sys, attn_core.integrations.vllm.selection, attn_core.integrations.vllm as v\n"
        "assert v.platform() is None\n"
        "sys.exit(any(name.split('.')[0] in ('torch', 'vllm', 'transformers') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
