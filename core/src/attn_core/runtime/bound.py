"""A group of layers with its kernels bound: the functions an engine holds, and the plan of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from attn_core.errors import AttnCoreError, BindError
from attn_core.runtime import admit, sinks, steps
from attn_core.runtime.adapt import Attend, fitted, gather_fitted, write_fitted
from attn_core.runtime.batch import Batch
from attn_core.runtime.bind import Bound, Choice, GroupFacts, bind_context, bind_roles
from attn_core.runtime.binding import Binding
from attn_core.runtime.cache import LAYOUTS, KVCache, Sizes, wrap_kv_cache
from attn_core.runtime.context import CHUNK_TOKENS, cut, prefill_with_context
from attn_core.runtime.merge import merge_state
from attn_core.runtime.plan import Capture, ContextChunk, Plan
from attn_core.spec import AttentionSpec, Device, EngineOptions, check

ATTENTION_ROLES = ("encode", "prefill", "decode")

DELEGATED = (
    "plan", "forward", "prefill", "decode", "encode", "write_kv", "gather_kv", "prefill_with_context", "prepare_sinks",
    "new_kv_cache", "merge_state",
)  # fmt: skip
"""What an engine calls: plain attributes of a BoundGroup, and of the AttentionBackend of a model with one group."""


def bind_group(
    name: str,
    spec: AttentionSpec,
    choices: Mapping[str, Choice],
    values: Mapping[str, Any],
    options: EngineOptions,
    device: Device,
    torch_device: torch.device,
    *,
    alibi_slopes: tuple[float, ...] | None = None,
) -> BoundGroup:
    """Bind the roles of one group.

    ``spec`` is the group after sharding. ``choices`` maps ``encode``, or ``prefill``, ``decode`` and ``kv_write``, to
    what was decided; a role left out (disaggregated serving) refuses to be called. ``values`` holds what was settled:
    ``page_size``, ``kv_cache_dtype``, ``kv_layout``, ``mla_query``, ``scale``, ``graph``. ``alibi_slopes`` are this
    rank's, the spec's unless given.

    A group whose ``kv_from`` names another one reads that group's cache: ``kv_write`` is not bound, ``write_kv`` does
    nothing and ``new_kv_cache`` raises.

    Raises :class:`BindError` naming backend, role, group and bind string; a plugin's :class:`MissingKernelError`
    passes through, so that the core can resolve again.
    """
    slopes = spec.alibi_slopes if alibi_slopes is None else alibi_slopes
    facts = GroupFacts(
        name=name, spec=spec, values=values, options=options, device=device, torch_device=torch_device,
        alibi_slopes=slopes,
    )  # fmt: skip
    return BoundGroup(facts, choices)


class BoundGroup:
    """One group's kernels. Attributes are plain functions; nothing is looked up or chosen when they are called.

    ``prefill``, ``decode`` and ``encode`` *are* what the backend's bind returned, unless the kernel is wider than the
    model (padding), cannot fill every ``out=``, or wants sinks of its own: then they are a closure made here.
    A unified kernel's plan covers all rows, so a mixed batch goes through ``forward``.
    """

    prefill: Attend
    decode: Attend
    encode: Attend
    write_kv: Callable[..., None]
    """``(k, v, kv_cache, plan)``: write the new keys at the batch's slots. MLA: k is the latent ``(tokens, latent)``,
    v the rotary part ``(tokens, rope)``. Does nothing for a group with ``kv_from``."""
    gather_kv: Callable[[KVCache, Plan, ContextChunk], tuple[Tensor, Tensor]]
    """``(kv_cache, plan, chunk)``: a chunk's keys as packed rows in the group's dtype, k and v (MLA: latent, rope)."""
    prepare_sinks: Callable[[Tensor], Any]
    """A layer's sinks ``(num_heads,)`` as ``forward`` wants them; once per layer."""

    def __init__(self, facts: GroupFacts, choices: Mapping[str, Choice]) -> None:
        spec, values = facts.spec, facts.values
        self.name = facts.name
        self.spec = spec
        self.options = facts.options
        self.device = facts.device
        self.torch_device = facts.torch_device
        self._bound = bound = bind_roles(facts, choices)
        self.bindings: dict[str, Binding] = {role: b.binding for role, b in bound.items()}
        self.unified = "decode" in bound and bound.get("prefill") is bound["decode"]
        self.materialised = "prefill" in bound and bound["prefill"].binding.form == "materialised"
        self._context = bind_context(facts, choices["prefill"]) if self.materialised else None
        first = next(iter(self.bindings.values()))
        self.page_size, self.kv_layout = first.page_size, first.kv_layout
        self.kv_cache_dtype, self.kv_dtype = first.kv_cache_dtype, first.kv_dtype
        self.scale, self.mla_query = first.scale, first.mla_query
        self.graph: str = values.get("graph", "none")
        self._caches: WeakSet[KVCache] = WeakSet()
        self._cache_widths = self._agree_on_cache()
        self._set_attention()
        self._set_cache_access()
        self._planners = self._make_planners()
        self._steps = self._make_steps()
        self.forward: Attend = self._make_forward()
        # Stored, not bound on access: attn.plan is group.plan, and reading one makes no method object.
        self.plan = self._plan
        self.new_kv_cache = self._new_kv_cache
        self.prefill_with_context = self._prefill_with_context
        own = (b.kernels.merge_state for b in bound.values())
        self.merge_state = next(filter(None, own), merge_state)

    # made once --------------------------------------------------------------------------------------------------------

    def _agree_on_cache(self) -> tuple[int, int, int] | None:
        """The cache's (kv heads, head_dim, v_head_dim), the same for all who touch it; None without a cache."""
        fits = {r: b.fit for r, b in self._bound.items() if self.spec.cached and b.binding.form != "materialised"}
        widths = {r: (f.kv_heads, f.kernel_head_dim, f.kernel_v_head_dim) for r, f in fits.items()}
        if len(set(widths.values())) > 1:
            raise BindError(
                f"group {self.name!r}: its roles disagree on the cache's (kv heads, head_dim, v_head_dim): {widths}; "
                "a group has one kernel width"
            )
        return next(iter(widths.values()), None)

    def _set_attention(self) -> None:
        spec, where = self.spec, f"group {self.name!r} ({self.spec.attn_type})"
        bound = {role: self._bound[role] for role in ATTENTION_ROLES if role in self._bound}
        own_sinks = spec.sinks and sinks.per_role(bound)
        calls: dict[int, Attend] = {}  # a unified kernel is wrapped once: decode is prefill
        for role in ATTENTION_ROLES:
            if role not in bound:
                text = f"{where} has no role {role}; its roles are {', '.join(bound)}"
                setattr(self, role, steps.refuses(text, AttnCoreError))
                continue
            b = bound[role]
            call = calls.setdefault(id(b), _call_of(b, role))
            setattr(self, role, sinks.with_own(call, role) if own_sinks else call)
        self.prepare_sinks = (
            sinks.preparer(f"prepare_sinks of {where}", spec.num_heads, bound, self.torch_device)
            if spec.sinks
            else steps.refuses(f"prepare_sinks of {where}: its AttentionSpec has no sinks")
        )
        self._attend_context = None if self._context is None else _call_of(self._context, "prefill")

    def _set_cache_access(self) -> None:
        writer, where = self._bound.get("kv_write"), f"group {self.name!r}"
        gather = None if writer is None else writer.kernels.gather
        if self.spec.kv_from is not None:
            self.write_kv = _write_nothing
        elif writer is None:
            self.write_kv = steps.refuses(f"{where} has no kv_write kernel bound", AttnCoreError)
        else:
            self.write_kv = write_fitted(writer.kernels.call, writer.fit)
        if writer is None or gather is None:
            self.gather_kv = steps.refuses(f"{where}: its kv_write kernel offers no gather_kv", AttnCoreError)
        else:
            self.gather_kv = gather_fitted(gather, writer.fit)

    def _make_planners(self) -> tuple[tuple[str, Callable[..., Any], Callable[[Batch], Batch | None]], ...]:
        """(slot on the plan, the kernel's plan, the rows it is for): what filling a plan goes through."""
        rows: dict[str, Callable[[Batch], Batch | None]] = {
            "encode": lambda b: b,
            "decode": (lambda b: b) if self.unified else (lambda b: b.decode_part),
            "prefill": _new_tokens if self.materialised else (lambda b: b.rest_part),
            "kv_write": lambda b: None if b.slot_mapping is None else b,
        }
        return tuple(
            ("write" if role == "kv_write" else role, b.kernels.plan, rows[role])
            for role, b in self._bound.items()
            if not (self.unified and role == "prefill")
        )

    def _make_steps(self) -> dict[tuple[str, bool], Attend]:
        if "encode" in self._bound:
            return {("encode", False): self.encode}
        spec, kinds = self.spec, dict[str, steps.Kind]()
        together = spec.attn_type == "decoder"
        appends = {role: "appends" in b.claims for role, b in self._bound.items()}
        if any(appends.values()) and (spec.kv_from is not None or not together):
            raise BindError(
                f"group {self.name!r}: a kernel that appends k and v itself serves neither shared KV (kv_from) nor "
                f"cross attention; chosen: {', '.join(f'{r}={b.backend}' for r, b in self.bindings.items())}"
            )
        if "decode" in appends:
            kinds["all" if self.unified else "decode"] = steps.Kind(self.decode, appends["decode"])
        if "prefill" in appends and not self.unified:
            kinds["prefill"] = steps.Kind(self.prefill, appends["prefill"])
        if len(kinds) == 2:
            both = steps.mixed(
                self.decode, self.prefill,
                split_q=spec.dual_chunk is not None or (spec.kind == "mla" and self.mla_query == "split"),
                decode_kv=appends["decode"], prefill_kv=together,
                width=self._bound["decode"].fit.v_head_dim, dtype=self.bindings["decode"].dtype,
            )  # fmt: skip
            kinds["mixed"] = steps.Kind(both, appends["decode"] and appends["prefill"])
        table = steps.table(
            kinds, self.write_kv, group=self.name, shared_kv=spec.kv_from is not None, together=together
        )
        if self.materialised:
            refuse = steps.refuses(
                f"forward of group {self.name!r}: its prefill is materialised MLA, whose q, k, v are not decode's; "
                "call write_kv(latent, rope, ...), then prefill_with_context(q, k, v, ...) for the prefill rows and "
                "decode(q, ...) for the decode rows"
            )
            table.update({key: refuse for key in table if key[0] != "decode"})
        return table

    def _make_forward(self) -> Attend:
        has_sinks, has_indices, has_bias = self.spec.sinks, self.spec.sparse != "none", self.spec.bias
        cached, layout, page_size = self.spec.cached, self.kv_layout, self.page_size

        def forward(
            q: Any, k: Any, v: Any, kv_cache: Any, plan: Any, *,
            sinks: Any = None, indices: Any = None, bias: Any = None, out: Any = None, return_lse: bool = False,
        ) -> Any:  # fmt: skip
            """Write the new keys, then attend to all; packed ``(tokens, heads, width)`` in and out.

            Returns the output (``out`` when given), or ``(output, lse)``. Raises :class:`BadInputError` for a plan of
            another group, a cache that is not this group's, and sinks, indices or bias that no kernel was chosen for.
            """
            if (
                plan.group is not self
                or (
                    cached
                    and (
                        kv_cache.layout != layout
                        or kv_cache.page_size != page_size
                        or kv_cache.num_pages < plan.num_pages
                    )
                )
                or (sinks is None) is has_sinks
                or (indices is not None and not has_indices)
                or (bias is not None and not has_bias)
            ):
                raise admit.misuse(self, kv_cache, plan, sinks, indices, bias)
            return plan.step(
                q, k, v, kv_cache, plan, sinks=sinks, indices=indices, bias=bias, out=out, return_lse=return_lse
            )

        return forward

    @property
    def num_pages(self) -> int | None:
        """Pages of the largest cache made here and still in use; None while all caches are wrapped ones."""
        return max((cache.num_pages for cache in self._caches), default=None)

    @property
    def cache_signature(self) -> tuple[object, ...]:
        """What groups that share a cache must agree on."""
        return (self.kv_layout, self.page_size, self.kv_cache_dtype, self._cache_widths)

    # per step ---------------------------------------------------------------------------------------------------------

    def _plan(self, batch: Batch, *, capture: Capture | None = None, out: Plan | None = None) -> Plan:
        """Everything the kernels need for one step.

        ``out`` is refilled in place and returned: its workspaces, wrappers and addresses survive. ``capture`` sizes
        everything for a captured graph; later batches of that plan are padded to it (query length ``decode_width``,
        kv length 1, page 0, slots -1), so q and out hold ``max_seqs * decode_width`` tokens.
        Raises :class:`BadInputError`, before touching ``out``, when batch and group do not fit.
        """
        if out is not None:
            admit.refilled(self, out, capture)
            capture = out.capture
        num_pages = admit.batch(self, batch)
        if capture is not None:
            batch = admit.captured(self, batch, capture)
        plan = Plan(self, capture) if out is None else out
        plan.clear()
        try:
            self._fill(plan, batch)
            plan.num_pages = num_pages
        except BaseException:
            plan.clear()
            raise
        return plan

    def _fill(self, plan: Plan, batch: Batch) -> None:
        for slot, make, rows in self._planners:
            part = rows(batch)
            if part is not None:
                plan.kept[slot] = made = make(part, capture=plan.capture, out=plan.kept.get(slot))
                setattr(plan, slot, made)
        if self.unified:
            plan.prefill = plan.decode
        plan.batch = batch
        plan.num_decode_rows, plan.num_decode_tokens = batch.num_decode_rows, batch.num_decode_tokens
        if self.materialised:
            self._cut_context(plan, CHUNK_TOKENS)
        plan.step = self._steps[self._kind(batch), batch.slot_mapping is not None]

    def _kind(self, batch: Batch) -> str:
        if "encode" in self._bound:
            return "encode"
        if self.unified:
            return "all"
        if batch.num_decode_rows == batch.num_seqs:
            return "decode"
        return "mixed" if batch.num_decode_rows else "prefill"

    def _cut_context(self, plan: Plan, chunk_tokens: int) -> None:
        part = None if plan.batch is None else plan.batch.rest_part
        if part is None or self._context is None or self.page_size is None:
            plan.chunks = ()
        else:
            plan.chunks = cut(plan, part, self._context.kernels.plan, self.page_size, chunk_tokens)
        plan.chunk_tokens = chunk_tokens

    # per layer --------------------------------------------------------------------------------------------------------

    def _new_kv_cache(self, num_pages: int, *, k_scale: float | Tensor = 1.0, v_scale: float | Tensor = 1.0) -> KVCache:
        """One layer's cache of ``num_pages`` pages, zeroed; page 0 is the null page. Call it once per layer.

        Raises :class:`AttnCoreError` for a group without a cache of its own.
        """
        where, spec = f"new_kv_cache of group {self.name!r}", self.spec
        layout, widths = self.kv_layout, self._cache_widths
        check.size(where, "num_pages", num_pages)
        if spec.kv_from is not None:
            raise AttnCoreError(f"{where}: it reads the cache of group {spec.kv_from!r}; pass that layer's cache")
        if widths is None or layout is None or self.page_size is None or self.kv_dtype is None:
            raise AttnCoreError(f"{where}: attn_type={spec.attn_type!r} keeps no KV cache; pass kv_cache=None")
        writer = self._bound.get("kv_write")
        if layout in LAYOUTS:
            heads, d, dv = widths
            sizes = Sizes(self.page_size, heads, d, dv, spec.latent_dim or 0, spec.rope_dim or 0)
            shapes = LAYOUTS[layout].shapes(sizes, num_pages)
            data = tuple(torch.zeros(s, dtype=self.kv_dtype, device=self.torch_device) for s in shapes)
        elif writer is not None and writer.kernels.allocate is not None:
            data = tuple(t.zero_() for t in writer.kernels.allocate(num_pages))
        else:
            raise AttnCoreError(f"{where}: nobody allocates layout {layout!r}; make it and use wrap_kv_cache")
        cache = wrap_kv_cache(*data, layout=layout, page_size=self.page_size, k_scale=k_scale, v_scale=v_scale)
        self._caches.add(cache)
        return cache

    def _prefill_with_context(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_cache: KVCache,
        plan: Plan,
        expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        sinks: Any = None,
        chunk_tokens: int | None = None,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Materialised MLA: new tokens among themselves, then their cached context, chunk by chunk, merged.

        ``q``, ``k``, ``v`` are the prefill rows' tokens (``plan.batch.rest_part``): ``(tokens, heads, width)``, ragged.
        ``expand(latent, rope) -> k, v`` applies the model's weights to gathered rows ``(keys, latent)`` and
        ``(keys, rope)``. At most ``chunk_tokens`` keys are expanded at a time; a number other than the one planned
        with cuts the plan anew. The kernel must return LSE when there is context: resolve with ``lse=True``.
        """
        if self._attend_context is None:
            raise AttnCoreError(f"group {self.name!r}: its prefill reads the cache itself; call forward or prefill")
        if plan.group is not self:
            raise admit.misuse(self, kv_cache, plan, sinks, None, None)
        if plan.prefill is None:
            raise AttnCoreError(
                f"group {self.name!r}: this plan has no prefill rows; its step is all decode, or failed"
            )
        if chunk_tokens is not None and chunk_tokens != plan.chunk_tokens:
            check.size("prefill_with_context", "chunk_tokens", chunk_tokens)
            self._cut_context(plan, chunk_tokens)
        return prefill_with_context(
            self, self._attend_context, q, k, v, kv_cache, plan, expand, sinks=sinks, out=out, return_lse=return_lse
        )

    def __repr__(self) -> str:
        chosen = ", ".join(f"{role}={b.backend}" for role, b in self.bindings.items())
        return f"BoundGroup({self.name!r}, {chosen}, {self.torch_device})"


def _call_of(b: Bound, role: str) -> Attend:
    """A role's kernel as the engine calls it. Decode looks at k and v only when it appends them itself."""
    reads_kv = role != "decode" or "appends" in b.claims
    return fitted(b.kernels.call, b.fit, b.claims, reads_kv=reads_kv)


def _new_tokens(batch: Batch) -> Batch | None:
    """Materialised MLA: the prefill rows over their own new tokens."""
    part = batch.rest_part
    return None if part is None else part.ragged(part.query_lens, causal=True)


def _write_nothing(k: Any, v: Any, kv_cache: Any, plan: Any) -> None:
    """``write_kv`` of a group with ``kv_from``: the group that owns the cache writes it."""
