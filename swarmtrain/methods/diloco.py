"""Synchronous rounds, whose contributors a signed roster names."""

from __future__ import annotations

from swarmtrain.methods.method import MergeMethod

__all__ = ["DILOCO"]

DILOCO = MergeMethod(
    name="diloco",
    says="synchronous rounds; everyone's pseudo-gradients are averaged by a signed roster.",
    keys=frozenset({"share_above"}),
    defaults={"outer_momentum": 0.9, "pacing": False},
    asynchronous=False,
)
