"""Adapters: fused infer attention, the cache writer. Imported when a backend is bound; torch_npu in ``bind`` only."""
