"""First time at which the gossip engine chooses whom to ask."""

from __future__ import annotations

from typing import Any

from swarmtrain.protocol.gossip.engine import GossipEngine, GossipSettings
from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.messages import LinkRateAssumed, MergesPlanned, PartnersChanged, PullTimerFired
from swarmtrain.protocol.gossip.pulls import PublicationBytes, WantedPartners
from swarmtrain.protocol.membership.membership import PeerInfo

PLAN = MergePlan(round=3, began_s=(100.0,), ends_s=160.0, gradient_format="int2")


def engine_with_others() -> GossipEngine[Any, Any, Any]:
    settings = GossipSettings(
        groups={"weights": "mean", "gradient": "outer step"},
        sizes=[{"int2": PublicationBytes(weights=1_000_000, gradient=500_000)}],
        wanted=WantedPartners(2, 1),
        num_parts=4,
        max_staleness_rounds=4,
    )
    engine = GossipEngine[Any, Any, Any]("me", settings)
    engine.receive(PartnersChanged([PeerInfo(peer=name, training=True, round=3) for name in ("a", "b")]), 99.0)
    return engine


def test_nothing_is_due_at_a_rounds_beginning_so_that_it_looks_when_something_is() -> None:
    engine = engine_with_others()
    assert engine.receive(MergesPlanned(3, [PLAN]), 100.0) == [] and engine.wake_at() == 130.0
    assert len(engine.receive(PullTimerFired(), 130.0)) == 3


def test_it_looks_at_once_where_pulls_are_due_or_a_link_turns_out_to_be_slow() -> None:
    late, slow = engine_with_others(), engine_with_others()
    late.receive(MergesPlanned(3, [PLAN]), 140.0)
    assert late.wake_at() == 140.0
    slow.receive(MergesPlanned(3, [PLAN]), 100.0)
    slow.receive(LinkRateAssumed(1.0), 100.0)
    assert slow.wake_at() == 100.0 and len(slow.receive(PullTimerFired(), 100.0)) == 2
