"""One large batch, for which all volunteers add up gradients at the same weights: `merge.method = "batch"`."""

from __future__ import annotations

from swarmtrain.methods.method import MergeMethod

BATCH = MergeMethod(
    name="batch",
    says="One large batch: volunteers add up gradients at the same weights until they have merge.target_tokens "
    "together; then all take the same optimizer step (DeDLOC).",
    exchange="swarmtrain.peer.merging.batch_exchange:BatchExchange",
    costs="swarmtrain.peer.merging.costs:BatchCosts",
    lives="swarmtrain.simulate.planning.playback:by_rosters",
    learns="swarmtrain.simulate.learning.synchronous:batch",
    keys=frozenset({"delay_steps", "gradient_format", "max_wait_s", "optimizer", "share_above", "target_tokens"}),
    unread=frozenset({"momentum_ramp_rounds", "outer_learning_rate", "outer_momentum", "pacing"}),
    defaults={"gradient_format": "fp32", "pacing": False},
    formats=("fp32", "bf16", "int8"),
    asynchronous=False,
    adapters=True,
    common_step=True,
    num_moments=2,
)
