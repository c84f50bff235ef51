"""Synchronous rounds, whose contributors a signed roster names: `merge.method = "diloco"`."""

from __future__ import annotations

from swarmtrain.methods.method import MergeMethod

DILOCO = MergeMethod(
    name="diloco",
    says="Synchronous rounds: a signed roster lists whose pseudo-gradients everyone averages.",
    exchange="swarmtrain.peer.merging.roster_exchange:RosterExchange",
    costs="swarmtrain.peer.merging.costs:DilocoCosts",
    lives="swarmtrain.simulate.planning.playback:by_rosters",
    learns="swarmtrain.simulate.learning.synchronous:diloco",
    keys=frozenset({"share_above"}),
    defaults={"outer_momentum": 0.9, "pacing": False},
    asynchronous=False,
    adapters=True,
)
