"""Importing this makes the published torchvision importable beside a torch without CUDA."""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class TorchvisionSchemas(importlib.abc.MetaPathFinder):
    """The published torchvision is linked for CUDA; without CUDA its operators are missing, and with them the schemas
    that its Python side wants to extend. SGLang imports it, text models never call it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


FINDER = TorchvisionSchemas()
"""Kept: schemas live as long as the library object that defined them."""

sys.meta_path.insert(0, FINDER)
