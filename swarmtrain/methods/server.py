"""Server, in which the bootstrap takes in gradients as they arrive and nobody waits: `merge.method = "server"`."""

from __future__ import annotations

from swarmtrain.methods.method import MergeMethod

SERVER = MergeMethod(
    name="server",
    says="Nobody waits: the bootstrap applies each pseudo-gradient as it arrives, and everyone goes on from its "
    "newest weights.",
    exchange="swarmtrain.peer.merging.server_exchange:ServerExchange",
    costs="swarmtrain.peer.merging.costs:ServerCosts",
    lives="swarmtrain.simulate.planning.playback:by_server",
    learns="swarmtrain.simulate.learning.server:server",
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
    server="swarmtrain.peer.merging.server:MergeServer",
)
