"""Slots: the names under which compiled graphs find the plan of the step that runs now."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError, BadInputError
from attn_core.runtime import BoundGroup, KVCache, Plan
from attn_core.runtime.cache import LAYOUTS, Sizes


class Slot:
    """One batch in flight of one group. Graphs hold its :attr:`handle` as a constant; its plan changes every step.

    An engine keeps as many slots per group as it has batches in flight, and each as long as graphs that name it. The
    name goes with the slot: a graph that still says it raises :class:`BadInputError`. ``name`` is for those who need
    the same handle in every process (caches of compiled code); left out, slots are numbered per group name.
    """

    handle: str
    group: BoundGroup

    def __init__(self, group: BoundGroup, name: str | None = None) -> None:
        self.group = group
        self._held = held = Held(group)
        numbered = name is None
        while name is None or (numbered and name in _table):
            name = f"{group.name}.{next(_numbers[group.name])}"
        if _table.setdefault(name, held) is not held:
            raise BadInputError(f"slot {name!r} exists already; a name stands for one batch in flight, take another")
        self.handle = name
        weakref.finalize(self, _table.pop, name, None).atexit = False

    @property
    def plan(self) -> Plan | None:
        """The plan of the step that runs now: what the next ``group.plan(batch, out=slot.plan)`` refills."""
        return self._held.plan

    @torch.compiler.disable  # type: ignore[untyped-decorator] # traced, it would move behind the calls that need it
    def set(self, plan: Plan | None) -> None:
        """From now on the operators run this step. Outside of compiled code; raises :class:`BadInputError` for a plan
        of another group."""
        if plan is not None and plan.group is not self.group:
            raise BadInputError(
                f"slot {self.handle!r} belongs to group {self.group.name!r}, the plan to group {plan.group.name!r}; "
                "each group has its own slots"
            )
        self._held.plan = plan

    @contextmanager
    def using(self, plan: Plan) -> Iterator[Slot]:
        """``plan`` inside the block, no plan after it."""
        self.set(plan)
        try:
            yield self
        finally:
            self.set(None)

    def __repr__(self) -> str:
        return f"Slot({self.handle!r}, {'no plan' if self.plan is None else self.plan.batch})"


class Held:
    """What the operators need of a slot: everything but the plan is known when the slot is made."""

    __slots__ = ("dtype", "group", "heads", "kv_dtype", "layout", "one", "page_size", "plan", "shapes", "width")

    plan: Plan | None

    def __init__(self, group: BoundGroup) -> None:
        if group.spec.dual_chunk is not None:
            raise AttnCoreError(
                f"group {group.name!r} has dual chunk attention, whose three q the operators have no arguments for; "
                "call group.forward"
            )
        form = next(group.bindings[r].form for r in ("decode", "prefill", "encode") if r in group.bindings)
        facts = group.spec.facts(form)
        width = facts["v_head_dim"]
        if not isinstance(width, int):
            raise AttnCoreError(f"group {group.name!r} does not say how wide its output is")
        self.plan, self.group, self.heads, self.width = None, group, group.spec.num_heads, width
        self.dtype: torch.dtype = next(iter(group.bindings.values())).dtype
        self.one = torch.ones((), device=group.torch_device)
        self.page_size, self.layout, self.kv_dtype = group.page_size or 0, group.kv_layout or "", group.kv_dtype
        self.shapes = _cache_shapes(group)

    def current(self, slot: str) -> Plan:
        if self.plan is None:
            raise AttnCoreError(f"slot {slot!r} holds no plan; call slot.set(group.plan(batch)) before every step")
        return self.plan

    def check_cache(self, slot: str, tensors: Sequence[Tensor]) -> None:
        """Raise :class:`BadInputError` unless these are a cache of this group. Pages are not counted here."""
        if self.shapes is None or (
            len(tensors) == len(self.shapes)
            and all(t.shape[1:] == shape and t.dtype == self.kv_dtype for t, shape in zip(tensors, self.shapes))
        ):
            return
        wanted = f"{self.layout} (pages, ...) of {self.shapes}, {self.kv_dtype}" if self.page_size else "none"
        raise BadInputError(
            f"slot {slot!r}: kv_cache has {[(tuple(t.shape), t.dtype) for t in tensors]}, but group "
            f"{self.group.name!r} keeps {wanted}; pass list(cache.data) of a cache of this group"
        )

    def cache(self, slot: str, tensors: Sequence[Tensor], k_scale: Tensor | None, v_scale: Tensor | None) -> KVCache:
        """The tensors as the kernels want them. Scales that lie on an accelerator have no host form."""
        self.check_cache(slot, tensors)
        return KVCache(
            data=tuple(tensors),
            layout=self.layout,
            page_size=self.page_size,
            k_scale_t=self.one if k_scale is None else k_scale,
            v_scale_t=self.one if v_scale is None else v_scale,
            scales=(_on_host(k_scale), _on_host(v_scale)),
        )


_table: dict[str, Held] = {}
_numbers: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


def held(slot: str) -> Held:
    """Raises :class:`BadInputError` for a handle that no living slot has."""
    found = _table.get(slot)
    if found is None:
        raise BadInputError(
            f"no slot {slot!r}: it was never made, or nobody kept it; keep Slot(group) as long as graphs name its "
            f"handle. Slots there are: {', '.join(_table) or 'none'}"
        )
    return found


def _on_host(scale: Tensor | None) -> float | None:
    if scale is None:
        return 1.0
    return float(scale) if scale.dim() == 0 and scale.device.type == "cpu" else None


def _cache_shapes(group: BoundGroup) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of a cache's tensors without their first axis; None where only their writer knows, ``((),)`` (which no
    tensors have) where the group keeps none."""
    layout, page_size, _, widths = group.cache_signature
    if not isinstance(layout, str) or not isinstance(page_size, int):
        return ((),)
    if layout not in LAYOUTS:
        return None
    heads, d, dv = widths if isinstance(widths, tuple) else (0, 0, 0)
    sizes = Sizes(page_size, heads, d, dv, group.spec.latent_dim or 0, group.spec.rope_dim or 0)
    return tuple(shape[1:] for shape in LAYOUTS[layout].shapes(sizes, 1))
