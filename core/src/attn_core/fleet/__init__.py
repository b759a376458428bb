"""Many ranks, one decision: what each rank says of itself, and what all of them run.

Pure data in, pure data out, so that any transport will do::

    mine = fleet.describe(model, platform=get_platform())          # on every rank: a dict of JSON
    decided = fleet.decide(all_of_them, model)                     # anywhere; rank i said all_of_them[i]
    decision = decided.decision_of(rank)                           # equal page size, cache dtype, layout everywhere

:mod:`attn_core.integrations.distributed` does it over a process group of torch; :func:`read` takes a fleet on paper.
Nothing here imports torch.
"""

from attn_core.fleet.about import FleetError, describe, failure
from attn_core.fleet.agree import decide
from attn_core.fleet.decision import FleetDecision, Kind
from attn_core.fleet.paper import read
from attn_core.fleet.ranks import Ranks

__all__ = ["FleetDecision", "FleetError", "Kind", "Ranks", "decide", "describe", "failure", "read"]
