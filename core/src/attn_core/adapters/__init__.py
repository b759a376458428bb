"""For authors of adapters: what binding a vendor's kernels needs again and again.

``load`` imports a vendor's functions and says what is missing. ``Paged``, ``Indexed`` and ``Ragged`` hold what kernels
over block tables, lists of pages and rows in memory need for one step, and ``refilled`` makes the ``plan`` of such a
step. ``both_sides`` and ``left`` put ``sliding_window`` in a vendor's words.
"""

from attn_core.adapters.indexed import Indexed
from attn_core.adapters.load import load
from attn_core.adapters.paged import Paged
from attn_core.adapters.ragged import Ragged, blind_tokens
from attn_core.adapters.refilled import refilled
from attn_core.adapters.windows import both_sides, left

__all__ = ["Indexed", "Paged", "Ragged", "blind_tokens", "both_sides", "left", "load", "refilled"]
