"""Hugging Face configs as :class:`attn_core.ModelSpec`: one small module per family of rules. Imports no torch.

``read_hf_config`` is what ``ModelSpec.from_hf_config`` calls. A family is a row of :mod:`attn_core.models.registry`:
the model types it reads and a function from a :class:`View` of the config to named groups of layers.
"""

from attn_core.models.read import read_hf_config

__all__ = ["read_hf_config"]
