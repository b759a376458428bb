"""Attention as vendors define it, in plain torch: what stand-ins compute with. Knows nothing of this project.

All in float64 on the host, rounded once to the kernel's dtype and put where q lies, so that a stand-in is never the
reason why a comparison fails. Conventions here are the vendors': windows as (left, right) key counts, causality aligned
to the bottom right, one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from simulators.contract import Misuse

INF = float("inf")


def seen(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    left: int = -1,
    right: int = -1,
    chunk: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """bool ``(queries, keys)``, aligned to the bottom right.

    ``left``, ``right``: keys before and after a query's own position that it sees besides its own, -1 = all.
    ``chunk``: keys of the query's own chunk of that many positions, 0 = no chunks. ``mask``: and these only.
    """
    p = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)[None, :]
    right = 0 if causal else right
    found = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        found &= j >= p - left
    if right >= 0:
        found &= j <= p + right
    if chunk > 0:
        found &= torch.div(j, chunk, rounding_mode="floor") == torch.div(p, chunk, rounding_mode="floor")
    return found if mask is None else found & mask.cpu()


def sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | Tensor,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: float64 output ``(queries, heads, dv)`` and natural-log LSE ``(heads, queries)``.

    ``q`` ``(queries, heads, d)``; ``k``, ``v`` ``(keys, kv heads, d or dv)``; ``slopes`` ``(heads,)``: minus slope
    times the distance. A query without keys gives zeros and -inf, with sinks too.
    """
    q, k, v = (double(t) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    x = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    if slopes is not None:
        p = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
        x = x - double(slopes)[:, None, None] * (p - torch.arange(k.shape[0])).abs()
    x = x.masked_fill(~visible, -INF)
    top = x.amax(-1, keepdim=True) if x.shape[-1] else x.new_full((*x.shape[:-1], 1), -INF)
    blind = top == -INF
    top = top.masked_fill(blind, 0.0)
    weights = torch.exp(x - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(double(sinks)[:, None, None] - top)
    out = torch.einsum("hij,jhd->ihd", weights / total.masked_fill(blind, 1.0), v)
    lse = (top + torch.log(total)).masked_fill(blind, -INF)[..., 0]
    return out, lse


def double(t: Tensor) -> Tensor:
    return t.detach().cpu().double()


def cumulative(offsets: Tensor) -> list[tuple[int, int]]:
    """``(begin, end)`` of every sequence in a packed tensor."""
    edges = offsets.tolist()
    return list(pairwise(edges))


def paged(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first ``length`` rows of one sequence, ``cache`` ``(pages, page size, ...)``, ``pages`` its page ids.

    Raises IndexError where the pages do not hold that many.
    """
    page_size = cache.shape[1]
    position = torch.arange(length)
    ids = pages.cpu().long()
    if length > len(ids) * page_size:
        raise IndexError(f"{length} keys in {len(ids)} pages of {page_size}")
    return cache[ids[position // page_size].to(cache.device), (position % page_size).to(cache.device)]


def finish(
    parts: Sequence[tuple[Tensor, Tensor]], like: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Sequences joined: output ``(tokens, heads, dv)`` where ``like`` is, LSE float32 ``(heads, tokens)``."""
    out = torch.cat([o for o, _ in parts]).to(dtype or like.dtype).to(like.device)
    return out, torch.cat([lse for _, lse in parts], 1).float().to(like.device)


def by_shape(where: str, **tensors: Tensor | None) -> None:
    """Of tensors whose strides the real function takes from their shapes."""
    for name, t in tensors.items():
        if t is not None and not t.is_contiguous():
            raise Misuse(f"{where}: takes the strides of {name} from its shape; it has {t.stride()}")


def put(out: Tensor | None, value: Tensor) -> Tensor:
    """``value``, in the caller's tensor when there is one, which must fit exactly."""
    if out is None:
        return value
    if out.shape != value.shape or out.dtype != value.dtype:
        raise RuntimeError(f"out is {tuple(out.shape)} {out.dtype}, the result {tuple(value.shape)} {value.dtype}")
    return out.copy_(value)
