"""Schedules of faults in a synchronous swarm, and the invariants that must hold whatever they are.

- Nobody waits without bound.
- Once the faults are over there is one model again, in which everyone counts.
- Nothing is in anybody's past twice.
- The tokens behind a peer's weights only grow, unless it gives way to more peers of the last common roster.
- Where messages come in time, what a peer reported as merged stays merged.
- A liar's own rounds move no peer beside which another stands.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from fault_search.faults import declare, declare_span, end_faults
from fault_search.schedule import FaultSchedule, FaultSpan, Played, ScheduledFault, Violation, draw_faults
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.chains import Chain, ChainLink, ShownChain
from swarmtrain.protocol.rounds.messages import AnswerRoundQuestion
from swarmtrain.protocol.rounds.rosters import AdvertisedRound, Roster, RoundPublication
from swarmtrain.simulate.systems.messages import JoinState, Phase, Settings, SimulatedLink, WorldMoment, hash_of
from swarmtrain.simulate.systems.volunteer import Reply, SimulatedVolunteer, named
from swarmtrain.simulate.systems.world import SynchronousWorld

BASE_WAIT_S = 6.0
"""Seconds of waiting without a fault: the slowest peer's round less the fastest one's, and the transfers."""
FAULT_WAIT_S = 22.0
"""Seconds that one fault explains: a call's time limit and hold (7 s), a stalled transfer (10 s), a silence (5 s)."""
LIE_WAIT_S = 12.0
"""Seconds that one liar explains. It answers, so that nothing stalls."""

_MOMENTS: tuple[WorldMoment, ...] = get_args(WorldMoment)
_TOGETHER_S = 4.0
"""Seconds in which peers that come together find each other. Times of faults are counted from there."""
_SPAN = FaultSpan(0.0, 20.0, 14.0)
_LEAST_S = 8.0
_PULLED_S = 1.0
"""Seconds in which others have a publication, or a state, links being as they are."""
_ASKED_S = (0.01, 0.01, 0.1, 0.2)
"""Seconds after it has asked: before it is answered, or while the bytes come that it learned of."""
KINDS = {
    "kill": 3, "leave": 2, "restart": 4, "freeze": 5, "partition": 3, "cut": 2, "delay": 2, "loss": 2, "twice": 2,
    "join": 2, "kill at": 4, "late": 2, "freeze at": 6, "idle": 1,
    "lie: two rosters": 1, "lie: two publications": 1, "lie: far ahead": 1, "lie: done": 1, "lie: tokens": 1,
    "lie: no bytes": 1, "lie: behind": 2, "lie: base tokens": 1, "lie: own chain": 2,
}  # fmt: skip


def draw_rounds(rng: random.Random, kinds: Mapping[str, int] = KINDS) -> FaultSchedule:
    """Draw a synchronous swarm of up to seven peers, and its faults of these kinds."""
    speeds = tuple(rng.choice((8.0, 10.0, 16.0)) for _ in range(rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 7))))
    options = (("share_above", 2.0),) if rng.random() < 0.5 else ()
    chance = rng.random()
    if chance < 0.1:
        speeds = (8.0, *speeds[1:3], 16.0)
    drawn = draw_faults(rng, kinds, len(speeds), _SPAN, lambda kind: rng.randrange(160))
    faults = tuple(_at_the_edge(rng, fault) for fault in drawn)
    if chance < 0.1:
        faults = (*faults[:1], _stops_before_it_signs(rng))
    elif chance < 0.25:
        faults = (_lies_alone(rng, len(speeds), kinds),)
    return FaultSchedule(
        world="rounds",
        speeds=speeds,
        faults=faults,
        options=options,
        seed=rng.randrange(2**16),
    )


def _stops_before_it_signs(rng: random.Random) -> ScheduledFault:
    """Draw a freeze of the lowest peer after it ended its round last, and before it has the others' bytes.

    It wakes when the others are two rounds further without it.
    """
    in_round, lasts_s = rng.randrange(4), round(rng.uniform(12.0, 18.0), 1)
    detail = 40 * rng.randrange(2, 4) + 5 * in_round + _MOMENTS.index("ended")
    return ScheduledFault(kind="freeze at", at_s=4.0 * in_round, lasts_s=lasts_s, detail=detail)


def _lies_alone(rng: random.Random, num_peers: int, kinds: Mapping[str, int]) -> ScheduledFault:
    """Draw one long lie of the peer that signs first or last, so that nothing else explains waits."""
    lies = {kind: weight for kind, weight in kinds.items() if kind.startswith("lie: ")}
    kind = rng.choices(list(lies), list(lies.values()))[0]
    return ScheduledFault(kind=kind, peer=rng.choice((0, num_peers - 1)), at_s=4.0, lasts_s=3 * _SPAN.longest_s)


def _at_the_edge(rng: random.Random, fault: ScheduledFault) -> ScheduledFault:
    """Let half of the freezes last until a call or a silence has just ended: there decisions cross."""
    if fault.kind != "freeze at" or rng.random() < 0.5:
        return fault
    s = Settings()
    ended_s = rng.choice((s.silence_s, s.call_limit_s + s.hold_s, s.silence_s + s.hold_s))
    ended = 5 * (fault.detail // 5) + _MOMENTS.index("ended")
    return replace(
        fault, peer=rng.choice((0, fault.peer)), lasts_s=round(ended_s + rng.uniform(0, 0.6), 1), detail=ended
    )


# ---------------------------------------------------------------- liars


class RoundLiar(SimulatedVolunteer):
    """Simulated peer that works as the others do, but lies about it."""

    lies: frozenset[str] = frozenset()
    world: SearchedRounds

    def provide(self, what: str) -> Any:
        """Return the bytes for something that the liar has claimed; None if it delivers nothing."""
        if "no bytes" in self.lies:
            return None
        if "two publications" in self.lies and what != "state":
            return what
        if what == "state" and (advertised := self._invented()) is not None:
            return advertised
        return super().provide(what)

    def _invented(self) -> JoinState | None:
        """Return an invented state: weights of the liar's own, after rosters that list it alone, with all the manifests
        that it can sign.

        The rosters claim any number of tokens before them, or the true number.
        """
        lasts = _LIE_ROUNDS[int(hash_of(self.name + str(self.round))[:8], 16) % len(_LIE_ROUNDS)]
        since = max(0, len(self.history) - lasts[0])
        if not self.lies & {"base tokens", "own chain"} or self.last is None or self.phase is Phase.JOINING:
            return None
        links, history = self.chain.links[:since], self.history[:since]
        for _ in range(lasts[1]):
            round, base = (history[-1].round + 1, history[-1].digest) if history else (0, "")
            own = RoundPublication(
                peer=self.name, snapshot=hash_of(f"{self.name} {round} {base}"), tokens=32000, inner_steps=32, base=base
            )
            behind = history[-1].total_tokens if history else 0
            behind = _MANY_TOKENS if "base tokens" in self.lies else behind
            roster = Roster(round=round, signer=self.name, entries=(own,), base=base, base_tokens=behind)
            self.world.invented.add(roster.digest)
            links = (*links, ChainLink(roster=roster, shown={self.name: own.tokens}))
            history = (*history, roster)
        weights = hash_of(f"what {self.name} would like")
        return JoinState(
            round=history[-1].round + 1, last=history[-1], digest=weights, history=history, chain=Chain(links)
        )

    @property
    def inner_steps_done(self) -> int:
        """Inner steps of this round that the liar claims."""
        return self.settings.inner_steps if "done" in self.lies else super().inner_steps_done

    def info(self) -> PeerInfo:
        """Return this peer's presence record."""
        info = super().info()
        return replace(info, round=info.round + 1000) if "far ahead" in self.lies else info

    def _reply(self, answer: AnswerRoundQuestion[None], asker: str) -> Reply:
        reply = super()._reply(answer, asker)
        return self._lie(reply, asker) if self.lies else reply

    def _lie(self, reply: Reply, asker: str) -> Reply:
        """Return the reply that the liar gives to this asker."""
        first = int(hash_of(asker)[0], 16) % 2 == 0
        offer, advertised, shown = reply.publication, reply.advertised, reply.shown
        roster = None if reply.roster is None else reply.roster.roster
        if "tokens" in self.lies and offer is not None:
            offer = replace(offer, tokens=1000 * offer.tokens)
        if "two publications" in self.lies and offer is not None and first:
            offer = replace(offer, snapshot=hash_of(offer.snapshot + asker))
        if "two rosters" in self.lies and roster is not None and roster.signer == self.name and first:
            roster = replace(roster, entries=roster.entries[:-1] or roster.entries)
        if "far ahead" in self.lies and first:
            last = Roster(round=self.round + 1000, signer=self.name, entries=(_INVENTED,), base_tokens=10**15)
            advertised = AdvertisedRound(round=self.round + 1001, last=last)
        if "behind" in self.lies and len(self.history) > 1:
            advertised, offer = AdvertisedRound(round=self.round - 1, last=self.history[-2]), None
        if (state := self._invented()) is not None:
            advertised, shown = (
                AdvertisedRound(round=state.round, last=state.last),
                None if shown is None else ShownChain(state.chain),
            )
        signed = None if roster is None else named(roster)
        applied = None if advertised.last is None else named(advertised.last)
        return replace(reply, publication=offer, roster=signed, advertised=advertised, last=applied, shown=shown)


_MANY_TOKENS = 10**12
"""Tokens behind a roster, as a liar claims."""
_LIE_ROUNDS = ((1, 1), (1, 3), (2, 1), (2, 8), (4, 2), (0, 2), (10**6, 30))
"""(number of rosters before its head at which a liar's invented chain begins, number of rosters in that chain)."""
_INVENTED = RoundPublication(peer="p0", snapshot=hash_of("invented"), tokens=1, inner_steps=1)


def settings_of(schedule: FaultSchedule) -> Settings:
    """Return the settings of a swarm in rounds."""
    return Settings(
        share_above=int(schedule.option("share_above", 5)),
        presence_ttl_s=15.0,
        round_limit_s=12.0 if schedule.has("idle") else 600.0,
    )


class SearchedRounds(SynchronousWorld):
    """Simulated world that records values that must only grow, and work that was reported as merged."""

    def __init__(self, schedule: FaultSchedule, settings: Settings) -> None:
        super().__init__(settings, seed=schedule.seed)
        self.clock.most_events = 400_000
        self.liars = schedule.liars
        self.pasts: dict[str, tuple[Roster, ...]] = {}
        """Rosters that each honest peer had applied when it last applied or adopted one."""
        self.invented: set[str] = set()
        """Digests of rosters that list a liar alone and that it published too late for others."""
        self.heads: dict[str, str] = {}
        """Digest of the roster that each honest peer last applied or adopted."""
        self.broken: list[Violation] = []
        self.waits: list[tuple[float, str, float]] = []
        """Waits as (time of its end, peer, seconds)."""
        self.advertised: dict[tuple[str, int], tuple[str, float]] = {}
        """Publications that their own authors reported as merged: (peer, round) -> (snapshot, time), of peers that are
        still alive."""

    def _make(self, name: str, steps_per_s: float, link: SimulatedLink) -> SimulatedVolunteer:
        return (RoundLiar if name in self.liars else SimulatedVolunteer)(self, name, steps_per_s, link)

    def declare(self, fault: ScheduledFault, name: str, index: int) -> None:
        """Schedule a fault of this peer; `index` tells newcomers apart."""
        if fault.kind == "idle":
            declare_span(self, fault, lambda: self.idle(name), lambda: self.sign_again(name))
        elif fault.kind in ("kill at", "freeze at"):
            strike = self.kill if fault.kind == "kill at" else _frozen_for(self, fault)
            self.fail_at(name, fault.detail // 5 % 8, _MOMENTS[fault.detail % 5], strike)
        else:
            declare(self, fault, name, index, self.come)

    def come(self, name: str, checkpoint: int) -> object:
        """Start a newcomer, or a peer that has died."""
        return self.come_back(name, checkpoint) if name in self.peers else self.join(name)

    def record(self, kind: Any, peer: SimulatedVolunteer, roster: Roster | None = None) -> None:
        """Add an event to the log, and judge it."""
        super().record(kind, peer, roster)
        if kind == "joined":
            self.pasts.pop(peer.name, None)  # from a checkpoint
            self.heads.pop(peer.name, None)
            self.advertised = {key: one for key, one in self.advertised.items() if key[0] != peer.name}
        if kind not in ("applied", "adopted") or roster is None or peer.name in self.liars:
            return
        if self.waits_s and self.waits_s[-1][0] == peer.name:
            self.waits.append((self.clock.now, peer.name, self.waits_s[-1][2]))
        self._look_for_lies(peer, roster)
        self.heads[peer.name] = roster.digest
        past = self.pasts.get(peer.name, ())
        if (
            past
            and roster.base_tokens < past[-1].base_tokens
            and not (kind == "adopted" and self._gave_way(past, peer))
        ):
            detail = f"{peer.name} went from weights with {past[-1].base_tokens} tokens behind them to"
            self.broken.append(Violation("totals only grow", f"{detail} {roster.base_tokens}"))
        self.pasts[peer.name] = peer.history
        if kind == "applied":
            for entry in roster.entries:
                if entry.peer == peer.name:
                    self.advertised[peer.name, roster.round] = entry.snapshot, self.clock.now

    def _gave_way(self, past: Sequence[Roster], peer: SimulatedVolunteer) -> bool:
        """Return whether a peer was right to take weights with fewer tokens than its own.

        It was if at least as many peers of the last common roster continued with those weights.
        """
        new = peer.history
        common = next((n for n, (one, other) in enumerate(zip(past, new, strict=False)) if one != other), len(new))
        if common == len(new) or common == len(past):
            return False
        electors = set(past[common - 1].peers) if common else set()
        stands = {one.name for one in self.running() if new[-1] in one.history}
        went_on = stands.union(*(roster.peers for roster in new[common + 1 :]))
        stayed = set[str]().union(*(roster.peers for roster in past[common + 1 :]))
        return len(electors) < 2 or len(electors & went_on) >= len(electors & stayed)

    def _look_for_lies(self, peer: SimulatedVolunteer, roster: Roster) -> None:
        """Check that no peer gives up its weights for a liar's own while another honest peer is on the same roster.

        One that hung until a moment ago does not count: it could not be heard when the state was asked for.
        """
        head = self.heads.get(peer.name)
        if roster.digest not in self.invented or head is None:
            return
        hung = {event.peer for event in self.events("thawed") if event.time_s > self.clock.now - _PULLED_S}
        beside = [
            one.name
            for one in self.running()
            if one is not peer
            and one.name not in self.liars
            and one.name not in hung
            and one.phase is not Phase.JOINING
            and self.connected(one, peer)
            and self.heads.get(one.name) == head
        ]
        if beside:
            detail = f"{peer.name}, beside {', '.join(beside)}, took the weights of {roster.signer}'s own round"
            self.broken.append(Violation("no lie moves a majority", f"{detail} {roster.round}"))


# ---------------------------------------------------------------- play


def play_rounds(schedule: FaultSchedule) -> Played:
    """Play the schedule, and return the violations."""
    return judged(SearchedRounds(schedule, settings_of(schedule)), schedule)


def judged(world: SearchedRounds, schedule: FaultSchedule, limit_s: float = 120.0) -> Played:
    """Play the schedule in this world, and return the violations. Two rounds take `limit_s` at most once the faults are
    over."""
    for name, steps_per_s in zip(schedule.names, schedule.speeds, strict=True):
        world.join(name, steps_per_s=steps_per_s)
    for index, fault in enumerate(schedule.faults):
        world.declare(replace(fault, at_s=_TOGETHER_S + fault.at_s), schedule.name(fault), index)
    world.run_until(_TOGETHER_S + schedule.faults_end_s(_LEAST_S))
    end_faults(world, world.liars)
    world.declare_no_more()
    found = list(_waits(world, schedule))
    if world.running():
        world.run_until(world.clock.now + world.settings.presence_ttl_s / 3 + 20)
        found += [Violation("one model", detail) for detail in not_one_model(world, limit_s=limit_s)]
        found += [Violation("exactly once", detail) for detail in counted_twice(world)]
        if not schedule.liars and not schedule.has("partition", "cut", "loss", "late"):
            found += _lost(world)
    weights = [peer.digest for peer in world.running()]
    return Played([*world.broken, *found], f"{world.clock.num_events} events, {weights}")


def _frozen_for(world: SynchronousWorld, fault: ScheduledFault) -> Callable[[str], None]:
    def freeze(name: str) -> None:
        from_s = world.clock.now + _ASKED_S[fault.detail // 40 % 4]
        world.at(from_s, world.freeze, name)
        world.at(from_s + fault.lasts_s, world.thaw, name)

    return freeze


# ---------------------------------------------------------------- what must hold


def _waits(world: SearchedRounds, schedule: FaultSchedule) -> Iterable[Violation]:
    """Check that each wait is explained by faults during it or shortly before."""
    now = world.clock.now
    waits = [*world.waits, *((now, p.name, now - p.ended_s) for p in world.running() if p.phase is Phase.MERGING)]
    idle = {schedule.name(fault) for fault in schedule.faults if fault.kind == "idle"}
    for over_s, name, wait_s in waits:
        if name in idle:
            continue
        span_s = (over_s - wait_s - FAULT_WAIT_S - _TOGETHER_S, over_s - _TOGETHER_S)
        causes = [fault for fault in schedule.faults if _may_matter(fault, *span_s)]
        explained_s = (LIE_WAIT_S if fault.kind.startswith("lie: ") else FAULT_WAIT_S for fault in causes)
        if wait_s > (bound_s := BASE_WAIT_S + sum(explained_s)):
            yield Violation("nobody waits", f"{name} waited for {wait_s:.1f} s; {bound_s:.1f} s are explained")


def _may_matter(fault: ScheduledFault, from_s: float, to_s: float) -> bool:
    """Return whether the fault may have struck between these times. A fault that is tied to a moment of a round may
    strike at any time."""
    return fault.kind.endswith(" at") or (fault.at_s <= to_s and from_s <= fault.end_s)


def not_one_model(world: SynchronousWorld, recovery_rounds: int = 2, limit_s: float = 120.0) -> list[str]:
    """Return sentences that say why the live peers do not have one model after the faults; empty if they do.

    Within `recovery_rounds` rounds they must have equal weights, and keep them.
    """
    peers = world.running()
    end_s = world.clock.now + limit_s
    rounds = max(peer.round for peer in peers) + recovery_rounds
    if not (world.run_rounds(rounds, end_s) and world.run_rounds(rounds + 2, end_s + limit_s)):
        return [
            f"round {rounds + 2} is not reached: {[(p.name, p.round, p.phase.value, p.is_late_joiner) for p in peers]}"
        ]
    for round in (rounds + 1, rounds + 2):
        digests = world.digests(round)
        if len(digests) != len(peers) or len(set(digests.values())) != 1:
            return [f"round {round} begins with { ({name: digest[:4] for name, digest in digests.items()}) }"]
    last = max(peers, key=lambda peer: peer.round).history[rounds + 1]
    if missing := {peer.name for peer in peers}.symmetric_difference(last.peers):
        return [f"two rounds later not everyone counts again: {sorted(missing)}"]
    return []


def counted_twice(world: SynchronousWorld) -> list[str]:
    """Return sentences about rounds that are in a peer's past twice, and about breaks in the chains of rosters and
    tokens."""
    found = []
    for peer in world.running():
        entries = [(entry.snapshot, entry.peer, r.round) for r in peer.history for entry in r.entries]
        counts: Mapping[Any, int] = Counter(one for snapshot, *whose in entries for one in (snapshot, tuple(whose)))
        found += [f"{what} is in {peer.name}'s past {n} times" for what, n in counts.items() if n > 1]
        base, tokens = "", 0
        for roster in peer.history:
            if (roster.base, roster.base_tokens) != (base, tokens) or any(e.base != base for e in roster.entries):
                found.append(f"{peer.name} applied a roster of round {roster.round} to other weights than its own")
            base, tokens = roster.digest, roster.total_tokens
    return found


def _lost(world: SearchedRounds) -> list[Violation]:
    """Return a violation for each publication that was reported as merged and is not in the model in the end.

    A loss is excused where nobody could be heard, and of a peer that froze as soon as it had signed, when nobody else
    had its bytes yet, as of one that is cut off.
    """
    peers = world.running()
    merged = {(e.peer, roster.round, e.snapshot) for roster in peers[0].history for e in roster.entries}
    return [
        Violation("no token is lost", f"{name} told its round {round} as merged, and it is not in the model")
        for (name, round), (snapshot, told_s) in world.advertised.items()
        if world.peers[name].alive and (name, round, snapshot) not in merged and not _stopped_then(world, name, told_s)
    ]


def _stopped_then(world: SynchronousWorld, name: str, told_s: float) -> bool:
    stops_s = [event.time_s for event in world.events("frozen") if event.peer == name]
    return any(told_s <= stop_s <= told_s + _PULLED_S for stop_s in stops_s)
