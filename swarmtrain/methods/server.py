"""Nobody waits: the bootstrap takes in what arrives."""

from __future__ import annotations

from swarmtrain.methods.method import MergeMethod

__all__ = ["SERVER"]

SERVER = MergeMethod(
    name="server",
    says="nobody waits; the bootstrap takes in each pseudo-gradient as it arrives, and everyone goes on from its "
    "newest weights.",
    exchange="swarmtrain.peer.server_exchange:ServerExchange",
    costs="swarmtrain.peer.merge_costs:ServerCosts",
    lives="swarmtrain.simulate.living:by_server",
    learns="swarmtrain.simulate.learning.serving:server",
    keys=frozenset(
        {
            "buffer_arrivals",
            "gradient_format",
            "max_staleness_rounds",
            "momentum_share",
            "robust",
            "theta_format",
        }
    ),
    defaults={"robust": "clip"},
    server="swarmtrain.peer.merge_server:MergeServer",
)
