"""One step of vLLM as one of our batches, and the plans of the layer groups that share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attn_core.errors import BadInputError
from attn_core.runtime import Batch, BoundGroup, Plan


def batch_of(common: Any, attn_type: str) -> Batch | None:
    """``CommonAttentionMetadata`` as a batch; None for a step without sequences.

    vLLM puts decode rows first (``reorder_batch_threshold = 1``), then the rest with prompts of a single token where
    they fall; those prefill. On CPUs ``seq_lens`` lies on the host and is exact; elsewhere the host has upper bounds
    and the device the truth.
    """
    starts: Tensor = common.query_start_loc_cpu
    queries = starts.diff()
    lens = queries.tolist()
    rows = next((i for i, n in enumerate(lens) if n == 0), len(lens))  # behind them: padding for graphs
    if not rows:
        return None
    if rows < len(lens):
        queries, lens = queries[:rows], lens[:rows]
    kv_lens, bounds = common.seq_lens[:rows], {}
    if kv_lens.device.type != "cpu":
        bounds = {"kv_lens_device": kv_lens, "exact": False}
        kv_lens = common.seq_lens_cpu_upper_bound[:rows]
    if attn_type == "encoder_only":
        return Batch(queries, attn_type=attn_type, device=common.seq_lens.device)
    _check_causal(common)
    return Batch(
        queries,
        kv_lens,
        block_table=common.block_table_tensor[:rows],
        slot_mapping=common.slot_mapping[: sum(lens)],
        num_decode_rows=next((i for i, n in enumerate(lens) if n != 1), rows),
        **bounds,
    )


def _check_causal(common: Any) -> None:
    if common.causal is not True:
        raise BadInputError(f"vLLM asks for causal={common.causal!r} over pages; attn-core runs causal decoders here")
    if any((getattr(common, "mm_req_doc_ranges", None) or {}).values()):
        raise BadInputError("images that see each other in both directions are not supported in vLLM yet")


class Step:
    """What vLLM hands from the builder to the layers: a plan for each group, refilled in place every step."""

    def __init__(self, groups: Sequence[BoundGroup]) -> None:
        self.groups = tuple(groups)
        self.plans: list[Plan | None] = [None] * len(self.groups)
        self.num_tokens = 0
        """Tokens to attend for; vLLM's tensors may be longer."""

    def fill(self, common: Any) -> Step:
        batch = batch_of(common, self.groups[0].spec.attn_type)
        self.num_tokens = 0 if batch is None else batch.num_tokens
        if batch is not None:
            self.plans = [g.plan(batch, out=plan) for g, plan in zip(self.groups, self.plans)]
        return self


def tokens(t: Tensor | None, count: int) -> Tensor | None:
    """The first ``count`` rows; ``t`` itself where it has no more, or is None (keys that another layer wrote)."""
    return t if t is None or t.shape[0] == count else t[:count]
