"""Moves between stages: who moves where, that all decide alike, and that no move empties a stage."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmtrain.protocol.pipeline.balance import (
    Joiner,
    Rule,
    StageChange,
    StagePeer,
    anchor,
    change_by_queues,
    changes,
    compute_speed,
    first_stages,
    may_move_again,
    my_change,
    stage_rates,
    stages_for_joiner,
)
from swarmtrain.protocol.pipeline.moves import LeaseRequest, StageLease, StageLeases

THREE = Rule(costs=(1 / 3,) * 3)
NOW = 1000.0


def peer(name: str, *stages: int, rate: float = 100.0, **more: object) -> StagePeer:
    return StagePeer(peer=name, stages=stages, tokens_per_s=rate, seen_s=NOW, **more)  # type: ignore[arg-type]


def pile(*counts: int) -> list[StagePeer]:
    """Return so many equal peers per stage, named p00, p01, ... in the order of the stages."""
    stages = [stage for stage, count in enumerate(counts) for _ in range(count)]
    return [peer(f"p{i:02d}", stage) for i, stage in enumerate(stages)]


def rule(num_stages: int, **more: object) -> Rule:
    return Rule(costs=(1 / num_stages,) * num_stages, **more)  # type: ignore[arg-type]


def made(peers: list[StagePeer], name: str, after: tuple[int, ...], rule: Rule) -> list[StagePeer]:
    """`peers` when `name` holds `after`, its rate what follows from its speed."""
    return [
        replace(one, stages=after, tokens_per_s=compute_speed(one, rule) / rule.cost(after))
        if one.peer == name
        else one
        for one in peers
    ]


def settled(peers: list[StagePeer], rule: Rule) -> tuple[list[StagePeer], int]:
    """After all changes, one after the other; and how many they were."""
    num = 0
    while num <= 200:
        found, _ = changes(peers, NOW, rule)
        if not found:
            return peers, num
        peers, num = made(peers, found[0].peer, found[0].after, rule), num + 1
    raise AssertionError("it never ends")


def counts(peers: list[StagePeer], num_stages: int) -> list[int]:
    return [sum(stage in one.stages for one in peers) for stage in range(num_stages)]


# ---------------------------------------------------------------- by hand


def test_four_one_one_names_one_mover_and_says_why() -> None:
    peers = pile(4, 1, 1)
    reason = "stage 1 is the slowest (100 tokens/s of 400): p00 moves to it from stage 0, which keeps 3"
    change, said = my_change("p00", peers, NOW, THREE)
    assert change is not None and (change.before, change.after, said) == ((0,), (1,), reason)
    assert (change.leaves, change.enters) == ((0,), (1,))
    for name in ("p01", "p04", "stranger"):
        assert my_change(name, peers, NOW, THREE) == (None, reason)
    assert anchor("p00", peers, 0, NOW, THREE) == "p01" and anchor("p01", peers, 0, NOW, THREE) == "p00"
    assert anchor("p04", peers, 1, NOW, THREE) is None


@pytest.mark.parametrize(
    ("piled", "becomes", "moves"),
    [
        ((4, 1, 1), [2, 2, 2], 2),
        ((8, 2, 2), [4, 4, 4], 4),
        ((3, 3, 1, 1), [2, 2, 2, 2], 2),
        ((6, 0, 0), [2, 2, 2], 4),
        ((1, 61, 1, 1), [16, 16, 16, 16], 45),
        ((2, 2, 3), [2, 2, 3], 0),
        ((1, 1, 0), [1, 1, 0], 0),
    ],
)
def test_piles_resolve_in_as_few_moves_as_there_are(piled: tuple[int, ...], becomes: list[int], moves: int) -> None:
    peers, num = settled(pile(*piled), rule(len(piled)))
    assert (counts(peers, len(piled)), num) == (becomes, moves)


def test_two_stages_that_are_nearly_equally_slow_do_not_block_each_other() -> None:
    """Of 100, 103 and 900 the slowest can only become 103: the pair that a move touches is what counts."""
    peers = [peer("a", 0), peer("b", 1, rate=103.0), *(peer(f"c{i}", 2) for i in range(9))]
    change = changes(peers, NOW, THREE)[0][0]
    assert change.after == (0,) and change.before == (2,)
    after, _ = settled(peers, THREE)
    assert sorted(counts(after, 3)) == [3, 4, 4] and min(stage_rates(after, THREE)) >= 299


@pytest.mark.parametrize(
    ("rate", "big", "small", "moves"),
    [
        (100.0, 150.0, 6.0, True),
        (100.0, 150.0, 4.0, True),  # 4 % only, and all that it has, where the stages are 28 % from being even
        (100.0, 105.0, 4.0, False),  # they are 4.5 % from it
        (100.0, 104.0, 8.0, True),  # 4 % faster, half of what it has
        (100.0, 103.0, 9.0, False),  # 3 %: the other stage would be the slower one
    ],
)
def test_a_move_is_worth_five_percent_or_half_of_the_peer(rate: float, big: float, small: float, moves: bool) -> None:
    peers = [peer("a", 0, rate=rate), peer("b", 1, rate=big), peer("c", 1, rate=small)]
    found, reason = changes(peers, NOW, rule(2))
    assert [change.peer for change in found] == (["c"] if moves else [])
    if not moves:
        assert reason == f"stage 0 is the slowest (100 tokens/s of {big + small:.0f}): no move makes it 5% faster"


@pytest.mark.parametrize(
    ("last", "mover"),
    [(20.0, "x"), (200.0, "w")],  # then the stages do 200 and 210, or 290 and 300
)
def test_the_best_of_the_moves_is_taken_and_of_equals_the_lowest_peer_id(last: float, mover: str) -> None:
    rates = {"z": 90.0, "y": 100.0, "x": 100.0, "w": last}
    peers = [peer("a", 0), *(peer(name, 1, rate=rate) for name, rate in rates.items())]
    assert changes(peers, NOW, rule(2))[0][0].peer == mover


def test_a_peers_rate_elsewhere_follows_from_the_stages_costs() -> None:
    uneven = Rule(costs=(0.5, 0.25, 0.25))
    peers = [peer("a", 0, rate=120.0), peer("b", 1, rate=240.0), peer("c", 2, rate=80.0), peer("d", 0, rate=20.0)]
    assert [compute_speed(one, uneven) for one in peers] == [60.0, 60.0, 20.0, 10.0]
    assert stage_rates(peers, uneven) == [140.0, 240.0, 80.0]
    change = changes(peers, NOW, uneven)[0][0]
    assert (change.peer, change.after) == ("d", (2,)), "20 tokens/s of the dear stage are 40 of the cheap one"
    assert stage_rates(made(peers, "d", (2,), uneven), uneven) == [120.0, 240.0, 120.0]


def test_who_moves_already_is_counted_where_it_goes_and_named_no_more() -> None:
    peers = pile(4, 1, 1)
    peers[3] = replace(peers[3], moving_to=(1,))
    assert stage_rates(peers, THREE) == pytest.approx([300.0, 200.0, 100.0])
    assert changes(peers, NOW, THREE)[0][0].after == (2,)
    peers[2] = replace(peers[2], moving_to=(2,))
    assert changes(peers, NOW, THREE)[0] == []
    assert anchor("p00", peers, 0, NOW, THREE) == "p01" and anchor("p01", peers[1:], 0, NOW, THREE) is None


def test_who_has_promised_to_stay_is_not_named() -> None:
    peers = pile(4, 1, 1)
    peers[0] = replace(peers[0], bound=(0,))
    assert changes(peers, NOW, THREE)[0][0].peer == "p01"


def test_who_was_not_seen_lately_or_says_nonsense_is_not_counted() -> None:
    peers = pile(4, 1, 1)
    old = [replace(one, seen_s=NOW - 61) if one.peer == "p04" else one for one in peers]
    assert my_change("p00", old, NOW, THREE)[1].startswith("stage 1 is empty")
    nonsense = [peer("x", 7, rate=1e9), peer("y", -1), peer("z", 0, moving_to=(3,))]
    assert changes([*peers, *nonsense], NOW, THREE) == changes(peers, NOW, THREE)
    for claim in (math.nan, math.inf, -5.0):
        assert stage_rates([peer("x", 0, rate=claim)], THREE) == [0.0, 0.0, 0.0]
    assert changes([], NOW, THREE) == ([], "nobody is there")
    with pytest.raises(ValueError, match="each stage has a cost, more than 0"):
        Rule(costs=(0.5, 0.0))


def test_what_a_move_costs_is_weighed_unless_the_stage_is_empty() -> None:
    """It moves 100 tokens/s; without memory for two stages it serves nothing for as long as it fetches."""
    slow = [replace(one, move_s=901.0) for one in pile(4, 1, 1)]
    assert changes(slow, NOW, THREE)[0] == [], "(200 - 100) * (1800 - 901) < 100 * 901"
    assert changes([replace(one, move_s=899.0) for one in slow], NOW, THREE)[0]
    assert changes([replace(one, most_stages=2) for one in slow], NOW, THREE)[0], "it serves the old one meanwhile"
    assert not changes([replace(one, most_stages=2, move_s=1800.0) for one in slow], NOW, THREE)[0]
    assert changes([replace(one, move_s=9000.0) for one in pile(5, 1, 0)], NOW, THREE)[0]


@pytest.mark.parametrize(
    ("since_s", "before", "after", "moves"),
    [
        (math.inf, (0,), (1,), True),
        (60.0, (0,), (1,), True),
        (59.9, (0,), (1,), False),
        (0.0, (0,), (2,), True),  # nobody holds it
        (0.0, (0,), (3,), False),  # somebody is on its way there
        (0.0, (0, 1), (1,), True),
    ],
)
def test_who_has_just_moved_moves_only_where_nobody_is_or_gives_one_up(
    since_s: float, before: tuple[int, ...], after: tuple[int, ...], moves: bool
) -> None:
    change = StageChange(peer="a", before=before, after=after, reason="by hand")
    may, reason = may_move_again(change, [peer("a", *before), peer("b", 1), peer("c", 0, moving_to=(3,))], since_s)
    assert may == moves and "by hand" in reason and ("lately" in reason) != moves


def test_several_at_once_each_on_top_of_the_others() -> None:
    found, _ = changes(pile(8, 2, 2), NOW, rule(3, most_changes=9))
    assert [(change.peer, change.after) for change in found] == [
        ("p00", (1,)),
        ("p01", (2,)),
        ("p02", (1,)),
        ("p03", (2,)),
    ]
    assert (
        found[3].reason == "stage 2 is the slowest (300 tokens/s of 500): p03 moves to it from stage 0, which keeps 4"
    )


# ---------------------------------------------------------------- several stages a peer


def test_an_empty_stage_is_rescued_by_a_move_or_else_by_one_who_serves_two() -> None:
    lonely = [peer("a", 0, most_stages=2), peer("b", 1, most_stages=2, rate=150.0)]
    change, reason = my_change("b", lonely, NOW, THREE)
    assert change is not None and change.after == (1, 2) and not change.leaves
    assert reason == "stage 2 is empty: b serves it besides stage 1"
    found, reason = changes([replace(one, most_stages=1) for one in lonely], NOW, THREE)
    assert (found, reason) == ([], "stage 2 is empty: nobody can serve it")
    third = [*lonely, peer("c", 1, rate=10.0)]
    change = changes(third, NOW, THREE)[0][0]
    assert change.after == (2,) and change.before == (1,), "rather a move than that somebody serves two"


def test_who_serves_two_gives_one_up_when_another_serves_it() -> None:
    peers = [peer("a", 0, 1, rate=50.0, most_stages=2), peer("b", 2), peer("c", 0)]
    change, reason = my_change("a", peers, NOW, THREE)
    assert change is not None and (change.after, change.leaves, change.enters) == ((1,), (0,), ())
    assert reason == (
        "stage 1 is the slowest (50 tokens/s of 150): a gives up stage 0, which keeps 1, and has more time for stage 1"
    )
    assert stage_rates(made(peers, "a", (1,), THREE), THREE) == pytest.approx([100.0] * 3)
    assert anchor("a", peers, 0, NOW, THREE) == "c"


def test_fewer_peers_than_stages_share_them_evenly() -> None:
    four = rule(4)
    alone, reason = stages_for_joiner(Joiner(peer="a", tokens_per_s=25.0, most_stages=4), [], NOW, four)
    assert alone == (0, 1, 2, 3) and reason == "stage 0 is empty: a serves stages 0, 1, 2 and 3"
    peers = [peer("a", *alone, rate=25.0, most_stages=4)]
    second, _ = stages_for_joiner(Joiner(peer="b", tokens_per_s=25.0, most_stages=4), peers, NOW, four)
    assert len(second) == 2
    peers, _ = settled([*peers, peer("b", *second, rate=50.0, most_stages=4)], four)
    assert counts(peers, 4) == [1, 1, 1, 1] and stage_rates(peers, four) == [50.0] * 4
    for name in ("c", "d"):
        taken, _ = stages_for_joiner(Joiner(peer=name, tokens_per_s=25.0, most_stages=4), peers, NOW, four)
        assert len(taken) == 1
        peers, _ = settled([*peers, peer(name, *taken, rate=100.0, most_stages=4)], four)
    assert counts(peers, 4) == [1, 1, 1, 1] and stage_rates(peers, four) == [100.0] * 4


# ---------------------------------------------------------------- a joiner


def test_a_joiner_goes_to_the_slowest_stage() -> None:
    peers = [peer("a", 0), peer("b", 1, rate=90.0), peer("c", 2), peer("d", 2)]
    taken, reason = stages_for_joiner(Joiner(peer="e", tokens_per_s=50.0, most_stages=3), peers, NOW, THREE)
    assert (taken, reason) == ((1,), "stage 1 is the slowest (90 tokens/s of 200): e serves stage 1")
    back = stages_for_joiner(Joiner(peer="b", tokens_per_s=50.0), peers, NOW, THREE)
    assert back[0] == (1,) and back[1].startswith("stage 1 is empty"), "its own record of before does not count"


def test_joiners_that_see_nobody_spread_over_the_stages() -> None:
    taken = [stages_for_joiner(Joiner(peer=f"p{i}", tokens_per_s=1.0), [], NOW, THREE)[0][0] for i in range(300)]
    assert min(taken.count(stage) for stage in range(3)) >= 70


# ---------------------------------------------------------------- SWARM's own rule


def test_the_shortest_queue_of_the_least_loaded_stage_moves_to_the_most_loaded() -> None:
    peers = [peer("a", 0, queue=1), peer("b", 0, queue=0), peer("c", 1, queue=9), peer("d", 2, queue=5)]
    change, reason = change_by_queues("b", peers, NOW, THREE)
    assert change is not None and (change.before, change.after) == ((0,), (1,))
    assert (
        reason
        == "stage 0 has the shortest queues (1), stage 1 the longest: b, whose queue is the shortest there, moves"
    )
    assert change_by_queues("a", peers, NOW, THREE)[0] is None
    assert change_by_queues("c", peers, NOW, THREE)[1].endswith("b has the shortest there")
    assert change_by_queues("a", peers[:1] + peers[2:], NOW, THREE) == (None, "no stage has a peer to give")
    alone = [peer("a", 0), peer("b", 1, queue=2), peer("c", 1, queue=3), peer("d", 2, queue=9)]
    change, _ = change_by_queues("b", alone, NOW, THREE)
    assert change is not None and (change.before, change.after) == ((1,), (2,)), "stage 0 has one peer only"
    assert change_by_queues("a", pile(2, 2, 2), NOW, THREE) == (None, "the queues of all stages are equal")
    empty = change_by_queues("b", peers[:3], NOW, THREE)[0]
    assert empty is not None and empty.after == (2,), "nobody serves it"
    assert change_by_queues("a", [], NOW, THREE)[0] is None


def test_those_who_come_at_one_moment_choose_one_after_the_other() -> None:
    new = [peer(name) for name in "abcdef"]
    chosen = [first_stages(one.peer, new, NOW, THREE)[0] for one in new]
    assert sorted(chosen) == [(0,), (0,), (1,), (1,), (2,), (2,)]
    few = [replace(one, most_stages=3) for one in new[:2]]
    chosen = [first_stages(one.peer, few, NOW, THREE)[0] for one in few]
    assert {stage for stages in chosen for stage in stages} == {0, 1, 2}
    late = first_stages("f", [*pile(2, 1, 2), new[-1]], NOW, THREE)
    assert late[0] == (1,) and "stage 1 is the slowest" in late[1]


def test_a_stage_that_nobody_has_is_taken_by_who_kept_it() -> None:
    """Everybody was switched off and comes back: nobody's checkpoint is left unused."""
    kept = {"b": ((2, 5),), "c": ((0, 9), (1, 7)), "d": ((1, 8),), "e": ((2, 6),), "f": ((1, 8), (0, 4))}
    new = [peer(name, kept=kept.get(name, ())) for name in "abcdef"]
    chosen = {one.peer: first_stages(one.peer, new, NOW, THREE)[0] for one in new}
    assert chosen["e"] == (2,) and chosen["c"] == (0,) and chosen["d"] == (1,), "the newest of each"
    assert sorted(chosen.values()) == [(0,), (0,), (1,), (1,), (2,), (2,)]
    late = peer("g", kept=((0, 3),))
    others = [replace(one, flow_tokens_per_s=50.0) for one in pile(2, 1, 2)]
    assert first_stages("g", [*others, late], NOW, THREE)[0] == (1,), "others train its stage: it is needed here"
    others = [replace(one, flow_tokens_per_s=50.0) for one in pile(2, 2, 0)]
    assert first_stages("g", [*others, peer("a"), late, peer("h", kept=((2, 3),))], NOW, THREE)[0] != (2,)
    few = [peer("a", kept=((2, 3), (0, 3)), most_stages=2), peer("b", most_stages=2)]
    assert first_stages("a", few, NOW, THREE)[0] == (0, 2)
    assert 1 in first_stages("b", few, NOW, THREE)[0]
    nonsense = peer("a", kept=((7, 1), (511, 2**63)))
    assert len(first_stages("a", [nonsense], NOW, THREE)[0]) == 1


@pytest.mark.parametrize("there", [{"stages": (0,)}, {"stages": (), "moving_to": (0,)}])
def test_who_decides_a_moment_earlier_takes_no_claim_away(there: dict[str, tuple[int, ...]]) -> None:
    """The fourth of three stages counts on the claim of the second and helps it; the second decides after it."""
    early = replace(peer("d"), **there)  # type: ignore[arg-type]
    new = [peer("a", kept=((2, 5),)), peer("b", kept=((0, 5),)), peer("c", kept=((1, 5),)), early]
    assert [first_stages(name, new, NOW, THREE)[0] for name in "abc"] == [(2,), (0,), (1,)]


# ---------------------------------------------------------------- for any swarm


swarms = st.lists(st.tuples(st.integers(0, 3), st.floats(1.0, 1000.0)), min_size=1, max_size=14)


@settings(max_examples=60, derandomize=True)
@given(swarm=swarms, costs=st.tuples(*[st.floats(0.1, 1.0)] * 4), seed=st.integers(0, 999))
def test_every_change_improves_lexicographically_keeps_all_stages_and_is_the_same_for_all(
    swarm: list[tuple[int, float]], costs: tuple[float, ...], seed: int
) -> None:
    four = Rule(costs=costs)
    peers = [peer(f"p{i:02d}", stage, rate=rate, most_stages=2) for i, (stage, rate) in enumerate(swarm)]
    for _ in range(100):
        found, reason = changes(peers, NOW, four)
        shuffled = random.Random(seed).sample(peers, len(peers))
        assert changes(shuffled, NOW, four) == (found, reason) and reason
        if not found:
            return
        after = made(peers, found[0].peer, found[0].after, four)
        was, will = stage_rates(peers, four), stage_rates(after, four)
        assert [r > 1e-9 for r in sorted(will)] >= [r > 1e-9 for r in sorted(was)], "no stage is emptied"
        touched = {*found[0].before, *found[0].after}
        assert min(will[s] for s in touched) > min(was[s] for s in touched)
        assert sorted(round(r, 6) for r in will) > sorted(round(r, 6) for r in was)
        peers = after
    raise AssertionError("it never ends")


# ---------------------------------------------------------------- promises, by hand


def request(mover: str, anchor: str, asked_s: float, stage: int = 0) -> LeaseRequest:
    return LeaseRequest(stage=stage, mover=mover, anchor=anchor, asked_s=asked_s)


def test_a_promise_is_given_once_asked_and_holds_for_a_minute() -> None:
    a, b = StageLeases("a"), StageLeases("b")
    assert a.wants_to_leave(0, 10.0)[0]
    assert a.may_leave(0, 10.0) == (False, "nobody has promised to stay in stage 0")
    lease, reason = b.asked(request("a", "b", 10.0), (0,), 110.0)  # its clock is another
    assert lease is not None and reason == "it stays for 60 s"
    assert b.bound(169.9) == (0,) and b.bound(170.0) == ()
    assert b.wants_to_leave(0, 150.0) == (False, "it has promised to stay in stage 0 for 20 s more")
    a.granted(lease)
    assert a.may_leave(0, 69.9) == (True, "b stays in stage 0")
    assert a.may_leave(0, 70.0) == (False, "the promise to stay in stage 0 has ended: it asks again")
    a.over(0)
    assert not a.may_leave(0, 20.0)[0]


def test_two_that_would_leave_at_once_both_stay() -> None:
    a, b = StageLeases("a"), StageLeases("b")
    assert a.wants_to_leave(0, 0.0)[0] and b.wants_to_leave(0, 0.0)[0]
    assert a.asked(request("b", "a", 0.0), (0,), 0.1) == (None, "a wants to leave stage 0 itself")
    assert b.asked(request("a", "b", 0.0), (0,), 0.1) == (None, "b wants to leave stage 0 itself")
    b.over(0)
    lease, _ = b.asked(request("a", "b", 10.0), (0,), 10.1)
    assert lease is not None
    a.granted(lease)
    assert a.may_leave(0, 11.0)[0] and not b.wants_to_leave(0, 11.0)[0]


def test_who_does_not_serve_the_stage_or_was_not_asked_promises_nothing() -> None:
    b = StageLeases("b")
    assert b.asked(request("a", "b", 0.0), (1, 2), 0.0) == (None, "b does not serve stage 0")
    assert (
        b.asked(request("a", "c", 0.0), (0,), 0.0)[0] is None and b.asked(request("b", "b", 0.0), (0,), 0.0)[0] is None
    )
    stray = StageLease(request=request("a", "b", 0.0), lasts_s=60.0)
    b.granted(stray)
    StageLeases("a").granted(stray)
    assert not b.may_leave(0, 1.0)[0]


# ---------------------------------------------------------------- promises, in any order


@dataclass
class Everyone:
    """Peers that each know what they know, and messages that arrive when they like."""

    clock_s: float = 0.0
    stays: dict[str, StageLeases] = field(default_factory=dict)
    holds: dict[str, int] = field(default_factory=dict)
    ahead_s: dict[str, float] = field(default_factory=dict)
    sessions: dict[str, int] = field(default_factory=dict)
    letters: list[tuple[LeaseRequest, StageLease | None, int]] = field(default_factory=list)
    """(request, the promise if it was given, the session of who gave it)."""
    given: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    """(mover, stage) -> who promised last, in which of its sessions."""
    num_moves: int = 0

    def now(self, name: str) -> float:
        return self.clock_s + self.ahead_s[name]

    def join(self, name: str, stage: int, ahead_s: float) -> None:
        if name not in self.holds:
            self.stays[name], self.holds[name], self.ahead_s[name] = StageLeases(name), stage, ahead_s
            self.sessions[name] = self.sessions.get(name, 0) + 1

    def crash(self, name: str) -> None:
        self.holds.pop(name, None)

    def ask(self, mover: str, anchor: str) -> None:
        if mover in self.holds and mover != anchor:
            stage = self.holds[mover]
            if self.stays[mover].wants_to_leave(stage, self.now(mover))[0]:
                self.letters.append((request(mover, anchor, self.now(mover), stage), None, 0))

    def deliver(self, index: int) -> None:
        if not self.letters:
            return
        asked, lease, session = self.letters.pop(index % len(self.letters))
        if lease is None and asked.anchor in self.holds:
            holds, now = (self.holds[asked.anchor],), self.now(asked.anchor)
            lease, _ = self.stays[asked.anchor].asked(asked, holds, now)
            if lease is not None:
                self.letters.append((asked, lease, self.sessions[asked.anchor]))
        elif lease is not None and asked.mover in self.holds:
            self.stays[asked.mover].granted(lease)
            self.given[asked.mover, asked.stage] = (asked.anchor, session)

    def give_up(self, mover: str) -> None:
        if mover in self.holds:
            self.stays[mover].over(self.holds[mover])

    def leave(self, mover: str, to: int) -> None:
        if mover not in self.holds or self.holds[mover] == to:
            return
        stage = self.holds[mover]
        if not self.stays[mover].may_leave(stage, self.now(mover))[0]:
            return
        self.stays[mover].over(stage)
        self.holds[mover] = to
        self.num_moves += 1
        anchor, session = self.given[mover, stage]
        crashed = anchor not in self.holds or self.sessions[anchor] != session
        assert crashed or self.holds[anchor] == stage, f"{mover} left stage {stage}, and {anchor} had left it"


NAMES = [f"p{i}" for i in range(6)]
names = st.sampled_from(NAMES)
steps = st.one_of(
    st.tuples(st.just("ask"), names, names),
    st.tuples(st.just("ask"), names, names),
    st.tuples(st.just("deliver"), st.integers(0, 9)),
    st.tuples(st.just("deliver"), st.integers(0, 9)),
    st.tuples(st.just("leave"), names, st.integers(0, 2)),
    st.tuples(st.just("leave"), names, st.integers(0, 2)),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 5.0, 20.0, 59.9, 60.0])),
    st.tuples(st.just("give_up"), names),
    st.tuples(st.just("crash"), names),
    st.tuples(st.just("join"), names, st.integers(0, 2), st.floats(-1e4, 1e4)),
)


@settings(max_examples=150, derandomize=True)
@given(schedule=st.lists(steps, max_size=60))
def test_no_schedule_of_joint_moves_empties_a_stage(schedule: list[tuple[object, ...]]) -> None:
    """Whoever believes whatever of the others, and whenever messages arrive: when a peer leaves, the one that has
    promised to stay is there, unless it has crashed since."""
    everyone = Everyone()
    for i, name in enumerate(NAMES):
        everyone.join(name, i % 2, 100.0 * i)
    for step, *arguments in schedule:
        if step == "wait":
            everyone.clock_s += arguments[0]  # type: ignore[operator]
        else:
            getattr(everyone, str(step))(*arguments)
