"""Attention in plain torch operations: right everywhere, fast on CPUs, the last resort elsewhere.

Why it looks as it does. On a CPU the obvious form, gather all pages of a batch and call
``scaled_dot_product_attention(enable_gqa=True)``, runs at 2 % of memory bandwidth: the gathered batch is a huge fresh
temporary (page faults), and every query head walks over its keys alone. So:

* one sequence at a time, its pages gathered into a buffer that the plan keeps and that stays in cache;
* in decode, the query heads that share a key/value head are packed into the query length, so each key is read once;
* a sequence's keys are cut into stretches, one per thread, so that each thread attends to the keys it gathered;
* the flash kernel behind ``scaled_dot_product_attention`` is called directly, because that way it also returns the
  log-sum-exp: sinks, LSE and merging then cost next to nothing;
* what can be a key range (windows, chunks) is one; masks exist for the rest, made once per step and shared by layers;
* scores are written out (in float32, query block by query block) only for softcap, and on devices other than CPUs.

A contiguous run of pages is gathered all the same: attention over the strided cache in memory is slower than the copy.

``rows`` says what is promised. ``decode``, ``prefill`` and ``sparse`` attend, ``setup`` is what they know at bind,
``steps`` what they plan; ``tiles`` and ``splits`` cut a step into pieces, ``sources`` fetches k and v, ``one_tile`` and
``scores`` compute a piece, ``kv_write`` writes the public layouts. This file imports no torch.
"""

from attn_core.backends.torch_native.rows import backends

__all__ = ["backends"]
