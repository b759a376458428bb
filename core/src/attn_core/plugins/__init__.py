"""Plugins: discovery, containment, probing, and what is installed. Their declarations become a ``Catalog``.

A plugin that is broken costs itself only and shows up in every report; see ``guard.py`` for what is contained and
``probe.py`` for why devices are looked for in a child process. Nothing here imports torch.
"""

from attn_core.plugins.discover import Found, discover
from attn_core.plugins.installed import installed_packages
from attn_core.plugins.load import load_plugins
from attn_core.plugins.registry import Plugins
from attn_core.plugins.slots import slot_conflict

__all__ = ["Found", "Plugins", "discover", "installed_packages", "load_plugins", "slot_conflict"]
