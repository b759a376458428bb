"""What ``forward`` does for each kind of step, one closure per kind, made at bind; the plan picks one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attn_core.errors import BadInputError
from attn_core.runtime.adapt import Attend

Write = Callable[..., None]


def writes(write: Write, attend: Attend, *, pass_kv: bool) -> Attend:
    """Write the new keys, then attend. ``pass_kv=False``: k and v do not line up with q (cross), the cache has all."""

    def step(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        write(k, v, kv_cache, plan)
        return attend(q, k, v, kv_cache, plan, sinks=sinks, indices=indices, bias=bias, out=out, return_lse=return_lse)

    def step_on_cache(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        write(k, v, kv_cache, plan)
        return attend(
            q, None, None, kv_cache, plan, sinks=sinks, indices=indices, bias=bias, out=out, return_lse=return_lse
        )

    return step if pass_kv else step_on_cache


def reads(attend: Attend, group: str) -> Attend:
    """Attend over a cache that holds every key already. Keys offered without slots would be lost: they are refused."""

    def step(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        if k is not None:
            raise BadInputError(
                f"forward of group {group!r} got k and v, but the planned batch has no slot_mapping to write them to; "
                "give Batch(slot_mapping=...), or pass k=None, v=None when the cache holds them already"
            )
        return attend(
            q, None, None, kv_cache, plan, sinks=sinks, indices=indices, bias=bias, out=out, return_lse=return_lse
        )

    return step


def borrows(attend: Attend) -> Attend:
    """Attend over another group's cache (``kv_from``): k and v, if any, are that group's business."""

    def step(q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, **rest: Any) -> Any:
        return attend(q, None, None, kv_cache, plan, **rest)

    return step


def mixed(
    decode: Attend, prefill: Attend, *, split_q: bool, decode_kv: bool, prefill_kv: bool, width: int, dtype: torch.dtype
) -> Attend:
    """Decode rows, then the rest, on slices of q and of the output. ``*_kv``: that kernel looks at k and v too.

    ``width`` and ``dtype`` are the output's; ``split_q``: q is several tensors.
    """

    def cut(q: Any, where: slice) -> Any:
        return tuple(part[where] for part in q) if split_q else q[where]

    def step(
        q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
        sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        rows, first, rest = plan.num_decode_rows, slice(0, plan.num_decode_tokens), slice(plan.num_decode_tokens, None)
        if out is None:
            like = q[0] if split_q else q
            out = like.new_empty((*like.shape[:2], width), dtype=dtype)
        bias_rows = bias is not None and bias.shape[0] > 1
        a = decode(
            cut(q, first),
            k[first] if decode_kv and k is not None else None,
            v[first] if decode_kv and v is not None else None,
            kv_cache,
            plan,
            sinks=sinks,
            indices=None if indices is None else indices[first],
            bias=bias[:rows] if bias_rows else bias,
            out=out[first],
            return_lse=return_lse,
        )
        b = prefill(
            cut(q, rest),
            k[rest] if prefill_kv and k is not None else None,
            v[rest] if prefill_kv and v is not None else None,
            kv_cache,
            plan,
            sinks=sinks,
            indices=None if indices is None else indices[rest],
            bias=bias[rows:] if bias_rows else bias,
            out=out[rest],
            return_lse=return_lse,
        )
        return (out, torch.cat((a[1], b[1]))) if return_lse else out

    return step


@dataclass(frozen=True)
class Kind:
    """A kind of step: what attends, and whether it writes k and v itself."""

    attend: Attend
    appends: bool


def table(
    kinds: Mapping[str, Kind], write: Write, *, group: str, shared_kv: bool, together: bool
) -> dict[tuple[str, bool], Attend]:
    """(kind, whether the batch has slots to write) -> what ``forward`` does.

    ``shared_kv``: the cache is another group's; ``together``: k and v line up with q, one row per token.
    """
    out: dict[tuple[str, bool], Attend] = {}
    for name, kind in kinds.items():
        if shared_kv:
            out[name, True] = out[name, False] = borrows(kind.attend)
        else:
            out[name, True] = kind.attend if kind.appends else writes(write, kind.attend, pass_kv=together)
            out[name, False] = reads(kind.attend, group)
    return out


def refuses(text: str, error: type[Exception] = BadInputError) -> Callable[..., Any]:
    """A callable that only says why it is none."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise error(text)

    return refuse
