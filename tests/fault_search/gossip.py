"""Schedules of faults in a swarm that gossips, with hidden peers, and the invariants that must hold.

- Each inner step of a peer enters another's weights once at most, checkpoints included.
- Nobody waits for anybody.
- The tokens that a peer counts, also by shard, only grow, are never more than were trained, and in the end include all
  that were ever advertised.
- Rounds are as long as pacing allows, and what is merged is not too old.
- Weights are finite, and without liars within those at the beginning.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterable, Mapping
from itertools import pairwise
from typing import Any

from fault_search.faults import declare, end_faults
from fault_search.hosts import HostedPeer, HostedSwarm
from fault_search.schedule import FaultSchedule, FaultSpan, Played, Violation, draw_faults
from swarmtrain.algorithm.pacing import fewest_inner_steps, most_inner_steps, paced_inner_steps
from swarmtrain.network.discovery.token_accounting import TokenAccounting
from swarmtrain.protocol.gossip.messages import MergeFragment
from swarmtrain.protocol.gossip.pulls import WantedPartners
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.shards import Coverage
from swarmtrain.protocol.tokens.tally import CountingRules, quick_speed
from swarmtrain.simulate.systems.gossip import BUSY
from swarmtrain.simulate.systems.messages import SimulatedLink
from swarmtrain.simulate.systems.network import kept_until
from swarmtrain.simulate.systems.publications import OfGuest, RoundRecord, SimulatedGossipSettings, SimulatedPublication
from swarmtrain.v1 import snapshot_pb2 as pb

_RECOVERY_S = 40.0
_SPAN = FaultSpan(2.0, 30.0, 20.0)
_LEAST_S = 20.0
_EVER = 10**12
_KINDS = {
    "kill": 3, "leave": 1, "restart": 8, "freeze": 3, "partition": 2, "cut": 2, "delay": 1, "loss": 2, "twice": 4,
    "late": 2, "join": 2, "lie: speed": 1, "lie: round": 1, "lie: turned back": 1, "lie: ahead": 1, "lie: tokens": 1,
    "lie: no numbers": 1, "lie: two publications": 1, "lie: busy": 1, "lie: silent": 1, "lie: told": 1,
    "lie: old record": 1,
}  # fmt: skip


def draw_gossip(rng: random.Random) -> FaultSchedule:
    """Draw a swarm of up to seven peers that gossip, and its faults."""
    speeds = tuple(rng.choice((0.7, 4.0, 6.0, 10.0, 12.0)) for _ in range(rng.choice((1, 2, 2, 3, 4, 5, 6, 7))))
    options = []
    if rng.random() < 0.3:
        options.append(("pacing", 0.0))
    if rng.random() < 0.3:
        options.append(("hidden", float(rng.randrange(1, 3))))
    if rng.random() < 0.3:
        options.append(("max_staleness_rounds", 2.0))
    faults = draw_faults(rng, _KINDS, len(speeds), _SPAN, lambda kind: rng.randrange(128))
    seed = rng.randrange(2**16)
    if rng.random() < 0.5:
        options.append(("fragments", float(rng.randrange(2, 5))))
        if rng.random() < 0.4:
            options.append(("adapter_groups", 1.0))
    return FaultSchedule(
        world="gossip",
        speeds=speeds,
        faults=faults,
        options=tuple(options),
        seed=seed,
    )


# ---------------------------------------------------------------- peers that count tokens


def _at_once(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waits for something")


class CountingPeer(HostedPeer):
    """Simulated peer that counts the run's tokens as real peers do, and advertises its own count."""

    def __init__(self, swarm: SearchedSwarm, name: str, speed: float, theta: float, link: SimulatedLink) -> None:
        self.searched = swarm
        super().__init__(swarm, name, speed, theta, link)
        round_tokens = self.settings.inner_steps * self.settings.tokens_per_step
        self.own_tokens, self.read_s, self.usual_per_s = 0, -math.inf, 0.0
        self.accounting = TokenAccounting(
            me=name,
            rules=CountingRules(began_s=0.0, burst_tokens=2 * round_tokens, most_tokens=_EVER),
            read_bucket=swarm.read_bucket,
            speeds=self._speeds,
            clock=lambda: swarm.clock.now,
            refused=lambda *_: None,
        )
        self.ended: tuple[int, int] | None = None
        """(tokens of the last round, which are not counted yet; tokens that had been seen before it ended)."""
        self.kept: list[tuple[int, list[list[str | int | float]], list[list[str | int | list[int]]]]] = []
        """(own tokens, tally, shard coverage) at each of the last checkpoints."""

    def _speeds(self) -> Mapping[str, float]:
        speeds = {info.peer: info.steps_per_s for info in self.membership.live()} | {self.name: self.steps_per_s}
        return {peer: speed * self.settings.tokens_per_step for peer, speed in speeds.items()}

    def _over(self, r: Any) -> None:
        self.ended = r.steps * self.settings.tokens_per_step, sum(self._shards.seen)
        super()._over(r)

    def _start_round(self, all_begin: bool = False) -> None:
        for other in self.searched.peers.values():  # as greetings do: who comes is known from then on
            if isinstance(other, CountingPeer) and other is not self:
                other.accounting.meet(self.name)
                self.accounting.meet(other.name)
        shard = self.shard
        super()._start_round(all_begin)
        if self.ended is not None:
            self._count(shard, *self.ended)
            self.ended = None
        s, honest = self.settings, self.searched.fastest_honest()
        claims = [one.peer in self.searched.liars for one in self._others]
        least = self._paced(honest)
        if s.pacing and len(claims) > 1 and 2 * self._now.steps < least:  # in step with the others, half may be wanting
            detail = f"{self.name} takes {self._now.steps} steps a round, and by the fastest of the others {least}"
            self.searched.broken.append(Violation("one liar paces nobody", detail))

    def _count(self, shard: int, tokens: int, seen: int) -> None:
        """Count a round of this peer, and what the others advertise."""
        before = self.accounting.total
        self.own_tokens += tokens
        self.searched.trained[self.name, shard] += tokens
        self.accounting.learn({self.name: self.own_tokens})
        self.searched.reached[self.name] = max(self.searched.reached.get(self.name, 0), self.own_tokens)
        _at_once(self.accounting.read_all())
        self.read_s, speeds = self.swarm.clock.now, [one.steps_per_s for one in self._others]
        self.usual_per_s = quick_speed([self.steps_per_s, *speeds])
        self.kept = [*self.kept[-2:], (self.own_tokens, self.accounting.kept(), self._shards.rows())]
        self.searched.tell(self.name, self._to_tell())
        self._judge(before)
        self._judge_shards(seen)

    def _paced(self, fastest: float) -> int:
        return paced_inner_steps(self.steps_per_s, max(fastest, self.steps_per_s), self.settings.inner_steps)

    def _merge(self, command: MergeFragment[Any, Any, Any]) -> None:
        self.searched.merges += [(self.name, one.peer, one.version.round) for one in command.pulled if one.version.part]
        super()._merge(command)

    def _to_tell(self) -> int:
        return self.accounting.own_to_tell(self.own_tokens)

    def _judge(self, before: int) -> None:
        swarm, counts = self.searched, self.accounting.contributions()
        if self.name in swarm.liars:
            return
        if self.accounting.total < before:
            detail = f"{self.name} counted {before} tokens, and {self.accounting.total} a moment later"
            swarm.broken.append(Violation("totals only grow", detail))
        explained = swarm.explained_tokens()
        for peer, tokens in counts.items():
            if peer in swarm.liars and tokens > explained:
                detail = f"{self.name} counts {tokens} of {peer}; {explained} are the most that a speed explains"
                swarm.broken.append(Violation("claims are bounded", detail))
            if peer not in swarm.liars and tokens > swarm.reached.get(peer, 0):
                detail = f"{self.name} counts {tokens} of {peer}, which has trained on {swarm.reached.get(peer, 0)}"
                swarm.broken.append(Violation("no token counts twice", detail))

    @property
    def _shards(self) -> Coverage:
        assert self.coverage is not None
        return self.coverage

    def _judge_shards(self, before: int) -> None:
        swarm = self.searched
        if self.name not in swarm.liars and (seen := sum(self._shards.seen)) < before:
            swarm.broken.append(Violation("totals only grow", f"{self.name} has seen {before} tokens, and now {seen}"))
        for peer in sorted(swarm.peers.keys() - swarm.liars) if self.name not in swarm.liars else ():
            row = self._shards.row(peer)
            for shard, tokens in enumerate(row.counts if row is not None else ()):
                if tokens > (trained := swarm.trained[peer, shard]):
                    detail = f"{self.name} counts {tokens} of {peer} in shard {shard}; it has trained on {trained}"
                    swarm.broken.append(Violation("no token counts twice", detail))

    def restore(self, old: CountingPeer, checkpoint: int) -> None:
        """Restore the counts of a checkpoint."""
        if old.kept:
            self.kept = [*kept_until(old.kept, checkpoint)]
            self.own_tokens, counts, shards = self.kept[-1]
            self.accounting.restore(counts)
            self._shards.load(shards)


class GossipLiar(CountingPeer):
    """Simulated peer that works as the others do, but lies about it."""

    lies: frozenset[str] = frozenset()

    def __init__(self, swarm: SearchedSwarm, name: str, speed: float, theta: float, link: SimulatedLink) -> None:
        super().__init__(swarm, name, speed, theta, link)
        self._claimed: list[SimulatedPublication] = []
        """Altered publications that the liar has announced recently."""

    def _describe(self, info: PeerInfo) -> PeerInfo:
        info = super()._describe(info)
        if "speed" in self.lies:
            info = dataclasses.replace(info, steps_per_s=1000 * info.steps_per_s)
        return dataclasses.replace(info, round=info.round + 1000) if "round" in self.lies else info

    def _to_tell(self) -> int:
        told = super()._to_tell()
        return min(told * 10**6, 10**15) if "told" in self.lies else told // 2 if "old record" in self.lies else told

    def provide(self, what: Any) -> Any:
        """Return what a pull asks for, altered. A publication that it has claimed keeps the bytes that it claimed."""
        if "silent" in self.lies or "busy" in self.lies:
            return BUSY if "busy" in self.lies else None
        asked = what.what if isinstance(what, OfGuest) else what
        if isinstance(asked, SimulatedPublication) and any(asked is one for one in self._claimed):
            return asked
        found = super().provide(what)
        if not self.lies or not isinstance(found, SimulatedPublication):
            return found
        changed = self._changed(found)
        self._claimed = [*self._claimed[-31:], changed]
        return changed

    def _changed(self, found: SimulatedPublication) -> SimulatedPublication:
        version = found.version
        if "turned back" in self.lies:
            version = dataclasses.replace(version, round=max(0, version.round - 3))
        if "ahead" in self.lies:
            version = dataclasses.replace(version, round=version.round + 1000)
        if "tokens" in self.lies:
            version = dataclasses.replace(version, tokens=1000 * version.tokens)
        gradient = found.gradient
        if "no numbers" in self.lies:
            gradient = self.swarm._random.choice((math.nan, math.inf))
        if "two publications" in self.lies:
            gradient += self.swarm._random.uniform(-0.1, 0.1)
        changed = dataclasses.replace(found, version=version, gradient=gradient)
        return dataclasses.replace(changed, is_forged=found.peer != self.name and changed != found)


class SearchedSwarm(HostedSwarm):
    """Simulated swarm that records what was trained, and the violations seen."""

    def __init__(self, schedule: FaultSchedule) -> None:
        self.progress: dict[str, tuple[pb.Record, float]] = {}
        self.earlier: dict[str, tuple[pb.Record, float]] = {}
        """Previous record of each peer, which some nodes of the DHT may still have."""
        self.told: list[tuple[float, str, int]] = []
        self.reached: dict[str, int] = {}
        """Most tokens that each peer has trained on, in any of its incarnations."""
        self.trained: Counter[tuple[str, int]] = Counter()
        """Tokens by (peer, shard), over all incarnations."""
        self.merges: list[tuple[str, str, int]] = []
        """Merged pseudo-gradients as (peer that merged, author, author's round).

        Entries stay when the weights have been replaced since. A state taken from another peer is an entry for the
        round after it.
        """
        self.broken: list[Violation] = []
        self.liars = schedule.liars
        self.speeds: dict[str, float] = {}
        """Inner steps per second of each honest machine that ever took part."""
        hidden = schedule.names[1 : 1 + int(schedule.option("hidden", 0))]
        settings = SimulatedGossipSettings(
            inner_steps=32,
            wanted=WantedPartners(2, 2),
            pacing=bool(schedule.option("pacing", 1)),
            max_staleness_rounds=int(schedule.option("max_staleness_rounds", 4)),
            inner_rate=0.01,
            num_shards=3,
            num_parts=8 if schedule.option("fragments", 1) > 1 else 4,
            num_fragments=int(schedule.option("fragments", 1)),
            adapter_groups=int(schedule.option("adapter_groups", 0)),
        )
        super().__init__(lambda name: name in hidden, settings, seed=schedule.seed)
        self.clock.most_events = 200_000

    def _make(self, name: str, steps_per_s: float, theta: float, link: SimulatedLink) -> CountingPeer:
        if name not in self.liars:
            self.speeds[name] = steps_per_s
        return (GossipLiar if name in self.liars else CountingPeer)(self, name, steps_per_s, theta, link)

    def took_state(self, peer: Any, of: str, waited_s: float) -> None:
        """Record that the peer continues from another peer's state."""
        self.merges.append((peer.name, of, peer.round + 1))

    def fastest_honest(self) -> float:
        """Return the inner steps per second of the fastest honest peer."""
        return max((peer.steps_per_s for name, peer in self.peers.items() if name not in self.liars), default=0.0)

    def explained_tokens(self) -> int:
        """Return the most tokens of a liar that an honest peer may count.

        That is 64 times what the fastest honest peer can have trained, and two rounds.
        """
        tokens_per_s = self.settings.tokens_per_step * self.fastest_honest()
        return int(64 * tokens_per_s * self.clock.now) + 2 * self.settings.inner_steps * self.settings.tokens_per_step

    async def read_bucket(self, kind: str, prefix: str) -> Mapping[str, tuple[pb.Record, float]]:
        """Return the progress records as the DHT delivers them: sometimes outdated ones while messages come twice."""
        if prefix:
            return {}
        return {peer: self.earlier[peer] if self.comes_twice() else record for peer, record in self.progress.items()}

    def tell(self, peer: str, tokens: int) -> None:  # type: ignore[override]
        """Store a progress record of `peer`."""
        self.earlier[peer] = self.progress.get(peer, (pb.Record(progress=pb.Progress()), math.inf))
        self.progress[peer] = (pb.Record(progress=pb.Progress(tokens=tokens)), math.inf)
        self.told.append((self.clock.now, peer, tokens))

    def come(self, name: str, checkpoint: int) -> object:
        """Start a newcomer, or a peer that has died."""
        return self.come_back(name, checkpoint) if name in self.peers else self.join(name)

    def come_back(self, name: str, checkpoint: int = -1) -> Any:
        """Restart a dead peer with the counts of a checkpoint."""
        old = self.peers[name]
        new = super().come_back(name, checkpoint)
        assert isinstance(old, CountingPeer) and isinstance(new, CountingPeer)
        new.restore(old, checkpoint)
        return new


# ---------------------------------------------------------------- play


def play_gossip(schedule: FaultSchedule) -> Played:
    """Play the schedule, and return the violations."""
    swarm = SearchedSwarm(schedule)
    for i, (name, steps_per_s) in enumerate(zip(schedule.names, schedule.speeds, strict=True)):
        swarm.found(name, steps_per_s=steps_per_s, theta=(-1.0, 1.0, 0.5)[i % 3])
    for index, fault in enumerate(schedule.faults):
        declare(swarm, fault, schedule.name(fault), index, swarm.come)
    swarm.run_until(schedule.faults_end_s(_LEAST_S))
    end_faults(swarm, swarm.liars)
    healed_s, reached = swarm.clock.now, {peer.name: peer.round for peer in _honest(swarm)}
    swarm.run_until(healed_s + _RECOVERY_S)
    found = [*swarm.broken, *_entered_twice(swarm), *_rounds(swarm, schedule)]
    found += [*_stuck(swarm, healed_s), *_alone(swarm, reached), *_end(swarm)]
    return Played(found, f"{swarm.clock.num_events} events, {[peer.theta for peer in swarm.running()]}")


# ---------------------------------------------------------------- what must hold


def _honest(swarm: SearchedSwarm) -> list[CountingPeer]:
    return [peer for peer in swarm.running() if isinstance(peer, CountingPeer) and peer.name not in swarm.liars]


def _entered_twice(swarm: SearchedSwarm) -> Iterable[Violation]:
    entered: defaultdict[tuple[str, str, int, int], list[tuple[int, int]]] = defaultdict(list)
    came = [one._replace(who=peer.name) for peer in swarm.peers.values() for one in peer.model.came]
    for one in [*swarm.entered, *came]:
        is_first = one.who == one.whose and one.round == 0  # who is killed in it has no checkpoint, and has it anew
        if not is_first and not {one.who, one.whose} & swarm.liars:
            entered[one.who, one.whose, one.fragment, one.round].append((one.since, one.until))
    for (who, whose, fragment, round), spans in entered.items():
        for before, after in pairwise(sorted(spans)):
            if before[1] > after[0]:
                what = f"tokens {after[0]} to {before[1]} of round {round} of {whose}"
                yield Violation("exactly once", f"{what} entered fragment {fragment} of {who} twice")


def _rounds(swarm: SearchedSwarm, schedule: FaultSchedule) -> Iterable[Violation]:
    s = swarm.settings
    of: defaultdict[str, list[RoundRecord]] = defaultdict(list)
    for one in swarm.rounds:
        if one.peer not in swarm.liars:
            of[one.peer].append(one)
    disturbed = {schedule.name(fault) for fault in schedule.faults if fault.kind in ("freeze", "restart")}
    for name, rounds in of.items():
        speed = swarm.peers[name].steps_per_s
        for one in rounds:
            if abs(one.ended_s - one.started_s - one.steps / speed) > 1e-6:
                yield Violation("nobody waits", f"round {one.round} of {name} took longer than its {one.steps} steps")
            if not fewest_inner_steps(s.inner_steps) <= one.steps <= most_inner_steps(s.inner_steps):
                yield Violation("rounds are bounded", f"round {one.round} of {name} has {one.steps} steps")
            if one.staleness_rounds > s.max_staleness_rounds:
                detail = f"{name} merged what was {one.staleness_rounds} rounds behind the median"
                yield Violation("nothing too old is merged", detail)
        pairs = [(a, b) for a, b in pairwise(rounds) if not a.waited]  # who takes a state waits for it
        gaps = [b.started_s - a.ended_s for a, b in pairs] if name not in disturbed else []
        if max(gaps, default=0.0) > 1e-6:
            yield Violation("nobody waits", f"{name} stood still for {max(gaps):.1f} s between two rounds")


def _stuck(swarm: SearchedSwarm, healed_s: float) -> Iterable[Violation]:
    """Check that every peer advances to later rounds."""
    for peer in _honest(swarm):
        ended_s = max((one.ended_s for one in swarm.rounds if one.peer == peer.name), default=0.0)
        allowed_s = most_inner_steps(swarm.settings.inner_steps) / peer.steps_per_s + 1e-6
        if ended_s < healed_s and swarm.clock.now - healed_s > 2 * allowed_s + swarm.settings.stall_limit_s:
            yield Violation("nobody waits", f"{peer.name} has ended no round since the faults are over")


def _alone(swarm: SearchedSwarm, reached: Mapping[str, int]) -> Iterable[Violation]:
    """Check that every peer has merged others and was merged by others after the faults were over, since the rounds in
    `reached`.

    Of two peers nobody tells which to believe where a third one lies. The first round of a slow machine may last longer
    than the play, so that nothing of it is left to merge. A peer whose publication was refused as too old may be left
    alone for longer than a play.
    """
    names = [peer.name for peer in _honest(swarm)]
    nobody_lies = len(names) == len(swarm.peers)
    ended = Counter(one.peer for one in swarm.rounds if one.round >= reached.get(one.peer, 0))
    merging, merged = set(), set()
    refused = {whose for _, whose, reason in swarm.incidents if "an old round" in reason}
    for who, whose, round in swarm.merges:
        if round > reached.get(whose, 0):
            merging.add(who)
            merged.add(whose)
    for name in names if (len(names) > 2 or nobody_lies) and swarm.settings.pacing else ():
        others_went_on = any(ended[other] > 1 for other in names if other != name)
        is_merged = name in merged or name in refused
        if ended[name] > 4 and others_went_on and name in reached and (name not in merging or not is_merged):
            does = "merges nobody" if name not in merging else "is merged by nobody"
            yield Violation("nobody is left alone", f"{name} {does} since the faults are over")


def _end(swarm: SearchedSwarm) -> Iterable[Violation]:
    """Check that all peers count, in the end, the tokens that all peers advertised.

    A machine that is faster than usual is believed more and more while it delivers, and what was missed of it is paid
    for by time: both may take longer than a play. Usual is what a peer saw when it read.
    """
    for peer in _honest(swarm):
        counts, told = peer.accounting.contributions(), defaultdict[str, int](int)
        for at_s, other, tokens in swarm.told:
            if other not in swarm.liars and at_s < peer.read_s - 10:
                told[other] = max(told[other], tokens)
        for other, tokens in told.items():
            if counts.get(other, 0) < tokens and swarm.speeds[other] <= peer.usual_per_s:
                detail = f"{peer.name} counts {counts.get(other, 0)} of {other}, which told {tokens}"
                yield Violation("no token is lost", detail)
        for one in peer.model.fragments:
            if not math.isfinite(one.theta) or not math.isfinite(one.momentum):
                yield Violation("weights are finite", f"{peer.name} has {one.theta}")
            elif not swarm.liars and abs(one.theta) > 10.0:
                yield Violation("weights stay together", f"{peer.name} has {one.theta}, at first they were within 1")
