"""torch's flex_attention: masks and score changes as small functions that torch.compile fuses into one kernel.

One call per sequence, its pages gathered first. On accelerators the call is compiled (inductor, with dynamic shapes, on
the first step): only so is there a kernel at all. On CPUs it is traced but not compiled, in float32: inductor's CPU
kernel cannot return the log-sum-exp, so it has neither LSE nor sinks, needs a C++ compiler and 7 to 50 s to build, and
decodes at a fraction of torch_native's speed. What is left is a second, independent implementation to compare with.

This file imports no torch.
"""

from attn_core.backends.flex_attention.rows import backends

__all__ = ["backends"]
