"""Sequences come from their sources by weight, and a peer that resumes goes on with the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefetch import OneByOne

from swarmtrain.data.batches import Batches, Windows
from swarmtrain.data.mixture import MixedBatches, PeerPlace, SequenceSource
from swarmtrain.data.streams import SequenceStream
from swarmtrain.data.tokens import ByteTokenizer

CONTEXT = 7


def place(position: int = 0, peer: str = "p") -> PeerPlace:
    return PeerPlace(run_sha256="a1", peer_id=peer, position=position)


def corpora(number: int = 2, shards: Sequence[int] = ()) -> list[SequenceSource]:
    """Corpora of numbered tokens: those of source k begin at 100,000 k."""
    made = [Windows(np.arange(100_000 * k, 100_000 * k + 5000), CONTEXT) for k in range(number)]
    for windows, num_shards in zip(made, shards, strict=False):
        if num_shards:
            windows.cut(num_shards)
    return list(made)


def letters() -> SequenceStream:
    """A stream of six digits a line: a sequence has eight of its characters."""
    return SequenceStream(OneByOne(lambda epoch: (b"%06d" % n for n in range(20_000))), ByteTokenizer().encode, CONTEXT)


def of_source(batch: torch.Tensor) -> list[int]:
    return (batch[:, 0] // 100_000).tolist()


@pytest.mark.parametrize(("weights", "batch"), [((3, 1), 16), ((3, 1), 1), ((0.2, 5, 1), 7), ((1, 1), 3)])
def test_sources_come_by_weight_within_a_percent_and_so_do_the_first_of_each_batch(
    weights: tuple[float, ...], batch: int
) -> None:
    source = MixedBatches(corpora(len(weights)), weights, batch, place())
    chosen = source._chosen(0, 24_000)
    for part in (chosen, chosen[:, :1], chosen[:, : (batch + 1) // 2]):
        shares = np.bincount(part.ravel(), minlength=len(weights)) / part.size
        assert shares == pytest.approx(np.array(weights) / sum(weights), abs=0.01)


def test_each_batch_has_nearly_its_share_of_each_source() -> None:
    drawn = [of_source(MixedBatches(corpora(), (3, 1), 16, place(position)).next_batch()) for position in range(200)]
    assert {each.count(1) for each in drawn} <= {3, 4, 5}
    assert len({tuple(each) for each in drawn}) > 20, "in another order each time"


def test_one_source_is_drawn_as_without_a_mixture() -> None:
    (windows,) = corpora(1)
    plain = Batches(
        np.arange(5000), context_tokens=CONTEXT, batch_sequences=4, run_sha256="a1", peer_id="p", position=3
    )
    mixed = MixedBatches([windows], [2.5], 4, place(3))
    for _ in range(3):
        assert torch.equal(mixed.next_batch(), plain.next_batch())


def test_the_mixture_is_pinned() -> None:
    """Another numpy, another machine, the same sources: a peer may move."""
    source = MixedBatches(corpora(), (3, 1), 8, place())
    assert source._chosen(0, 2).tolist() == source._chosen(0, 2).tolist() == PINNED
    assert source._chosen(1, 1).tolist() == PINNED[1:]
    assert MixedBatches(corpora(), (3, 1), 8, place(peer="q"))._chosen(0, 2).tolist() != PINNED


PINNED = [[1, 0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 1, 0, 0]]


@settings(max_examples=20)
@given(position=st.integers(0, 600), weight=st.sampled_from([0.05, 1.0, 30.0]))
def test_corpora_and_streams_go_on_where_they_were(position: int, weight: float) -> None:
    whole = MixedBatches([*corpora(), letters()], (3.0, 1.0, weight), 5, place())
    resumed = MixedBatches([*corpora(), letters()], (3.0, 1.0, weight), 5, place(position))
    whole._drawn, whole._position = whole._num_drawn(0, position), position  # as counted, batch by batch, below
    for _ in range(3):
        assert torch.equal(resumed.next_batch(), whole.next_batch())
    assert resumed.position == position + 3


def test_a_streams_sequences_come_in_order_and_none_is_lost() -> None:
    source = MixedBatches([corpora()[1], letters()], (1.0, 1.0), 3, place())
    rows = [row for _ in range(40) for row in source.next_batch().tolist()]
    read = b"".join(bytes(row) for row in rows if max(row) < 256)
    assert b"".join(b"%06d\n" % n for n in range(2000)).startswith(read) and len(read) > 300


def test_a_shard_is_one_of_each_source_and_of_a_small_one_modulo_its_number() -> None:
    source = MixedBatches([*corpora(2, (6, 2)), letters()], (1.0, 1.0, 1.0), 12, place())
    assert source.num_shards == 6
    source.use_shard(5)
    first, second = source._sources[:2]
    assert isinstance(first, Windows) and isinstance(second, Windows)
    assert (first._shard, second._shard) == (5, 1)
    with pytest.raises(ValueError, match="shard 6 of data in 6 shards"):
        source.use_shard(6)
