"""Whether a batch, a capture or a call is one that a group's kernels were chosen for. Not claimed means refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_core.errors import BadInputError
from attn_core.runtime import checks
from attn_core.runtime.batch import Batch
from attn_core.runtime.plan import Capture, Plan

if TYPE_CHECKING:
    from attn_core.runtime.bound import BoundGroup


def batch(group: BoundGroup, given: Batch) -> int:
    """Raise :class:`BadInputError` unless ``group`` can plan ``given``; returns the pages a cache must have for it."""
    where, spec, options = f"plan of group {group.name!r}", group.spec, group.options
    if given.attn_type != spec.attn_type:
        raise BadInputError(
            f"{where}: the batch is for attn_type={given.attn_type!r}, the group is {spec.attn_type!r}; "
            f"build it with Batch(..., attn_type={spec.attn_type!r})"
        )
    if not checks.same_device(given.device, group.torch_device):
        raise BadInputError(
            f"{where}: the batch lies on {given.device}, the group was bound for {group.torch_device}; "
            "move its tensors there, or give Batch(device=...)"
        )
    width = given.decode_width
    claims = (
        (width not in (1, options.verify_width), f"decode_width={width}", f"verify_width={width}"),
        (given.tree_mask is not None and not options.tree_mask, "a tree_mask", "tree_mask=True"),
        (not given.exact and options.host_lengths == "exact", "only bounds of kv_lens", "host_lengths='bounds'"),
        (
            given.bidirectional_spans is not None and not spec.bidirectional_prefix,
            "bidirectional_spans",
            "bidirectional_prefix=True",
        ),
    )
    for unclaimed, what, option in claims:
        if unclaimed:
            raise BadInputError(f"{where}: the batch has {what}, but was resolved without it; resolve with {option}")
    if group.materialised and not given.exact and given.rest_part is not None:
        raise BadInputError(
            f"{where}: materialised MLA prefill cuts cached context by exact kv_lens, this batch has only bounds; "
            "wait for the lengths of prefill rows"
        )
    limits = (("max_num_seqs", given.num_seqs), ("max_model_len", given.max_kv_len if spec.causal else 0))
    for name, got in limits:
        limit = getattr(options, name)
        if limit is not None and got > limit:
            raise BadInputError(f"{where}: the batch has {got}, more than {name}={limit} that was resolved for")
    if group.page_size is None:
        return 0
    if given.block_table is None:
        raise BadInputError(f"{where}: the batch has no block_table; a group with a cache needs one")
    return given.check_pages(group.page_size, group.num_pages if given.device.type == "cpu" else None)


def captured(group: BoundGroup, given: Batch, capture: Capture) -> Batch:
    """``given`` padded to the size that was captured; raises :class:`BadInputError` where it cannot be."""
    where = f"plan of group {group.name!r}"
    if group.graph not in ("full", "decode"):
        raise BadInputError(
            f"{where}: capture= given, but graph={group.graph!r} was decided; resolve with graph='decode' or 'full'"
        )
    fits = (
        given.num_decode_rows == given.num_seqs <= capture.max_seqs
        and given.decode_width == capture.decode_width
        and given.max_kv_len <= capture.max_kv_len
    )
    if not fits:
        raise BadInputError(f"{where}: {given!r} does not fit {capture}; a captured plan serves decode rows up to it")
    return given.padded(capture.max_seqs)


def refilled(group: BoundGroup, out: Plan, capture: Capture | None) -> None:
    """Raise :class:`BadInputError` unless ``out`` is a plan of this group, captured as asked."""
    if out.group is not group:
        raise BadInputError(f"plan of group {group.name!r}: out= is a plan of group {out.group.name!r}")
    if capture is not None and capture != out.capture:
        raise BadInputError(
            f"plan of group {group.name!r}: out= was made for {out.capture}, not for {capture}; plan anew without out="
        )


def misuse(group: BoundGroup, kv_cache: Any, plan: Plan, sinks: Any, indices: Any, bias: Any) -> BadInputError:
    """What was wrong with a call of ``forward``."""
    where, spec = f"forward of group {group.name!r}", group.spec
    if plan.group is not group:
        return BadInputError(
            f"{where} got a plan of group {plan.group.name!r}; windows, slots and metadata differ per group: "
            "make each group's plan by its own plan()"
        )
    if group.page_size is not None and (kv_cache.layout, kv_cache.page_size) != (group.kv_layout, group.page_size):
        return BadInputError(
            f"{where} got a cache of layout {kv_cache.layout!r} with pages of {kv_cache.page_size}, but the group "
            f"reads {group.kv_layout!r} with pages of {group.page_size}; use new_kv_cache or wrap one of that shape"
        )
    if group.page_size is not None and kv_cache.num_pages < plan.num_pages:
        return BadInputError(
            f"{where}: the planned batch uses pages up to {plan.num_pages - 1}, but the cache has {kv_cache.num_pages} "
            "pages; its block_table or slot_mapping belongs to another cache"
        )
    if sinks is None and spec.sinks:
        return BadInputError(f"{where} needs sinks=prepare_sinks(the layer's sinks); without them results are wrong")
    offered = (
        ("sinks", sinks, "sinks=True", spec.sinks),
        ("indices", indices, "sparse='dsa'", spec.sparse != "none"),
        ("bias", bias, "bias=True", spec.bias),
    )
    name, field = next((name, field) for name, value, field, wanted in offered if value is not None and not wanted)
    return BadInputError(
        f"{where} got {name}, but its AttentionSpec does not say {field}, so no kernel was chosen for it; "
        "resolve with a spec that does"
    )
