"""Device memory that kernels work in. Each plan has its own: steps in flight on several streams may not share it."""

from __future__ import annotations

import torch
from torch import Tensor

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends for the partial results of split keys, and for trtllm-gen and XQA."""


def workspace(device: torch.device) -> Tensor:
    """uint8 on ``device``; whatever was there before."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
