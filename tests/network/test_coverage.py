"""Coverage of the data, over real manifests and signatures: nothing stays unseen, and what a liar's row costs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from swarmtrain.data.batches import Batches, Shards
from swarmtrain.network import coverage
from swarmtrain.network.asynchronous.publications import OwnPublication, Publisher
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.coverage import CarriedRows, DataCoverage, ShardsOf
from swarmtrain.network.discovery.token_accounting import TokenAccounting
from swarmtrain.network.identity import Identity, new_identity, sign
from swarmtrain.network.snapshots.store import Body, SnapshotStore, TensorSpec, manifest_untrusted
from swarmtrain.network.tensor_groups import groups_of
from swarmtrain.protocol.tokens.shards import MAX_ROWS
from swarmtrain.protocol.tokens.tally import CountingRules
from swarmtrain.v1 import snapshot_pb2 as pb

RUN, CORPUS, OTHER = "ab" * 32, "cd" * 32, "ef" * 32
ANNA, BEN, CARL, DORA = (new_identity(bytes([i]) * 32) for i in range(1, 5))
STEP_TOKENS, STEPS, NUM_SHARDS = 4 * 16, 40, 24
ROUND_TOKENS = STEP_TOKENS * STEPS
CODEC = PublicationCodec(groups_of((TensorSpec("w", (3, 4)),), "fp32", ("fp32",)))


def shards_of_corpus(corpus: str = CORPUS, num_shards: int = NUM_SHARDS) -> ShardsOf:
    return ShardsOf(run_sha256=RUN, corpus_sha256=corpus, num_shards=num_shards, seed=3, round_tokens=ROUND_TOKENS)


class Reader:
    """Coverage of a peer that believes all; with its refusals by peer."""

    def __init__(
        self,
        identity: Identity,
        shards: ShardsOf | None = None,
        explained: Callable[[str, int], int | None] = lambda _, tokens: tokens,
    ) -> None:
        self.id, self.told = identity.peer_id, list[tuple[str, str, str]]()
        self.now = 0.0
        self.coverage = DataCoverage(
            identity, shards or shards_of_corpus(), explained, lambda *told: self.told.append(told), lambda: self.now
        )

    def counts(self, peer: Identity) -> list[int] | None:
        row = self.coverage._coverage.row(peer.peer_id)
        return None if row is None else list(row.counts)


def row(author: Identity, counts: list[int], *, on: int = 0, corpus: str = CORPUS, run: str = RUN) -> pb.Signed:
    return sign(author, "coverage", run, pb.ShardRow(corpus_sha256=bytes.fromhex(corpus), tokens=counts, on=on))


def counts(**tokens: int) -> list[int]:
    """`s3=5`: five tokens of shard 3, and none of the others."""
    return [tokens.get(f"s{shard}", 0) for shard in range(NUM_SHARDS)]


# ---------------------------------------------------------------- four peers


class Peer(Reader):
    """Peer, one of four: draws real batches, publishes real manifests, and reads the others'."""

    def __init__(self, identity: Identity, number: int) -> None:
        super().__init__(identity)
        self.number, self.round = number, 0
        self.batches = Batches(
            np.arange(NUM_SHARDS * 1000), context_tokens=16, batch_sequences=4, run_sha256=RUN, peer_id=self.id
        )
        self.batches.cut(NUM_SHARDS)
        rows = self.coverage.rows_to_send
        self.publisher = Publisher(identity, RUN, CODEC.gradient.of["fp32"].tensors, SnapshotStore(), shard_rows=rows)
        self.read: set[int] = set()
        """Places in the corpus that its sequences were read from,"""
        self.begun: set[int] = set()
        """and those that they began at."""

    def train(self, others: list[Peer], shard: int | None = None) -> None:
        chosen = self.coverage.begin(self.round, [other.id for other in others])
        self.batches.use_shard(chosen if shard is None else shard)
        for step in range(1, STEPS + 1):
            batch = self.batches.next_batch()
            self.read.update(batch.flatten().tolist())
            self.begun.update(batch[:, 0].tolist())
            if step % 10 == 0:
                self.coverage.reached(step * STEP_TOKENS)
        self.round += 1
        nothing = torch.zeros(12)
        self.publisher.newest = OwnPublication(
            round=self.round,
            part=1,
            tokens=ROUND_TOKENS,
            inner_steps=STEPS,
            author_tokens=self.round * ROUND_TOKENS,
            encode=lambda: Body([CODEC.gradient.of["fp32"].encode(nothing)]),
        )

    def pull(self, other: Peer) -> None:
        held = asyncio.run(other.publisher.held_after(pb.PublicationRequest()))
        if held is not None:
            kind = pb.SNAPSHOT_KIND_PUBLICATION
            read = manifest_untrusted(held.snapshot.signed, RUN, kind, CODEC.gradient.of["fp32"].tensors)
            self.coverage.receive_untrusted(other.id, read.manifest.coverage)


def unseen_with_one_of_four_gone(*, fixed_quarters: bool) -> tuple[int, int]:
    """Hundreds of tokens that nobody has read any of, and shards in which nothing began."""
    rng = random.Random(5)
    peers = [Peer(identity, number) for number, identity in enumerate((ANNA, BEN, CARL, DORA))]
    everyone = list(peers)
    for round in range(NUM_SHARDS // 2):
        if round == 2:
            peers.pop()
        for peer in peers:
            quarter = NUM_SHARDS // 4
            fixed = peer.number * quarter + round % quarter if fixed_quarters else None
            others = [other for other in peers if other is not peer]
            peer.train(others, fixed)
            for other in rng.sample(others, 2):
                peer.pull(other)
    assert not any(peer.told for peer in everyone)
    read, begun = (set.union(*(getattr(peer, name) for peer in everyone)) for name in ("read", "begun"))
    if not fixed_quarters:
        assert {peer.coverage.num_unseen for peer in peers} == {0}
    shards = Shards(NUM_SHARDS * 1000, NUM_SHARDS, 16)
    places = (shards.places(shard, np.arange(shards.num_tokens(shard))) for shard in range(NUM_SHARDS))
    hundreds = sum(read.isdisjoint(range(100 * each, 100 * each + 100)) for each in range(10 * NUM_SHARDS))
    return hundreds, sum(begun.isdisjoint(each.tolist()) for each in places)


def test_one_peer_of_four_is_gone_for_good_and_none_of_the_data_stays_unseen() -> None:
    assert unseen_with_one_of_four_gone(fixed_quarters=False) == (0, 0)
    _, shards = unseen_with_one_of_four_gone(fixed_quarters=True)  # every hundred is read: sequences run on
    assert shards == NUM_SHARDS // 4 - 2, "what the dead peer's quarter still had"


# ---------------------------------------------------------------- choosing and keeping


def test_a_round_is_counted_as_it_goes_and_others_see_where_one_is() -> None:
    anna, ben = Reader(ANNA), Reader(BEN)
    shard = anna.coverage.begin(0, [])
    ben.coverage.receive_untrusted(ANNA.peer_id, anna.coverage.rows_to_send())
    assert ben.counts(ANNA) == counts() and ben.coverage._coverage.busy([ANNA.peer_id]) == {shard}
    for tokens in (100, 250, 400):
        anna.coverage.reached(tokens)
    ben.coverage.receive_untrusted(ANNA.peer_id, anna.coverage.rows_to_send())
    assert ben.counts(ANNA) == counts(**{f"s{shard}": 400})
    assert (anna.coverage.num_unseen, ben.coverage.num_unseen) == (NUM_SHARDS - 1, NUM_SHARDS - 1)
    other = anna.coverage.begin(1, [])
    anna.coverage.reached(50)
    assert other != shard and sum(anna.counts(ANNA) or ()) == 450


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_a_checkpoint_goes_on_exactly() -> None:
    anna, again = Reader(ANNA), Reader(ANNA)
    for round in range(5):
        anna.coverage.begin(round, [])
        anna.coverage.reached(ROUND_TOKENS)
    anna.coverage.receive_untrusted(BEN.peer_id, [row(BEN, counts(s3=7), on=4)])
    again.coverage.restore(through_json(anna.coverage.kept()))
    assert again.coverage.kept() == anna.coverage.kept()
    for round in range(5, 30):
        assert again.coverage.begin(round, [BEN.peer_id]) == anna.coverage.begin(round, [BEN.peer_id])
        for reader in (anna, again):
            reader.coverage.reached(ROUND_TOKENS)
    assert anna.coverage.num_unseen == 0


def test_a_checkpoint_without_it_or_of_another_corpus_begins_anew_and_nonsense_is_an_error() -> None:
    anna, other = Reader(ANNA), Reader(ANNA, shards_of_corpus(OTHER, 3))
    anna.coverage.begin(0, [])
    anna.coverage.reached(10)
    kept = anna.coverage.kept()
    other.coverage.restore(kept)
    other.coverage.restore(None)
    assert other.coverage.num_unseen == 3
    for nonsense in (3, [], {}, kept | {"rows": [["x"]]}, kept | {"rows": "x"}):
        with pytest.raises(ValueError, match="coverage"):
            anna.coverage.restore(nonsense)
    assert anna.coverage.kept() == kept


def test_what_a_kill_took_comes_back_from_others_and_nobody_is_blamed() -> None:
    anna, ben, again = Reader(ANNA), Reader(BEN), Reader(ANNA)
    shard = anna.coverage.begin(0, [])
    anna.coverage.reached(ROUND_TOKENS)
    ben.coverage.receive_untrusted(ANNA.peer_id, anna.coverage.rows_to_send())
    ben.coverage.receive_untrusted(ANNA.peer_id, again.coverage.rows_to_send())
    assert ben.told == [] and ben.counts(ANNA) == counts(**{f"s{shard}": ROUND_TOKENS})
    again.coverage.receive_untrusted(BEN.peer_id, ben.coverage.rows_to_send())
    assert again.counts(ANNA) == counts(**{f"s{shard}": ROUND_TOKENS}) and again.coverage.begin(0, []) != shard
    ben.coverage.receive_untrusted(ANNA.peer_id, [row(ANNA, counts(**{f"s{shard}": 9 * ROUND_TOKENS}))])
    ben.coverage.receive_untrusted(ANNA.peer_id, [row(ANNA, counts())])
    ((peer, rule, detail),) = ben.told
    assert (peer, rule) == (ANNA.peer_id, "shards") and "shrank" in detail


# ---------------------------------------------------------------- rows of others


def test_a_row_travels_as_its_author_signed_it() -> None:
    anna, ben, carl = Reader(ANNA), Reader(BEN), Reader(CARL)
    signed = row(ANNA, counts(s2=9))
    ben.coverage.receive_untrusted(ANNA.peer_id, [signed])
    sent = ben.coverage.rows_to_send()
    assert sent[1] == signed and sent[0].author == row(BEN, []).author
    carl.coverage.receive_untrusted(BEN.peer_id, sent)
    assert carl.counts(ANNA) == counts(s2=9) and carl.told == []
    anna.coverage.receive_untrusted(CARL.peer_id, carl.coverage.rows_to_send())
    assert anna.counts(ANNA) == counts(s2=9), "what it had forgotten"


def test_a_manifest_carries_sixteen_rows_at_most_and_a_few_kilobytes() -> None:
    ben = Reader(BEN)
    for i in range(40):
        author = new_identity(bytes([100 + i]) * 32)
        ben.coverage.receive_untrusted(author.peer_id, [row(author, [10**9] * NUM_SHARDS)])
    rows = ben.coverage.rows_to_send()
    assert len(rows) == MAX_ROWS and sum(signed.ByteSize() for signed in rows) < 6000


def forged() -> pb.Signed:
    signed = row(CARL, counts(s1=1))
    signed.author = row(DORA, []).author
    return signed


def unreadable() -> pb.Signed:
    signed = sign(CARL, "coverage", RUN, pb.RoundRequest(wait_s=1.0))
    return sign(CARL, "coverage", RUN, pb.Signed(payload=signed.payload, author=b"\xff" * 9, signature=b"x"))


@pytest.mark.parametrize(
    ("hostile", "blamed", "words"),
    [
        (forged, BEN, "a signature that is not"),
        (lambda: pb.Signed(), BEN, "not the PeerID"),
        (unreadable, BEN, "cannot be read"),
        (lambda: row(CARL, counts(s1=1), run=OTHER), BEN, "a signature that is not"),
        (lambda: row(CARL, [10**9] * 5000), BEN, "bytes, more than"),
        (lambda: row(CARL, [1, 2, 3]), CARL, f"3 counts in a row; the run has {NUM_SHARDS}"),
        (lambda: row(CARL, counts(s1=2**63)), CARL, "out of range"),
        (lambda: row(CARL, counts(s1=1), on=NUM_SHARDS + 1), CARL, f"shard {NUM_SHARDS}; allowed: below"),
        (lambda: row(CARL, counts(s1=10**9)), CARL, "1000 are explained by now"),
    ],
)
def test_a_hostile_row_is_refused_named_once_and_the_others_are_taken(
    hostile: Callable[[], pb.Signed], blamed: Identity, words: str
) -> None:
    anna = Reader(ANNA, explained=lambda _, tokens: min(tokens, 1000))
    anna.coverage.receive_untrusted(CARL.peer_id, [row(CARL, counts(s0=3))])
    for _ in range(5):
        anna.coverage.receive_untrusted(BEN.peer_id, [hostile(), row(DORA, counts(s5=8))])
    ((peer, rule, detail),) = anna.told
    assert (peer, rule) == (blamed.peer_id, "shards") and words in detail
    assert anna.counts(CARL) == counts(s0=3) and anna.counts(DORA) == counts(s5=8)
    anna.now = 100.0
    anna.coverage.receive_untrusted(BEN.peer_id, [hostile()])
    assert len(anna.told) == 2, "a minute later it is named again"


def test_what_is_spared_is_not_told_and_may_be_told_later() -> None:
    anna = Reader(ANNA, explained=lambda _, tokens: 5)
    anna.coverage.spares = lambda peer, rule, detail: (peer, rule) == (CARL.peer_id, "shards") and "by now" in detail
    anna.coverage.receive_untrusted(BEN.peer_id, [row(CARL, counts(s0=9))])
    assert anna.told == [] and anna.counts(CARL) is None
    anna.coverage.spares = lambda peer, rule, detail: False
    anna.coverage.receive_untrusted(BEN.peer_id, [row(CARL, counts(s0=9))])
    assert [peer for peer, *_ in anna.told] == [CARL.peer_id]


def test_too_many_rows_are_not_read() -> None:
    anna = Reader(ANNA)
    anna.coverage.receive_untrusted(BEN.peer_id, [row(CARL, counts(s0=i)) for i in range(20)])
    assert "20 rows of the data's coverage; a manifest has at most 16" in anna.told[0][2]
    assert anna.counts(CARL) == counts(s0=15)


def test_rows_of_another_corpus_are_not_ours() -> None:
    anna = Reader(ANNA)
    anna.coverage.receive_untrusted(
        BEN.peer_id, [row(BEN, [1, 2, 3], corpus=OTHER), row(CARL, counts(s1=1), corpus="")]
    )
    assert anna.counts(BEN) is None and anna.counts(CARL) is None and anna.told == []


def test_an_archive_carries_rows_to_whoever_comes_when_all_are_gone() -> None:
    trained = {ANNA.peer_id: 500, BEN.peer_id: 400}
    archive = CarriedRows(RUN, lambda: trained)
    archive.receive_untrusted([row(ANNA, counts(s1=300)), row(BEN, counts(s2=400)), row(CARL, counts(s3=5), run=OTHER)])
    archive.receive_untrusted([row(ANNA, counts(s1=500)), row(ANNA, counts(s1=100))])
    again = CarriedRows(RUN, lambda: trained)
    again.restore(json.loads(json.dumps(archive.kept())))
    dora = Reader(DORA)
    dora.coverage.receive_untrusted("the bootstrap", again.rows_to_send())
    assert dora.counts(ANNA) == counts(s1=500) and dora.counts(BEN) == counts(s2=400) and dora.counts(CARL) is None
    for wrong in (["no row"], [5], 7):
        with pytest.raises((ValueError, TypeError)):
            again.restore(wrong)


def test_rows_that_claim_more_than_is_counted_push_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = CarriedRows(RUN, lambda: {ANNA.peer_id: 500})
    monkeypatch.setattr(coverage, "_MAX_PEERS", MAX_ROWS + 4)
    archive.receive_untrusted([row(ANNA, counts(s1=500))])
    for number in range(30, 70):
        archive.receive_untrusted([row(new_identity(bytes([number]) * 32), counts(s2=10**9))])
    sent = archive.rows_to_send()
    assert len(sent) == MAX_ROWS and len(archive.kept()) == MAX_ROWS + 4
    dora = Reader(DORA)
    dora.coverage.receive_untrusted("the bootstrap", sent)
    assert dora.counts(ANNA) == counts(s1=500)


def test_counts_are_looked_at_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes a look at all counts: for each of a thousand rows it would hold a bootstrap up for minutes."""
    looked: list[int] = []
    archive = CarriedRows(RUN, lambda: looked.append(1) or {ANNA.peer_id: 500})  # type: ignore[func-returns-value]
    monkeypatch.setattr(coverage, "_MAX_PEERS", 8)
    archive.receive_untrusted([row(new_identity(bytes([number]) * 32), counts(s2=7)) for number in range(30, 46)])
    assert len(archive.kept()) == 8 and len(looked) == 1
    assert len(archive.rows_to_send()) == 8 and len(looked) == 2


def test_what_is_believed_follows_from_the_tally_and_counts_nothing() -> None:
    rules = CountingRules(began_s=0.0, burst_tokens=100, most_tokens=10**9)
    speeds: dict[str, float] = {}
    reading: Any = None
    now = [0.0]
    accounting = TokenAccounting(ANNA.peer_id, rules, reading, lambda: speeds, lambda: now[0], lambda *told: None)
    accounting.meet(BEN.peer_id)
    now[0] = 50.0
    anna = Reader(ANNA, explained=accounting.explained)
    anna.coverage.receive_untrusted(BEN.peer_id, [row(BEN, counts(s1=500))])
    assert anna.counts(BEN) is None and anna.told == [], "nobody's speed is known: it comes again"
    speeds.update({ANNA.peer_id: 10.0, BEN.peer_id: 10.0})
    anna.coverage.receive_untrusted(BEN.peer_id, [row(BEN, counts(s1=500))])
    assert anna.counts(BEN) == counts(s1=500) and anna.told == [] and accounting.total == 0
    anna.coverage.receive_untrusted(BEN.peer_id, [row(BEN, counts(s1=10**6))])
    assert anna.counts(BEN) == counts(s1=500) and "2100 are explained by now" in anna.told[0][2]
