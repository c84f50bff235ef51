"""What recorded volunteers did, done again by the simulator's peers (`simulate.learning.gossip`): the record says what
happened, when, and what gossip decided; the simulator trains, publishes, decodes and merges."""

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
from recording import plain
from torch import Tensor

from swarmtrain.algorithm.gossip import PartnerUpdate
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.pacing import first_inner_steps, round_inner_steps, steps_of_everybody
from swarmtrain.algorithm.robust import ClipIncident
from swarmtrain.data.batches import BatchSource
from swarmtrain.data.prepare import PeerPlace, training_batches, training_data
from swarmtrain.errors import BadBytesError
from swarmtrain.network.codec import vector_sha256
from swarmtrain.peer.lifecycle.preparation import initial_seed
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.gossip.fragments import publishes_every
from swarmtrain.protocol.gossip.messages import DecodePublication
from swarmtrain.protocol.gossip.partners import Delta, Full, News, PublicationVersion
from swarmtrain.protocol.gossip.pulls import Section, ahead_rounds
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import parse_published_untrusted, run_sha256
from swarmtrain.simulate.learning.fragment import LearningFragment, Published
from swarmtrain.simulate.learning.gossip import LearningPeer, LearningWorld
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


class ReplayedPeer(LearningPeer):
    """A peer of the simulator to which happens what happened to a real one; each kind of event has a method.

    It trains, publishes, decodes, cuts and merges as the real one did; an assertion fails where what comes of that is
    something else. What gossip decided is what was recorded: `tests/recordings/drive.py` decides that again.
    """

    world: Replayed

    def __init__(self, world: Replayed, number: int) -> None:
        super().__init__(world, number)
        self.name = world.names[number]
        self.published: dict[tuple[int, Section, PublicationVersion], Published] = {}
        self.new: dict[tuple[int, Section, str], News] = {}
        self.here: dict[tuple[int, Section, str], tuple[Published, PartnerUpdate]] = {}
        self.before: dict[tuple[int, str], Published] = {}
        """Whose gradients of each fragment were merged last."""
        self.unlearned: deque[tuple[Callable[[Tensor, int], None], Tensor, int]] = deque()
        for lane in self.lanes:
            lane.robustness.learn = partial(self._learns, lane.robustness.learn)  # type: ignore[method-assign]
        self.entered: list[list[Any]] = []
        self.incidents: list[tuple[str, str, str]] = []
        self.num_rounds = self.num_equal = 0

    def _learns(self, learn: Callable[[Tensor, int], None], gradient: Tensor, tokens: int) -> None:
        self.unlearned.append((learn, gradient, tokens))

    def play(self, event: Event) -> None:
        """One event of the record."""
        if (does := getattr(self, f"_on_{event['kind']}", None)) is not None:  # else it is gossip's
            does(event)

    def _same(self, event: Event, what: str, decided: Any, found: str = "found") -> None:
        told = json.loads(json.dumps(decided, default=plain))
        assert told == event[found], f"{self.name}: {what}: {told} and not {event[found]} in {event}"
        self.world.decisions[what] += 1

    # ------------------------------------------------------------- a round

    def _on_round(self, event: Event) -> None:
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
        decided = replace(start, inner_steps=steps, run_steps_a_step=everybodys, every=every)
        self.world.formats[start.gradient_format] += 1
        self._same(event, "inner steps", decided, "start")
        assert event["round"] == self.round
        self.enter(start, event["run_tokens"])
        for lane in self.lanes:
            self._has(lane)

    def _has(self, lane: LearningFragment) -> None:
        assert lane.weights is not None
        self.published.setdefault((lane.number, "weights", lane.weights.version), lane.weights)

    def _on_restarts(self, event: Event) -> None:
        """It rests: what was trained since each fragment's merge is given up."""
        step_tokens, total_tokens = self.world.setting.run.tokens_per_step, self.world.setting.total_tokens
        for step in range(self.done, event["done"]):
            self.learner.step(self.start.run_tokens(self.run_tokens, step, step_tokens) / total_tokens)
        self.trainer.restart()
        for lane in self.lanes:
            lane.newest = lane.weights = None
            self.published.pop((lane.number, "weights", PublicationVersion(self.round, 0, 0)), None)

    def _on_published(self, event: Event) -> None:
        moments = [moment for moment in self.start.publish_after if moment > self.done]
        self.train_to(moments[0])
        newest = [lane.newest for lane in self.lanes if lane.newest is not None]
        told = [[each.version.round, each.version.part, each.version.tokens] for each in newest]
        self._same(event, "publication", told)
        for lane, each in zip(self.lanes, newest, strict=True):
            self.published[lane.number, "gradient", each.version] = each

    def _on_learned(self, event: Event) -> None:
        learn, gradient, tokens = self.unlearned.popleft()
        self._same(event, "learned", tokens)
        learn(gradient, tokens)

    def _on_asked_for(self, event: Event) -> None:
        mark, lane = PublicationVersion(**event["mark"]), self._lane_of(event)
        section: Section = "gradient" if mark.part else "weights"
        self.serve(lane, section, self.published[lane.number, section, mark])

    def _lane_of(self, event: Event) -> LearningFragment:
        return self.lanes[event["fragment"]]

    # ------------------------------------------------------------- what was pulled

    def _on_news(self, event: Event) -> None:
        kind, tokens = event["found"]
        if event["is_here"] and kind:
            mark, which = PublicationVersion(**event["mark"]), (event["fragment"], event["section"], event["author"])
            self.new[which] = Delta(mark, tokens, "") if kind in ("Delta", "Difference") else Full(tokens, "")

    def _on_accepted(self, event: Event) -> None:
        section, author, mark, fragment = (
            event["section"],
            event["author"],
            PublicationVersion(**event["mark"]),
            event["fragment"],
        )
        published, told = self.world.published(fragment, section, author, mark), list[ClipIncident]()
        news, self.world.told_now = self.new.pop((fragment, section, author)), told
        earlier = self.before[fragment, author] if isinstance(news, Delta) else None
        try:
            arrival = self.arrival_untrusted(DecodePublication(0, author, section, fragment, published, news, earlier))
            self.here[fragment, section, author] = published, arrival
            decided = [arrival.tokens, ""]
        except BadBytesError as error:
            decided = [0, str(error)]
        if not self.world.is_to_the_bit and bool(decided[1]) == bool(event["found"][1]):
            decided = event["found"]  # what counts less than it says, and the rule's words, are of what is computed
        self._same(event, "rule", decided)
        self.incidents += [(author, each.rule, each.detail) for each in told]

    # ------------------------------------------------------------- the merge

    def _on_taken(self, event: Event) -> None:
        lane, is_last = self._lane_of(event), event["fragment"] == len(self.lanes) - 1
        arrivals, tokens = list[PartnerUpdate](), dict[str, float]()
        for section, author, mark, began_s in event["pulled"]:
            published, arrival = self.here.pop((lane.number, section, author))
            assert published.version == PublicationVersion(**mark)
            ahead = ahead_rounds(began_s, *(event["of_s"] or (0.0, 0.0)))
            arrivals.append(replace(arrival, ahead_rounds=ahead))
            tokens[author] = tokens.get(author, 0) + arrival.tokens
            if section == "gradient":
                self.before[lane.number, author] = published
        self.entered = [list(each) for each in tokens.items()]
        assert self.done == self.start.merge_after[lane.number]
        if event.get("is_replaced"):  # by the others' weights: what was taken counts as merged all the same
            return
        self.merge(lane, arrivals)
        if not is_last:
            self.begins(lane, self.round + 1)
            self._has(lane)

    def _on_merged(self, event: Event) -> None:
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

    def _on_took_states(self, _: Event) -> None:
        for lane in self.lanes:
            lane.robustness.comes_back()

    def _on_adopted(self, event: Event) -> None:
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
class Replayed(LearningWorld):
    """The simulator's peers under the names of real ones, and as far as each of those knew."""

    names: tuple[str, ...] = ()
    is_to_the_bit: bool = True
    """Whether what is computed here is what was computed there; else it is nearly that."""
    decisions: Counter[str] = field(default_factory=Counter)
    """How many of each kind were the same."""
    formats: Counter[str] = field(default_factory=Counter)
    """Of pseudo-gradients: in so many rounds."""
    told_now: list[ClipIncident] = field(default_factory=list)

    def peer(self, number: int) -> LearningPeer:
        """See `LearningWorld`."""
        return ReplayedPeer(self, number)

    def told(self, peer: str, incident: ClipIncident) -> None:
        """See `LearningWorld`."""
        self.told_now.append(incident)

    def published(self, fragment: int, section: Section, author: str, mark: PublicationVersion) -> Published:
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
