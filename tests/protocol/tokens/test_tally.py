"""Counting: merging by the greater count, and believing no more than a peer's speed explains."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.membership.budgets import NamedOnce
from swarmtrain.protocol.tokens.tally import ALL_OTHERS, CountingRules, Tally, agreed_counts, quick_speed, typical_speed

HOUR_S, DAY_S = 3600.0, 86_400.0
RULES = CountingRules(began_s=1000.0, burst_tokens=200, most_tokens=10**12)
TYPICAL = 10.0

PEERS = st.sampled_from(["ada", "ben", "cleo", "dora", "emil"])
COUNTS = st.dictionaries(PEERS, st.integers(0, 50))


@st.composite
def tallies(draw: st.DrawFn, max_counts: int = 3) -> Tally:
    """Learned and told counts of a few peers, in a tally so small that some are left out."""
    tally = Tally(RULES, max_counts, typical_per_s=TYPICAL)
    tally.learn(draw(COUNTS), 1000.0)
    for (peer, stage), tokens in draw(st.dictionaries(st.tuples(PEERS, st.integers(0, 1)), st.integers(0, 50))).items():
        tally.observe(peer, stage, tokens, 2000.0)
    tally._prune(tally._told, slack=0)
    return tally


def merged(*parts: Tally) -> tuple[dict[str, int], dict[str, int], int]:
    whole = Tally(RULES, parts[0].max_counts)
    for part in parts:
        whole.merge(part)
    return whole.contributions(), whole.told(), whole.total


def nested(a: Tally, b: Tally, c: Tally) -> tuple[dict[str, int], dict[str, int], int]:
    right = Tally(RULES, a.max_counts)
    right.merge(b)
    right.merge(c)
    return merged(a, right)


@given(tallies(), tallies(), tallies())
def test_merging_is_commutative_associative_and_idempotent_also_when_there_is_no_room(
    a: Tally, b: Tally, c: Tally
) -> None:
    assert merged(a, b) == merged(b, a)
    assert merged(a, b, c) == nested(a, b, c) == merged(c, a, b)
    assert merged(a, a) == merged(a) and merged(a, b, a, b) == merged(a, b)


@given(tallies(100), tallies(100))
def test_merging_loses_nothing_and_a_checkpoint_keeps_everything(a: Tally, b: Tally) -> None:
    before = {peer: (a.tokens(peer, 0), b.tokens(peer, 0)) for peer in ("ada", "ben", "cleo", "dora", "emil")}
    a.merge(b)
    assert all(a.tokens(peer) == max(counts) for peer, counts in before.items())
    again = Tally(RULES)
    again.merge_rows(json.loads(json.dumps(a.rows())))
    assert again.rows() == a.rows() and again.total == a.total and again.told() == a.told()


@given(st.lists(st.tuples(PEERS, st.integers(0, 10**6), st.floats(-1e6, 1e7), st.floats(0, 1e6))))
def test_counts_never_fall_and_never_exceed_what_is_said(said: list[tuple[str, int, float, float]]) -> None:
    tally, most = Tally(RULES, typical_per_s=TYPICAL), dict[str, int]()
    for peer, tokens, now, speed in said:
        held = tally.tokens(peer)
        believed, incident = tally.observe(peer, 0, tokens, now, speed)
        most[peer] = max(most.get(peer, 0), tokens)
        assert held <= believed == tally.tokens(peer) <= most[peer]
        assert incident is None or believed < tokens


@pytest.mark.parametrize(
    "row",
    [
        ["a"],
        ["a", 0, 1, 1, 1.0],
        [1, 0, 1, 1, 1.0, 1.0],
        ["a", 0, -1, 1, 1.0, 1.0],
        ["a", 0, 1, "1", 1.0, 1.0],
        ["a", 0, 1, 1, float("nan"), 1.0],
        ["a", 0, 1, 1, 1.0, float("inf")],
        "text",
        None,
    ],
)
def test_rows_that_are_something_else_are_not_merged(row: object) -> None:
    tally = Tally(RULES)
    with pytest.raises(ValueError, match="count"):
        tally.merge_rows([["good", 0, 5, 5, 1.0, 1.0], row])  # type: ignore[list-item]
    assert tally.total == 0


# ---------------------------------------------------------------- what is believed


def test_only_stage_0_is_in_the_total() -> None:
    tally = Tally(RULES, typical_per_s=TYPICAL)
    tally.observe("a", 0, 100, 2000.0)
    tally.observe("a", 1, 70, 2000.0)
    tally.observe("b", 1, 50, 2000.0)
    assert tally.total == 100 and tally.contributions() == {"a": 170, "b": 50} and tally.tokens("a", 1) == 70


def test_growth_is_believed_up_to_four_times_the_claimed_speed_and_the_rest_as_time_passes() -> None:
    rules = CountingRules(began_s=2000.0, burst_tokens=200, most_tokens=10**12)
    tally = Tally(rules, typical_per_s=TYPICAL)
    tally.learn({"liar": 1000}, 2000.0)
    believed, incident = tally.observe("liar", 0, 10_000, 2010.0, 5.0)
    assert believed == 1000 + 200 + 4 * 5 * 10, "two rounds at once, and ten seconds at four times its speed"
    assert incident is not None and (incident.peer, incident.rule) == ("liar", "tokens") and "10000" in incident.detail
    assert tally.observe("liar", 0, 10_000, 2010.0, 5.0)[0] == believed, "asked again it is believed no more"
    assert tally.observe("liar", 0, 10_000, 2020.0, 5.0)[0] == believed + 200
    assert tally.observe("liar", 0, 10_000, 2010.0 + 10_000 / 20, 5.0) == (10_000, None)


def test_a_state_from_a_checkpoint_says_nothing_of_the_time_since() -> None:
    tally = Tally(RULES, typical_per_s=TYPICAL)
    tally.observe("away", 0, 1000, 2000.0, 10.0)
    tally.learn({"away": 1100}, 2600.0)  # read back by a peer that was down for ten minutes: others trained meanwhile
    assert tally.observe("away", 0, 1100 + 600 * 10, 2600.0, 10.0) == (7100, None)
    assert tally.observe("away", 0, 10**6, 2600.0, 10.0)[0] < 1000 + 1700 * 40, "and it is bounded as before"


def test_a_claimed_speed_is_no_proof() -> None:
    tally = Tally(RULES, typical_per_s=TYPICAL)
    tally.learn({"liar": 0}, 2000.0)
    tally.observe("liar", 0, 1, 1000.0, 1e12)
    believed, _ = tally.observe("liar", 0, 10**9, 2010.0, 1e12)
    assert believed <= 64 * TYPICAL * 1010 + 201


def test_what_a_roster_counted_needs_no_explanation_and_explains_nothing_else() -> None:
    tally = Tally(RULES, typical_per_s=TYPICAL)
    tally.learn({"a": 10**9}, 5000.0)
    assert tally.tokens("a") == 10**9 and tally.told() == {}
    assert tally.observe("a", 0, 10**9 - 5, 5000.0, 1.0) == (10**9, None)
    assert tally.told() == {"a": 10**9 - 5}, "what was read is remembered apart: it is what the peer knows to be told"
    assert tally.observe("a", 0, 2 * 10**9, 5000.0, 1.0)[0] == 10**9 + 200


def test_a_first_sighting_earns_from_when_it_was_met_and_not_for_the_age_of_the_run() -> None:
    tally = Tally(RULES, typical_per_s=TYPICAL)
    month_s = RULES.began_s + 30 * DAY_S
    believed, incident = tally.observe("liar", 0, 10**11, month_s, 10.0)
    assert believed == 200 and incident is not None, "two rounds at once"
    tally.meet(["here"], month_s)
    assert tally.observe("here", 0, 200 + 40 * 60, month_s + 60, 10.0) == (200 + 40 * 60, None)
    assert tally.observe("liar", 0, 10**11, month_s + 60, 10.0)[0] == 200 + 40 * 60


def honest_run() -> tuple[Tally, float]:
    """Two honest peers have trained a run of 1000 * 30 rounds to 14 %, a day after it began."""
    rules = CountingRules(began_s=0.0, burst_tokens=200, most_tokens=3_000_100, total_tokens=3_000_000)
    tally = Tally(rules)
    for minute in range(1, 60 * 24 + 1):
        for peer in ("ada", "ben"):
            tally.meet([peer], 0.0)
            tally.know_speeds({"ada": 3.0, "ben": 3.0})
            tally.observe(peer, 0, 210_000 * minute // (60 * 24), minute * 60.0, 3.0)
    assert tally.total == 420_000
    return tally, DAY_S


@pytest.mark.parametrize("claimed_per_s", [0.0, 3.0, 1e9])
def test_a_newcomers_record_does_not_end_a_run(claimed_per_s: float) -> None:
    """Seen: one record took a run from 14 % to its end; half an hour later it has not moved it by a twentieth."""
    tally, now = honest_run()
    for second in range(0, 1800, 5):
        tally.know_speeds({"ada": 3.0, "ben": 3.0, "mallory": claimed_per_s})
        tally.observe("mallory", 0, 2_580_000, now + second, claimed_per_s)
        assert tally.total <= 420_000 + 200 + 64 * 3 * second
    assert tally.total < 0.18 * 3_000_000


def test_who_delivers_is_believed_at_twice_the_speed_after_a_while() -> None:
    """An honest machine of thirty times the usual speed is counted in full within the hour."""
    tally, tokens = Tally(RULES), 0
    speeds = {"a": 9.0, "b": 10.0, "c": 10.0, "d": 11.0, "fast": 300.0}
    tally.meet(speeds, 2000.0)
    lags = []
    for second in range(0, 3600, 10):
        tokens = 300 * second
        tally.know_speeds(speeds)
        believed, _ = tally.observe("fast", 0, tokens, 2000.0 + second, 300.0)
        lags.append(tokens - believed)
    assert lags[50] > 0 and lags[-1] == 0
    again = Tally(RULES)
    again.merge_rows(json.loads(json.dumps(tally.rows())))
    assert again.rows() == tally.rows() and len(tally.rows()[0]) == 7, "trust outlives a restart"


@pytest.mark.parametrize("told", [0, 1])
def test_who_delivers_nothing_is_believed_at_the_first_speed_for_ever(told: int) -> None:
    """However fast it says that it is, and however long it has been here."""
    tally, speeds = Tally(RULES), {"a": 9.0, "b": 10.0, "c": 10.0, "d": 11.0, "sleeper": 640.0}
    tally.meet(speeds, 2000.0)
    for second in range(0, int(DAY_S), 600):
        tally.know_speeds(speeds)
        tally.observe("sleeper", 0, told * (1 + second // 600), 2000.0 + second, 640.0)
    now = 2000.0 + DAY_S
    believed, _ = tally.observe("sleeper", 0, 10**9, now, 640.0)
    assert believed <= RULES.burst_tokens + DAY_S * 4 * 11 + 200
    assert tally.observe("sleeper", 0, 10**9, now + 10, 640.0)[0] - believed <= 10 * 8 * 11, "a day's worth earns once"


def test_one_that_is_alone_does_not_say_what_is_usual() -> None:
    tally, now = honest_run()
    tally.know_speeds({"mallory": 1e9})
    assert tally.typical_per_s == tally.quick_per_s == 3.0
    tally.observe("mallory", 0, 2_580_000, now, 1e9)
    tally.observe("mallory", 0, 2_580_000, now + 60, 1e9)
    assert tally.tokens("mallory") == 200 + 60 * 4 * 3


# ---------------------------------------------------------------- what states bring

ARCHIVED = {"ada": 210_000, "ben": 255_664}


def test_a_newcomer_has_the_counts_that_belong_to_the_state() -> None:
    """Also those of volunteers who have left and whom it never meets, and without a speed of anybody."""
    rules = CountingRules(began_s=0.0, burst_tokens=200, most_tokens=3_000_100, total_tokens=3_000_000)
    tally = Tally(rules)
    tally.adopt(ARCHIVED, 1, DAY_S)
    assert tally.contributions() == ARCHIVED and tally.told() == {}
    tally.adopt({"ada": 5}, 3, DAY_S + 1)
    assert tally.contributions() == ARCHIVED, "counts never fall"
    assert tally.observe("ada", 0, 10**9, DAY_S + 2, 3.0)[0] == 210_000, "no speed is known yet"
    tally.know_speeds({"ada": 3.0, "me": 3.0})
    assert tally.observe("ada", 0, 10**9, DAY_S + 2, 3.0)[0] == 210_000 + 200 + 12 * 0, "and it explains nothing else"


def test_three_sources_outvote_one_and_of_two_the_lesser_counts() -> None:
    told = [{"a": 100, "b": 50}, {"a": 90, "b": 60, "c": 7}, {"a": 10**15, "d": 10**15}]
    assert agreed_counts(told) == {"a": 100, "b": 50, "c": 0, "d": 0}
    assert agreed_counts(told[1:]) == {"a": 90, "b": 0, "c": 0, "d": 0} and agreed_counts(told[:1]) == told[0]
    assert agreed_counts([]) == {}


def test_those_who_are_told_in_one_sum_are_counted_once() -> None:
    """Of a run of very many a state tells the least counts as one; some of them are known here by themselves."""
    ours = Tally(RULES, typical_per_s=TYPICAL)
    ours.learn({"ada": 500, "ben": 20, "cleo": 10}, 2000.0)
    told = {"ada": 500, ALL_OTHERS: 30}
    for again in range(3):
        ours.adopt(ours.with_rest(told), 3, 1e6 + 3600 * again)
    assert ours.total == 530, "ben and cleo are those"
    late = Tally(RULES, typical_per_s=TYPICAL)
    for again in range(3):
        late.adopt(late.with_rest(told), 3, 1e6 + 3600 * again)
    assert late.total == 530 and late.tokens(ALL_OTHERS) == 30, "who knows none of them counts them all the same"
    late.adopt(late.with_rest({"ada": 500, "ben": 20, ALL_OTHERS: 30}), 3, 2e6)
    assert late.total == 550, "what was counted does not fall"


@pytest.mark.parametrize("num_sources", [1, 2])
def test_one_or_two_sources_never_end_a_run(num_sources: int) -> None:
    rules = CountingRules(began_s=0.0, burst_tokens=200, most_tokens=3_000_100, total_tokens=3_000_000)
    new, three = Tally(rules), Tally(rules)
    new.adopt({"x": 2_000_000, "y": 2_000_000}, num_sources, DAY_S)
    assert new.contributions() == {"x": 1_499_900, "y": 1_499_900}
    three.adopt({"x": 2_000_000, "y": 2_000_000}, 3, DAY_S)
    assert three.total == 4_000_000
    most = Tally(rules)
    most.adopt({"z": 10**15}, 3, DAY_S)
    assert most.total == rules.most_tokens, "nobody has more than the run"


@pytest.mark.parametrize("num_sources", [1, 2, 3, 9])
def test_what_is_brought_to_a_peer_that_watched_is_what_everybody_can_have_done_since(num_sources: int) -> None:
    tally, now = honest_run()
    tally.adopt({}, 3, now)
    tally.adopt({"ada": 210_000 + 100, "stranger": 80}, num_sources, now + 10)
    assert tally.total == 420_180, "a few rounds need no time"
    tally.adopt({"x": 2_000_000}, num_sources, now + 20)
    assert 420_180 < tally.total <= 420_180 + 3 * (200 + 4 * 3 * 10)
    before = tally.total
    for second in range(30, 3600, 10):
        tally.adopt({"x": 5000}, num_sources, now + second)
    assert tally.tokens("x") == 5000 and tally.total > before, "brought again it is believed as time passes"


def test_what_is_brought_before_any_speed_is_known_waits_for_one() -> None:
    """A bootstrap that was started again, whose volunteers have not told how fast they are."""
    tally, now = honest_run()
    again = Tally(tally.rules)
    again.adopt({"ada": 210_000, "ben": 210_000}, 3, now)
    again.adopt({"ada": 300_000}, 1, now + 10_000)
    assert again.tokens("ada") == 210_000 + 2 * 200
    again.know_speeds({"ada": 3.0})
    again.adopt({"ada": 300_000}, 1, now + 10_005)
    assert again.tokens("ada") == 300_000


def test_an_old_folder_put_back_has_watched_until_then() -> None:
    """A week passes: what the others did meanwhile is believed of one of them."""
    tally, now = honest_run()
    again = Tally(tally.rules)
    again.merge_rows(json.loads(json.dumps(tally.rows())))
    again.know_speeds({"ada": 3.0})
    again.adopt({"ada": 500_000, "ben": 400_000, "carl": 300_000}, 1, now + 7 * DAY_S)
    assert again.total == 1_200_000
    soon = Tally(tally.rules)
    soon.merge_rows(tally.rows())
    soon.watched_s = now  # as a checkpoint of now says
    soon.know_speeds({"ada": 3.0})
    soon.adopt({"ada": 500_000, "ben": 400_000, "carl": 300_000}, 1, now + 60)
    assert soon.total <= 420_000 + 2 * (200 + 12 * 60)


def test_while_no_speed_is_known_nothing_is_believed_and_nobody_is_named() -> None:
    tally = Tally(RULES)
    assert tally.observe("a", 0, 100, 2000.0) == (0, None)
    tally.typical_per_s = TYPICAL
    assert tally.observe("a", 0, 100, 2000.0) == (100, None)


def test_nobody_has_more_than_the_run() -> None:
    tally = Tally(CountingRules(began_s=0.0, burst_tokens=200, most_tokens=5000), typical_per_s=TYPICAL)
    tally.meet(["liar"], 0.0)
    believed, incident = tally.observe("liar", 0, 2**59, 1e6, 10.0)
    assert believed == 5000 and incident is not None


def test_a_clock_that_jumps_costs_an_honest_peer_nothing_and_gives_a_liar_a_week_at_most() -> None:
    tally = Tally(RULES, typical_per_s=TYPICAL)
    tally.meet(["a", "liar"], 1000.0)
    assert tally.observe("a", 0, 5000, 2000.0, 10.0) == (5000, None)
    year_s = 365 * DAY_S
    believed, _ = tally.observe("liar", 0, 10, 2000.0, 10.0)
    believed, _ = tally.observe("liar", 0, 10**11, 2000.0 + year_s, 10.0)
    assert believed <= 7 * DAY_S * 40 + 210
    assert tally.observe("a", 0, 5100, 2000.0 + year_s, 10.0) == (5100, None)
    tally.learn({"a": 5200}, 2000.0 + year_s)  # and now the clock is right again
    assert tally.observe("a", 0, 5210, 2010.0, 10.0)[0] >= 5200
    assert tally.observe("a", 0, 5500, 2100.0, 10.0) == (5500, None)


def test_what_is_believed_can_be_asked_without_counting_it() -> None:
    tally = Tally(CountingRules(began_s=0.0, burst_tokens=100, most_tokens=10**9), typical_per_s=10.0)
    for told, now in ((500, 10.0), (10**6, 20.0), (400, 30.0), (3000, 60.0)):
        before = tally.rows()
        believed = tally.believes("b", told, now, 10.0)
        assert tally.rows() == before
        assert believed == min(told, tally.observe("b", 0, told, now, 10.0)[0])
    assert Tally(tally.rules).believes("b", 5, 1.0) == 0, "no speed is known"


def test_a_flood_of_identities_pushes_nobody_out_and_takes_no_memory() -> None:
    tally = Tally(RULES, max_counts=64, typical_per_s=TYPICAL)
    tally.learn({f"known {i}": 10 for i in range(20)}, 2000.0)
    tally.meet([f"honest {i}" for i in range(20)], 1000.0)
    for i in range(20):
        tally.observe(f"honest {i}", 0, 1000 + i, 2000.0, 10.0)
    for i in range(5000):
        tally.observe(f"nobody {i}", 0, 1 + i % 900, 2000.0, 10.0)
        assert len(tally.rows()) <= 64 + 8 + 20 and len(tally._accounts) <= 64 + 8 + 20
    for i in range(20_000):
        tally.meet([f"seen {i}"], 2000.0)
    assert len(tally._met_s) == 16_384
    counts = tally.contributions()
    assert all(counts[f"known {i}"] == 10 and counts[f"honest {i}"] == 1000 + i for i in range(20))


def test_the_typical_speed_is_the_lower_median_of_those_known() -> None:
    assert typical_speed([]) == typical_speed([0.0, float("inf"), float("nan"), -1.0]) == 0.0
    assert typical_speed([5.0, 1e9]) == 5.0, "of two, one may lie"
    assert typical_speed([5.0, 0.0, 1e9, 4.0]) == 5.0
    assert quick_speed([]) == 0.0 and quick_speed([5.0, 1e9]) == 5.0 and quick_speed([4.0, 5.0, 1e9]) == 5.0
    assert quick_speed([1.0, 2.0, 3.0, 1e9]) == 3.0 and quick_speed([float(n) for n in range(1, 102)]) == 76.0


# ---------------------------------------------------------------- a month


@dataclass
class Worker:
    """Peer that trains `per_s` tokens a second while it is present, and claims `lies` times as much."""

    name: str
    per_s: float
    lies: float = 1.0
    claims: float = 1.0
    tokens: int = 0
    told: int = 0
    here: bool = True

    def train(self, seconds: float) -> None:
        if self.here:
            self.tokens += int(self.per_s * seconds)
            self.told = max(self.told, int(self.tokens * self.lies))


@dataclass
class Reader:
    """Peer that reads the others' records, and is killed and restarted from its last checkpoint."""

    tally: Tally
    named: NamedOnce = field(default_factory=NamedOnce)
    incidents: list[str] = field(default_factory=list)
    checkpoint: str = "[]"

    def read(self, workers: list[Worker], now: float) -> None:
        self.tally.know_speeds({w.name: w.per_s * w.claims for w in workers if w.here})
        for worker in workers:
            claimed = worker.per_s * worker.claims if worker.here else 0.0
            _, incident = self.tally.observe(worker.name, 0, worker.told, now, claimed)
            if incident is not None and self.named.is_due(worker.name, now):
                self.incidents.append(worker.name)

    def restart(self) -> None:
        self.tally, self.named = Tally(MONTH), NamedOnce()
        self.tally.merge_rows(json.loads(self.checkpoint))


STEP_S = 600.0
MONTH = CountingRules(began_s=1000.0, burst_tokens=2 * 300 * int(STEP_S), most_tokens=10**12)


def test_a_month_with_restarts_forks_absences_and_liars() -> None:
    rng = random.Random(7)
    honest = [Worker(f"honest {i}", per_s) for i, per_s in enumerate([3, 10, 10, 12, 15, 300])]
    tenfold, thousandfold = Worker("tenfold", 10, lies=10), Worker("thousandfold", 10, lies=1000)
    boaster = Worker("boaster", 10, lies=1e6, claims=1e6)
    workers = [*honest, tenfold, thousandfold, boaster]
    fast, reader, now = honest[-1], Reader(Tally(MONTH)), MONTH.began_s
    for look in range(int(30 * DAY_S / STEP_S)):
        now += STEP_S
        day = look * STEP_S / DAY_S
        fast.here = not 5 < day < 8  # it was away
        for worker in workers:
            worker.train(STEP_S)
        if 12 < day < 14:
            continue  # this reader is away, or parted from the others
        seen = now + (10 * DAY_S if look % 500 == 499 else 0.0)  # its clock is wrong for a moment
        if rng.random() < 0.1:  # of a fork in which the last round was another: less is counted
            reader.tally.learn({worker.name: worker.tokens // 2 for worker in honest}, seen)
        reader.read(workers, seen)
        if rng.random() < 0.5:
            reader.checkpoint = json.dumps(reader.tally.rows())
        if rng.random() < 0.02:
            reader.restart()
    reader.read(workers, now)
    counts = reader.tally.contributions()
    assert [counts[worker.name] for worker in honest] == [worker.tokens for worker in honest]
    assert not [name for name in reader.incidents if name.startswith("honest")]
    truth = 10 * 30 * DAY_S
    jumps = 8 * (7 * DAY_S * 40 + 2 * MONTH.burst_tokens)  # a clock that was ahead explains a week each time
    assert counts["tenfold"] <= 4.1 * truth + jumps and counts["thousandfold"] <= 4.1 * truth + jumps
    assert counts["boaster"] <= (30 + 8 * 7) * DAY_S * 64 * typical_speed([3, 10, 10, 10, 10, 12, 15, 300, 1e7]) * 1.01
    for liar in ("thousandfold", "boaster"):
        assert 1 <= reader.incidents.count(liar) <= 30 * 4 + 90, "named, and not at each of four thousand looks"
