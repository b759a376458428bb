"""Caches of 310P: layout ASCEND_NZ, two fractal tensors ``(pages, kv heads * width / 16, page size, 16)``.

A key's numbers lie in the order of NHD, 16 of them in each slice of the second axis. Source: op-plugin
python/atb/_atb_api_docs.py, test_scatter_pa_kv_cache.py (517f2e7); vllm-ascend 182b75e _310p/attention/attention_v1.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attn_core.adapters import load
from attn_core.errors import BadInputError
from attn_core.runtime import Binding
from attn_plugin_ascend.backends import TORCH_NPU

FRACTAL_NZ = 29
"""The number of the format in torch_npu."""
COLUMNS = 16
"""Of one fractal."""


def shapes(b: Binding) -> tuple[tuple[int, ...], ...]:
    """Of the k and the v tensor, without the number of pages."""
    return tuple((b.num_kv_heads * width // COLUMNS, b.page_size or 0, COLUMNS) for width in (b.head_dim, b.v_head_dim))


def pages_of(b: Binding) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """``(kv_cache)`` -> its two tensors, looked at once per cache: ATB writes by the format that memory is tagged with,
    and copies what is not closely packed."""
    format_of, wanted = load(TORCH_NPU, "torch_npu", "get_npu_format"), shapes(b)

    def look(kv_cache: Any) -> tuple[Tensor, Tensor]:
        keys, values = kv_cache.data
        for t, shape in zip(kv_cache.data, wanted):
            if t.shape[1:] != shape or not t.is_contiguous() or format_of(t) != FRACTAL_NZ:
                raise BadInputError(
                    f"layout ASCEND_NZ is (pages, {', '.join(map(str, shape))}), closely packed, in format "
                    f"{FRACTAL_NZ} (FRACTAL_NZ); this cache has {tuple(t.shape)} with strides {t.stride()} in format "
                    f"{format_of(t)}; make it by new_kv_cache or torch_npu.empty_with_format"
                )
        kv_cache.memo["ascend_nz"] = keys, values
        return keys, values

    def pages(kv_cache: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] | None = kv_cache.memo.get("ascend_nz")
        return found or look(kv_cache)

    return pages
