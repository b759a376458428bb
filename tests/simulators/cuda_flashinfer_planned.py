"""What each of FlashInfer's kernels takes of a wrapper's plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from simulators.contract import Misuse, Refused
from simulators.cuda_flashinfer_common import FACTS, dtype_of

Check = Callable[[str, SimpleNamespace, tuple[int, int], bool], None]
"""(where, the plan's arguments, (head_dim_qk, head_dim_vo), whether keys have the queries' dtype)."""


def check_fa2(where: str, a: SimpleNamespace, head_dims: tuple[int, int], one_dtype: bool) -> None:
    FACTS.require("fa2_head_dim_qk", head_dims[0], where)
    FACTS.require("fa2_head_dim_vo", head_dims[1], where)
    if not one_dtype:
        FACTS.require("fa2_kv_dtype", str(dtype_of(a.kv_data_type)).removeprefix("torch."), where)


def check_fa3(where: str, a: SimpleNamespace, head_dims: tuple[int, int], one_dtype: bool) -> None:
    FACTS.require("fa3_head_dims", head_dims, where)
    if not one_dtype or a.custom_mask is not None or a.packed_custom_mask is not None:
        raise Refused(f"{where}: fa3 takes neither an fp8 cache under 16-bit q nor a custom mask")
    _check_splits(where, a, "fa3")


def check_cutlass(where: str, a: SimpleNamespace, head_dims: tuple[int, int], one_dtype: bool) -> None:
    """The kernel is given causality and scales only; for a named backend nobody checks what else was planned."""
    FACTS.require("cutlass_head_dims", head_dims, where)
    if not one_dtype or a.o_data_type not in (None, a.q_data_type):
        raise Refused(f"{where}: cutlass takes q, k, v and the output in one 16-bit dtype")
    if a.window_left >= 0 or a.logits_soft_cap or a.custom_mask is not None or a.pos_encoding_mode != "NONE":
        raise Misuse(f"{where}: cutlass drops windows, soft caps, masks and position encodings")
    _check_splits(where, a, "cutlass")


def check_room(where: str, queries: Sequence[int], heads: int) -> None:
    """One entry per tile of queries, head and sequence, in buffers that nobody measures."""
    tiles = sum(-(-n // 256) for n in queries)
    if tiles * heads > int(FACTS.limit("cutlass_work_items")["max"]):
        raise Misuse(f"{where}: {tiles} tiles of {heads} heads overrun the plan's buffers")


def check_cudnn(where: str, a: SimpleNamespace, head_dims: tuple[int, int], one_dtype: bool) -> None:
    FACTS.require("cudnn_ragged_head_dims", head_dims, where)
    if not one_dtype:
        raise Refused(f"{where}: cudnn takes q, k and v in one 16-bit dtype")
    if a.window_left != -1 or a.logits_soft_cap or a.custom_mask is not None or a.pos_encoding_mode != "NONE":
        raise Refused(f"{where}: cudnn takes no windows, soft caps, masks and position encodings")
    _check_splits(where, a, "cudnn")


def check_single_tokens(where: str, queries: Sequence[int], heads: int, kv_heads: int) -> None:
    if max(queries) == 1 and heads != kv_heads:
        raise Refused(f"{where}: cudnn's kernel for single tokens writes the LSE of the first head of a group only")


def _check_splits(where: str, a: SimpleNamespace, backend: str) -> None:
    if a.disable_split_kv or a.fixed_split_size is not None:
        raise Misuse(f"{where}: {backend} drops disable_split_kv and fixed_split_size")
