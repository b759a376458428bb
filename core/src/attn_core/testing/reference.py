"""What every kernel must compute, in float64, as plainly as it can be said. Slow, readable, the judge of all tests.

For query i of a sequence at position p, head h and the keys j it may see (:func:`visible`)::

    x_j = scale * q_i . k_j                      k and v of kv head h // group_size, stored values times their scale;
                                                 dual_chunk: q for p // chunk - j // chunk of 0, 1, more
    x_j = softcap * tanh(x_j / softcap)          logit_softcap
    x_j = x_j - slope_h * |j - p|                alibi (for causal attention: slope_h * (j - p))
    x_j = x_j + bias_hij                         bias
    lse = log(sum_j exp(x_j) + exp(sink_h))      the sink joins the denominator only
    out = sum_j exp(x_j - lse) v_j

A query that sees no key gives zeros and lse -inf, with sinks too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.runtime.batch import Batch
from attn_core.runtime.cache import KVCache
from attn_core.spec import AttentionSpec

Spans = Sequence[tuple[int, int]]


def visible(
    query_len: int,
    kv_len: int,
    *,
    attn_type: str = "decoder",
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    spans: Spans = (),
    tree_mask: Tensor | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """bool ``(query_len, kv_len)``: which keys each query sees.

    ``decoder``: query i sits at ``kv_len - query_len + i`` and sees itself and what came before; ``encoder_only`` and
    ``cross``: it sits at i and sees all. ``sliding_window`` W: keys less than W away. ``attention_chunk``: keys of the
    query's own chunk. ``tree_mask`` bool ``(query_len, query_len)`` replaces all of this among the new tokens. Keys in
    one of ``spans`` (``(start, end)``, end exclusive) are seen by the queries in it, whatever else holds. ``indices``
    ``(query_len, topk)``: of what is left only these key positions, -1 = none.
    """
    offset = kv_len - query_len if attn_type == "decoder" else 0
    p = torch.arange(query_len)[:, None] + offset
    j = torch.arange(kv_len)[None, :]
    seen = (j <= p) if attn_type == "decoder" else torch.ones(query_len, kv_len, dtype=torch.bool)
    if sliding_window is not None:
        seen = seen & ((p - j).abs() < sliding_window)
    if attention_chunk is not None:
        seen = seen & (p // attention_chunk == j // attention_chunk)
    if tree_mask is not None:
        seen[:, offset:] = tree_mask.cpu()
    for start, end in spans:
        seen = seen | ((p >= start) & (p < end) & (j >= start) & (j < end))
    if indices is not None:
        wanted = indices.cpu().long()
        chosen = torch.zeros(query_len, kv_len + 1, dtype=torch.bool)
        chosen.scatter_(1, wanted.where((wanted >= 0) & (wanted < kv_len), kv_len), True)
        seen = seen & chosen[:, :kv_len]
    return seen


def attend(
    q: Tensor | tuple[Tensor, ...],
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    dual_chunk: int | None = None,
    scale: float,
    softcap: float | None = None,
    alibi_slopes: Sequence[float] | None = None,
    offset: int = 0,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence. ``q`` ``(tokens, heads, d)``, ``k`` ``(keys, kv heads, d)``, ``v`` ``(keys, kv heads, dv)``,
    ``seen`` bool ``(tokens, keys)``, ``offset`` the first query's position, ``bias`` ``(heads or 1, tokens, keys)``,
    ``sinks`` ``(heads,)``. With ``dual_chunk`` three q, see :class:`AttentionSpec`.
    Returns float64 ``(tokens, heads, dv)`` and ``(tokens, heads)``."""
    queries = [t.detach().cpu().double() for t in (q if isinstance(q, tuple) else (q,))]
    k, v = (t.detach().cpu().double() for t in (k, v))
    tokens, heads, _ = queries[0].shape
    keys, kv_heads, _ = k.shape
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    x = scale * torch.einsum("ihd,jhd->hij", queries[0], k)
    if dual_chunk is not None:
        back = (torch.arange(tokens)[:, None] + offset) // dual_chunk - torch.arange(keys) // dual_chunk
        for chunks, other in enumerate(queries[1:], 1):
            x = torch.where(back >= chunks, scale * torch.einsum("ihd,jhd->hij", other, k), x)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if alibi_slopes is not None:
        distance = (torch.arange(keys) - torch.arange(tokens)[:, None] - offset).abs()
        x = x - torch.tensor(alibi_slopes, dtype=torch.float64)[:, None, None] * distance
    if bias is not None:
        x = x + bias.detach().cpu().double()
    x = x.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(x, -1) if keys else torch.full((heads, tokens), float("-inf"), dtype=torch.float64)
    blind = lse == float("-inf")
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.detach().cpu().double()[:, None])
    weights = torch.exp(x - lse[..., None]).masked_fill(blind[..., None], 0.0)
    out = torch.einsum("hij,jhd->ihd", weights, v)
    return out, lse.masked_fill(blind, float("-inf")).T


def stored_keys(spec: AttentionSpec, kv_cache: KVCache, table_row: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """float64 k ``(kv_len, kv heads, d)`` and v of one sequence, read key by key from its pages, scales applied.

    For the MLA layouts k is the latent row with its rotary part, v the latent row; one kv head.
    """
    position = torch.arange(kv_len)
    page, place = table_row.cpu().long()[position // kv_cache.page_size], position % kv_cache.page_size
    tensors = [t.cpu().double() for t in kv_cache.data]
    quantised = kv_cache.data[0].element_size() == 1
    k_scale, v_scale = (
        (t.cpu().double().view(-1, 1) if quantised else 1.0) for t in (kv_cache.k_scale_t, kv_cache.v_scale_t)
    )
    if kv_cache.layout in ("NHD", "HND"):
        k, v = (t if kv_cache.layout == "NHD" else t.transpose(1, 2) for t in tensors)
        return k[page, place] * k_scale, v[page, place] * v_scale
    row = torch.cat([t[page, place] for t in tensors], -1)[:, None] * k_scale
    return row, row[..., : spec.latent_dim]


def true_kv_lens(batch: Batch) -> list[int]:
    """The lengths that count: the device's where the host knows bounds only."""
    lens: list[int] = (batch.kv_lens if batch.exact else batch.kv_lens_device.cpu()).tolist()
    return lens


def attention(
    spec: AttentionSpec,
    batch: Batch,
    q: Tensor | tuple[Tensor, ...],
    k: Tensor | None = None,
    v: Tensor | None = None,
    kv_cache: KVCache | None = None,
    *,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Sequence[float] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """All sequences of a step: float64 output ``(tokens, heads, dv)`` and lse ``(tokens, heads)``.

    Keys come from ``kv_cache``, which must hold the new ones already, or without one from ragged ``k`` and ``v``.
    With an MLA cache this is the absorbed form: q packed or a pair, output of latent width. ``alibi_slopes`` and
    ``scale`` default to the spec's.
    """
    packed = torch.cat(q, -1) if isinstance(q, tuple) and spec.dual_chunk is None else q
    parts = packed if isinstance(packed, tuple) else (packed,)
    slopes = spec.alibi_slopes if alibi_slopes is None else alibi_slopes
    outputs, sums, token, key = [], [], 0, 0
    for i, (n, m) in enumerate(zip(batch.query_lens.tolist(), true_kv_lens(batch))):
        if kv_cache is not None:
            if batch.block_table is None:
                raise ValueError("a paged batch needs its block_table")
            keys, values = stored_keys(spec, kv_cache, batch.block_table[i], m)
        else:
            if k is None or v is None:
                raise ValueError("without kv_cache the reference needs k and v")
            keys, values = k[key : key + m], v[key : key + m]
        verify = batch.tree_mask is not None and i < batch.num_decode_rows
        seen = visible(
            n, m, attn_type=batch.attn_type, sliding_window=spec.sliding_window,
            attention_chunk=spec.attention_chunk,
            spans=() if batch.bidirectional_spans is None else batch.bidirectional_spans[i],
            tree_mask=batch.tree_mask[i] if verify and batch.tree_mask is not None else None,
            indices=None if indices is None else indices[token : token + n],
        )  # fmt: skip
        o, lse = attend(
            tuple(part[token : token + n] for part in parts), keys, values, seen, dual_chunk=spec.dual_chunk,
            scale=spec.softmax_scale if scale is None else scale, softcap=spec.logit_softcap, alibi_slopes=slopes,
            offset=m - n if batch.attn_type == "decoder" else 0,
            bias=None if bias is None else bias[i if bias.shape[0] > 1 else 0, :, :n, :m], sinks=sinks,
        )  # fmt: skip
        outputs.append(o)
        sums.append(lse)
        token, key = token + n, key + m
    return torch.cat(outputs), torch.cat(sums)


def merged(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions over disjoint keys as one, float64; ``(tokens, heads, width)`` and ``(tokens, heads)``."""
    o_a, lse_a, o_b, lse_b = (t.detach().cpu().double() for t in (o_a, lse_a, o_b, lse_b))
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == float("-inf"), 0.0)
    return torch.exp(lse_a - safe)[..., None] * o_a + torch.exp(lse_b - safe)[..., None] * o_b, lse
