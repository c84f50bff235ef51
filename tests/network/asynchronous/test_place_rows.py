"""Publications in a state's weights, as the state lists them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from codes import raises_code

from swarmtrain.errors import BadBytesError
from swarmtrain.network.asynchronous.place_rows import MAX_ROWS_TOLD, add_place_rows, places_untrusted
from swarmtrain.network.asynchronous.server_link import describe_weights
from swarmtrain.network.asynchronous.state_fetcher import StateFetcher
from swarmtrain.network.identity import base58_encode, new_identity, peer_bytes
from swarmtrain.network.snapshots.state_provider import StateProvider, state_specs
from swarmtrain.network.snapshots.store import Body, SnapshotStore, TensorSpec
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1 import snapshot_pb2 as pb

EVE, FRED = new_identity(b"e" * 32), new_identity(b"f" * 32)
RUN = "ab" * 32
SPECS = state_specs([TensorSpec("w", (1,))])


def test_places_go_there_and_back() -> None:
    places = [{EVE.peer_id: (3, 4), FRED.peer_id: (4, 1)}, {FRED.peer_id: (3, 2)}]
    manifest = pb.Manifest()
    add_place_rows(manifest, places)
    assert places_untrusted(manifest, 2, 4) == places
    assert places_untrusted(manifest, 1, 4) == places[:1], "of a fragment that is not"
    assert places_untrusted(manifest, 2, 3)[0] == {FRED.peer_id: (4, 1)}, "a part that is not"


def test_of_very_many_those_of_the_latest_rounds_are_told() -> None:
    peers = [base58_encode(b"\x00\x24\x08\x01\x12\x20" + number.to_bytes(32, "big")) for number in range(3000)]
    manifest = pb.Manifest()
    add_place_rows(manifest, [{peer: (round, 4) for round, peer in enumerate(peers)}] * 4)
    told = places_untrusted(manifest, 4, 4)
    assert len(manifest.entered) == MAX_ROWS_TOLD and told[3] == {peer: (peers.index(peer), 4) for peer in peers[-256:]}


def test_a_servers_rows_are_of_whole_rounds_and_no_places() -> None:
    manifest = pb.Manifest()
    describe_weights(manifest, 5, {EVE.peer_id: 3})
    assert places_untrusted(manifest, 1, 4) == [{}]


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([pb.Entered(peer=b"nobody", round=1, part=1)], "bad-number"),
        ([pb.Entered(peer=peer_bytes(EVE.peer_id), round=2**41, part=1)], "bad-number"),
        ([pb.Entered(peer=peer_bytes(EVE.peer_id), round=1, part=1)] * 5000, "bad-size"),
    ],
)
def test_a_state_whose_rows_make_no_sense_is_refused_before_it_is_pulled(rows: list[pb.Entered], code: str) -> None:
    offer = StateProvider(EVE, RUN, SPECS, SnapshotStore())
    offer.put(Progress(), Body([bytes(8)]), lambda manifest: manifest.entered.extend(rows))
    found = asyncio.run(offer.held(0))
    assert found is not None
    settings: Any = SimpleNamespace(run_sha256=RUN, state_specs=SPECS)
    calls: Any = SimpleNamespace()
    fetcher = StateFetcher(calls, SnapshotStore(), settings, lambda peer, error: None)
    with raises_code(code, BadBytesError):
        fetcher._state_untrusted(found[1].snapshot.signed, EVE.peer_id, 0)


def test_what_is_merged_while_a_state_is_made_is_told_with_it() -> None:
    """Told and not in the weights, it is not merged by who takes them; in the weights and not told, it is twice."""
    merged = [{FRED.peer_id: (3, 2)}]
    offer = StateProvider(EVE, RUN, SPECS, SnapshotStore(), places=lambda: merged)

    def body() -> Body:
        merged[0] = {FRED.peer_id: (3, 4)}
        return Body([bytes(8)])

    offer.put(Progress(round=1), body)
    found = asyncio.run(offer.held(0))
    assert found is not None
    assert places_untrusted(found[1].snapshot.manifest, 1, 4) == [{FRED.peer_id: (3, 4)}]
