"""Gossip, in which each peer merges what it pulled from a few partners and never waits: `merge.method = "gossip"`."""

from __future__ import annotations

from swarmtrain.methods.method import MergeMethod

GOSSIP = MergeMethod(
    name="gossip",
    says="Nobody waits: each peer merges at its own pace what it pulled from a few partners.",
    exchange="swarmtrain.peer.merging.gossip_exchange:GossipExchange",
    costs="swarmtrain.peer.merging.costs:GossipCosts",
    lives="swarmtrain.simulate.planning.playback:by_gossip",
    learns="swarmtrain.simulate.learning.hostile:gossip",
    keys=frozenset(
        {
            "fragments",
            "gradient_format",
            "init",
            "max_staleness_rounds",
            "num_partners",
            "num_weights",
            "partners",
            "publications_per_round",
            "robust",
            "theta_format",
        }
    ),
    auto_formats=("int2", "int4"),
    own_weights=True,
    in_step=True,
    hosting=True,
    shards=True,
    stages=True,
    adapters=True,
    lends_weights=True,
)
