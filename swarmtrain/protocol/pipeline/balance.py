"""Assignment of stages: where a joiner of a pipeline goes, and who moves when the stages have become unequal.

A pipeline is as fast as its slowest stage. Every peer advertises what it holds and how fast it is there. All who read
the same records compute the same change, and only the peer that it names makes it. Records are seconds old, and no two
peers see quite the same, so a computed change may be wrong; but it must never empty a stage. That is ensured by leases:
a peer leaves a stage only while another holder has promised to stay (`stage_leases.py`).

A peer's rate depends on what it holds. Stages differ in cost, a share of the whole model's computation. A peer that
does `tokens_per_s` through stages of total cost c computes `tokens_per_s * c` of the whole model, from which follows
what it would do elsewhere. A peer with several stages does each token's work in all of them, so that it adds the same
rate to each.

Everything here is pure: `now` is an argument, and every answer carries its reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from swarmtrain.words import count_in_words, short_peer, stages_in_words

_COOLDOWN_S = 60.0
"""Seconds for which a peer stays after a move: its speed in the new place, and the others' since then, must be measured
first."""


@dataclass(frozen=True, kw_only=True)
class StagePeer:
    """Stages and speed of a live peer, as it advertises them."""

    peer: str
    stages: tuple[int, ...]
    """Stages that the peer serves, ascending; empty while it fetches its first one."""
    tokens_per_s: float
    """Measured throughput through all of `stages` when the peer always has work; before it has stages, through those
    that it fetches, and before it knows these, through the whole model."""
    moving_to: tuple[int, ...] = ()
    """Stages that the peer will serve soon; empty if it does not move."""
    bound: tuple[int, ...] = ()
    """Stages that the peer has promised not to leave."""
    most_stages: int = 1
    """Number of stages that fit into the peer's memory."""
    kept: tuple[tuple[int, int], ...] = ()
    """(stage, round) of the checkpoints in the peer's folder, while it holds no stage."""
    move_s: float = 60.0
    """Seconds that the peer takes to fetch a stage."""
    queue: float = 0.0
    """Number of tasks that wait at the peer; used only by `change_by_queues`."""
    flow_tokens_per_s: float = 0.0
    """Tokens per second that pass through the peer now."""
    seen_s: float = 0.0
    """Time of the peer's record."""

    @property
    def planned(self) -> tuple[int, ...]:
        """Stages that the peer will serve soon, or serves if it does not move."""
        return self.moving_to or self.stages


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Conditions under which a change is worthwhile. `costs`: each stage's share of the whole model's computation."""

    costs: tuple[float, ...]
    improvement: float = 0.05
    """Gain of the slowest stage that a change touches, at least, as a share. Half of the peer's own rate is enough if
    it is one of many, and the stages are so unequal that several such moves add up to this share."""
    horizon_s: float = 1800.0
    """Seconds within which the gain must exceed the cost of the move."""
    live_s: float = 60.0
    """Seconds after which a peer that was not seen does not count."""
    most_changes: int = 1
    """Number of peers that may be told to move at once."""

    def __post_init__(self) -> None:
        if not self.costs or min(self.costs) <= 0:
            raise ValueError(f"each stage has a cost, more than 0: {self.costs}")

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self.costs)

    def cost(self, stages: Sequence[int]) -> float:
        """Return the cost of several stages together."""
        return self.costs[stages[0]] if len(stages) == 1 else sum(self.costs[stage] for stage in stages)


@dataclass(frozen=True, kw_only=True)
class StageChange:
    """Change of one peer: it holds `before`, and should hold `after`."""

    peer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    reason: str

    @property
    def leaves(self) -> tuple[int, ...]:
        """Stages that the peer gives up; in each another peer must promise to stay."""
        return tuple(stage for stage in self.before if stage not in self.after)

    @property
    def enters(self) -> tuple[int, ...]:
        """Stages that the peer must fetch."""
        return tuple(stage for stage in self.after if stage not in self.before)


# ---------------------------------------------------------------- rates


def compute_speed(peer: StagePeer, rule: Rule) -> float:
    """Return the tokens per second that a peer would do through the whole model; 0 if what it advertises is no rate."""
    rate = peer.tokens_per_s if 0 < peer.tokens_per_s < math.inf else 0.0
    return rate * rule.cost(held) if (held := peer.stages or peer.moving_to) else rate


def stage_rates(peers: Iterable[StagePeer], rule: Rule) -> list[float]:
    """Return the tokens per second of each stage. Peers about to move count where they go."""
    return _Table(peers, rule).rates


def live(peers: Iterable[StagePeer], now: float, rule: Rule) -> list[StagePeer]:
    """Return the peers seen recently, by PeerID, without those that name a stage that does not exist."""
    known = frozenset(range(rule.num_stages))
    seen = [one for one in peers if now - one.seen_s <= rule.live_s and known.issuperset(one.stages + one.moving_to)]
    return sorted(seen, key=lambda one: one.peer)


class _Table:
    """Peers by stage, and the stages' rates; changes can be tried and applied."""

    def __init__(self, peers: Iterable[StagePeer], rule: Rule) -> None:
        self.rule = rule
        self.peers = {one.peer: one for one in peers}
        self.speeds = {one.peer: compute_speed(one, rule) for one in self.peers.values()}
        self.holding = {one.peer: one.planned for one in self.peers.values()}
        self.holders: list[set[str]] = [set() for _ in rule.costs]
        """Peers that serve each stage now and will not leave it."""
        self.rates = [0.0] * rule.num_stages
        for one in self.peers.values():
            rate = self.rate(one.peer, one.planned)
            for stage in one.planned:
                self.rates[stage] += rate
                if stage in one.stages:
                    self.holders[stage].add(one.peer)

    def rate(self, peer: str, stages: Sequence[int]) -> float:
        """Return the peer's rate through `stages`."""
        return self.speeds[peer] / self.rule.cost(stages) if stages else 0.0

    def effect(self, peer: str, after: Sequence[int]) -> dict[int, float]:
        """Map each stage whose rate would change to its new rate, if the peer held the stages `after`."""
        before = self.holding[peer]
        was, will = self.rate(peer, before), self.rate(peer, after)
        return {
            stage: max(0.0, self.rates[stage] - was * (stage in before) + will * (stage in after))
            for stage in (*before, *after)
        }

    def with_effect(self, effect: Mapping[int, float]) -> list[float]:
        """Return the rates of all stages after an `effect`, slowest first."""
        return sorted(effect.get(stage, rate) for stage, rate in enumerate(self.rates))

    def keeps(self, stage: int, peer: str) -> int:
        """Return how many peers besides `peer` serve the stage and will not leave it."""
        return len(self.holders[stage]) - (peer in self.holders[stage])

    def make(self, change: StageChange) -> None:
        """Apply a change."""
        for stage, rate in self.effect(change.peer, change.after).items():
            self.rates[stage] = rate
        for stage in change.leaves:
            self.holders[stage].discard(change.peer)
        self.holding[change.peer] = change.after


def anchor(mover: str, peers: Iterable[StagePeer], stage: int, now: float, rule: Rule) -> str | None:
    """Return the peer that `mover` asks to stay in a stage that it leaves; None if there is nobody.

    Of the other holders those with fewer stages come first, then the lowest PeerID.
    """
    staying = [one for one in live(peers, now, rule) if one.peer != mover and stage in one.stages]
    staying = [one for one in staying if stage in one.planned]
    return min(staying, key=lambda one: (len(one.planned), one.peer)).peer if staying else None


# ---------------------------------------------------------------- who moves


def my_change(me: str, peers: Iterable[StagePeer], now: float, rule: Rule) -> tuple[StageChange | None, str]:
    """Return (the change that peer `me` should make, or None; the reason), judged by the records in `peers`."""
    found, reason = changes(peers, now, rule)
    mine = next((change for change in found if change.peer == me), None)
    if mine is not None:
        return mine, mine.reason
    return None, found[0].reason if found else reason


def may_move_again(change: StageChange, peers: Iterable[StagePeer], since_s: float) -> tuple[bool, str]:
    """Return (True if a peer that moved `since_s` seconds ago may make this change now; reason).

    Within `_COOLDOWN_S` it may only give up a stage, or take one that nobody holds.
    """
    held = {stage for one in peers for stage in one.planned}
    can_wait = bool(change.enters) and held.issuperset(change.enters)
    if since_s < _COOLDOWN_S and can_wait:
        return False, f"it has moved lately, and stays for now: {change.reason}"
    return True, change.reason


def changes(peers: Iterable[StagePeer], now: float, rule: Rule) -> tuple[list[StageChange], str]:
    """Return (the changes that help most, the reason if there are none). Each change assumes those before it, and no
    peer changes twice.

    Only the slowest stage is helped, since it limits the pipeline. A change is worthwhile if the slowest of the stages
    that it touches becomes faster by `Rule.improvement`; then the rates, slowest first, grow lexicographically. The
    comparison is of the stages touched, not of the sorted rates place by place: of two stages that are nearly equally
    slow each is worth helping, although the pipeline becomes faster only when both were. Among worthwhile changes the
    best is the one after which the slowest stage is fastest, then the second slowest, and so on.
    """
    table = _Table(live(peers, now, rule), rule)
    found: list[StageChange] = []
    reason = "nobody is there"
    while len(found) < rule.most_changes:
        change, reason = _best(table, {change.peer for change in found})
        if change is None:
            break
        found.append(change)
        table.make(change)
    return found, reason


def _best(table: _Table, moved: Collection[str]) -> tuple[StageChange | None, str]:
    """Return (the best change for the slowest stage by a peer not in `moved`, or None; reason)."""
    if not table.peers:
        return None, "nobody is there"
    slowest = min(range(table.rule.num_stages), key=lambda stage: (table.rates[stage], stage))
    free = [peer for peer, one in table.peers.items() if one.stages and not one.moving_to and peer not in moved]
    is_empty = table.rates[slowest] == 0
    if not is_empty:  # skip peers of stages that are nearly as slow
        uneven = {stage for stage in range(table.rule.num_stages) if _is_uneven(table, {stage, slowest})}
        free = [peer for peer in free if len(table.holding[peer]) > 1 or table.holding[peer][0] in uneven]
    options = [(peer, after) for peer in free for after in _options(table, peer, slowest)]
    if is_empty:
        options = [(peer, after) for peer, after in options if slowest in after]
        moves = [(peer, after) for peer, after in options if len(after) == len(table.holding[peer])]
        options = moves or options  # a move is better than a peer with two stages
    else:
        options = [(peer, after) for peer, after in options if _is_worth_it(table, peer, after)]
    if not options:
        why_not = "nobody can serve it" if is_empty else f"no move makes it {table.rule.improvement:.0%} faster"
        return None, f"{_about(table, slowest)}: {why_not}"
    peer, after = max(options, key=lambda option: table.with_effect(table.effect(*option)))
    change = StageChange(
        peer=peer, before=table.holding[peer], after=after, reason=_reason(table, slowest, peer, after)
    )
    return change, change.reason


def _options(table: _Table, peer: str, slowest: int) -> list[tuple[int, ...]]:
    """Return the sets of stages that `peer` could hold instead: another stage, one more, or one less. Each stage that
    it leaves keeps a peer."""
    one, before = table.peers[peer], table.holding[peer]
    if before == (slowest,):
        return []
    free = [stage for stage in before if stage not in one.bound and table.keeps(stage, peer)]
    options = [tuple(stage for stage in before if stage != left) for left in free if len(before) > 1]
    if slowest not in before:
        options += [tuple(sorted({*before, slowest} - {left})) for left in free]
        is_short = table.rates[slowest] == 0 or len(table.peers) < table.rule.num_stages
        if is_short and len(before) < one.most_stages:
            options.append(tuple(sorted({*before, slowest})))
    return options


def _is_worth_it(table: _Table, peer: str, after: tuple[int, ...]) -> bool:
    """Return whether a change improves enough, and gains more than the move costs.

    Giving up a stage costs nothing: a peer with several does so if the slowest of them becomes faster.
    """
    rule, one, before = table.rule, table.peers[peer], table.holding[peer]
    effect = table.effect(peer, after)
    was, will = min(table.rates[stage] for stage in effect), min(effect.values())
    if len(after) < len(before):
        return will > was
    least = min(rule.improvement * was, table.rate(peer, after) / 2)
    if will - was < least or not _is_uneven(table, effect):
        return False
    lost_tokens = 0.0 if len(before) < one.most_stages else one.tokens_per_s * one.move_s
    return (will - was) * (rule.horizon_s - one.move_s) > lost_tokens


def _is_uneven(table: _Table, stages: Collection[int]) -> bool:
    """Return whether evening out these stages would make the slowest one faster by `Rule.improvement`."""
    rates, rule = table.rates, table.rule
    evened = sum(rates[stage] * rule.costs[stage] for stage in stages) / rule.cost(tuple(stages))
    return evened >= (1 + rule.improvement) * min(rates[stage] for stage in stages)


# ---------------------------------------------------------------- in words


def _about(table: _Table, slowest: int) -> str:
    rates = table.rates
    if rates[slowest] <= 0:
        return f"stage {slowest} is empty"
    rate, most = count_in_words(rates[slowest]), count_in_words(max(rates))
    return f"stage {slowest} is the slowest ({rate} tokens/s of {most})"


def _reason(table: _Table, slowest: int, peer: str, after: tuple[int, ...]) -> str:
    before, name = table.holding[peer], short_peer(peer)
    leaves = [stage for stage in before if stage not in after]
    about = _about(table, slowest)
    if not leaves:
        return f"{about}: {name} serves it besides {stages_in_words(before)}"
    left = min(table.keeps(stage, peer) for stage in leaves)
    kept = f"{stages_in_words(leaves)}, which keeps {left}"
    if len(after) < len(before):
        return f"{about}: {name} gives up {kept}, and has more time for {stages_in_words(after)}"
    return f"{about}: {name} moves to it from {kept}"


# ---------------------------------------------------------------- a joiner


@dataclass(frozen=True, kw_only=True)
class Joiner:
    """Peer that joins. `tokens_per_s` is what it would do through the whole model."""

    peer: str
    tokens_per_s: float
    most_stages: int = 1
    kept: tuple[int, ...] = ()
    """Stages that nothing passes through yet, of which it has the newest checkpoint."""


def stages_for_joiner(
    joiner: Joiner, peers: Iterable[StagePeer], now: float, rule: Rule
) -> tuple[tuple[int, ...], str]:
    """Return (the stages that a joiner serves, because it is needed most there; reason).

    That is the slowest stage. Of several equal ones, as when all come at once and see nobody, each joiner takes one by
    the hash of its PeerID. While there are fewer peers than stages it takes several if they fit, also those that other
    peers with several stages hold; these give them up when they see it serve them.

    Stages of which it has the newest checkpoint come first, so that their training is not lost.
    """
    table = _Table(live((one for one in peers if one.peer != joiner.peer), now, rule), rule)
    order = sorted(range(rule.num_stages), key=lambda stage: _hash(joiner.peer, stage))
    is_short = len(table.peers) + 1 < rule.num_stages
    taken = tuple(sorted(joiner.kept[: joiner.most_stages if is_short else 1]))
    vector: list[float] = _with_joiner(table, joiner, taken) if taken else []

    def is_enough() -> bool:
        return bool(taken) and (len(taken) >= joiner.most_stages or not (is_short or vector[0] == 0))

    while not is_enough() and (wider := [tuple(sorted({*taken, stage})) for stage in order if stage not in taken]):
        best = max(wider, key=lambda stages: _with_joiner(table, joiner, stages))
        if taken and _with_joiner(table, joiner, best) <= vector:
            break
        taken, vector = best, _with_joiner(table, joiner, best)
    slowest = min(taken, key=lambda stage: table.rates[stage])
    return taken, f"{_about(table, slowest)}: {short_peer(joiner.peer)} serves {stages_in_words(taken)}"


def first_stages(me: str, peers: Iterable[StagePeer], now: float, rule: Rule) -> tuple[tuple[int, ...], str]:
    """Return (the stages that a peer without stages takes while others choose at the same moment; reason).

    They choose one after the other: first the peers with the newest checkpoint of a stage that nothing passes through
    yet, then by PeerID. Each computes from the same records what those before it have chosen, so that nobody needs to
    be asked; and a peer that takes an idle stage a moment earlier does not remove another's claim to it. None takes
    more than one stage while there are as many peers as stages.
    """
    known = {one.peer: one for one in live(peers, now, rule)}
    undecided = [one for one in known.values() if not one.planned]
    alive = {stage for one in known.values() if one.flow_tokens_per_s > 0 for stage in one.stages}
    claims = _kept_claims(undecided, set(range(rule.num_stages)) - alive)
    undecided.sort(key=lambda one: (one.peer not in claims, one.peer))
    stages: tuple[int, ...] = ()
    reason = f"{short_peer(me)} is not among the peers"
    for one in undecided:
        most = 1 if len(known) >= rule.num_stages else one.most_stages
        kept = tuple(claims.get(one.peer, ()))
        joiner = Joiner(peer=one.peer, tokens_per_s=compute_speed(one, rule), most_stages=most, kept=kept)
        stages, reason = stages_for_joiner(joiner, known.values(), now, rule)
        if one.peer == me:
            break
        here = joiner.tokens_per_s / rule.cost(stages)
        known[one.peer] = dataclasses.replace(one, moving_to=stages, tokens_per_s=here)
    return stages, reason


def _kept_claims(peers: Sequence[StagePeer], idle: Collection[int]) -> dict[str, list[int]]:
    """Return the idle stages of which each peer has the newest checkpoint, the one trained furthest first."""
    newest: dict[int, tuple[int, str]] = {}
    for one in sorted(peers, key=lambda one: one.peer):
        for stage, round in one.kept:
            if stage in idle and (stage not in newest or round > newest[stage][0]):
                newest[stage] = (round, one.peer)
    claims: dict[str, list[int]] = {}
    for stage in sorted(newest, key=lambda stage: (-newest[stage][0], stage)):
        claims.setdefault(newest[stage][1], []).append(stage)
    return claims


def _with_joiner(table: _Table, joiner: Joiner, stages: Sequence[int]) -> list[float]:
    """Return the rates, slowest first, with the joiner at `stages`, which peers with several stages then give up."""
    rates = [0.0] * table.rule.num_stages
    for peer, holding in table.holding.items():
        kept = [stage for stage in holding if stage not in stages] if len(holding) > 1 else holding
        for stage in kept or holding:
            rates[stage] += table.rate(peer, kept or holding)
    for stage in stages:
        rates[stage] += joiner.tokens_per_s / table.rule.cost(stages)
    return sorted(rates)


def _hash(peer: str, stage: int) -> bytes:
    return hashlib.sha256(f"{peer} {stage}".encode()).digest()


# ---------------------------------------------------------------- SWARM's own rule


def change_by_queues(me: str, peers: Iterable[StagePeer], now: float, rule: Rule) -> tuple[StageChange | None, str]:
    """Return (the change by SWARM's own rule, or None; reason), for comparison (arXiv 2301.11913, algorithm 2).

    Every T seconds the peer with the shortest queue in the stage with the shortest queues in total moves to the stage
    with the longest. As published, the rule would empty stages and stop for ever. Here nobody leaves a stage with one
    peer, so the shortest queues are sought among the others, and a stage that nobody serves counts as the longest.
    """
    table = _Table(live(peers, now, rule), rule)
    queues = [0.0] * rule.num_stages
    for peer, holding in table.holding.items():
        for stage in holding:
            queues[stage] += table.peers[peer].queue
    givers = [stage for stage in range(rule.num_stages) if len(table.holders[stage]) > 1]
    if not givers:
        return None, "no stage has a peer to give"
    shortest = min(givers, key=lambda stage: (queues[stage], stage))
    longest = min(range(rule.num_stages), key=lambda stage: (table.rates[stage] > 0, -queues[stage], stage))
    if queues[shortest] >= queues[longest] and table.rates[longest] > 0:
        return None, "the queues of all stages are equal"
    among = sorted(table.holders[shortest], key=lambda peer: (table.peers[peer].queue, peer))
    about = f"stage {shortest} has the shortest queues ({queues[shortest]:g}), stage {longest} the longest"
    if among[0] != me or table.holding[me] != (shortest,):
        return None, f"{about}: {short_peer(among[0])} has the shortest there"
    reason = f"{about}: {short_peer(me)}, whose queue is the shortest there, moves"
    return StageChange(peer=me, before=(shortest,), after=(longest,), reason=reason), reason
