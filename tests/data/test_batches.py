"""Batches depend on the run, the peer and its number alone; held-out windows cover every token once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codes import raises_code
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.data.batches import Batches, Shards, held_out_batches
from swarmtrain.errors import RunFileError

TOKENS = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)


def _batches(*, tokens: np.ndarray = TOKENS, run: str = "a1", peer: str = "p", position: int = 0) -> Batches:
    return Batches(tokens, context_tokens=16, batch_sequences=4, run_sha256=run, peer_id=peer, position=position)


def test_batches_are_windows_of_the_corpus() -> None:
    batch = _batches().next_batch()
    assert batch.shape == (4, 17) and batch.dtype == torch.int64
    text = TOKENS.tobytes()
    assert all(bytes(row) in text for row in batch.tolist())


@given(position=st.integers(0, 2**62))
def test_a_batch_is_the_same_after_a_resume(position: int) -> None:
    source = _batches(position=position)
    source.next_batch()
    second = source.next_batch()
    assert source.position == position + 2
    assert torch.equal(second, _batches(position=position + 1).next_batch())


def test_runs_peers_and_positions_draw_differently() -> None:
    drawn = [_batches(), _batches(run="a2"), _batches(peer="q"), _batches(position=1)]
    batches = {str(source.next_batch().tolist()) for source in drawn}
    assert len(batches) == 4


def test_the_draw_is_pinned() -> None:
    """Another numpy, another machine, the same windows: a peer may move."""
    tokens = np.arange(5000)
    assert [_batches(tokens=tokens, position=p).next_batch()[:, 0].tolist() for p in (0, 10**12)] == PINNED


PINNED = [[774, 2224, 4973, 4452], [299, 865, 1703, 4045]]


def test_every_window_is_drawn_alike() -> None:
    source = Batches(np.arange(18), context_tokens=15, batch_sequences=3000, run_sha256="r", peer_id="p")
    starts = torch.bincount(source.next_batch()[:, 0], minlength=4)
    assert len(starts) == 3 or starts[3] == 0
    assert starts[:3].min() > 900


def test_a_corpus_of_one_sequence_is_enough_and_less_is_an_error() -> None:
    assert _batches(tokens=TOKENS[:17]).next_batch().shape == (4, 17)
    with raises_code("too-little-text", RunFileError, "16 tokens", "17", "model.context_tokens"):
        _batches(tokens=TOKENS[:16])


# ---------------------------------------------------------------- shards


@given(num_tokens=st.integers(1, 3000), num_shards=st.integers(1, 70), context_tokens=st.integers(1, 30))
def test_shards_are_a_partition_of_the_corpus(num_tokens: int, num_shards: int, context_tokens: int) -> None:
    num_shards = min(num_shards, num_tokens)
    shards = Shards(num_tokens, num_shards, context_tokens)
    places = [shards.places(shard, np.arange(shards.num_tokens(shard))) for shard in range(num_shards)]
    assert sorted(np.concatenate(places).tolist()) == list(range(num_tokens))
    assert all(np.all(np.diff(place) > 0) for place in places), "in the corpus' order"
    sizes = [len(place) for place in places]
    assert min(sizes) > 0 and max(sizes) - min(sizes) <= max(1, num_tokens // num_shards)


def test_each_shard_has_something_of_the_whole_corpus() -> None:
    shards = Shards(640_000, 64, 64)
    for shard in range(64):
        places = shards.places(shard, np.arange(shards.num_tokens(shard)))
        assert set((places // 80_000).tolist()) == set(range(8))
    with pytest.raises(ValueError, match="allowed: 1 to 10 shards"):
        Shards(10, 11, 4)


def _in_shards(*, peer: str = "p", position: int = 0, shard: int | None = None) -> Batches:
    """Over numbered tokens, so that one sees where each was."""
    source = _batches(tokens=np.arange(5000), peer=peer, position=position)
    source.cut(8)
    if shard is not None:
        source.use_shard(shard)
    return source


@pytest.mark.parametrize("shard", [0, 3, 7])
def test_windows_begin_at_every_token_of_a_shard_and_at_none_of_another_and_run_on(shard: int) -> None:
    source = _in_shards(shard=shard)
    drawn = torch.cat([source.next_batch() for _ in range(2000)]).numpy()
    assert np.all(np.diff(drawn) == 1), "each is text that is together"
    shards = Shards(5000, 8, 16)
    places = shards.places(shard, np.arange(shards.num_tokens(shard)))
    assert set(drawn[:, 0].tolist()) == {min(place, 5000 - 17) for place in places.tolist()}


def test_a_batch_of_a_shard_is_the_same_after_a_resume_and_others_draw_others() -> None:
    source = _in_shards(shard=2)
    source.next_batch()
    second = source.next_batch()
    assert torch.equal(second, _in_shards(position=1, shard=2).next_batch())
    others = [_in_shards(position=1, shard=3), _in_shards(position=1, shard=2, peer="q"), _in_shards(shard=2)]
    assert not any(torch.equal(second, other.next_batch()) for other in others)


def test_a_change_of_shard_keeps_the_position_and_before_one_is_chosen_all_is_as_without() -> None:
    source = _in_shards()
    assert source.num_shards == 8 and _batches().num_shards == 0
    assert torch.equal(source.next_batch(), _batches(tokens=np.arange(5000)).next_batch())
    source.use_shard(5)
    assert torch.equal(source.next_batch(), _in_shards(position=1, shard=5).next_batch())
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match="of data in 8 shards"):
            source.use_shard(wrong)
    with pytest.raises(ValueError, match="of data in 0 shards"):
        _batches().use_shard(0)


def test_windows_of_a_shard_are_text_but_where_two_blocks_meet() -> None:
    source = _batches(tokens=np.arange(50_000))
    source.cut(4)
    source.use_shard(1)
    steps = torch.cat([source.next_batch() for _ in range(100)]).diff(dim=1)
    assert (steps == 1).float().mean() > 0.99


@given(num_tokens=st.integers(0, 200), context_tokens=st.integers(1, 20), batch_sequences=st.integers(1, 5))
def test_every_held_out_token_is_a_target_once(num_tokens: int, context_tokens: int, batch_sequences: int) -> None:
    tokens = TOKENS[:num_tokens]
    batches = list(held_out_batches(tokens, context_tokens, batch_sequences))
    assert b"".join(bytes(batch[:, 1:].flatten().tolist()) for batch in batches) == tokens.tobytes()
    inputs = [token for batch in batches for token in batch[:, :-1].flatten().tolist()]
    assert inputs == [10, *tokens.tolist()][:num_tokens]
    full = batches[:-1] if num_tokens % context_tokens else batches
    assert all(batch.shape[1] == context_tokens + 1 and batch.shape[0] <= batch_sequences for batch in full)


def test_nats_per_byte_of_a_uniform_model_is_log_256() -> None:
    tokens = TOKENS[:1001]
    total = 0.0
    for batch in held_out_batches(tokens, 16, 4):
        targets = batch[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(torch.zeros(len(targets), 256), targets, reduction="sum"))
    assert total / len(tokens.tobytes()) == pytest.approx(math.log(256))
