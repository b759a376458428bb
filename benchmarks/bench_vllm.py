"""Tokens per second of vLLM on the CPU: our backend over vLLM's own. A program of vLLM's environment:
``.venv-vllm/bin/python benchmarks/bench_vllm.py``.

``make test-vllm`` sets that up. The engines live in one process and take turns with the
same prompts, whose prefixes all have cached, so that nearly all steps decode. The model is one whose attention is a
good part of a step: eight narrow layers, 4k tokens of context.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    ATTN_CORE_VLLM="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip
os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).parent))

from harness import Result, busy, ratios, result

CONTEXT, SEQS, NEW_TOKENS, BLOCK, ROUNDS = 4032, 4, 32, 128, 9

ENGINES: dict[str, dict[str, Any]] = {
    "own": {"attention_config": {"backend": "CPU_ATTN"}},
    "vllm_cpu": {"additional_config": {"attn_core": {"backend": "vllm_cpu"}}},
    "torch_native": {"additional_config": {"attn_core": {"backend": "torch_native"}}},
}
"""vLLM's backend; ours with the same kernels bound; ours with torch's."""


def save_model(folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def generator_of(folder: str, arguments: dict[str, Any]) -> Callable[[], tuple[float, float]]:
    """An engine, as a function that generates once more and returns the seconds it took: of the wall, of CPUs."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=CONTEXT + NEW_TOKENS + 32,
        max_num_seqs=SEQS, block_size=BLOCK, kv_cache_memory_bytes=160 << 20, **arguments,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": torch.randint(0, 512, (CONTEXT,), generator=generator).tolist()} for _ in range(SEQS)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)

    def generate() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - wall, time.process_time() - cpu

    generate()  # fills the prefix cache
    return generate


def attention_share(generate: Callable[[], tuple[float, float]]) -> float:
    """Part of the time that vLLM's own attention takes, writing the cache included."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl as Impl

    spent, originals = 0.0, {name: getattr(Impl, name) for name in ("forward", "do_kv_cache_update")}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            out = call(*args, **kwargs)
            spent += time.perf_counter() - start
            return out

        return run

    for name, call in originals.items():
        setattr(Impl, name, timed(call))
    whole, _ = generate()
    for name, call in originals.items():
        setattr(Impl, name, call)
    return spent / whole


def tokens_per_second() -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        engines = {name: generator_of(folder, arguments) for name, arguments in ENGINES.items()}
        share = attention_share(engines["own"])
        yield result("attention's part of a run of vLLM's own", [share], "", limit=0.3, at_most=False)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        cpu: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(ROUNDS):
            for name, generate in engines.items():
                for taken, of in zip(generate(), (seconds, cpu)):
                    of[name].append(taken)
        rates = {name: [SEQS * NEW_TOKENS / s for s in taken] for name, taken in seconds.items()}
        note = f"{SEQS} sequences, {CONTEXT} cached tokens, bfloat16"
        for name, rate in rates.items():
            yield result(f"{name}", rate, "tokens/s", note=note)
        for name, limit in (("vllm_cpu", 0.98), ("torch_native", None)):
            for unit, taken in (("wall", seconds), ("CPU", cpu)):
                yield result(
                    f"{name} over vLLM's own", ratios(taken[name], taken["own"]), f"x {unit}",
                    limit=limit, at_most=False, note="the wall on a quiet machine, CPU time with one thread",
                )  # fmt: skip


ALL = (tokens_per_second,)

if __name__ == "__main__":
    print(busy() or "the machine is quiet")
    for f in ALL:
        for r in f():
            limit = "" if r.limit is None else f"  (limit {r.limit:g})"
            print(f"{r.name}: {r.value:.3g} {r.unit} [{r.low:.3g}, {r.high:.3g}]{limit}")
