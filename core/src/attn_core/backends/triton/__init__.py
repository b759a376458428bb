"""Portable kernels in Triton: what serves where no vendor kernel may. This file imports neither torch nor Triton."""

from attn_core.backends.triton.rows import backends

__all__ = ["backends"]
