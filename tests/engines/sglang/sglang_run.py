"""Runs one SGLang engine as ``SGLANG_RUN`` in the environment asks, and leaves what it said in a folder.

SGLang spawns its scheduler, and a spawned process runs the top of this file first: what is set up there holds in both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import no_cuda_torchvision  # noqa: F401 (before anything looks for torchvision)

from attn_core.integrations.sglang import registration
from attn_core.spec import ModelSpec

ASKED: dict[str, Any] = json.loads(os.environ["SGLANG_RUN"])
"""``model``, ``arguments`` of Engine, ``prompts``, ``new_tokens``, ``folder`` for answers; ``modes``: which of CONTROLS
to run as well; ``again``: prompts to ask once more while they are cached."""

FOLDER = Path(ASKED["folder"])
MODE = FOLDER / "mode"
RIGHT = "right"

CONTROLS: dict[str, dict[str, Any]] = {
    "softcap dropped": {"logit_softcap": None},
    "window one short": {"sliding_window": 15},
    "sinks dropped": {},
    "scale of the width": {"scale": None},
}
"""What a wrong backend believes of the groups that have such a thing."""


def watched(runner: Any) -> Any:
    """The scheduler's backend: ours, counting what it does; the word in ``MODE`` swaps in one that does it wrong."""
    import torch
    from sglang.srt.runtime_context import get_parallel

    from attn_core.integrations.sglang import backend

    rank = get_parallel().attn_tp_rank
    notes: dict[str, Any] = {"plans": 0, "calls": 0, "reordered": 0, "evicted": 0, "prefix": 0}

    def wrong(mode: str) -> Any:
        spec, check = backend.model_spec, backend.check_layer
        backend.model_spec, backend.check_layer = believing(spec, **CONTROLS[mode]), lambda *_: None
        made = backend.AttnCoreBackend(runner)
        backend.model_spec, backend.check_layer = spec, check
        for group in made.groups.values() if mode == "sinks dropped" else ():
            right = group.bound.prepare_sinks
            group.bound.prepare_sinks = lambda t, right=right: right(torch.full_like(t, -torch.inf))
        return made

    class Watched(backend.AttnCoreBackend):
        def __init__(self, runner: Any) -> None:
            super().__init__(runner)
            decision = self.attn.decision
            notes.update(
                pool=type(self.token_to_kv_pool).__name__,
                values=dict(decision.values),
                uniform=decision.options.uniform,
                heads={name: group.bound.spec.num_heads for name, group in self.groups.items()},
                pages={a.layer_id: entry.cache.num_pages for a, entry in self.layers.items()},
            )
            self.wrong = {mode: wrong(mode) for mode in ASKED["modes"]}
            self.now: Any = None

        def init_forward_metadata(self, forward_batch: Any) -> None:
            self.now = self.wrong.get(MODE.read_text())
            if self.now is not None:
                self.now.init_forward_metadata(forward_batch)
                return
            super().init_forward_metadata(forward_batch)
            notes["plans"] += len(self.groups)
            notes["reordered"] += self._tokens is not None
            if forward_batch.forward_mode.is_extend():
                notes["prefix"] = max(notes["prefix"], *map(int, forward_batch.extend_prefix_lens_cpu))
            for request, length in zip(forward_batch.req_pool_indices, forward_batch.seq_lens):
                slots = self.req_to_token_pool.req_to_token[request, :length].long()
                for group in self.groups.values():
                    if group.translate is not None:
                        notes["evicted"] = max(notes["evicted"], int((group.translate(slots) == 0).sum()))

        def forward_extend(self, *args: Any, **kwargs: Any) -> Any:
            if self.now is not None:
                return self.now.forward_extend(*args, **kwargs)
            notes["calls"] += 1
            if rank == 0:
                FOLDER.joinpath("notes.json").write_text(json.dumps(notes))
            return super().forward_extend(*args, **kwargs)

        forward_decode = forward_extend

    return Watched(runner)


def believing(read: Callable[[Any], ModelSpec], **facts: Any) -> Callable[[Any], ModelSpec]:
    """A reader of models that gets facts wrong."""

    def wrong(model_config: Any) -> ModelSpec:
        spec = read(model_config)
        changed = {
            name: replace(g, **{k: v for k, v in facts.items() if getattr(g, k) is not None})
            for name, g in spec.groups.items()
        }
        return replace(spec, groups=changed)

    return wrong


def main() -> None:
    from sglang.srt.entrypoints.engine import Engine

    MODE.write_text(RIGHT)
    arguments = {
        "model_path": ASKED["model"], "skip_tokenizer_init": True, "device": "cpu", "sampling_backend": "pytorch",
        "dtype": "float32", "context_length": 256, "max_total_tokens": 4096, "max_running_requests": 8,
        "mem_fraction_static": 0.2, "skip_server_warmup": True, "log_level": "info", **ASKED["arguments"],
    }  # fmt: skip
    engine = Engine(**arguments)
    sampling = {"temperature": 0.0, "max_new_tokens": ASKED["new_tokens"], "ignore_eos": True}

    def ask(prompts: list[list[int]]) -> list[list[int]]:
        return [answer["output_ids"] for answer in engine.generate(input_ids=prompts, sampling_params=sampling)]

    said = {RIGHT: ask(ASKED["prompts"])}
    if ASKED["again"]:
        said["again"] = ask(ASKED["again"])
    for mode in ASKED["modes"]:
        engine.flush_cache()
        MODE.write_text(mode)
        said[mode] = ask(ASKED["prompts"])
    engine.shutdown()
    FOLDER.joinpath("said.json").write_text(json.dumps(said))


registration.create = watched
if __name__ == "__main__":
    main()
