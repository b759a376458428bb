"""The examples as modules, and toy sizes on one thread."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
torch.set_num_threads(1)
