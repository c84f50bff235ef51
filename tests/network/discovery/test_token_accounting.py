"""Reading progress records: in rotation, and believing nobody more than is possible."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from codes import raises_code

from swarmtrain.errors import BadBytesError
from swarmtrain.network.discovery.records import PROGRESS, progress_from_proto_untrusted, progress_to_proto
from swarmtrain.network.discovery.token_accounting import TokenAccounting, counting_rules
from swarmtrain.network.identity import new_identity
from swarmtrain.protocol.membership.records import BUCKET_LIMIT, bucket_of
from swarmtrain.protocol.tokens.tally import CountingRules
from swarmtrain.run import RunFile
from swarmtrain.v1 import snapshot_pb2 as pb

ME, BEN, CARL, DORA = (new_identity(bytes([i]) * 32).peer_id for i in range(4))
RULES = CountingRules(began_s=1000.0, burst_tokens=200, most_tokens=10**9)
Bucket = dict[str, tuple[pb.Record, float]]


def record(tokens: int, stage: int = 0) -> tuple[pb.Record, float]:
    return pb.Record(progress=progress_to_proto(tokens, 3, stage)), 1e9


class Reading:
    """Tally over scripted buckets; every peer claims ten tokens a second."""

    def __init__(self, buckets: dict[str, Bucket]) -> None:
        self.buckets, self.reads, self.told = buckets, list[str](), list[tuple[str, str]]()
        self.now = 2000.0
        self.speeds = {ME: 10.0, BEN: 10.0, CARL: 10.0}
        self.accounting = TokenAccounting(
            ME,
            RULES,
            self.read_bucket,
            lambda: self.speeds,
            lambda: self.now,
            lambda peer, rule, detail: self.told.append((peer, rule)),
        )

    async def read_bucket(self, kind: str, prefix: str) -> Mapping[str, tuple[pb.Record, float]]:
        assert kind == PROGRESS
        self.reads.append(prefix)
        return self.buckets.get(prefix, {})

    def look(self, times: int = 1) -> None:
        async def read() -> None:
            for _ in range(times):
                await self.accounting.read_some()

        asyncio.run(read())


def test_a_small_swarm_is_read_whole_each_time() -> None:
    reading = Reading({"": {BEN: record(100), CARL: record(50)}})
    reading.look()
    assert reading.accounting.contributions() == reading.accounting.acknowledged() == {BEN: 100, CARL: 50}
    reading.buckets[""] = {BEN: record(180)}
    reading.look()
    assert reading.reads == ["", ""] and reading.accounting.total == 230, "whose record has expired still counts"


def big_swarm() -> Reading:
    full = {new_identity(f"{i:032}".encode()).peer_id: record(1) for i in range(4 * BUCKET_LIMIT)}
    buckets: dict[str, Bucket] = {}
    for peer, item in full.items():
        depth = next(d for d in range(24) if len(buckets.setdefault(bucket_of(peer, d), {})) < BUCKET_LIMIT)
        buckets[bucket_of(peer, depth)][peer] = item
    return Reading(buckets)


def test_at_the_end_a_big_swarm_is_read_whole_once_wherever_the_rotation_is() -> None:
    reading = big_swarm()
    reading.look()
    before = len(reading.reads)
    asyncio.run(reading.accounting.read_all())
    assert reading.accounting.total == 4 * BUCKET_LIMIT
    read = reading.reads[before:]
    assert len(read) == len(set(read))


def test_a_big_swarm_is_read_a_few_buckets_at_a_time_and_again_from_the_start() -> None:
    reading = big_swarm()
    for _ in range(20):
        before = len(reading.reads)
        reading.look()
        assert 1 <= len(reading.reads) - before <= 4
    assert reading.accounting.total == 4 * BUCKET_LIMIT
    assert reading.reads.count("") >= 2 and reading.reads.index("0") < reading.reads.index("", 1)


def test_an_unreadable_bucket_is_an_empty_one() -> None:
    reading = Reading({})
    reading.look(3)
    assert reading.reads == ["", "", ""] and reading.accounting.total == 0 and reading.told == []


@pytest.mark.parametrize(
    ("item", "rule"),
    [
        (record(2**60), "progress"),
        (record(2**64 - 1), "progress"),
        (record(10, stage=1), "progress"),
        ((pb.Record(progress=pb.Progress(tokens=5, round=2**63)), 1e9), "progress"),
        ((pb.Record(presence=pb.Presence(name="ben")), 1e9), "progress"),
        ((pb.Record(), 1e9), "progress"),
        (record(2**59), "tokens"),
        (record(200 + 1000 * 40 + 1), "tokens"),
    ],
)
def test_what_a_hostile_record_says_is_not_counted_and_named_once(item: tuple[pb.Record, float], rule: str) -> None:
    reading = Reading({"": {BEN: item, CARL: record(70)}})
    reading.look(50)
    assert reading.told == [(BEN, rule)]
    counts = reading.accounting.contributions()
    assert counts[CARL] == 70 and counts.get(BEN, 0) <= 200 + 1000 * 40


def test_a_crowd_with_bad_records_does_not_mute_who_lies_about_tokens() -> None:
    """Nor does a bad record of its own: each rule names by itself."""
    crowd = {new_identity(bytes([9, number]) * 16).peer_id: record(2**60) for number in range(30)}
    reading = Reading({"": {**crowd, BEN: record(2**60)}})
    reading.look()
    assert len(reading.told) == 16 and {rule for _, rule in reading.told} == {"progress"}
    reading.buckets[""] = {**crowd, BEN: record(2**59)}
    reading.look()
    assert reading.told[16:] == [(BEN, "tokens")]


def test_a_record_in_a_bucket_of_others_is_not_counted() -> None:
    wrong = "1" if bucket_of(BEN, 1) == "0" else "0"
    reading = Reading({"": {f"filler {i}": record(0) for i in range(BUCKET_LIMIT)}, wrong: {BEN: record(10)}})
    reading.look(3)
    assert BEN not in reading.accounting.contributions()


def test_a_negative_count_is_refused() -> None:
    negative = pb.Progress.FromString(b"\x10" + b"\xff" * 9 + b"\x01")  # -1 as a signed reader would have it
    with raises_code("bad-number", BadBytesError):
        progress_from_proto_untrusted(negative)


def test_the_name_of_one_that_left_is_read_in_its_record() -> None:
    """Seen: who joined later saw the end of a PeerID in place of a name."""
    named = pb.Record(progress=progress_to_proto(100, 3, name="ben"))
    reading = Reading({"": {BEN: (named, 1e9), CARL: record(50)}})
    reading.look()
    assert reading.accounting.names == {BEN: "ben", CARL: ""}


@pytest.mark.parametrize("name", ["b" * 65, "ben\n", "\x1b[2J", "\u202egpj"])
def test_a_name_that_no_screen_should_show_is_refused(name: str) -> None:
    with raises_code("bad-number", BadBytesError):
        progress_from_proto_untrusted(progress_to_proto(1, 3, name=name))
    reading = Reading({"": {BEN: (pb.Record(progress=progress_to_proto(100, 3, name=name)), 1e9)}})
    reading.look()
    assert not reading.accounting.names and reading.told == [(BEN, "progress")]


def test_names_of_endless_identities_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain.network.discovery.token_accounting._MAX_NAMES", 2)
    peers = {peer: (pb.Record(progress=progress_to_proto(9, 3, name=peer[-6:])), 1e9) for peer in (BEN, CARL, DORA)}
    reading = Reading({"": peers})
    reading.look(3)
    assert len(reading.accounting.names) == 2


def test_an_old_record_or_one_of_another_fork_takes_nothing_away_and_counts_nothing_twice() -> None:
    reading = Reading({"": {BEN: record(100)}})
    reading.look()
    reading.accounting.learn({BEN: 80, CARL: 80})
    reading.buckets[""] = {BEN: record(60)}
    reading.look()
    assert reading.accounting.contributions() == {BEN: 100, CARL: 80}
    assert reading.accounting.acknowledged() == {BEN: 100}


def test_one_tells_what_was_ever_safe_and_reads_what_one_told_in_an_earlier_life() -> None:
    reading = Reading({"": {ME: record(500)}})
    accounting = reading.accounting
    assert [accounting.own_to_tell(tokens) for tokens in (100, 90, 120)] == [100, 100, 120], "a fork counted less"
    accounting.learn({ME: 300})
    assert accounting.own_to_tell(120) == 120, "counted, and not yet on the disk"
    reading.look()
    assert accounting.own_to_tell(130) == 500 and accounting.contributions() == {ME: 500}


def test_what_was_told_is_believed_when_everyone_has_left_after_a_restart_too() -> None:
    """A bootstrap that was away until the end reads last, and nobody is there whose speed could explain anything."""
    reading = Reading({"": {BEN: record(100)}})
    reading.look()
    reading.speeds = {}
    reading.buckets[""] = {BEN: record(180), CARL: record(90)}
    reading.look()
    assert reading.accounting.contributions() == {BEN: 180, CARL: 90}
    again = Reading({"": {BEN: record(250), CARL: record(90)}})
    again.speeds, again.now = {}, 2010.0
    again.accounting.restore(reading.accounting.kept())
    again.look()
    assert again.accounting.acknowledged() == {BEN: 250, CARL: 90}
    nobody = Reading({"": {BEN: record(100)}})
    nobody.speeds = {}
    nobody.look()
    assert nobody.accounting.contributions() == {} and nobody.told == [], "nothing was ever known"


def test_a_tally_outlives_its_process() -> None:
    reading = Reading({"": {BEN: record(100)}})
    reading.accounting.learn({ME: 70, CARL: 30})
    reading.look()
    again = Reading({})
    again.accounting.restore(reading.accounting.kept())
    assert again.accounting.contributions() == {ME: 70, BEN: 100, CARL: 30} and again.accounting.total == 200
    assert again.accounting.acknowledged() == {BEN: 100} and again.accounting.own_to_tell(0) == 70
    with pytest.raises(ValueError, match="count"):
        again.accounting.restore([[BEN, 0, 5]])


def test_counts_come_with_states_and_say_nothing_new_of_this_peer_itself() -> None:
    reading = Reading({})
    reading.accounting.adopt([{BEN: 5000, CARL: 70, ME: 10**8}, {BEN: 6000, ME: 10**8}])
    assert reading.accounting.contributions() == {BEN: 5000, ME: 200}
    reading.now += 100.0
    reading.accounting.adopt([{BEN: 10**6}, {BEN: 9000}, {BEN: 8000}])
    assert reading.accounting.contributions()[BEN] == 9000


def test_the_server_that_a_run_names_is_believed_alone() -> None:
    rules = CountingRules(began_s=1000.0, burst_tokens=200, most_tokens=10_100, total_tokens=10_000)
    for is_server, counted in ((True, 10_000), (False, 9_800)):
        reading = Reading({})
        reading.accounting._tally.rules = rules
        reading.accounting.adopt([{BEN: 10_000}], is_server=is_server)
        assert reading.accounting.total == counted


def test_a_bootstrap_that_has_published_the_run_watches_from_then_on() -> None:
    """What the first volunteer brings is what those who are here can have done since."""
    reading = Reading({})
    reading.accounting.watch()
    reading.now = RULES.began_s + 10
    reading.accounting.adopt([{BEN: 10**6}])
    assert reading.accounting.total == 3 * (200 + 40 * 10)
    reading.now += 60.0
    reading.accounting.receive(CARL, 10**6)
    assert reading.accounting.contributions()[CARL] == 200 + 40 * 60, "a minute, in which it was here"


def test_what_is_usual_is_looked_up_once_for_all_that_states_tell() -> None:
    """Of few that are here it takes a look at everybody ever counted: for each of thousands, seconds of the loop."""
    reading, looks = Reading({}), 0

    def speeds() -> dict[str, float]:
        nonlocal looks
        looks += 1
        return {ME: 10.0, BEN: 10.0}

    reading.accounting.speeds = speeds
    told = {f"p{number}": 100 for number in range(50)}
    reading.accounting.receive_all({**told, CARL: 10**6})
    assert looks == 1 and reading.accounting.contributions() == {**told, CARL: 200}, "no more than was possible"
    assert reading.told == [(CARL, "tokens")]


def test_the_rules_of_a_run() -> None:
    section = {"created": "2026-11-25T00:00:00+00:00", "swarmtrain": "0.1", "held_out_sha256": "0" * 64}
    table = {"run": {"total_tokens": 100_000}, "published": {**section, "held_out_bytes": 1000}}
    run = RunFile.model_validate(table)
    rules = counting_rules(run, 2e9)
    assert rules.began_s == 1_795_564_800.0 and counting_rules(run, 5.0).began_s == 5.0
    assert rules.burst_tokens == 2 * run.merge.inner_steps * run.tokens_per_step
    assert rules.most_tokens == 100_000 + run.max_round_tokens and rules.total_tokens == 100_000
