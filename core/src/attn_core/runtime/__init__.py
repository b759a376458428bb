"""The runtime contract: batches, caches, plans and bound kernels. The first layer that imports torch.

An engine meets ``AttentionBackend`` and ``BoundGroup`` (functions to call), ``Batch``, ``KVCache``, ``Plan`` and
``Capture`` (what they take). A plugin's ``bind`` meets ``Binding`` and ``Kernels``; for ``allreduce_fusion``
``AllReduceBinding`` and ``AllReduceKernel``, and engines ``AllReduceFusion``.
"""

from attn_core.runtime.allreduce import AllReduceFusion
from attn_core.runtime.backend import AttentionBackend, SeveralGroupsError
from attn_core.runtime.batch import Batch
from attn_core.runtime.binding import AllReduceBinding, AllReduceKernel, Binding, Kernels
from attn_core.runtime.bound import BoundGroup, bind_group
from attn_core.runtime.cache import KV_DTYPES, KVCache, wrap_kv_cache
from attn_core.runtime.merge import merge_state
from attn_core.runtime.pages import CsrPages
from attn_core.runtime.plan import Capture, ContextChunk, Plan

__all__ = [
    "KV_DTYPES",
    "AllReduceBinding",
    "AllReduceFusion",
    "AllReduceKernel",
    "AttentionBackend",
    "Batch",
    "Binding",
    "BoundGroup",
    "Capture",
    "ContextChunk",
    "CsrPages",
    "KVCache",
    "Kernels",
    "Plan",
    "SeveralGroupsError",
    "bind_group",
    "merge_state",
    "wrap_kv_cache",
]
