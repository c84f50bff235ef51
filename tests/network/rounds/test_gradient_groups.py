"""Pseudo-gradients of some groups of an adapter: what is accepted, and their mean, whole or in shares."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from codes import raises_code
from torch import Tensor
from virtual_loop import virtual_swarm

from swarmtrain.algorithm.outer import weighted_mean
from swarmtrain.errors import BadBytesError, PeerError, UnreachableError
from swarmtrain.network.codec import average_bytes_untrusted, body_of
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.rounds.downloads import Downloads
from swarmtrain.network.rounds.gradient_groups import GradientGroups
from swarmtrain.network.rounds.merger import Merger, RoundSettings, ShareOwners
from swarmtrain.network.rounds.roster import publication_of
from swarmtrain.network.snapshots.store import HeldSnapshot, PullLimits, SnapshotStore, TensorSpec, build_snapshot
from swarmtrain.protocol.adapter_groups import tensor_name
from swarmtrain.protocol.membership.membership import Membership
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.run import CHUNK_BYTES
from swarmtrain.v1 import snapshot_pb2 as pb

RUN = "ab" * 32
SIZES = {0: [70_000, 3], 1: [5], 2: [2, 140_000], 3: [65_536]}
"""Numbers of the tensors of each group; a chunk has 65,536."""
SPECS = tuple(TensorSpec(tensor_name(group, f"t{n}"), (n,)) for group, sizes in SIZES.items() for n in sizes)
GROUPS = GradientGroups(SPECS)
SETTINGS = RoundSettings(
    run_sha256=RUN,
    specs=SPECS,
    state_specs=(),
    max_tokens=1000,
    share_above=5,
    round_limit_s=30.0,
    silence_s=0.3,
    pull=PullLimits(stall_limit_s=0.2),
)
PEERS = sorted((new_identity(bytes([i]) * 32) for i in range(4)), key=lambda identity: identity.peer_id)


def publication(author: Identity, gradient: Tensor, groups: Sequence[int], tokens: int) -> HeldSnapshot:
    manifest = pb.Manifest(
        run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, part=1, tokens=tokens, inner_steps=1
    )
    body = body_of(*(gradient[place] for place in GROUPS.places(groups)))
    return build_snapshot(author, manifest, GROUPS.table(groups), body)


class Silent:
    """Calls that nobody answers."""

    def __init__(self) -> None:
        self.pull_slots = asyncio.Semaphore(8)

    def on_failure(self, peer: str, error: PeerError) -> None:
        pass

    async def round(self, peer: str, request: pb.RoundRequest) -> pb.RoundReply:
        raise UnreachableError("silent")

    async def open_pull(self, peer: str, request: pb.PullRequest) -> Any:
        raise UnreachableError("silent")


def merged(publications: Sequence[HeldSnapshot], share_above: int) -> tuple[Tensor, list[str]]:
    """Return what a peer with all these publications averages, and whose numbers were refused."""
    refused = list[str]()
    entries = tuple(publication_of(held.snapshot) for held in publications)
    roster = Roster(round=0, signer=PEERS[0].peer_id, entries=entries)

    async def run() -> bytearray:
        calls: Any = Silent()
        me, settings = PEERS[0], dataclasses.replace(SETTINGS, share_above=share_above)
        downloads = Downloads(me.peer_id, calls, SnapshotStore(), settings.pull, lambda peer, _: refused.append(peer))
        merger = Merger(
            me,
            downloads,
            Membership(me.peer_id),
            settings,
            average_bytes_untrusted,
            ShareOwners(last_known=lambda peer: b""),
        )
        held = {each.snapshot.author: each for each in publications}
        return await merger.merge(roster, "cd" * 32, held, lambda share: None)

    return torch.frombuffer(virtual_swarm(run), dtype=torch.float32), refused


@pytest.mark.parametrize("share_above", [5, 2])
def test_each_group_is_the_mean_of_those_who_have_it(share_above: int) -> None:
    total = sum(map(sum, SIZES.values()))
    gradients = [torch.randn(total, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    have, tokens = [(0, 2), (0,), (2, 0), (0, 1, 2)], [100, 200, 50, 400]
    gradients[3][-1] = float("nan")  # of a group that it has not trained
    made = [publication(*each) for each in zip(PEERS, gradients, have, tokens, strict=True)]
    mean, refused = merged(made, share_above)
    for group, place in zip(SIZES, GROUPS.places(None), strict=True):
        who = [number for number, groups in enumerate(have) if group in groups]
        if who:
            expected = weighted_mean([gradients[n][place] for n in who], [tokens[n] for n in who])
            assert torch.equal(mean[place], expected), f"group {group}: to the bit"
        else:
            assert not mean[place].any()
    assert GROUPS.untrained(each.snapshot for each in made) == (GROUPS.places([3])[0],) and not refused


def test_numbers_that_are_not_finite_leave_a_publication_out_of_that_group_only() -> None:
    gradients = [torch.ones(GROUPS.total_bytes // 4) * (1 + number) for number in range(2)]
    gradients[1][GROUPS.places([0])[0]] = float("inf")
    made = [publication(PEERS[number], gradients[number], (0, 1), 100) for number in range(2)]
    mean, refused = merged(made, 5)
    first, second = (mean[place] for place in GROUPS.places([0, 1]))
    assert set(first.tolist()) == {1.0} and set(second.tolist()) == {1.5} and refused == [PEERS[1].peer_id]


def test_a_manifest_of_whole_groups_in_their_order_is_accepted_and_nothing_else() -> None:
    gradient = torch.zeros(GROUPS.total_bytes // 4)

    def read(table: Sequence[TensorSpec], numbers: int) -> Any:
        manifest = pb.Manifest(run_sha256=bytes.fromhex(RUN), kind=pb.SNAPSHOT_KIND_PSEUDO_GRADIENT, tokens=1)
        held = build_snapshot(PEERS[0], manifest, table, body_of(gradient[:numbers]))
        return GROUPS.gradient_untrusted(held.snapshot.signed, RUN)

    for groups in ([0], [1, 3], [0, 1, 2, 3]):
        table = GROUPS.table(groups)
        assert read(table, sum(spec.shape[0] for spec in table)).author == PEERS[0].peer_id
    two = GROUPS.table([1, 3])
    for table in (GROUPS.table([0])[:1], two[::-1], two * 2, (TensorSpec("group9/t5", (5,)),), ()):
        with raises_code("bad-shape", BadBytesError):
            read(table, sum(spec.shape[0] for spec in table))
    with raises_code("bad-format", BadBytesError):
        GROUPS.gradient_untrusted(pb.Signed(payload=b"\xff\xff"), RUN)


def test_a_model_that_is_no_adapter_has_one_group() -> None:
    groups = GradientGroups((TensorSpec("embed.weight", (3,)), TensorSpec("group0.weight", (4,))))
    assert not groups.is_adapter and groups.places(None) == [slice(0, 7)] and groups.total_bytes == 28
    assert groups.segments(4, 28) == [(4, 28)] and GradientGroups(()).total_bytes == 0


def test_segments_end_where_groups_do_or_chunks_too() -> None:
    sizes = [CHUNK_BYTES + 400, 800, 2 * CHUNK_BYTES]
    groups = GradientGroups([TensorSpec(f"group{i}/t", (size // 4,)) for i, size in enumerate(sizes)])
    first, second, end = sizes[0], sizes[0] + sizes[1], groups.total_bytes
    assert groups.segments(8, end - 4) == [(8, first), (first, second), (second, end - 4)]
    cuts = [8, CHUNK_BYTES, first, second, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES, end - 4]
    assert groups.segments(8, end - 4, by_chunk=True) == list(itertools.pairwise(cuts))
    one = (CHUNK_BYTES, 2 * CHUNK_BYTES)
    assert groups.segments(*one, by_chunk=True) == [(CHUNK_BYTES, first), (first, second), (second, 2 * CHUNK_BYTES)]


@pytest.mark.parametrize(("dtype", "piece_bytes"), [("bfloat16", 131_072), ("int8", 66_560)])
def test_chunks_of_the_whole_gradient_are_pieces_of_fewer_bytes(dtype: str, piece_bytes: int) -> None:
    numbers = 3 * 65_536 + 1000
    groups = GradientGroups([TensorSpec("a", (65_536, 3)), TensorSpec("b", (1000,))], dtype)
    (spec,) = groups.table(None)
    assert (groups.total_bytes, spec.shape, spec.dtype) == (4 * numbers, (numbers,), dtype)
    (piece,) = groups.pieces(None, CHUNK_BYTES, 3 * CHUNK_BYTES)  # type: ignore[arg-type]
    assert groups.in_body(piece, CHUNK_BYTES, 3 * CHUNK_BYTES) == (piece_bytes, 3 * piece_bytes)
    assert groups.in_body(piece, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES) == (2 * piece_bytes, 3 * piece_bytes)
    (last,) = groups.pieces(None, 3 * CHUNK_BYTES, groups.total_bytes)  # type: ignore[arg-type]
    assert groups.in_body(last, 3 * CHUNK_BYTES, groups.total_bytes) == (3 * piece_bytes, spec.size_bytes)
