"""One step of SGLang as attn-core wants it: lengths on the host, rows of one query token first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError
from attn_core.runtime import Batch

MODES = ("EXTEND", "DECODE", "MIXED")
"""Forward modes served; the others belong to speculation, disaggregation and diffusion models."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Rows and tokens in the order of the kernels: decode rows first, whatever order SGLang has them in."""

    query_lens: list[int]
    kv_lens: list[int]
    requests: Tensor
    """int64 ``(rows,)``: rows of ``req_to_token``."""
    slots: Tensor
    """int64 ``(tokens,)``: where each new key goes, in slots of the full pool."""
    tokens: Tensor | None
    """int64 ``(tokens,)``: SGLang's place of each token here; None where the order is the same."""


def read_step(forward_batch: Any) -> Step:
    """What a ``ForwardBatch`` says. Raises :class:`AttnCoreError` for modes that are not served."""
    mode = forward_batch.forward_mode
    if mode.name not in MODES:
        raise AttnCoreError(f"forward mode {mode.name} is not supported by the SGLang integration; it serves {MODES}")
    kv_lens = _on_host(forward_batch.seq_lens_cpu, forward_batch.seq_lens)
    if mode.is_decode():
        query_lens = [1] * len(kv_lens)
    else:
        query_lens = _on_host(forward_batch.extend_seq_lens_cpu, forward_batch.extend_seq_lens)
    requests, slots = forward_batch.req_pool_indices, forward_batch.out_cache_loc
    order = Batch.order(query_lens)
    if order == list(range(len(order))):
        return Step(query_lens=query_lens, kv_lens=kv_lens, requests=requests, slots=slots.long(), tokens=None)
    tokens = token_order(query_lens, order).to(slots.device)
    return Step(
        query_lens=[query_lens[i] for i in order],
        kv_lens=[kv_lens[i] for i in order],
        requests=requests[torch.tensor(order, device=requests.device)],
        slots=slots[tokens].long(),
        tokens=tokens,
    )


def token_order(query_lens: Sequence[int], order: Sequence[int]) -> Tensor:
    """The tokens of rows taken in ``order``, as places in the packed tokens of the original rows; int64, host."""
    starts = [0]
    for n in query_lens:
        starts.append(starts[-1] + n)
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in order])


def _on_host(mirror: Any, tensor: Tensor) -> list[int]:
    """A list of lengths: SGLang's copy on the host where it keeps one, else the tensor (which waits for the device)."""
    source = tensor if mirror is None else mirror
    return source.tolist() if isinstance(source, Tensor) else [int(n) for n in source]
