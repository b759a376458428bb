"""Models whose softmax always has a learned sink per head: GPT-OSS, Granite with sliding windows."""

from __future__ import annotations

from attn_core.models import dense
from attn_core.models.view import View
from attn_core.spec.model import Group


def read(v: View) -> dict[str, Group]:
    """As any decoder, with sinks in every layer. Source: ``s_aux=self.sinks`` in transformers' modeling files.

    All of them mix windowed and full layers, so a window without a word on which layers have it is refused.
    """
    if v.get("sliding_window") is not None and v.get("sliding_window_pattern") is None:
        v.need("layer_types")
    return dense.read(v, sinks=True)
