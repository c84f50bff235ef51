"""What recorded volunteers did, done again by the simulator's peers (`simulate.learning.gossip`): the record says what
happened and when, the simulator decides, trains and merges."""

from __future__ import annotations

import base64
import json
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recording import generator, plain
from torch import Tensor

from swarmtrain.algorithm.gossip import Arrival
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.pacing import first_inner_steps, round_inner_steps, steps_of_everybody
from swarmtrain.algorithm.robust import Incident
from swarmtrain.data.batches import BatchSource
from swarmtrain.data.prepare import PeerPlace, training_batches, training_data
from swarmtrain.errors import BadBytesError
from swarmtrain.network.codec import vector_sha256
from swarmtrain.peer.preparing import initial_seed
from swarmtrain.peer.session import Start
from swarmtrain.protocol.fragments import publishes_every
from swarmtrain.protocol.partners import Candidate, Mark, View, agreed_places
from swarmtrain.protocol.progress import Progress
from swarmtrain.protocol.pulls import (
    BytesBegun,
    PullTimes,
    Section,
    ahead_rounds,
    expected_step_s,
    gradient_format,
    is_moved,
    plan_pulls,
    round_began_s,
    total_bytes,
)
from swarmtrain.run import parse_published_untrusted, run_sha256
from swarmtrain.simulate.learning.gossip import Peer, World
from swarmtrain.simulate.learning.lane import Lane, Published
from swarmtrain.simulate.learning.learner import Learner, Text
from swarmtrain.simulate.learning.setting import Setting

__all__ = ["Replayed", "ReplayedPeer", "replay", "replay_lines", "text_from", "text_of"]

Event = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedText(Text):
    """The data as real peers draw them: each its own, by the run's identity and its PeerID."""

    sha256: str = ""
    peers: tuple[str, ...] = ()

    def batches(self, number: int) -> BatchSource:
        """See `Text`."""
        place = PeerPlace(run_sha256=self.sha256, peer_id=self.peers[number])
        return training_batches(self.run, self.data, place, self.base, self.held_out)


def text_of(run_folder: Path, text_folder: Path, peers: Sequence[str]) -> RecordedText:
    """From the files of the run that a volunteer kept, and the folder that its data are below."""
    published, held_out = (run_folder / "run.toml").read_bytes(), (run_folder / "held-out.txt").read_bytes()
    return text_from(published, held_out, text_folder, peers)


def text_from(published: bytes, held_out: bytes, text_folder: Path, peers: Sequence[str]) -> RecordedText:
    """From the run file as it was published, the held-out text, and the folder that the data are below."""
    sha256 = run_sha256(published)
    run = parse_published_untrusted(published, sha256)
    data = training_data(run, text_folder, held_out, b"", None)
    return RecordedText(run, data, held_out, text_folder, sha256=sha256, peers=tuple(peers))


class ReplayedPeer(Peer):
    """A peer of the simulator to which happens what happened to a real one; each kind of event has a method.

    Whatever the real one decided is decided again, on the same inputs; an assertion fails where that is something else.
    """

    world: Replayed

    def __init__(self, world: Replayed, number: int) -> None:
        super().__init__(world, number)
        self.name = world.names[number]
        self.rng, self.times = generator(self.name), PullTimes()
        self.published: dict[tuple[int, Section, Mark], Published] = {}
        self.new: dict[tuple[int, Section, str], Arrival] = {}
        self.unlearned: deque[tuple[Callable[[Tensor, int], None], Tensor, int]] = deque()
        for lane in self.lanes:
            lane.robustness.learn = partial(self._learns, lane.robustness.learn)  # type: ignore[method-assign]
        self.entered: list[list[Any]] = []
        self.begun: dict[int, float | None] = {}
        self.round_s: tuple[float, float] = 0.0, 0.0
        self.incidents: list[tuple[str, str, str]] = []
        self.num_rounds = self.num_equal = 0

    def _learns(self, learn: Callable[[Tensor, int], None], gradient: Tensor, tokens: int) -> None:
        self.unlearned.append((learn, gradient, tokens))

    def play(self, event: Event) -> None:
        """One event of the record."""
        kind, _, what = event["kind"].partition(".")
        if what:
            self._times(what, event)
        elif kind.startswith("plan of"):
            self._plan(event)
        elif kind in ("busy", "failed", "answered", "called"):
            self._same(event, "back-off", getattr(self.back_off, kind)(*event["args"]))
        elif (does := getattr(self, f"_{kind}", None)) is not None:  # else it is of the network's side
            does(event)

    def _same(self, event: Event, what: str, decided: Any, found: str = "found") -> None:
        told = json.loads(json.dumps(decided, default=plain))
        assert told == event[found], f"{self.name}: {what}: {told} and not {event[found]} in {event}"
        self.world.decisions[what] += 1

    # ------------------------------------------------------------- a round

    def _round(self, event: Event) -> None:
        section, start = self.world.setting.run.merge, Start(**event["start"])
        own, others, others_end_in_s = event["steps_of"]
        steps, round_s = first_inner_steps(section.inner_steps, paced=section.pacing), 0.0
        if own > 0:
            steps = round_inner_steps(
                own,
                others,
                section.inner_steps,
                paced=section.pacing,
                limit_s=section.round_limit_s,
                others_end_in_s=others_end_in_s,
            )
            round_s = steps / own
        everybodys = steps_of_everybody(*event["everybodys_of"])
        every = publishes_every(section.publications_per_round, len(self.lanes), round_s, self.world.layout.size)
        format = gradient_format(self.world.sizes, *event["format_of"][:3], self.world.wanted)
        decided = replace(start, inner_steps=steps, run_steps_a_step=everybodys, every=every, gradient_format=format)
        self.world.formats[format] += 1
        self._same(event, "inner steps", decided, "start")
        assert event["round"] == self.round
        self.enter(start, event["run_tokens"])
        for lane in self.lanes:
            self._has(lane)

    def _has(self, lane: Lane) -> None:
        assert lane.weights is not None
        self.published.setdefault((lane.number, "weights", lane.weights.mark), lane.weights)

    def _restarts(self, event: Event) -> None:
        """It rests: what was trained since each fragment's merge is given up."""
        step_tokens, total_tokens = self.world.setting.run.tokens_per_step, self.world.setting.total_tokens
        for step in range(self.done, event["done"]):
            self.learner.step(self.start.run_tokens(self.run_tokens, step, step_tokens) / total_tokens)
        self.trainer.restart()
        for lane in self.lanes:
            lane.newest = lane.weights = None
            self.published.pop((lane.number, "weights", Mark(self.round, 0, 0)), None)

    def _published(self, event: Event) -> None:
        moments = [moment for moment in self.start.publish_after if moment > self.done]
        self.train_to(moments[0])
        newest = [lane.newest for lane in self.lanes if lane.newest is not None]
        told = [[each.mark.round, each.mark.part, each.mark.tokens] for each in newest]
        self._same(event, "publication", told)
        for lane, each in zip(self.lanes, newest, strict=True):
            self.published[lane.number, "gradient", each.mark] = each

    def _learned(self, event: Event) -> None:
        learn, gradient, tokens = self.unlearned.popleft()
        self._same(event, "learned", tokens)
        learn(gradient, tokens)

    def _asked_for(self, event: Event) -> None:
        mark, lane = Mark(**event["mark"]), self._lane_of(event)
        section: Section = "gradient" if mark.part else "weights"
        self.serve(lane, section, self.published[lane.number, section, mark])

    def _lane_of(self, event: Event) -> Lane:
        return self.lanes[event["fragment"]]

    # ------------------------------------------------------------- pulls

    def _times(self, what: str, event: Event) -> None:
        args = [BytesBegun(**arg) if isinstance(arg, dict) else arg for arg in event["args"]]
        self._same(event, "pulls' times", getattr(self.times, what)(*args))

    def _plan(self, event: Event) -> None:
        num_others, started_s, ends_s = event["inputs"]
        sizes = total_bytes(self.lanes[fragment].sizes[event["format"]] for fragment in event["fragments"])
        wanted = self.world.wanted
        self._same(event, "plan of pulls", plan_pulls(num_others, started_s, ends_s, sizes, self.times, wanted))

    def _expected(self, event: Event) -> None:
        last_round_s, passed_s, done = event["inputs"]
        assert done == self.done
        self._same(event, "a step's time", expected_step_s(last_round_s, passed_s, done))

    def _moved(self, event: Event) -> None:
        self._same(event, "merges at other times", is_moved(*event["inputs"]))

    def _began(self, event: Event) -> None:
        self._same(event, "when another began", round_began_s(*event["args"]))

    def _choice(self, event: Event) -> None:
        seen = event["view"]
        view = View(**{**seen, "candidates": [Candidate(**each) for each in seen["candidates"]]})
        partners = self._lane_of(event).partners
        self._same(event, "partner", partners.next(event["section"], view, event["now"], self.rng))

    def _news(self, event: Event) -> None:
        self.world.reference = event["reference"]
        section, author, mark = event["section"], event["author"], Mark(**event["mark"])
        lane, found = self._lane_of(event), list[Any]([None, 0])
        if self.is_of_use(lane, section, author, mark):
            found = ["Whole", 0]
            if section == "gradient":
                news = lane.ledger.news(author, mark, self.world.reference_round)
                found = [type(news).__name__, news.tokens]
        self._same(event, "news", found)
        if event["is_here"] and found[0]:
            published = self.world.published(lane.number, section, author, mark)
            arrival = self.new_untrusted(lane, section, author, published)
            assert arrival is not None
            self.new[lane.number, section, author] = arrival

    def _accepted(self, event: Event) -> None:
        section, author, mark, lane = event["section"], event["author"], Mark(**event["mark"]), self._lane_of(event)
        published, told = self.world.published(lane.number, section, author, mark), list[Incident]()
        self.world.told_now = told
        try:
            self.keep_untrusted(lane, section, author, published, self.new.pop((lane.number, section, author)))
            decided = [lane.arrived[section, author][1].tokens, ""]
        except BadBytesError as error:
            decided = [0, str(error)]
        if not self.world.is_to_the_bit and bool(decided[1]) == bool(event["found"][1]):
            decided = event["found"]  # what counts less than it says, and the rule's words, are of what is computed
        self._same(event, "rule", decided)
        self.incidents += [(author, each.rule, each.detail) for each in told]

    # ------------------------------------------------------------- the merge

    def _taken(self, event: Event) -> None:
        pulled, ready = event["pulled"], dict[tuple[Section, str], tuple[Published, Arrival]]()
        lane, is_last = self._lane_of(event), event["fragment"] == len(self.lanes) - 1
        if event["reference"] is not None:
            self.world.reference = event["reference"]
            here = self.ready(lane)
            ready = {(section, author): here[section, author] for section, author, *_ in pulled}
            assert [each.mark for each, _ in ready.values()] == [Mark(**mark) for _, _, mark, _ in pulled]
            self.begun = {id(ready[section, author][0]): began_s for section, author, _, began_s in pulled}
            self.round_s = event["of_s"] or (0.0, 0.0)
        tokens = dict[str, float]()
        for (_, author), (_, arrival) in ready.items():
            tokens[author] = tokens.get(author, 0) + arrival.tokens
        self.entered = [list(each) for each in tokens.items()]
        assert self.done == self.start.merge_after[lane.number]
        if event.get("is_replaced"):  # by the others' weights: what was taken counts as merged all the same
            for (section, author), (published, _) in ready.items():
                if section == "weights":
                    lane.ledger.weights_merged(author, published.mark.round)
                else:
                    lane.ledger.merged(author, published.mark, self.world.reference_round)
            return
        self.merge(lane, ready)
        if not is_last:
            lane.begins(self.round + 1, self.trainer.state_of(lane.number).theta, self.world.clock.now)
            self._has(lane)

    def ahead_rounds(self, lane: Lane, published: Published) -> float:
        """See `Peer`: as far as the real one knew."""
        return ahead_rounds(self.begun[id(published)], *self.round_s)

    def _merged(self, event: Event) -> None:
        entered, recorded = self.entered, event["found"]
        if not self.world.is_to_the_bit and [author for author, _ in entered] == [author for author, _ in recorded]:
            entered = recorded
        self._same(event, "merge", entered)
        self.num_rounds += 1
        state = self.trainer.state
        is_equal = vector_sha256(state.theta) == event["theta_sha256"]
        if "momentum_sha256" in event:
            is_equal &= vector_sha256(state.momentum) == event["momentum_sha256"]
        self.num_equal += is_equal

    # ------------------------------------------------------------- others' weights

    def _forgets(self, event: Event) -> None:
        for lane in self.lanes:
            lane.arrived = {}

    def _took_states(self, event: Event) -> None:
        self._forgets(event)
        rounds, told = dict(event["heard"]), event["told"]
        for peer, round in event["rounds"].items():
            rounds[peer] = max(round, rounds.get(peer, 0))
        for lane in self.lanes:
            of_lane = [{peer: (at[0], at[1]) for peer, at in each[lane.number].items()} for each in told]
            lane.ledger.bring(agreed_places(of_lane, rounds, event["round"], lane.ledger.max_staleness_rounds))
            lane.robustness.comes_back()

    def _adopted(self, event: Event) -> None:
        self.learner.comes_late()
        self.trainer.state = OuterState(_vector(event["theta"]), _vector(event["momentum"]))
        self.trainer.progress = Progress(round=event["round"], run_tokens=event["run_tokens"])
        for lane in self.lanes:
            lane.newest = lane.weights = None


def _vector(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class RecordedSetting(Setting):
    """Each begins with the weights that the real one began with."""

    text: RecordedText

    def learner(self, number: int) -> Learner:
        """See `Setting`."""
        return Learner(self.text, number, initial_seed(self.run, self.text.peers[number]))


@dataclass
class Replayed(World):
    """The simulator's peers under the names of real ones, and as far as each of those knew."""

    names: tuple[str, ...] = ()
    is_to_the_bit: bool = True
    """Whether what is computed here is what was computed there; else it is nearly that."""
    reference: int = 0
    """What the peer in question believes the median round to be."""
    decisions: Counter[str] = field(default_factory=Counter)
    """How many of each kind were the same."""
    formats: Counter[str] = field(default_factory=Counter)
    """Of pseudo-gradients: in so many rounds."""
    told_now: list[Incident] = field(default_factory=list)

    def peer(self, number: int) -> Peer:
        """See `World`."""
        return ReplayedPeer(self, number)

    @property
    def reference_round(self) -> int:
        """See `World`."""
        return self.reference

    def told(self, peer: str, incident: Incident) -> None:
        """See `World`."""
        self.told_now.append(incident)

    def published(self, fragment: int, section: Section, author: str, mark: Mark) -> Published:
        """What that peer has published."""
        peer = self.by_name[author]
        assert isinstance(peer, ReplayedPeer)
        return peer.published[fragment, section, mark]


def replay(text: RecordedText, records: Sequence[Path]) -> Replayed:
    """The records of the peers of `text`, in the same order, replayed."""
    return replay_lines(
        text,
        [
            {"peer": number, **json.loads(line)}
            for number, path in enumerate(records)
            for line in path.read_text(encoding="utf-8").splitlines()
        ],
    )


def replay_lines(text: RecordedText, lines: Sequence[Event], *, is_to_the_bit: bool = True) -> Replayed:
    """The same of their lines, each with the number of its peer."""
    setting = RecordedSetting(text=text, step_s=(1.0,) * len(text.peers))
    world = Replayed(setting, names=text.peers, is_to_the_bit=is_to_the_bit)
    ordered = sorted(lines, key=lambda line: (line["at_s"], line["peer"]))
    replaced = _replaced(ordered)
    for event in ordered:
        peer = world.peers[event["peer"]]
        assert isinstance(peer, ReplayedPeer)
        peer.play({**event, "is_replaced": True} if id(event) in replaced else event)
    return world


def _replaced(lines: Sequence[Event]) -> set[int]:
    """The ends of rounds after which others' weights came in place of a merge."""
    taken, found = dict[int, Event](), set[int]()
    for line in lines:
        if line["kind"] == "taken":
            taken[line["peer"]] = line
        elif line["kind"] == "merged":
            taken.pop(line["peer"], None)
        elif line["kind"] == "adopted" and line["peer"] in taken:
            found.add(id(taken.pop(line["peer"])))
    return found
