# mypy: ignore-errors
"""The attention kernel, its inner loop, and the merge of split keys. Triton's language; mypy does not know it.

One program attends with a *tile* of ``BLOCK_M`` rows to a run of keys. A row is one query token with one of the query
heads that share a key/value head, so a tile of decode holds a whole group and a tile of prefill several tokens of it:
each key is read once for all of them. For row r of a tile::

    x_j = scale * q_r . k_j                     softcap: cap * tanh(x_j / cap); alibi: - slope * |j - position|; + bias
    m, norm, acc                                running maximum, sum of exp(x_j - m), sum of exp(x_j - m) v_j
    out = acc / (norm + exp(sink - m))          lse = m + log(norm + exp(sink - m))

(online softmax, arXiv 1805.02867, as in FlashAttention-2, arXiv 2307.08691), everything in base 2: exponents are
multiplied by log2(e) beforehand. A width is taken as a power of two and a rest (192 = 128 + 64, MLA's
576 = 512 + 64), because a tensor's side must be a power of two; where v is the front of k (MLA), it is read once.

On Turing a latent of 512 comes in two halves (``HALF``), as products there keep their factors in shared memory in
float32. Keys are then the left factor and v is read anew: so one half at a time is there, and nothing spills.

Triton compiles the branches on constants (upper case) away, so each group of layers gets a kernel with its own rules.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(1 << 30)
"""A key position after every query."""
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(
    q, q_rest, k, k_rest, v, out, lse, part_out, part_lse,
    work, cu_queries, kv_lens, cu_keys, table,
    sinks, slopes, tree, bias, spans, indices, k_scale, v_scale, scale,
    q_token, q_head, q_rest_token, q_rest_head,
    k_page, k_place, k_head, k_rest_page, k_rest_place, k_rest_head, v_page, v_place, v_head,
    out_token, out_head, table_row, indices_token, bias_seq, bias_head, bias_token, k_scale_head, v_scale_head,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, V_WIDTH: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr,
    Q_REST_AT: tl.constexpr, K_REST_AT: tl.constexpr, JOINED: tl.constexpr, PAGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, TOPK: tl.constexpr,
    QUANTISED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program per line of ``work``, ``(sequence, first row, first key, end key, partial)``, and kv head; the heads of
    a line are neighbours, as their keys are in an NHD cache.

    Keys count from the first that the tile sees; ``partial`` -1 means all of them, straight to ``out``. PAGE 0 means
    ragged keys. Optional tensors are None where the group has none.
    """
    item, kv_head = work + tl.program_id(0) // HEADS_KV * 5, tl.program_id(0) % HEADS_KV
    sequence = tl.load(item)
    if sequence < 0:
        return
    first_row, begin, end, partial = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    q_start = tl.load(cu_queries + sequence)
    q_len = tl.load(cu_queries + sequence + 1) - q_start
    kv_len = tl.load(kv_lens + sequence)

    rows = first_row + tl.arange(0, BLOCK_M)
    token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    first_token = first_row // GROUP
    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, q_len - 1)
    live = token < q_len
    if TOPK:  # every token has keys of its own
        last_token = first_token
        live = token == first_token
    offset = kv_len - q_len if CAUSAL else 0
    position = token + offset
    at_token = (q_start + token).to(tl.int64)

    # Keys from ``low`` to ``high`` are seen by some row of the tile, those from ``left`` to ``clear`` by every row.
    first, end_seen = sees(position, kv_len, CAUSAL, WINDOW, CHUNK)
    low, clear = sees(offset + first_token, kv_len, CAUSAL, WINDOW, CHUNK)
    left, high = sees(offset + last_token, kv_len, CAUSAL, WINDOW, CHUNK)
    if tree is not None:
        low, high, clear = tl.minimum(low, offset), kv_len, offset
    span_start, span_end = token, token
    if spans is not None:
        span_start = tl.load(spans + 2 * at_token, mask=live, other=kv_len)
        span_end = tl.load(spans + 2 * at_token + 1, mask=live, other=0)
        low, high = tl.minimum(low, tl.min(span_start)), tl.maximum(high, tl.max(span_end))
    if TOPK:
        low, high, clear = 0, TOPK, 0
    low = tl.maximum(low, 0) // BLOCK_N * BLOCK_N
    if partial >= 0:
        high = tl.minimum(high, low + end)
        low = low + begin

    columns, rest = tl.arange(0, MAIN), tl.arange(0, REST if REST else 1)
    q_at = at_token * q_token + head * q_head
    q_main = tl.load(q + q_at[:, None] + columns[None, :], mask=live[:, None] & (columns < WIDTH)[None, :], other=0.0)
    q_half, q_more = q_main, q_main
    if HALF:
        q_half = tl.load(q + q_at[:, None] + MAIN + tl.arange(0, HALF)[None, :], mask=live[:, None], other=0.0)
    if REST:
        q_at = at_token * q_rest_token + head * q_rest_head + Q_REST_AT
        rest_live = live[:, None] & (MAIN + HALF + rest < WIDTH)[None, :]
        q_more = tl.load(q_rest + q_at[:, None] + rest[None, :], mask=rest_live, other=0.0)
    factor = scale
    if QUANTISED:
        factor = factor * tl.load(k_scale + kv_head * k_scale_head)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + head) * LOG2E
    bias_at = token
    if bias is not None:
        bias_at = sequence.to(tl.int64) * bias_seq + head.to(tl.int64) * bias_head + token.to(tl.int64) * bias_token

    key_start = 0
    pages = table
    if PAGE:
        pages = table + sequence.to(tl.int64) * table_row
    else:
        key_start = tl.load(cu_keys + sequence)
    wanted = indices
    if TOPK:
        wanted = indices + (q_start + first_token).to(tl.int64) * indices_token
    new_tokens = tree
    if tree is not None:
        new_tokens = tree + sequence.to(tl.int64) * q_len * q_len

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_MAIN], tl.float32)
    acc_more = tl.zeros([BLOCK_M, V_REST if V_REST else 1], tl.float32)
    for n in range(low, high, BLOCK_N):
        m, norm, acc, acc_more = attend_block(
            m, norm, acc, acc_more, q_main, q_half, q_more, n, left, clear, high, position, first, end_seen, token,
            live, factor, slopes, slope, k + kv_head * k_head, k_rest + kv_head * k_rest_head + K_REST_AT,
            v + kv_head * v_head, pages, key_start, wanted, new_tokens, bias, bias_at, spans, span_start, span_end,
            offset, q_len,
            k_page, k_place, k_rest_page, k_rest_place, v_page, v_place,
            WIDTH, MAIN, HALF, REST, V_WIDTH, V_MAIN, V_REST, JOINED, PAGE, SOFTCAP, WINDOW or CHUNK, TOPK, BLOCK_N,
        )  # fmt: skip

    if partial >= 0:
        total = tl.where(norm > 0, norm, 1.0)
        place = (partial * HEADS_KV + kv_head).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(part_lse + place, m + tl.log2(norm))
        v_columns = tl.arange(0, V_MAIN)
        at = part_out + place[:, None] * V_WIDTH
        tl.store(at + v_columns[None, :], acc / total[:, None], mask=(v_columns < V_WIDTH)[None, :])
        if V_REST:
            v_columns = V_MAIN + tl.arange(0, V_REST)
            tl.store(at + v_columns[None, :], acc_more / total[:, None], mask=(v_columns < V_WIDTH)[None, :])
    else:
        finish(
            acc, acc_more, m, norm, at_token, head, live, kv_head, out, lse, sinks, v_scale, v_scale_head, out_token,
            out_head, HEADS_KV * GROUP, V_WIDTH, V_MAIN, V_REST, QUANTISED,
        )  # fmt: skip


@triton.jit
def sees(position, kv_len, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key seen from a position, and the one after the last."""
    first, end = position * 0, position * 0 + kv_len
    if CAUSAL:
        end = tl.minimum(end, position + 1)
    if WINDOW:
        first, end = tl.maximum(first, position - WINDOW + 1), tl.minimum(end, position + WINDOW)
    if CHUNK:
        start = position // CHUNK * CHUNK
        first, end = tl.maximum(first, start), tl.minimum(end, start + CHUNK)
    return first, end


@triton.jit
def attend_block(
    m, norm, acc, acc_more, q_main, q_half, q_more, n, left, clear, high, position, first, end, token, live, factor,
    slopes, slope, k, k_rest, v, pages, key_start, wanted, new_tokens, bias, bias_at, spans, span_start, span_end,
    offset, q_len, k_page, k_place, k_rest_page, k_rest_place, v_page, v_place,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    V_WIDTH: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr, JOINED: tl.constexpr, PAGE: tl.constexpr,
    SOFTCAP: tl.constexpr, BANDED: tl.constexpr, TOPK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The inner loop's body: keys ``n`` to ``n + BLOCK_N``.

    Beyond the last key the last is loaded again: no load needs a mask, and what lies there may be NaN.
    """
    lane = tl.arange(0, BLOCK_N)
    key = n + lane
    at = tl.minimum(n + lane, high - 1)
    if TOPK:
        at = tl.load(wanted + at)
        key = tl.where((key < high) & (at >= 0), at, NOWHERE)
        at = tl.maximum(at, 0)

    if PAGE == 0:
        page, place = 0, (key_start + at).to(tl.int64)
    elif TOPK or PAGE % BLOCK_N:
        page, place = tl.load(pages + at // PAGE).to(tl.int64), at % PAGE
    else:  # the block lies in one page
        page, place = tl.load(pages + n // PAGE).to(tl.int64), at - n // PAGE * PAGE

    k_main = load_keys(k, page * k_page + place * k_place, 0, WIDTH, MAIN, q_main.dtype)
    if HALF:
        x = tl.dot(k_main, tl.trans(q_main), input_precision="ieee")
        k_half = load_keys(k + MAIN, page * k_page + place * k_place, MAIN, WIDTH, HALF, q_main.dtype)
        x = tl.trans(tl.dot(k_half, tl.trans(q_half), x, input_precision="ieee"))
    else:
        x = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
    if REST:
        k_more = load_keys(k_rest, page * k_rest_page + place * k_rest_place, MAIN + HALF, WIDTH, REST, q_main.dtype)
        x = tl.dot(q_more, tl.trans(k_more), x, input_precision="ieee")

    if SOFTCAP > 0:  # cap * tanh(y) with tanh(y) = 1 - 2 / (exp(2 y) + 1)
        x = SOFTCAP * LOG2E * (1.0 - 2.0 / (tl.exp2(x * (factor * (2.0 / SOFTCAP) * LOG2E)) + 1.0))
    else:
        x = x * (factor * LOG2E)
    if slopes is not None:
        x = x - slope[:, None] * tl.abs(key[None, :] - position[:, None]).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + bias_at[:, None] + at[None, :], mask=live[:, None], other=0.0) * LOG2E

    if n < left or n + BLOCK_N > clear:  # some row does not see all of them
        if TOPK:
            seen = key[None, :] < end[:, None]
        else:
            seen = lane[None, :] < (end - n)[:, None]  # no register per element, as key - position would take
        if BANDED:
            seen = seen & (lane[None, :] >= (first - n)[:, None])
        if new_tokens is not None:
            new = key - offset
            known = live[:, None] & ((new >= 0) & (new < q_len))[None, :]
            shown = tl.load(new_tokens + token[:, None] * q_len + new[None, :], mask=known, other=0)
            seen = tl.where((new >= 0)[None, :], shown != 0, seen)
        if spans is not None:
            seen = seen | ((key[None, :] >= span_start[:, None]) & (key[None, :] < span_end[:, None]))
        x = tl.where(seen, x, float("-inf"))
    top = tl.maximum(m, tl.max(x, 1))
    base = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen no key yet
    p = tl.exp2(x - base[:, None])
    shrink = tl.exp2(m - base)
    norm = norm * shrink + tl.sum(p, 1)
    p = p.to(q_main.dtype)

    if JOINED:
        v_main = k_main
    else:
        v_main = load_keys(v, page * v_page + place * v_place, 0, V_WIDTH, V_MAIN, q_main.dtype, HALF)
    acc = tl.dot(p, v_main, acc * shrink[:, None], input_precision="ieee")
    if V_REST:
        v_more = load_keys(v + V_MAIN, page * v_page + place * v_place, V_MAIN, V_WIDTH, V_REST, q_main.dtype, HALF)
        acc_more = tl.dot(p, v_more, acc_more * shrink[:, None], input_precision="ieee")
    return top, norm, acc, acc_more


@triton.jit
def load_keys(
    base, at, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
    AGAIN: tl.constexpr = 0,
):  # fmt: skip
    """Columns ``FIRST`` to ``FIRST + BLOCK`` of the keys at offsets ``at``, as ``dtype``; zeros beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    address = base + at[:, None] + column[None, :]
    if FIRST + BLOCK > WIDTH:
        x = tl.load(address, mask=(FIRST + column < WIDTH)[None, :], other=0.0)
    elif AGAIN:  # no load that the compiler takes for the first one
        x = tl.load(address, eviction_policy="evict_last")
    else:
        x = tl.load(address)
    if base.dtype.element_ty.is_int():  # exact in every float; the interpreter cannot go to bfloat16 directly
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def finish(
    acc, acc_more, m, norm, at_token, head, live, kv_head, out, lse, sinks, v_scale, v_scale_head, out_token, out_head,
    heads, V_WIDTH: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Sinks join the denominator, the output is divided by it and stored with its log-sum-exp. A row that saw no key
    gives zeros and -inf, with sinks too."""
    blind = norm == 0
    weight = tl.where(blind, 0.0, 1.0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(m, sink)
        weight = tl.exp2(m - top)
        norm = norm * weight + tl.exp2(sink - top)
        m = top
    total = tl.where(blind, 1.0, norm)
    if lse is not None:
        sums = tl.where(blind, float("-inf"), (m + tl.log2(total)) * LN2)
        tl.store(lse + at_token * heads + head, sums, mask=live)
    weight = tl.where(blind, 0.0, weight / total)
    if QUANTISED:
        weight = weight * tl.load(v_scale + kv_head * v_scale_head)
    column = tl.arange(0, V_MAIN)
    at = out + (at_token * out_token + head * out_head)[:, None]
    inside = live[:, None] & (column < V_WIDTH)[None, :]
    tl.store(at + column[None, :], (acc * weight[:, None]).to(out.dtype.element_ty), mask=inside)
    if V_REST:
        column = V_MAIN + tl.arange(0, V_REST)
        inside = live[:, None] & (column < V_WIDTH)[None, :]
        tl.store(at + column[None, :], (acc_more * weight[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def merge(
    part_out, part_lse, merges, cu_queries, out, lse, sinks, v_scale, v_scale_head, out_token, out_head,
    HEADS_KV: tl.constexpr, GROUP: tl.constexpr, V_WIDTH: tl.constexpr, V_MAIN: tl.constexpr, V_REST: tl.constexpr,
    TOPK: tl.constexpr, QUANTISED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Join the partial results of one tile, by their log-sum-exp; a program per line of ``merges``, ``(sequence, first
    row, first partial, partials)``, kv head and ``BLOCK_R`` rows."""
    item = merges + tl.program_id(0) // (BLOCK_M // BLOCK_R * HEADS_KV) * 4
    kv_head = tl.program_id(0) % HEADS_KV
    lane = tl.program_id(0) // HEADS_KV % (BLOCK_M // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    sequence = tl.load(item)
    if sequence < 0:
        return
    first_row, first, count = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    q_start = tl.load(cu_queries + sequence)
    q_len = tl.load(cu_queries + sequence + 1) - q_start
    rows = first_row + lane
    token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    live = token < q_len
    if TOPK:
        live = token == first_row // GROUP

    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, V_MAIN], tl.float32)
    acc_more = tl.zeros([BLOCK_R, V_REST if V_REST else 1], tl.float32)
    column = tl.arange(0, V_MAIN)
    for i in range(first, first + count):
        place = (i * HEADS_KV + kv_head).to(tl.int64) * BLOCK_M + lane
        x = tl.load(part_lse + place)
        top = tl.maximum(m, x)
        base = tl.where(top == float("-inf"), 0.0, top)
        p, shrink = tl.exp2(x - base), tl.exp2(m - base)
        norm = norm * shrink + p
        at = part_out + place[:, None] * V_WIDTH
        o = tl.load(at + column[None, :], mask=(column < V_WIDTH)[None, :], other=0.0)
        acc = acc * shrink[:, None] + o * p[:, None]
        if V_REST:
            more = V_MAIN + tl.arange(0, V_REST)
            o = tl.load(at + more[None, :], mask=(more < V_WIDTH)[None, :], other=0.0)
            acc_more = acc_more * shrink[:, None] + o * p[:, None]
        m = top
    finish(
        acc, acc_more, m, norm, (q_start + token).to(tl.int64), head, live, kv_head, out, lse, sinks, v_scale,
        v_scale_head, out_token, out_head, HEADS_KV * GROUP, V_WIDTH, V_MAIN, V_REST, QUANTISED,
    )  # fmt: skip
