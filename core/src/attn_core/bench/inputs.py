"""Random q, k and v for a shape, made once and shared by all backends, so that they answer the same question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_core.bench.shapes import Shape

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Inputs:
    """Packed by sequence. ``q`` ``(tokens, heads, width)``; ``k``, ``v`` of every key, the cached ones included:
    ``(keys, kv heads, width)``, or for latent caches ``(keys, latent)`` and ``(keys, rope)``."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def make(shape: Shape, absorbed: bool, device: torch.device) -> Inputs:
        """Standard normal numbers, seeded by the shape's lengths; the same on every device."""
        s, dtype = shape.spec, _DTYPES[shape.spec.dtype]
        generator = torch.Generator().manual_seed(sum(shape.kv_lens) + 7 * len(shape.kv_lens))
        tokens, keys = sum(shape.query_lens), sum(shape.kv_lens)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32).to(dtype).to(device)

        if absorbed:
            latent, rope = s.latent_dim or 0, s.rope_dim or 0
            return Inputs(normal(tokens, s.num_heads, latent + rope), normal(keys, latent), normal(keys, rope))
        heads = s.num_heads if s.kind == "mla" else s.num_kv_heads
        return Inputs(
            normal(tokens, s.num_heads, s.head_dim),
            normal(keys, heads, s.head_dim),
            normal(keys, heads, s.v_head_dim or s.head_dim),
        )

    def new(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """k and v of the step's new tokens: the last of each sequence."""
        at, starts = [], 0
        for n, m in zip(shape.query_lens, shape.kv_lens):
            at.append(torch.arange(starts + m - n, starts + m))
            starts += m
        rows = torch.cat(at).to(self.k.device)
        return self.k[rows], self.v[rows]
