"""Recorded runs of both simulators: all that their peers were told and decided, line by line; deterministic."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recording
from fault_search.gossip import draw_gossip, play_gossip
from fault_search.schedule import FaultSchedule, ScheduledFault
from learnt import setting, tiny
from lines import Line, Recording, header_of, news_name
from recording import around, plain

from swarmtrain.errors import BadBytesError
from swarmtrain.network.codec import vector_sha256
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.gossip import pull_schedule
from swarmtrain.protocol.gossip.engine import GossipEngine
from swarmtrain.protocol.gossip.messages import (
    AskPartner,
    DecodePublication,
    DownloadPublication,
    FetchConsensus,
    MergeDue,
    MergeFragment,
    MergesPlanned,
    PartnerReplied,
    PartnersChanged,
    PeerCalled,
    PrepareMerge,
    PublicationDecoded,
    PublicationDownloaded,
    PullFailed,
    PullsPaused,
    PullTimerFired,
    ReportFailure,
)
from swarmtrain.protocol.gossip.partners import BackOff, Partners
from swarmtrain.protocol.gossip.pulls import PullTimes
from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.learning import churn
from swarmtrain.simulate.learning.gossip import LearningPeer, LearningWorld, VirtualRunner
from swarmtrain.simulate.learning.hostile import HostileWorld
from swarmtrain.simulate.systems.gossip import GossipPeer
from swarmtrain.simulate.systems.network import PullRefusal
from swarmtrain.simulate.systems.publications import SimulatedPublication

LEARNING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {"run__total_tokens": 18_000}),
    "churn": (
        {
            "peers": {"number": 4, "slowdowns": [1.0, 1.5, 2.0, 3.0]},
            "away": [{"peer": 2, "at_s": 0.0, "for_s": 0.15}, {"peer": 0, "at_s": 0.53, "for_s": 0.2}],
            "hangs": [{"peer": 1, "at_s": 0.3, "for_s": 0.7}],
        },
        {
            "run__total_tokens": 44_000, "merge__fragments": 2, "merge__max_staleness_rounds": 2,
            "merge__partners": "random-permutation",
        },
    ),
    "liars": (
        {"peers": {"number": 5, "slowdowns": [1.0, 1.5, 2.0]}, "hostile": {"percent": 40.0, "attack": "sign-flip"}},
        {"run__total_tokens": 16_000, "merge__fragments": 2, "merge__gradient_format": "int4"},
    ),
    "slow-links": (
        {
            "peers": {"number": 4, "slowdowns": [1.0, 2.0], "noise": 0.2},
            "links": {
                "up_mbit": 1.0, "down_mbit": 2.0, "rtt_ms": 60.0, "jitter_ms": 10.0, "loss_percent": 1.0,
                "failing_percent": 50.0,
            },
        },
        {
            "run__total_tokens": 36_000, "merge__fragments": 1, "merge__init": "own", "merge__robust": "clip",
            "merge__partners": "freshest",
        },
    ),
}  # fmt: skip
"""Sections of the scenario, and changes of run-file keys, on top of tests/simulate/learnt.py."""

SYSTEMS = {"faults": 1942, "hidden-and-liars": 2638}
"""Seeds of the schedules, drawn as by `make search`."""


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else plain(value)


@dataclass
class _Lines:
    """Recorder of lines in the order in which they happen."""

    clock: Clock | None = None
    lines: list[Line] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    """Map the id of an object to its peer's number; the objects live as long as the run."""
    kept: list[Any] = field(default_factory=list)
    current: int = -1
    """Peer whose engine is being asked."""
    told: dict[Any, Any] = field(default_factory=dict)

    def write(self, peer: int, kind: str, **what: Any) -> None:
        assert self.clock is not None
        line = {"kind": kind, "peer": peer, "block": self.clock.num_events, "now": self.clock.now, **what}
        self.lines.append(json.loads(json.dumps({"number": len(self.lines), **line}, default=plain)))

    def is_of(self, thing: Any, peer: int) -> None:
        """Attribute what is told to `thing` to that peer."""
        self.numbers[id(thing)] = peer
        self.kept.append(thing)

    def of(self, thing: Any) -> int:
        """Return the peer of an object; -1 if not known."""
        return self.numbers.get(id(thing), -1)

    def news(self, peer: int, kind: str, key: Any, told: Mapping[str, Any], **what: Any) -> None:
        """Write what has changed in `told` since the last time."""
        before = self.told.get((peer, key), {})
        changed = {name: value for name, value in told.items() if before.get(name) != value}
        gone = [name for name in before if name not in told]
        if changed or gone:
            self.write(peer, kind, **what, known=changed, forgotten=gone)
        self.told[peer, key] = dict(told)

    def inner(self) -> None:
        """Record what back-off and transfer times were told."""
        for owner, names, before in (
            (BackOff, ("busy", "failed", "answered", "called"), ""),
            (PullTimes, ("bytes_begin", "bytes_end", "merged", "round_ended"), "times."),
        ):
            for name in names:
                around(owner, name, functools.partial(self._inner, before + name))

    def _inner(self, kind: str, original: Any, thing: Any, *args: Any) -> Any:
        found = original(thing, *args)
        if (peer := self.of(thing)) >= 0:
            self.write(peer, kind, args=args, found=found)
        return found


# ---------------------------------------------------------------- with tensors


def record_learning(name: str, folder: Path) -> Recording:
    """Play and record one of `LEARNING` in `folder`."""
    sections, changes = LEARNING[name]
    one = setting(tiny(folder, **sections), **changes)
    lines = _Learning(Clock())
    try:
        lines.put_in()
        world = (HostileWorld if one.hostile.percent else LearningWorld)(one)
        lines.clock = world.clock
        world.run()
    finally:
        recording.take_out()
    peers = [
        {"name": peer.name, "rounds": peer.rounds_done, "theta": _text(peer.trainer.state.theta)}
        for peer in world.peers
    ]
    how = {"sections": sections, "changes": changes, "made_by": "tests/simulate/learnt.py", "threads": 1}
    how["run"] = one.run.model_dump(mode="json")
    return Recording(header_of("learning", name, peers, how), lines.lines)


def _text(vector: Any) -> str:
    return base64.b64encode(vector.numpy().tobytes()).decode()


class _Learning(_Lines):
    """Recorder of what each engine is told and answers, and of what its peer trains, decodes and merges."""

    due: int = -1
    """Round that is being merged."""
    num_blocks: int = 0

    def write(self, peer: int, kind: str, **what: Any) -> None:
        super().write(peer, kind, block=self.num_blocks, **what)

    def put_in(self) -> None:
        self.inner()
        self._gossip()
        self._rounds()
        self._merges()

    def _gossip(self) -> None:
        def init(original: Any, driver: VirtualRunner, peer: LearningPeer) -> None:
            original(driver, peer)
            engine, times = driver.engine, driver.engine._schedule.times
            for thing in (engine, engine._others.back_off, times, *(lane.choice.partners for lane in engine._states)):
                self.is_of(thing, peer.number)

        def receive(original: Any, engine: Any, event: Any, now: float) -> Any:
            last, self.current = self.current, self.of(engine)
            if self.current >= 0:
                self._event(self.current, event)
            found = original(engine, event, now)
            for command in found:
                self._command(self.current, command)
            self.current = last
            return found

        def choose(original: Any, partners: Partners, candidates: Any, **how: Any) -> Any:
            found = original(partners, candidates, **how)
            if found[0] is not None:
                what = {"exclude": sorted(how["exclude"]), "first": sorted(how["first"])}
                self.write(self.of(partners), "choice", **what, reference=how["reference_round"], found=found)
            return found

        def bring(
            original: Any, driver: VirtualRunner, one: Any, num_lives: int, left: int, attempts: int, *args: Any
        ) -> None:
            self.write(driver.peer.number, "transfers", ask=one.pull, left=left, attempts=attempts)
            original(driver, one, num_lives, left, attempts, *args)

        around(VirtualRunner, "__init__", init)
        around(GossipEngine, "receive", receive)
        around(Partners, "choose", choose)
        around(VirtualRunner, "download", bring)

    def _event(self, peer: int, event: Any) -> None:
        self.num_blocks += not isinstance(event, PullTimerFired)
        match event:
            case PartnersChanged(volunteers):
                told = {one.peer: [one.round, one.part, one.part_tokens] for one in volunteers}
                self.news(peer, "others", "others", told)
            case MergesPlanned(round, plans):
                self.write(peer, "begins", round=round, plans=plans)
            case PeerCalled(author):
                self.write(peer, "calls", author=author)
            case PartnerReplied(ask, mark):
                self.write(peer, "replied", ask=ask, mark=mark)
            case PublicationDownloaded(ask, num_bytes):
                self.write(peer, "came", ask=ask, num_bytes=num_bytes)
            case PullFailed(ask, failure):
                self.write(peer, "breaks", ask=ask, reason=failure.reason, mute=failure.kind == "silent")
            case PublicationDecoded(ask, arrival):
                self.write(peer, "decoded", ask=ask, tokens=arrival.tokens)
            case MergeDue(round, fragment):
                self.due = round
                self.write(peer, "due", fragment=fragment, round=round)
            case PullsPaused():
                self.write(peer, "stops")

    def _command(self, peer: int, command: Any) -> None:
        match command:
            case AskPartner(ask, source, author, section, fragment, known):
                self.write(peer, "asks", ask=ask, section=section, author=author, fragment=fragment)
                known = None if known is None else [known.round, known.part]
                self.write(peer, "requests", ask=ask, source=source, known=known)
            case DownloadPublication(ask, source, held):
                self.write(peer, "downloads", ask=ask, source=source, mark=held.version)
            case DecodePublication(ask, _, _, fragment, held, news, earlier):
                what = {"news": news_name(news), "tokens": news.tokens, "has_earlier": earlier is not None}
                self.write(peer, "decodes", ask=ask, fragment=fragment, mark=held.version, what=what)
            case PrepareMerge(_, _, fragment, pulled):
                self.write(peer, "readies", fragment=fragment, pulled=_named(pulled))
            case MergeFragment(fragment, merge, pulled):
                named = None if merge is None else _named(pulled)
                self.write(peer, "merges", fragment=fragment, round=self.due, pulled=named)
            case FetchConsensus():
                self.write(peer, "catches_up", found=True)
            case ReportFailure(author, failure):
                self.write(peer, "incident", author=author, reason=failure.reason)

    def _mine(self, name: str, before: Callable[..., None], after: Callable[..., None] | None = None) -> None:
        """Wrap a method of a peer: call `before(peer, *args)`, and afterwards `after(peer, result, *args)`."""

        def call(original: Any, peer: LearningPeer, *args: Any) -> Any:
            before(peer, *args)
            found = original(peer, *args)
            if after is not None:
                after(peer, found, *args)
            return found

        around(LearningPeer, name, call)

    def _rounds(self) -> None:
        def paces(peer: LearningPeer) -> None:
            world = peer.world
            self.write(
                peer.number,
                "paces",
                round=peer.round,
                knows_speed=peer.knows_speed,
                step_s=peer.step_s,
                ends_s=[other.ends_in_s() for other in world.peers if other is not peer],
                speeds=[1 / other.step_s for other in world.peers],
                live=[other.name for other in world.live],
                bytes_per_s=peer.gossip.engine.bytes_per_s,
            )

        def starts_with(peer: LearningPeer, found: Start) -> None:
            told = {name: value for name, value in dataclasses.asdict(found).items() if not callable(value)}
            # Older recordings do not know smaller batches, and a peer that takes none is as it was.
            if not told["batch_sequences"]:
                del told["batch_sequences"]
            self.write(peer.number, "starts_with", found=told)

        self._mine("_next_start", paces, starts_with)
        self._mine("train_to", lambda peer, moment: None, self._published)

    def _published(self, peer: LearningPeer, _: None, moment: int) -> None:
        newest = [None if lane.newest is None else lane.newest.version for lane in peer.fragments]
        self.write(peer.number, "published", done=moment, found=newest)

    def _merges(self) -> None:
        def accepts(original: Any, peer: LearningPeer, decode: Any) -> Any:
            refused, tokens = "", 0
            try:
                arrival = original(peer, decode)
                tokens = arrival.tokens
                return arrival
            except BadBytesError as error:
                refused = str(error)
                raise
            finally:
                what = {"fragment": decode.fragment, "section": decode.group, "author": decode.author}
                self.write(peer.number, "accepted", **what, mark=decode.held.version, found=[tokens, refused])

        def merged(peer: LearningPeer, _: None, lane: Any, arrivals: Any) -> None:
            state = peer.trainer.state_of(lane.number)
            sums = {"theta_sha256": vector_sha256(state.theta), "momentum_sha256": vector_sha256(state.momentum)}
            self.write(peer.number, "merged", fragment=lane.number, **sums)

        def lives(kind: str) -> Callable[..., None]:
            def call(original: Any, peer: LearningPeer) -> None:
                self.write(peer.number, kind)
                original(peer)

            return call

        def begin_with(original: Any, peer: LearningPeer, taken: Any, rows: Any) -> None:
            sums = {"theta_sha256": vector_sha256(taken.state.theta)}
            sums["momentum_sha256"] = vector_sha256(taken.state.momentum)
            event = taken.event
            self.write(
                peer.number, "took_states", round=event.round, told=event.advertised, rounds=event.rounds, **sums
            )
            original(peer, taken, rows)

        around(LearningPeer, "arrival_untrusted", accepts)
        self._mine("merge", lambda *_: None, merged)
        around(churn, "_go", lives("goes"))
        around(churn, "_come", lives("returns"))
        around(churn, "_begin_with", begin_with)


def _named(pulled: Any) -> list[Any]:
    return [[each.group, each.peer, each.version] for each in pulled]


# ---------------------------------------------------------------- without tensors


def record_systems(name: str, schedule: FaultSchedule | None = None) -> Recording:
    """Play and record one of `SYSTEMS`, or a recorded schedule."""
    schedule = schedule or draw_gossip(random.Random(SYSTEMS[name]))
    lines = _Systems()
    try:
        lines.put_in()
        played = play_gossip(schedule)
    finally:
        recording.take_out()
    assert not played.violations
    how = {"schedule": dataclasses.asdict(schedule), "fingerprint": played.fingerprint}
    return Recording(header_of("systems", name, [{"name": each} for each in lines.names], how), lines.lines)


def recorded_schedule(told: Mapping[str, Any]) -> FaultSchedule:
    """Read a recorded schedule."""
    faults = tuple(ScheduledFault(**each) for each in told["faults"])
    options = tuple((name, value) for name, value in told["options"])
    return FaultSchedule(**{**told, "speeds": tuple(told["speeds"]), "faults": faults, "options": options})


class _Systems(_Lines):
    def __init__(self) -> None:
        super().__init__(clock=Clock())
        self.names: list[str] = []
        self.pulled: Sequence[Any] = ()
        """Inputs of the merge."""

    def put_in(self) -> None:
        self.inner()

        def init(original: Any, peer: GossipPeer, swarm: Any, name: str, *args: Any) -> None:
            self.clock = swarm.clock
            original(peer, swarm, name, *args)
            if name not in self.names:
                self.names.append(name)
            engine = peer.engine
            for thing in (
                engine._schedule.times,
                engine._others.back_off,
                *(lane.choice.partners for lane in engine._states),
            ):
                self.is_of(thing, self.names.index(name))
            self.write(self.names.index(name), "comes", speed=peer.steps_per_s, theta=peer.theta)

        def plan(original: Any, *args: Any) -> Any:
            found = original(*args)
            self.write(self.of(args[4]), "plan", inputs=args[:3], found=found)
            return found

        def choose(original: Any, partners: Partners, candidates: Any, **how: Any) -> Any:
            found = original(partners, candidates, **how)
            what = {"exclude": sorted(how["exclude"]), "first": sorted(how["first"])}
            self.write(self.of(partners), "choice", **what, reference=how["reference_round"], found=found)
            return found

        around(GossipPeer, "__init__", init)
        around(pull_schedule, "plan_pulls", plan)
        around(Partners, "choose", choose)
        for name in ("die", "freeze", "thaw", "leave"):
            self._mine(name, lambda peer, name=name, *_: self._write(peer, name))
        self._mine("resume", lambda peer, saved: self._write(peer, "resumes", round=saved.round, theta=saved.thetas))
        self._mine("_go_on_with", lambda peer, state, author, since_s: self._write(
            peer, "took_state", author=author, round=state.round, theta=state.thetas
        ))  # fmt: skip
        self._mine("_start_round", lambda peer, *all_begin, **how: None, self._round)
        self._mine("_look_around", lambda peer: None, self._others)
        self._mine("_replied", lambda peer, ask, found: self._write(
            peer, "replied", author=ask.author, section=ask.group, found=_told(found)
        ))  # fmt: skip
        self._mine("_came", lambda peer, download, found: self._write(
            peer, "came", author=download.held.peer, section=download.held.group, found=_told(found)
        ))  # fmt: skip
        self._mine("_merge", lambda peer, command: setattr(self, "pulled", command.pulled))
        around(GossipPeer, "_merged", self._merged)

    def _mine(self, name: str, before: Callable[..., None], after: Callable[..., None] | None = None) -> None:
        def call(original: Any, peer: GossipPeer, *args: Any, **how: Any) -> Any:
            before(peer, *args, **how)
            found = original(peer, *args, **how)
            if after is not None:
                after(peer)
            return found

        around(GossipPeer, name, call)

    def _write(self, peer: GossipPeer, kind: str, **what: Any) -> None:
        self.write(self.names.index(peer.name), kind, **what)

    def _round(self, peer: GossipPeer) -> None:
        self._write(peer, "round", round=peer.round, steps=peer._now.steps, shard=peer.shard)

    def _others(self, peer: GossipPeer) -> None:
        pairs = zip(peer._others, peer._ends_s, strict=True)
        told = {info.peer: [*(getattr(info, name) for name in _READ), end_s] for info, end_s in pairs}
        self.news(self.names.index(peer.name), "others", "sampled", told)

    def _merged(self, original: Any, peer: GossipPeer, number: int) -> None:
        fragment, pulled = peer.model.fragments[number], [[one.group, one.peer, one.version] for one in self.pulled]
        what = {"fragment": number, "round": peer.round, "pulled": pulled}
        self._write(peer, "merges", **what, theta=fragment.theta.hex(), momentum=fragment.momentum.hex())
        original(peer, number)


_READ = ("round", "part", "part_tokens", "inner_steps", "inner_steps_done", "steps_per_s", "hidden", "hosts")
"""Fields of a presence that gossip uses."""


def _told(found: Any) -> Any:
    if isinstance(found, SimulatedPublication):
        return found.version if found.is_finite else "no numbers"
    return found.reason if isinstance(found, PullRefusal) else None
