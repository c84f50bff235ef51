"""A run with a section more than weights and pseudo-gradient: what it takes is its place in the list, and its tensors.

Real trainers and exchanges, calls within memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from test_gossip_exchange import IDENTITIES, Peer, World, refused, run_file, worlds  # noqa: F401 - a fixture
from torch import Tensor

from swarmtrain.algorithm.gossip import PartnerUpdate
from swarmtrain.errors import BadBytesError
from swarmtrain.events import RefusedEvent
from swarmtrain.network.asynchronous.publications import request_of
from swarmtrain.network.codec import VectorCodec
from swarmtrain.network.snapshots.store import TensorSpec
from swarmtrain.network.tensor_groups import TensorGroup, groups_of, rules_of
from swarmtrain.peer.merging import gossip_exchange
from swarmtrain.peer.merging.averaged_group import AveragedGroup
from swarmtrain.peer.merging.robustness import Naming
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.v1 import snapshot_pb2 as pb

pytestmark = pytest.mark.slow

BUFFERS = TensorGroup(
    name="buffers",
    prefix="buffer",
    tensors=(TensorSpec("running_mean", (5,)), TensorSpec("running_var", (2,))),
    formats=("fp32",),
    rule="mean",
    num_parts=32,
)


def with_buffers(*given: Any) -> tuple[TensorGroup, ...]:
    """Return the run's list with one more group."""
    return (*groups_of(*given), BUFFERS)


def give_buffers(peer: Peer, value: float) -> dict[tuple[str, int], Tensor]:
    """Add the group to its model, for each fragment; its contributions change when a merge does."""
    fragments = peer.exchange.gossip.engine._states
    buffers = {("buffers", fragment.number): torch.full((7,), value) for fragment in fragments}
    peer.loop.parameters.values = lambda: {which: one.clone() for which, one in buffers.items()}  # type: ignore[method-assign]
    peer.loop.parameters.write_values = buffers.update  # type: ignore[method-assign, assignment]
    return buffers


@pytest.fixture
def with_a_third(monkeypatch: pytest.MonkeyPatch, worlds: list[World]) -> Iterator[World]:  # noqa: F811
    monkeypatch.setattr(gossip_exchange, "groups_of", with_buffers)
    worlds.append(World(run_file(fragments=2), 2))
    yield worlds[-1]


def test_a_section_that_the_list_has_is_published_pulled_and_averaged(with_a_third: World) -> None:
    ours, theirs = with_a_third.everyone()
    own, others = give_buffers(ours, 1.0), give_buffers(theirs, 3.0)
    assert len(own) == 2, "of each fragment"
    theirs.round()
    assert all(torch.equal(one, torch.full((7,), 3.0)) for one in others.values()), "nobody's came"
    report = ours.round(partners=1)
    assert report is not None
    assert all(torch.equal(one, torch.full((7,), 2.0)) for one in own.values()), "the mean of its own and its partner's"
    for lane in ours.exchange.gossip.engine._states:
        place = lane.merged.ledger.values_at("buffers", theirs.id)
        version = lane.merged.ledger.version(theirs.id)
        assert place is not None and version is not None and place == (version.round, version.part)
    before = [one.clone() for one in own.values()]
    ours.round()
    assert all(torch.equal(one, was) for one, was in zip(own.values(), before, strict=True)), "they are merged once"
    theirs.round(partners=1)
    assert all(torch.equal(one, torch.full((7,), 2.5)) for one in others.values())
    assert not refused(ours) and not refused(theirs)
    assert {name for name, _ in ours.exchange.publishers} == {"weights", "gradient", "buffers"}


def test_who_asks_for_what_the_run_does_not_have_gets_nothing_and_is_named(with_a_third: World) -> None:
    ours, theirs = with_a_third.everyone()
    give_buffers(ours, 1.0)
    ours.round()

    def asks(caller: str, request: pb.PublicationRequest) -> pb.PublicationReply:
        answer = ours.swarm.answers.publication(request, caller)
        return ours.world.network.run(asyncio.wait_for(answer, PATIENCE_S), 2 * PATIENCE_S)

    def tables(request: pb.PublicationRequest) -> str:
        manifest = pb.Manifest.FromString(asks(theirs.id, request).manifest.payload)
        return manifest.tensors[0].name.partition("/")[0]

    assert tables(request_of("buffers", 1, None, pb.Signed())) == "buffer"
    assert [tables(pb.PublicationRequest(weights=weights)) for weights in (True, False)] == ["theta", "gradient"]
    assert not refused(ours)
    for identity, name, words in (
        (IDENTITIES[2], "x" * 33, "more than 32 bytes"),
        (IDENTITIES[3], "adapters", "'adapters'"),
    ):
        assert asks(identity.peer_id, pb.PublicationRequest(section=name)) == pb.PublicationReply()
        *_, told = [event for event in ours.events if isinstance(event, RefusedEvent)]
        assert told.from_peer == identity.peer_id and words in told.detail


@pytest.mark.parametrize("group", ["weights", "gradient"])
def test_peers_of_before_are_asked_as_ever(group: str) -> None:
    """The two sections that there have always been are asked for by a flag, to the byte."""
    request = request_of(group, 3, PublicationVersion(4, 5, 6), pb.Signed(payload=b"p"))
    before = pb.PublicationRequest(has_any=True, round=4, part=5, fragment=3, presence=pb.Signed(payload=b"p"))
    before.weights = group == "weights"
    assert request.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


def test_weights_are_pulled_first_then_what_else_is_averaged() -> None:
    assert list(rules_of(with_buffers((), "int8", ("int2",), 32)).items()) == [
        ("weights", "mean"),
        ("buffers", "mean"),
        ("gradient", "outer step"),
    ]


def test_partners_pull_what_is_averaged_by_the_usual_distance_at_most() -> None:
    def arrival(value: float) -> PartnerUpdate:
        return PartnerUpdate(torch.full((7,), value), torch.zeros(7), 0)

    def accepted(values: Sequence[float], rule: str = "clip") -> AveragedGroup:
        group = AveragedGroup(VectorCodec(BUFFERS, "fp32"), rule, Naming(lambda peer, incident: None))
        assert group.accept_untrusted("p", arrival(9e9), 0).theta is not None, "nothing is usual yet"
        group.published(torch.full((7,), 1.0))
        for value in values:
            group.accept_untrusted("p", arrival(value), 0)
        return group

    group = accepted([2.0, 2.0, 2.0])
    drawn_in = group.accept_untrusted("mallory", arrival(11.0), 1).theta
    assert drawn_in is not None and torch.allclose(drawn_in, torch.full((7,), 4.0)), "three times as far as usual"
    with pytest.raises(BadBytesError, match="far beyond what is usual"):
        accepted([2.0, 2.0, 2.0]).accept_untrusted("mallory", arrival(1e9), 1)
    assert torch.allclose(group.mean([torch.full((7,), 3.0)]), torch.full((7,), 2.0))
