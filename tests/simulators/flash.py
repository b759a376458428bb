"""What the FlashAttention family has in common, for the stand-ins of all vendors that offer one of its interfaces.

A stand-in maps its arguments to :func:`keys_of_pages` or :func:`keys_of_rows` and :func:`forward`; the checks raise
:class:`Refused` where the real entry point raises and :class:`Misuse` where it would read or compute something wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simulators.attend import cumulative, finish, paged, seen, sequence
from simulators.contract import Contract, Misuse, Refused

Keys = list[tuple[Tensor, Tensor]]
"""Per sequence k ``(keys, kv heads, d)`` and v ``(keys, kv heads, dv)``."""


def check_index(where: str, name: str, t: object, device: torch.device, shape: tuple[int | None, ...]) -> None:
    """An int32 tensor on the kernel's device, of that shape (None: any), contiguous in its last dimension."""
    if not isinstance(t, Tensor):
        raise Refused(f"{where}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype != torch.int32:
        raise Refused(f"{where}: {name} must have dtype torch.int32, got {t.dtype}")
    if t.device != device:
        raise Refused(f"{where}: {name} is on {t.device}, q on {device}")
    if t.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, t.shape)):
        raise Refused(f"{where}: {name} has shape {tuple(t.shape)}, expected {shape}")
    if t.numel() and t.stride(-1) != 1:
        raise Refused(f"{where}: {name} must be contiguous in its last dimension")


def check_heads(contract: Contract, where: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """dtypes, widths and head counts; all three share one dtype, the last dimensions are contiguous."""
    contract.require_dtype("dtype", q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise Refused(f"{where}: q, k, v must have the same dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise Refused(f"{where}: q, k, v must be on one device")
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        raise Refused(f"{where}: the last dimension of q, k, v must be contiguous")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise Refused(f"{where}: heads do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    contract.require("head_dim", q.shape[-1], where)
    contract.require("head_dim", v.shape[-1], where)


def check_longest(where: str, name: str, given: int | None, lengths: Sequence[int]) -> None:
    """The kernel sizes its grid by the longest sequence it is told: rows beyond are never computed."""
    if given is not None and not isinstance(given, int):
        raise Refused(f"{where}: {name} must be an int on the host, got {type(given).__name__}")
    if given is not None and lengths and given < max(lengths):
        raise Misuse(
            f"{where}: {name}={given}, but the longest sequence has {max(lengths)}: the rest is never computed"
        )


def lengths_of(edges: Sequence[tuple[int, int]]) -> list[int]:
    return [end - begin for begin, end in edges]


def packed_edges(where: str, name: str, offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    """Sequences of a packed tensor of ``rows`` rows."""
    edges = cumulative(offsets)
    if edges[0][0] != 0 or edges[-1][1] != rows or any(b > e for b, e in edges):
        raise Misuse(f"{where}: {name}={offsets.tolist()} does not cut {rows} rows into sequences: it reads elsewhere")
    return edges


def keys_of_pages(where: str, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Sequence[int]) -> Keys:
    """Caches ``(pages, page size, kv heads, width)``."""
    try:
        return [(paged(k_cache, t, n), paged(v_cache, t, n)) for t, n in zip(table, lengths)]
    except IndexError as e:
        raise Misuse(f"{where}: reads outside its pages: {e}") from None


def keys_of_rows(
    where: str, k: Tensor, v: Tensor, edges: Sequence[tuple[int, int]], used: Tensor | None = None
) -> Keys:
    """Packed rows ``(keys, kv heads, width)``; ``used``: only so many of each sequence."""
    ends = [e for _, e in edges] if used is None else [b + u for (b, _), u in zip(edges, used.tolist())]
    return [(k[b:e], v[b:e]) for (b, _), e in zip(edges, ends)]


def scaled(keys: Keys, k_descale: Tensor | None, v_descale: Tensor | None, q_descale: Tensor | None = None) -> Keys:
    """Keys as numbers: stored values times descales ``(sequences, kv heads)``; q's goes with k."""

    def times(x: Tensor, *scales: Tensor | None) -> Tensor:
        x = x.detach().cpu().double()
        for s in scales:
            x = x if s is None else x * s.detach().cpu().double()[:, None]
        return x

    def row(t: Tensor | None, i: int) -> Tensor | None:
        return None if t is None else t[i]

    return [
        (times(k, row(k_descale, i), row(q_descale, i)), times(v, row(v_descale, i))) for i, (k, v) in enumerate(keys)
    ]


def forward(
    q: Tensor,
    edges: Sequence[tuple[int, int]],
    keys: Keys,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    qv: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed q ``(tokens, heads, d)``; output likewise, LSE float32 natural log ``(heads, tokens)``.

    ``qv`` ``(tokens, heads, dv)``: scores are q.k + qv.v. ``slopes`` ``(heads,)`` or ``(sequences, heads)``.
    """
    parts = []
    for i, ((begin, end), (k, v)) in enumerate(zip(edges, keys)):
        rows = q[begin:end]
        if qv is not None:
            rows, k = (
                torch.cat((rows.cpu().double(), qv[begin:end].cpu().double()), -1),
                torch.cat((k.cpu().double(), v.cpu().double()), -1),
            )
        visible = seen(end - begin, k.shape[0], causal=causal, left=window[0], right=window[1], chunk=chunk)
        own = slopes[i] if slopes is not None and slopes.dim() == 2 else slopes
        parts.append(sequence(rows, k, v, visible, scale=scale, softcap=softcap, sinks=sinks, slopes=own))
    return finish(parts, q, dtype)


def batched(lse: Tensor, batch: int) -> Tensor:
    """LSE ``(heads, tokens)`` of sequences of one length as ``(batch, heads, queries)``."""
    return lse.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()


class Metadata:
    """Scheduler metadata: an int32 tensor that fits one step of one group of layers and no other.

    The real one holds tile counts and an order of the batch, which are right only for the lengths, heads and masks
    they were made for. Here it holds those facts themselves, so that wrong use is noticed and not merely wrong.
    """

    @staticmethod
    def make(facts: Sequence[Any], lengths: Tensor) -> Tensor:
        numbers = [int(x) for x in facts]
        return torch.tensor([len(numbers), *numbers, *lengths.tolist()], dtype=torch.int32, device=lengths.device)

    @staticmethod
    def check(where: str, metadata: Tensor, facts: Sequence[Any], lengths: Tensor) -> None:
        """``metadata`` may be longer (a buffer of a captured graph): what follows must be zeros."""
        if metadata.dtype != torch.int32 or metadata.dim() != 1:
            raise Refused(f"{where}: scheduler_metadata must be a one-dimensional int32 tensor")
        want = Metadata.make(facts, lengths).cpu()
        got = metadata.cpu()
        if got.shape[0] < want.shape[0] or not torch.equal(got[: want.shape[0]], want) or got[want.shape[0] :].any():
            raise Misuse(f"{where}: scheduler_metadata belongs to another call: {got.tolist()}, needed {want.tolist()}")
