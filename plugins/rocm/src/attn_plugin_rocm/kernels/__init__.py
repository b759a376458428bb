"""Adapters: one file per family of AITER's kernels. Imported when a backend is bound; AITER in ``bind`` only.

AITER compiles a kernel at its first use, for minutes: run a step of every kind before capturing graphs.
"""
