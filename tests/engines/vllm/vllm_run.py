"""Runs vLLM engines one after the other and writes down what they said. A program: VLLM_RUN holds what to do, as JSON.

vLLM spawns processes in its default mode, and a spawned process runs the top of this file first: what is set up there
holds in all of them.
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import torch

from attn_core.backends.torch_native import rows
from attn_core.integrations import vllm as integration

ASKED: dict[str, Any] = json.loads(os.environ["VLLM_RUN"])
"""``folder`` for results; ``runs``: a list of ``name``, ``model`` (a folder), ``arguments`` of LLM, ``environment``,
``prompts``, ``modes`` (see WRONG), ``again`` (prompts asked once more, without forgetting)."""

FOLDER = Path(ASKED["folder"])
NEW_TOKENS = 16
WRONG = {
    "softcap dropped": {"logit_softcap": None},
    "window one short": {"sliding_window": 15},
    "sinks dropped": {},
}
"""Mode -> what the kernels are told of a group instead of the truth, where the group has it."""


NOTES: dict[str, Any] = {}


def new_notes() -> dict[str, Any]:
    """What is noted where layers run: ``shared`` says that all caches lie in vLLM's memory."""
    return {
        "forwards": {}, "steps": 0, "mixed": 0, "late_singles": 0, "kernels": {}, "views": {}, "shared": True,
        "layout": None, "page_size": None,
    }  # fmt: skip


def watched_register() -> None:
    """The plugin as vLLM loads it, then: count, note, and do wrong where the mode says so."""
    register()
    from dataclasses import replace

    from attn_core.integrations.vllm import backend, caches, mla
    from attn_core.integrations.vllm.binding import bound, in_layout
    from attn_core.integrations.vllm.question import question_of
    from attn_core.integrations.vllm.step import Step
    from attn_core.runtime import bind_group

    if backend.AttnCoreBackend.get_builder_cls() is not backend.AttnCoreBuilder:
        return

    def told_wrong(group: Any, decision: Any, mode: str) -> Any:
        changes = {k: v for k, v in WRONG[mode].items() if getattr(group.spec, k) is not None}
        decided = decision.groups[group.name]
        wrong = bind_group(
            group.name, replace(group.spec, **changes), decided.choices, {**decision.values, **decided.values},
            group.options, group.device, group.torch_device,
        )  # fmt: skip
        if mode == "sinks dropped":
            right = wrong.prepare_sinks
            wrong.prepare_sinks = lambda t: right(torch.full_like(t, -torch.inf))
        return wrong

    class Builder(backend.AttnCoreBuilder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            layout = self.vllm_config.cache_config.kv_cache_layout
            decision = bound(in_layout(question_of(self.vllm_config), layout), 0, 0).decision
            modes = json.loads(FOLDER.joinpath("modes").read_text())
            self.wrong = {mode: Step([told_wrong(g, decision, mode) for g in self.step.groups]) for mode in modes}
            NOTES["layout"] = layout
            for g in self.step.groups:
                NOTES["kernels"][g.name] = {r: b.backend for r, b in g.bindings.items()}
                NOTES["views"][g.name] = g.kv_layout
                NOTES["page_size"] = g.page_size

        def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Step:
            wrong = self.wrong.get(FOLDER.joinpath("mode").read_text())
            if wrong is not None:
                return wrong.fill(common)
            step = super().build(common_prefix_len, common, fast_build)
            lens = common.query_start_loc_cpu.diff().tolist()
            NOTES["steps"] += 1
            NOTES["mixed"] += 1 in lens and max(lens) > 1
            NOTES["late_singles"] += 1 in lens[next((i for i, n in enumerate(lens) if n != 1), len(lens)) :]
            return step

    def note(group: Any, kv_cache: Any, cache: Any) -> None:
        if cache is not None:
            whole = kv_cache.untyped_storage().data_ptr()
            NOTES["shared"] &= all(t.untyped_storage().data_ptr() == whole for t in cache.data)
        NOTES["forwards"][group.name] = NOTES["forwards"].get(group.name, 0) + 1
        FOLDER.joinpath("notes.json").write_text(json.dumps(NOTES))

    class Impl(backend.AttnCoreImpl):
        def forward(
            self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, step: Any, output: Any, *scales: Any,
            **named: Any,
        ) -> Any:  # fmt: skip
            group = None if step is None else step.groups[self._place]
            if group is None or group is self.group:
                super().forward(layer, query, key, value, kv_cache, step, output, *scales, **named)
                if group is not None:
                    note(group, kv_cache, self._cache)
                return output
            sinks = None if self.sinks is None else group.prepare_sinks(self.sinks.detach())
            cache = caches.wrapped(kv_cache, group, layer)
            group.forward(query, key, value, cache, step.plans[self._place], sinks=sinks, out=output)
            return output

    class MlaBuilder(Builder):
        step_type = mla.MlaStep

    class MlaImpl(mla.AttnCoreMlaImpl):
        def forward_mqa(self, q: Any, kv_cache: Any, step: Any, layer: Any) -> Any:
            note(self.group, kv_cache, self._cache(self.group, kv_cache))
            return super().forward_mqa(q, kv_cache, step, layer)

    mla.AttnCoreMlaBackend.get_builder_cls = staticmethod(lambda: MlaBuilder)
    mla.AttnCoreMlaBackend.get_impl_cls = staticmethod(lambda: MlaImpl)
    backend.AttnCoreBackend.get_builder_cls = staticmethod(lambda: Builder)
    backend.AttnCoreBackend.get_impl_cls = staticmethod(lambda: Impl)


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """One engine, from start to end."""
    mode = FOLDER / "mode"
    mode.write_text("right")
    FOLDER.joinpath("modes").write_text(json.dumps(asked.get("modes", [])))
    FOLDER.joinpath("notes.json").unlink(missing_ok=True)
    NOTES.update(new_notes())

    from vllm import LLM, SamplingParams

    arguments = {
        "model": asked["model"], "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32",
        "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256, "seed": 0, "disable_log_stats": False,
        "kv_cache_memory_bytes": 16 << 20, **asked.get("arguments", {}),
    }  # fmt: skip
    llm = LLM(**arguments)
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)

    def said(prompts: list[list[int]]) -> list[list[Any]]:
        asked_of = [{"prompt_token_ids": p} for p in prompts]
        if arguments.get("runner") == "pooling":
            done = llm.encode(asked_of, pooling_task="token_embed", use_tqdm=False)
            return [o.outputs.data.tolist() for o in done]
        return [list(o.outputs[0].token_ids) for o in llm.generate(asked_of, sampling, use_tqdm=False)]

    found: dict[str, Any] = {"right": said(asked["prompts"])}
    if "again" in asked:
        found["again"] = said(asked["again"])
    for name in asked.get("modes", []):
        llm.reset_prefix_cache()
        mode.write_text(name)
        found[name] = said(asked["prompts"])
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    noted = FOLDER / "notes.json"
    notes = json.loads(noted.read_text()) if noted.exists() else {}
    llm.llm_engine.engine_core.shutdown()
    return {"said": found, "metrics": metrics, "notes": notes}


def main() -> None:
    results = {}
    for asked in ASKED["runs"]:
        os.environ.update(asked.get("environment", {}))
        results[asked["name"]] = run(asked)
        for name in asked.get("environment", {}):
            del os.environ[name]
        gc.collect()
    FOLDER.joinpath("results.json").write_text(json.dumps(results))


if "VLLM_RUN_WITHOUT" in os.environ:
    rows._TABLE = tuple(row for row in rows._TABLE if row[1] != os.environ["VLLM_RUN_WITHOUT"])
if "VLLM_RUN_NO_AMX" in os.environ:
    torch.cpu._is_amx_tile_supported = lambda: False
NOTES.update(new_notes())
register = integration.register
integration.register = watched_register
if __name__ == "__main__":
    main()
