"""Prints the table of ``docs/engines-compared.md``: what engines decide alone, and what attn-core decides.

    python docs/print_engines_compared.py

The last column is resolved anew each time. What SGLang decides is run in its own environment by
``tests/engines/sglang/test_sglang_alone.py`` where ``Alone`` says so, and was read in its source otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_core import AttentionSpec, ModelSpec, NoBackendError, simulate
from attn_core.spec import ACCOMPANYING, Decision

PAGE = Path(__file__).with_name("engines-compared.md")
MODELS = PAGE.parents[1] / "tests" / "data" / "models"
START, END = "<!-- table: print_engines_compared.py -->\n", "<!-- end of table -->\n"


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What SGLang's argument resolution answers when it is told that it runs on ``Case.device``."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Server arguments beside the model."""
    says: Mapping[str, Any]
    """Resolved fields."""

    def text(self) -> str:
        page = f", page {self.says['page_size']}" if "page_size" in self.says else ""
        return f"`{self.says['attention_backend']}`{page}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question that an engine answers wrong today."""

    what: str
    model: str | AttentionSpec
    """Name of a config in ``tests/data/models``, or a group of layers."""
    device: str
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, str] = ("", "")
    """Where a refusal is the right answer: backend and field of the rejection to quote; else its first sentence is."""
    sglang: str
    """What it decides and why, or what comes of what it says by itself (``alone``); read in its source."""
    vllm: str
    alone: Alone | None = None


UNKNOWN = "not examined"

CASES = (
    Case(
        what="Olmo-3 7B", model="olmo-3-7b", device="cuda:sm_120",
        sglang="its model override says so from SM 8.0 on; once the weights are loaded, "
        "`create_flashattention_v3_backend` refuses what is above SM 9",
        vllm="`FLASH_ATTN`, right",
        alone=Alone(says={"attention_backend": "fa3"}),
    ),
    Case(
        what="Exaone-4 32B", model="exaone-4.0-32b", device="cuda:sm_110",
        sglang="refused as above", vllm="`FLASH_ATTN`, right",
        alone=Alone(says={"attention_backend": "fa3"}),
    ),
    *(
        Case(
            what="Whisper", model="whisper-large-v3", device=device,
            sglang="as on every platform (`get_default_attn_backend`)", vllm=UNKNOWN,
            alone=Alone(says={"attention_backend": "flashinfer"}),
        )
        for device in ("rocm:gfx942", "musa:mp31", "xpu:bmg")
    ),
    Case(
        what="gte-small, an encoder", model="gte-small", device="rocm:gfx942",
        sglang="its backend has no branch for encoders and is always causal", vllm=UNKNOWN,
        alone=Alone(says={"attention_backend": "aiter"}),
    ),
    Case(
        what="Gemma-2 9B, softcap 50", model="gemma-2-9b-it", device="cuda:sm_100",
        sglang="its backend ignores the softcap",
        vllm="`FLASHINFER`; softcap is no part of its question (`AttentionSelectorConfig`)",
        alone=Alone(says={"attention_backend": "trtllm_mha", "page_size": 64}),
    ),
    Case(
        what="Gemma-2 on a CPU", model="gemma-2-9b-it", device="cpu:avx512",
        sglang="`torch_native`, which ignores the softcap: in the engine a toy Gemma-2 has 0 of 64 tokens right, with "
        "attn-core 64 (`test_sglang_engine.py`)",
        vllm="`CPU_ATTN`, right",
    ),
    Case(
        what="Llama-3.2-Vision, cross attention", model="llama-3.2-11b-vision", device="cuda:sm_100",
        sglang="its backend has no branch for cross attention", vllm=UNKNOWN,
        alone=Alone(says={"attention_backend": "trtllm_mha"}),
    ),
    Case(
        what="GPT-OSS 20B, sinks", model="gpt-oss-20b", device="cuda:sm_100",
        sglang="right",
        vllm="`FLASHINFER` with downloaded cubins, else `FLASH_ATTN`; once refused for its sinks (vllm#30919)",
        alone=Alone(says={"attention_backend": "trtllm_mha", "page_size": 64}),
    ),
    Case(
        what="MiMo-V2-Flash, sinks, flashinfer pinned", model="mimo-v2-flash", device="cuda:sm_120",
        options={"backend": "flashinfer"}, refused=("flashinfer", "sinks"),
        sglang="`FlashInferAttnBackend.forward_extend` takes no `sinks`, the first request fails",
        vllm="its model class names a backend of its own",
        alone=Alone(arguments={"attention_backend": "flashinfer"}, says={"attention_backend": "flashinfer"}),
    ),
    Case(
        what="Qwen3-Next 80B", model="qwen3-next-80b-a3b", device="cuda:sm_100",
        sglang="it reads the mamba strategy before that is resolved; typing what it then resolves to gives "
        "`trtllm_mha`, page 64",
        vllm=UNKNOWN,
        alone=Alone(says={"attention_backend": "triton", "page_size": 1}),
    ),
    Case(
        what="Llama-3.1 8B, deterministic", model="llama-3.1-8b", device="rocm:gfx942",
        options={"deterministic": True},
        sglang="capability 9.4 passes a test of the major number for SM 9",
        vllm="the same reading lets it accept `HPC_ATTN`, a Hopper kernel, on gfx90a",
        alone=Alone(arguments={"enable_deterministic_inference": True}, says={"attention_backend": "fa3"}),
    ),
    Case(
        what="Llama-3.1 8B on CDNA5", model="llama-3.1-8b", device="rocm:gfx1250",
        sglang=UNKNOWN, vllm="refuses `FLASHINFER` only because 12.5 is more than 12.1",
    ),
    Case(
        what="Llama-3.1 8B, ascend pinned", model="llama-3.1-8b", device="cuda:sm_90",
        options={"backend": "ascend"},
        sglang="names have no platform",
        vllm="likewise accepts `ROCM_ATTN`",
        alone=Alone(arguments={"attention_backend": "ascend"}, says={"attention_backend": "ascend"}),
    ),
    Case(
        what="head_dim 288", model=AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=288, dtype="bfloat16"),
        device="cuda:sm_100", sglang=UNKNOWN,
        vllm="`FLASH_ATTN`, because FA4 exists; then takes FA2, whose limit is 256",
    ),
    Case(
        what="MLA with latent 256 + 32",
        model=AttentionSpec(
            kind="mla", num_heads=40, head_dim=96, latent_dim=256, rope_dim=32, nope_dim=64, v_head_dim=64,
            dtype="bfloat16",
        ),
        device="cuda:sm_90", sglang=UNKNOWN,
        vllm="`TRITON_MLA` for decode; every prefill backend then rejects (64, 32, 64), so the layer cannot be built",
    ),
    Case(
        what="DeepSeek-V3.2, sparse", model="deepseek-v3.2", device="cuda:sm_75",
        sglang="`dsa` with `flashmla_sparse` and `fa3`, neither of which runs there", vllm="refused",
    ),
    Case(
        what="Llama-3.1 8B, page 8 pinned", model="llama-3.1-8b", device="cuda:sm_100", options={"page_size": 8},
        sglang="the pin is replaced with a log line", vllm="refused: no backend has blocks of 8",
        alone=Alone(arguments={"page_size": 8}, says={"attention_backend": "trtllm_mha", "page_size": 64}),
    ),
    Case(
        what="Llama-3.1 8B, page 16 pinned", model="llama-3.1-8b", device="ascend:910b", options={"page_size": 16},
        refused=("ascend", "page_size"),
        sglang="corrupts the output silently (sglang#38196)", vllm=UNKNOWN,
        alone=Alone(
            arguments={"page_size": 16, "attention_backend": "ascend"},
            says={"attention_backend": "ascend", "page_size": 16},
        ),
    ),
    Case(
        what="DeepSeek-V3, page 64 pinned", model="deepseek-v3", device="rocm:gfx942", options={"page_size": 64},
        refused=("aiter", "page_size"),
        sglang="once wrong without an error (sglang#25556)", vllm=UNKNOWN,
        alone=Alone(arguments={"page_size": 64}, says={"attention_backend": "aiter", "page_size": 64}),
    ),
)  # fmt: skip


def decided(case: Case) -> str:
    """attn-core's answer in a cell."""
    model = case.model if isinstance(case.model, AttentionSpec) else ModelSpec.from_hf_config(path(case.model))
    try:
        return brief(simulate(case.device).resolve(model, **case.options))
    except NoBackendError as e:
        backend, name = case.refused
        quoted = [f"`{r.backend}`: {r.text}" for r in e.rejections if (r.backend, r.field) == (backend, name)]
        reason = quoted[0] if quoted else e.text.splitlines()[0].partition(";")[0]
        return f"refused: {reason}; {e.relaxations[0]}"


def path(model: str) -> Path:
    return MODELS / f"{model}.json"


def brief(d: Decision) -> str:
    """Backends of prefill and decode for the groups that differ, and the page size."""
    found: dict[str, list[str]] = {}
    for name, group in d.groups.items():
        roles = [c.backend for role, c in group.choices.items() if role not in ACCOMPANYING]
        if "linear_decode" not in group.choices:
            found.setdefault(" / ".join(f"`{b}`" for b in dict.fromkeys(roles)), []).append(name)
    parts = list(found) if len(found) == 1 else [f"{', '.join(names)}: {b}" for b, names in found.items()]
    page = d.values.get("page_size")
    return "; ".join(parts) + (f", page {page}" if page else "")


def table() -> list[str]:
    head = ("question", "device", "SGLang 0.5.23 alone", "vLLM 0.33.0 alone", "attn-core")
    rows = [head, ("---",) * len(head)]
    for case in CASES:
        ran = "" if case.alone is None else f"{case.alone.text()} (run): "
        rows.append((case.what, f"`{case.device}`", ran + case.sglang, case.vllm, decided(case)))
    return [f"| {' | '.join(row)} |" for row in rows]


def render(page: str) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    return before + START + "\n".join(table()) + "\n" + END + after


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
