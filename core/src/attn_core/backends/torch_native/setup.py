"""Everything the dense kernels know when they are bound: sizes, dtypes, rules, and how heads are laid out.

Query heads come in two layouts. Prefill has rows enough: ``(kv heads, heads of a group, queries, width)``, where k and
v serve their group through a stride-0 axis and nothing is copied. Decode has few, so a group is packed into the queries
and one pass over k and v serves it: ``(1, kv heads, queries x heads of a group, width)``; the first axis is for
stretches of keys (splits.py).
"""

from __future__ import annotations

import torch

from attn_core.backends.torch_native.float8 import UNIT
from attn_core.backends.torch_native.scores import HAS_FUSED
from attn_core.backends.torch_native.sources import Shape
from attn_core.backends.torch_native.tiles import Rules
from attn_core.runtime.binding import Binding


class Setup:
    """One role of one group, taken apart. Read-only after construction."""

    def __init__(self, b: Binding, *, paged: bool, ragged: bool, packed: bool) -> None:
        self.b, self.paged, self.ragged, self.packed = b, paged, ragged, packed
        """``ragged``: k and v may come as given, where ``paged`` is set for sequences without cached prefix only."""
        self.absorbed = b.form == "absorbed"
        self.new_only = b.form == "materialised" and b.spec.causal
        """Keys are the new tokens alone; the core adds cached context chunk by chunk."""
        self.heads_kv, self.heads, self.device = b.num_kv_heads, b.num_heads, b.torch_device
        group = self.heads // self.heads_kv
        self.axes, self.packed_heads = ((1, self.heads_kv), group) if packed else ((self.heads_kv, group), 1)
        """Leading axes of q, and how many heads follow each query in the rows."""
        self.per_kv_head = (1, -1, 1, 1) if packed else (-1, 1, 1, 1)
        """Shape of one number per key/value head, to go with q."""
        self.fused = HAS_FUSED and self.device.type == "cpu" and b.spec.logit_softcap is None
        """By torch's flash kernel; else scores are written out."""
        self.quantised = paged and b.kv_dtype is not None and b.kv_dtype.itemsize == 1
        self.unit = UNIT.get(b.kv_dtype, 1.0) if b.kv_dtype is not None and self.device.type == "cpu" else 1.0
        """What k and v of an 8-bit cache come short of, see float8.py."""
        converts = b.spec.sinks or (paged and b.kv_dtype != b.dtype)
        self.dtype = torch.float32 if converts or not self.fused else b.dtype
        """What the kernel computes in. With sinks float32: they scale its output, which must not be rounded twice."""
        self.rules = Rules(causal=b.spec.causal, window=b.sliding_window, chunk=b.spec.attention_chunk)
        self.slopes = None if b.alibi_slopes is None else torch.tensor(b.alibi_slopes, device=self.device)
        self.planes = self.heads if b.spec.bias or self.slopes is not None or not self.fused else 1
        """Score-sized matrices a tile needs."""
        self.unbounded = self.planes == 1 and self.fused
        self.triangles = self.unbounded and self.packed_heads == 1
        self.q_width = max(b.head_dim, b.v_head_dim) if self.fused else b.head_dim
        """The flash kernel knows one width: the narrower of k and v is filled up with zeros."""
        self.shape = self._shape()
        self.stretches = self._stretches() if packed and self.fused else 1
        """How many stretches decode cuts its keys into at most."""

    def _stretches(self) -> int:
        """One per thread where threads gather by keys; where they gather or copy by heads, enough to employ them."""
        threads = torch.get_num_threads()
        copied = self.dtype != self.b.kv_dtype or self.shape.wider
        by_heads = self.heads_kv > 1 and (copied or self.b.kv_layout == "HND")
        return -(-threads // self.heads_kv) if by_heads else threads

    def _shape(self) -> Shape:
        b, wide, lanes = self.b, self.q_width, 0 if self.packed else self.axes[1]
        if not self.absorbed:
            own = (b.head_dim, b.v_head_dim)
            kernel = (wide, wide) if self.fused else own
            return Shape(
                heads=self.heads_kv, widths=own, joined=False, kernel_widths=kernel, v_width=kernel[1], lanes=lanes,
                dtype=self.dtype,
            )  # fmt: skip
        split = b.kv_layout == "MLA_SPLIT"
        return Shape(
            heads=1,
            widths=(b.v_head_dim, b.head_dim - b.v_head_dim) if split else (b.head_dim,),
            joined=True,
            kernel_widths=(b.head_dim,),
            v_width=b.head_dim if self.fused else b.v_head_dim,  # the flash kernel's surplus is cut off the output
            lanes=lanes,
            dtype=self.dtype,
        )
