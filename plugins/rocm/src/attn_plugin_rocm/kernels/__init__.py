"""Adapters: one file per family of AITER's kernels, and one for SGLang's wave kernels. Imported when a backend is
bound; AITER and SGLang in ``bind`` only.

Both compile a kernel at its first use, AITER for minutes: run a step of every kind before capturing graphs.
"""
