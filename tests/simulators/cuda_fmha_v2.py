"""FlashInfer's trtllm_fmha_v2_prefill over keys in memory, as compiled for one architecture."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from simulators.attend import finish, put, seen, sequence
from simulators.contract import Misuse, Refused
from simulators.cuda_flashinfer_common import FACTS, check_workspace
from simulators.flash import check_index, check_longest, keys_of_rows, lengths_of, packed_edges


def fmha_v2(arch: str) -> Callable[[SimpleNamespace], Any]:
    """``arch``: what the sources are generated for: Hopper's kernel has layouts and widths that SM12x's lacks."""
    hopper = arch == "sm_90"

    def run(a: SimpleNamespace) -> Any:
        where = "trtllm_fmha_v2_prefill"
        if arch not in ("sm_90", "sm_120", "sm_121"):
            raise Refused(f"{where}: compiled for majors 9 and 12, not {arch}")
        if a.input_layout not in ("SEPARATE_Q_K_V", "CONTIGUOUS_Q_KV"):
            raise NotImplementedError(f"{where}: this stand-in knows keys in memory, q apart")
        if a.input_layout == "SEPARATE_Q_K_V" and not hopper:
            raise Refused(f"{where}: no kernel is generated for {a.input_layout} on {arch}")
        q, k, v = a.qkv if a.input_layout == "SEPARATE_Q_K_V" else (a.qkv[0], *_halves(where, a.qkv[1]))
        if not all(t.is_contiguous() for t in a.qkv):
            raise Misuse(f"{where}: strides follow from shapes, and these tensors have others")
        if q.dtype == torch.float16:
            raise Misuse(f"{where}: float16 is accumulated in float16")
        FACTS.require("fmha_v2_dtype", str(q.dtype).removeprefix("torch."), where)
        FACTS.require("fmha_v2_head_dim_hopper" if hopper else "fmha_v2_head_dim", q.shape[-1], where)
        causal = a.mask_mode in ("causal", "sliding_window", "chunked")
        if a.mask_mode == "padding" and (a.window_left >= 0 or a.chunked_attention_size > 0):
            raise Refused(f"{where}: windows and chunks are causal")
        if a.input_layout == "SEPARATE_Q_K_V" and (a.logits_soft_cap_scale or 0) > 0:
            raise Refused(f"{where}: no soft cap over separate q, k and v")
        if a.save_softmax_stats and a.input_layout != "CONTIGUOUS_Q_KV":
            raise Misuse(f"{where}: softmax stats of this layout end the process")
        if a.sinks is not None or a.pos_encoding_mode or a.window_left >= 0 or a.chunked_attention_size:
            raise NotImplementedError(f"{where}: this stand-in knows plain attention")
        if a.save_softmax_stats or a.logits_soft_cap_scale or a.out is not None:
            raise NotImplementedError(f"{where}: this stand-in gives a new output and no stats")
        if a.bmm1_scale == 0:
            raise Misuse(f"{where}: a scale of 0 is taken for the default")
        check_workspace(where, a.workspace_buffer, q.device)
        check_index(where, "seq_lens", a.seq_lens, q.device, (a.batch_size,))
        for name in ("cum_seq_lens_q", "cum_seq_lens_kv"):
            check_index(where, name, getattr(a, name), q.device, (a.batch_size + 1,))
        edges = packed_edges(where, "cum_seq_lens_q", a.cum_seq_lens_q, q.shape[0])
        k_edges = packed_edges(where, "cum_seq_lens_kv", a.cum_seq_lens_kv, k.shape[0])
        if lengths_of(k_edges) != a.seq_lens.tolist():
            raise Misuse(f"{where}: cum_seq_lens_kv and seq_lens disagree")
        check_longest(where, "max_q_len", a.max_q_len, lengths_of(edges))
        check_longest(where, "max_kv_len", a.max_kv_len, lengths_of(k_edges))
        if a.max_q_len > a.max_kv_len:
            raise Refused(f"{where}: more queries than keys")
        parts = []
        for (b, e), (k_row, v_row) in zip(edges, keys_of_rows(where, k, v, k_edges)):
            visible = seen(e - b, k_row.shape[0], causal=causal)
            o, lse = sequence(q[b:e], k_row, v_row, visible, scale=a.bmm1_scale)
            parts.append((o * a.bmm2_scale, lse))
        return put(None, finish(parts, q)[0])

    return run


def _halves(where: str, kv: Tensor) -> tuple[Tensor, Tensor]:
    if kv.dim() != 4 or kv.shape[1] != 2:
        raise Refused(f"{where}: keys and values are (tokens, 2, kv heads, width), not {tuple(kv.shape)}")
    return kv[:, 0], kv[:, 1]
