"""Adapters: one file per backend. Imported when a backend is bound; MATE is imported in ``bind`` only.

What MATE gets wrong or leaves open, and where it is kept out (numbers as in the plugin's README):

* rows refuse it: widths above 512 or without a kernel, windows without causality, ``deterministic``, descales and fp8
  caches, sinks with LSE, heads that do not divide;
* calls here fix it: the kernel family of a ragged call is named, never ``auto``; causality goes as ``causal``, never as
  a window; sinks are bfloat16; ``cu_seqlens_k_new`` is never passed; metadata is made on the lengths' own device, for
  one group and one step, and lies on its plan.
"""
