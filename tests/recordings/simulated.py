"""Runs of both simulators, with everything that their peers were told and decided, line by line; the same each time."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recording
from learnt import setting, tiny
from lines import Line, Recording, header_of
from recording import around, plain

from swarmtrain.errors import BadBytesError
from swarmtrain.network.codec import vector_sha256
from swarmtrain.protocol.open_pulls import OpenPull, OpenPulls
from swarmtrain.protocol.partners import BackOff, Mark, Partners
from swarmtrain.protocol.pulls import PullTimes
from swarmtrain.simulate import gossip as systems
from swarmtrain.simulate.clock import Clock
from swarmtrain.simulate.gossip import GossipPeer, Publication
from swarmtrain.simulate.learning import churn
from swarmtrain.simulate.learning import gossip as learning
from swarmtrain.simulate.learning.gossip import Peer, World
from swarmtrain.simulate.learning.hostile import HostileWorld
from swarmtrain.simulate.network import Refused
from swarmtrain.simulate.search.gossip import draw_gossip, play_gossip
from swarmtrain.simulate.search.schedule import Fault, Schedule

__all__ = ["LEARNING", "SYSTEMS", "record_learning", "record_systems", "recorded_schedule"]

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
"""Sections of the scenario, and changes of the run file's keys, over what tests/simulate/learnt.py has."""

SYSTEMS = {"faults": 1942, "hidden-and-liars": 2638}
"""What the schedules are drawn with, as `make search` draws them."""


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else plain(value)


@dataclass
class _Lines:
    """What is written, in the order in which it happens."""

    clock: Clock | None = None
    lines: list[Line] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    """Of which peer an object is, by its id; it lives as long as the run."""
    kept: list[Any] = field(default_factory=list)
    current: int = -1
    """Whose function is running."""
    told: dict[Any, Any] = field(default_factory=dict)

    def write(self, peer: int, kind: str, **what: Any) -> None:
        assert self.clock is not None
        line = {"kind": kind, "peer": peer, "block": self.clock.num_events, "now": self.clock.now, **what}
        self.lines.append(json.loads(json.dumps({"number": len(self.lines), **line}, default=plain)))

    def is_of(self, thing: Any, peer: int) -> None:
        """Whatever is told to `thing`, is of that peer."""
        self.numbers[id(thing)] = peer
        self.kept.append(thing)

    def of(self, thing: Any) -> int:
        """Whose it is; -1 if nobody's that is known."""
        return self.numbers.get(id(thing), -1)

    def news(self, peer: int, kind: str, key: Any, told: Mapping[str, Any], **what: Any) -> None:
        """What has changed of `told` since the last time."""
        before = self.told.get((peer, key), {})
        changed = {name: value for name, value in told.items() if before.get(name) != value}
        gone = [name for name in before if name not in told]
        if changed or gone:
            self.write(peer, kind, **what, known=changed, forgotten=gone)
        self.told[peer, key] = dict(told)

    def inner(self) -> None:
        """What back-off and times were told."""
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
    """One of `LEARNING`, played in `folder`."""
    sections, changes = LEARNING[name]
    one = setting(tiny(folder, **sections), **changes)
    lines = _Learning()
    try:
        lines.put_in()
        world = (HostileWorld if one.hostile.percent else World)(one)
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
    def __init__(self) -> None:
        super().__init__(clock=Clock())
        self.asks: dict[OpenPull, tuple[int, int]] = {}
        self.num_asks = 0

    def put_in(self) -> None:
        self.inner()
        self._rounds()
        self._pulls()
        self._merges()

    def _mine(self, name: str, before: Callable[..., None], after: Callable[..., None] | None = None) -> None:
        """Around a method of a peer: `before(peer, *args)`, and with what it returned `after(peer, found, *args)`."""

        def call(original: Any, peer: Peer, *args: Any) -> Any:
            last, self.current = self.current, peer.number
            try:
                before(peer, *args)
                found = original(peer, *args)
                if after is not None:
                    after(peer, found, *args)
                return found
            finally:
                self.current = last

        around(Peer, name, call)

    def _rounds(self) -> None:
        def init(original: Any, peer: Peer, world: World, number: int) -> None:
            original(peer, world, number)
            self.is_of(peer.times, number)

        def forget(peer: Peer, _: None) -> None:
            self.is_of(peer.back_off, peer.number)

        def paces(peer: Peer) -> None:
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
                bytes_per_s=peer.times.bytes_per_s,
            )

        def plan(original: Any, *args: Any) -> Any:
            found = original(*args)
            num_others, started_s, ends_s, sizes, *_ = args
            self.write(self.current, "plan", inputs=[num_others, started_s, ends_s], sizes=sizes, found=found)
            return found

        around(Peer, "__init__", init)
        self._mine("forget", lambda peer: None, forget)
        self._mine(
            "_next_start", paces, lambda peer, found: self.write(peer.number, "starts_with", found=_sorted(found))
        )
        self._mine("plan_pulls", lambda peer: self.write(peer.number, "plans", done=peer.done))
        around(learning, "plan_pulls", plan)
        self._mine("train_to", lambda peer, moment: None, self._published)
        around(learning, "expected_step_s", self._pure("expected"))
        around(learning, "is_moved", self._pure("moved"))

    def _pure(self, kind: str) -> Callable[..., Any]:
        def call(original: Any, *inputs: Any) -> Any:
            found = original(*inputs)
            self.write(self.current, kind, inputs=inputs, found=found)
            return found

        return call

    def _published(self, peer: Peer, _: None, moment: int) -> None:
        newest = [None if lane.newest is None else lane.newest.mark for lane in peer.lanes]
        self.write(peer.number, "published", done=moment, found=newest)

    def _pulls(self) -> None:
        def fill(peer: Peer, lane: Any, section: str) -> None:
            if lane.plan is not None:
                self.write(peer.number, "looks", fragment=lane.number, section=section)

        def choose(peer: Peer, lane: Any, section: str) -> None:
            told = {}
            for other in peer.world.live:
                if other is not peer:
                    theirs = other.lanes[lane.number]
                    newest = None if theirs.newest is None else theirs.newest.mark
                    told[other.name] = [newest, theirs.round]
            self.news(
                peer.number, "others", lane.number, json.loads(json.dumps(told, default=plain)), fragment=lane.number
            )

        def chosen(original: Any, partners: Partners, section: str, view: Any, now: float, rng: Any) -> Any:
            found = original(partners, section, view, now, rng)
            what = {"section": section, "exclude": sorted(view.exclude), "with_weights": sorted(view.with_weights)}
            self.write(self.current, "choice", **what, found=found)
            return found

        def begin(original: Any, pulls: OpenPulls, section: str, author: str, now: float) -> OpenPull:
            pull: OpenPull = original(pulls, section, author, now)
            self.asks[pull] = self.current, self.num_asks
            self.write(self.current, "asks", ask=self.num_asks, section=section, author=author)
            self.num_asks += 1
            return pull

        def news(peer: Peer, found: bool, lane: Any, section: str, author: str, mark: Mark) -> None:
            what = {"fragment": lane.number, "section": section, "author": author, "mark": mark}
            self.write(peer.number, "news", **what, reference=peer.world.reference_round, found=found)

        self._mine("fill", fill)
        self._mine("choose", choose)
        around(Partners, "next", chosen)
        around(OpenPulls, "begin", begin)
        for name in ("end", "nothing_new", "fail"):
            around(OpenPulls, name, functools.partial(self._ended, name))
        self._mine("is_of_use", lambda *_: None, news)
        self._mine(
            "bring", lambda peer, pull, left, attempts: self._event(pull, "transfers", left=left, attempts=attempts)
        )
        self._mine(
            "break_off", lambda peer, pull, reason, mute=False: self._event(pull, "breaks", reason=reason, mute=mute)
        )
        self._mine("arrive", lambda peer, pull: self._event(pull, "came", mark=pull.published.mark))

    def _event(self, pull: Any, kind: str, **what: Any) -> None:
        peer, ask = self.asks.get(pull.asked, (self.current, -1))
        self.write(peer, kind, ask=ask, **what)

    def _ended(self, name: str, original: Any, pulls: OpenPulls, pull: OpenPull, *args: Any) -> Any:
        """Within `nothing_new` and `fail` it ends too."""
        if (asked := self.asks.pop(pull, None)) is None:
            return original(pulls, pull, *args)
        found = original(pulls, pull, *args)
        self.write(asked[0], "ended", ask=asked[1], how=name, found=found)
        return found

    def _merges(self) -> None:
        def keep(original: Any, peer: Peer, lane: Any, section: str, author: str, published: Any, arrival: Any) -> None:
            refused, tokens = "", 0
            try:
                original(peer, lane, section, author, published, arrival)
                tokens = lane.arrived[section, author][1].tokens
            except BadBytesError as error:
                refused = str(error)
                raise
            finally:
                what = {"fragment": lane.number, "section": section, "author": author, "mark": published.mark}
                self.write(peer.number, "accepted", **what, found=[tokens, refused])

        def merges(peer: Peer, lane: Any, ready: Any) -> None:
            pulled = [[section, author, each[0].mark] for (section, author), each in ready.items()]
            ahead = [peer.ahead_rounds(lane, each[0]) for each in ready.values()]
            what = {"fragment": lane.number, "round": lane.round, "reference": peer.world.reference_round}
            self.write(peer.number, "merges", **what, pulled=pulled, ahead_rounds=ahead)

        def merged(peer: Peer, _: None, lane: Any, ready: Any) -> None:
            state = peer.trainer.state_of(lane.number)
            sums = {"theta_sha256": vector_sha256(state.theta), "momentum_sha256": vector_sha256(state.momentum)}
            self.write(peer.number, "merged", fragment=lane.number, **sums)

        def goes(original: Any, peer: Peer) -> None:
            self.write(peer.number, "goes")
            original(peer)

        def comes(original: Any, peer: Peer) -> None:
            self.write(peer.number, "returns")
            original(peer)

        def begin_with(original: Any, peer: Peer, taken: Any, rows: Any) -> None:
            sums = {"theta_sha256": vector_sha256(taken.state.theta)}
            sums["momentum_sha256"] = vector_sha256(taken.state.momentum)
            self.write(peer.number, "took_states", round=taken.round, places=taken.places, **sums)
            original(peer, taken, rows)

        def catches_up(original: Any, peer: Peer) -> bool:
            found = bool(original(peer))
            self.write(peer.number, "catches_up", found=found)
            return found

        around(Peer, "keep_untrusted", keep)
        self._mine("merge", merges, merged)
        self._mine("end_of_some", lambda peer, moment: self.write(peer.number, "due", done=moment))
        around(churn, "_go", goes)
        around(churn, "_come", comes)
        around(churn, "_begin_with", begin_with)
        around(learning, "catches_up", catches_up)


# ---------------------------------------------------------------- without tensors


def record_systems(name: str, schedule: Schedule | None = None) -> Recording:
    """One of `SYSTEMS`, or a schedule that was recorded, played."""
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


def recorded_schedule(told: Mapping[str, Any]) -> Schedule:
    """As it was recorded."""
    faults = tuple(Fault(**each) for each in told["faults"])
    options = tuple((name, value) for name, value in told["options"])
    return Schedule(**{**told, "speeds": tuple(told["speeds"]), "faults": faults, "options": options})


class _Systems(_Lines):
    def __init__(self) -> None:
        super().__init__(clock=Clock())
        self.names: list[str] = []

    def put_in(self) -> None:
        self.inner()

        def init(original: Any, peer: GossipPeer, swarm: Any, name: str, *args: Any) -> None:
            self.clock = swarm.clock
            original(peer, swarm, name, *args)
            if name not in self.names:
                self.names.append(name)
            for thing in (peer._times, peer.partners.back_off, peer.partners):
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
        around(systems, "plan_pulls", plan)
        around(Partners, "choose", choose)
        for name in ("die", "freeze", "thaw", "leave"):
            self._mine(name, lambda peer, name=name, *_: self._write(peer, name))
        self._mine("resume", lambda peer, saved: self._write(peer, "resumes", round=saved.round, theta=saved.theta))
        self._mine("_adopt", lambda peer, came_s, author, state: self._write(
            peer, "took_state", author=author, round=getattr(state, "round", None), theta=getattr(state, "theta", None)
        ))  # fmt: skip
        self._mine("_start_round", lambda peer: None, self._round)
        self._mine("_look_around", lambda peer: None, self._others)
        self._mine("_pull", self._looks)
        self._mine("_manifest", lambda peer, pull, author, found: self._write(
            peer, "replied", author=author, section=pull.section, found=_told(found)
        ))  # fmt: skip
        self._mine("_body", lambda peer, pull, author, began_s, begun, found: self._write(
            peer, "came", author=author, section=pull.section, found=_told(found)
        ))  # fmt: skip
        around(GossipPeer, "_merge", self._merge)

    def _mine(self, name: str, before: Callable[..., None], after: Callable[..., None] | None = None) -> None:
        def call(original: Any, peer: GossipPeer, *args: Any) -> Any:
            before(peer, *args)
            found = original(peer, *args)
            if after is not None:
                after(peer, *args)
            return found

        around(GossipPeer, name, call)

    def _write(self, peer: GossipPeer, kind: str, **what: Any) -> None:
        self.write(self.names.index(peer.name), kind, **what)

    def _round(self, peer: GossipPeer) -> None:
        now = peer._now
        self._write(peer, "round", round=peer.round, steps=now.steps, every=now.every, shard=peer.shard)

    def _others(self, peer: GossipPeer) -> None:
        pairs = zip(peer._sampled, peer._ends_sampled_s, strict=True)
        told = {one.peer: [*dataclasses.astuple(one)[1:], end_s] for one, end_s in pairs}
        self.news(self.names.index(peer.name), "others", "sampled", told)

    def _looks(self, peer: GossipPeer, r: Any, section: str) -> None:
        if r is peer._now:
            self._write(peer, "looks", section=section)

    def _merge(self, original: Any, peer: GossipPeer, reference_round: int) -> Any:
        pulled = [[one.section, one.peer, one.mark] for one in peer._arrived]
        found = original(peer, reference_round)
        what = {"round": peer.round, "reference": reference_round, "pulled": pulled, "found": found}
        self._write(peer, "merges", **what, theta=peer.theta.hex(), momentum=peer.momentum.hex())
        return found


def _told(found: Any) -> Any:
    if isinstance(found, Publication):
        return found.mark if found.is_finite else "no numbers"
    return found.reason if isinstance(found, Refused) else None
