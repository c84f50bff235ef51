"""Replay of recorded volunteers by the simulator's peers (`simulate.learning.gossip`).

The record says what happened, when, and what gossip decided; the simulator trains, publishes, decodes and merges.
"""

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
from swarmtrain.data.mixture import PeerPlace
from swarmtrain.data.prepare import training_batches, training_data
from swarmtrain.errors import BadBytesError
from swarmtrain.network.codec import vector_sha256
from swarmtrain.peer.lifecycle.preparation import initial_seed
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.gossip.fragments import publishes_every
from swarmtrain.protocol.gossip.messages import DecodePublication
from swarmtrain.protocol.gossip.partners import Delta, Full, News, PublicationVersion
from swarmtrain.protocol.gossip.pulls import GroupName, ahead_rounds
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import parse_published_untrusted, run_sha256
from swarmtrain.simulate.learning.fragment import LearningFragment, Published
from swarmtrain.simulate.learning.gossip import LearningPeer, LearningWorld
from swarmtrain.simulate.learning.learner import Learner, Text
from swarmtrain.simulate.learning.setting import Setting

Event = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedText(Text):
    """Data as real peers draw them, by the run's identity and the PeerID."""

    sha256: str = ""
    peers: tuple[str, ...] = ()

    def batches(self, number: int) -> BatchSource:
        """See `Text`."""
        place = PeerPlace(run_sha256=self.sha256, peer_id=self.peers[number])
        return training_batches(self.run, self.data, place)


def text_of(run_folder: Path, text_folder: Path, peers: Sequence[str]) -> RecordedText:
    """Make the text from the run's files in a volunteer's folder, and the folder of its data."""
    published, held_out = (run_folder / "run.toml").read_bytes(), (run_folder / "held-out.txt").read_bytes()
    return text_from(published, held_out, text_folder, peers)


def text_from(published: bytes, held_out: bytes, text_folder: Path, peers: Sequence[str]) -> RecordedText:
    """Make the text from the published run file, the held-out text, and the folder of the data."""
    sha256 = run_sha256(published)
    run = parse_published_untrusted(published, sha256)
    data = training_data(run, text_folder, held_out, b"", None)
    return RecordedText(run, data, held_out, sha256=sha256, peers=tuple(peers))


class ReplayedPeer(LearningPeer):
    """Peer of the simulator that replays a real one's events, with one method per kind of event.

    It trains, publishes, decodes, clips and merges as the real one did; an assertion fails if a result differs.
    Gossip's decisions are taken from the record: `tests/recordings/drive.py` checks those.
    """

    world: Replayed

    def __init__(self, world: Replayed, number: int) -> None:
        super().__init__(world, number)
        self.name = world.names[number]
        self.published: dict[tuple[int, GroupName, PublicationVersion], Published] = {}
        self.new: dict[tuple[int, GroupName, str], News] = {}
        self.here: dict[tuple[int, GroupName, str], tuple[Published, PartnerUpdate]] = {}
        self.before: dict[tuple[int, str], Published] = {}
        """Gradients of each fragment that were merged last, by author."""
        self.unlearned: deque[tuple[Callable[[Tensor, int], None], Tensor, int]] = deque()
        for fragment in self.fragments:
            fragment.robustness.learn = partial(self._learns, fragment.robustness.learn)  # type: ignore[method-assign]
        self.entered: list[list[Any]] = []
        self.incidents: list[tuple[str, str, str]] = []
        self.num_rounds = self.num_equal = 0

    def _learns(self, learn: Callable[[Tensor, int], None], gradient: Tensor, tokens: int) -> None:
        self.unlearned.append((learn, gradient, tokens))

    def play(self, event: Event) -> None:
        """Play one event of the record."""
        if (does := getattr(self, f"_on_{event['kind']}", None)) is not None:  # other kinds are gossip's
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
        every = publishes_every(section.publications_per_round, len(self.fragments), round_s, self.world.layout.size)
        decided = replace(start, inner_steps=steps, run_steps_a_step=everybodys, every=every)
        self.world.formats[start.gradient_format] += 1
        # As read from the record, so that a field that `Start` has got since then has its default on both sides.
        self._same({**event, "start": json.loads(json.dumps(start, default=plain))}, "inner steps", decided, "start")
        assert event["round"] == self.round
        self.enter(start, event["run_tokens"])
        for fragment in self.fragments:
            self._has(fragment)

    def _has(self, fragment: LearningFragment) -> None:
        assert fragment.weights is not None
        self.published.setdefault((fragment.number, "weights", fragment.weights.version), fragment.weights)

    def _on_restarts(self, event: Event) -> None:
        """Pause: drop what was trained since each fragment's merge."""
        step_tokens, total_tokens = self.world.setting.run.tokens_per_step, self.world.setting.total_tokens
        for step in range(self.done, event["done"]):
            self.learner.step(self.start.run_tokens(self.run_tokens, step, step_tokens) / total_tokens)
        self.trainer.restart()
        for fragment in self.fragments:
            fragment.newest = fragment.weights = None
            self.published.pop((fragment.number, "weights", PublicationVersion(self.round, 0, 0)), None)

    def _on_published(self, event: Event) -> None:
        moments = [moment for moment in self.start.publish_after if moment > self.done]
        self.train_to(moments[0])
        newest = [fragment.newest for fragment in self.fragments if fragment.newest is not None]
        told = [[each.version.round, each.version.part, each.version.tokens] for each in newest]
        self._same(event, "publication", told)
        for fragment, each in zip(self.fragments, newest, strict=True):
            self.published[fragment.number, "gradient", each.version] = each

    def _on_learned(self, event: Event) -> None:
        learn, gradient, tokens = self.unlearned.popleft()
        self._same(event, "learned", tokens)
        learn(gradient, tokens)

    def _on_asked_for(self, event: Event) -> None:
        mark, fragment = PublicationVersion(**event["mark"]), self._fragment_of(event)
        section: GroupName = "gradient" if mark.part else "weights"
        self.serve(fragment, section, self.published[fragment.number, section, mark])

    def _fragment_of(self, event: Event) -> LearningFragment:
        return self.fragments[event["fragment"]]

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
            decided = event["found"]  # reduced weights and the rule's words depend on computed values
        self._same(event, "rule", decided)
        self.incidents += [(author, each.rule, each.detail) for each in told]

    # ------------------------------------------------------------- the merge

    def _on_taken(self, event: Event) -> None:
        fragment, is_last = self._fragment_of(event), event["fragment"] == len(self.fragments) - 1
        arrivals, tokens = list[PartnerUpdate](), dict[str, float]()
        for section, author, mark, began_s in event["pulled"]:
            published, arrival = self.here.pop((fragment.number, section, author))
            assert published.version == PublicationVersion(**mark)
            ahead = ahead_rounds(began_s, *(event["of_s"] or (0.0, 0.0)))
            arrivals.append(replace(arrival, ahead_rounds=ahead))
            tokens[author] = tokens.get(author, 0) + arrival.tokens
            if section == "gradient":
                self.before[fragment.number, author] = published
        self.entered = [list(each) for each in tokens.items()]
        assert self.done == self.start.merge_after[fragment.number]
        if event.get("is_replaced"):  # replaced by others' weights: what was taken counts as merged anyway
            return
        self.merge(fragment, arrivals)
        if not is_last:
            self.begins(fragment, self.round + 1)
            self._has(fragment)

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
        for fragment in self.fragments:
            fragment.robustness.comes_back()

    def _on_adopted(self, event: Event) -> None:
        self.learner.comes_late()
        self.trainer.state = OuterState(_vector(event["theta"]), _vector(event["momentum"]))
        self.trainer.progress = Progress(round=event["round"], run_tokens=event["run_tokens"])
        for fragment in self.fragments:
            fragment.newest = fragment.weights = None


def _vector(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class RecordedSetting(Setting):
    """Setting in which each peer starts with the real one's initial weights."""

    text: RecordedText

    def learner(self, number: int) -> Learner:
        """See `Setting`."""
        return Learner(self.text, number, initial_seed(self.run, self.text.peers[number]))


@dataclass
class Replayed(LearningWorld):
    """World of the simulator's peers under the names of real ones, with what each of those knew."""

    names: tuple[str, ...] = ()
    is_to_the_bit: bool = True
    """True if results must be bitwise equal to the recorded ones; else nearly equal."""
    decisions: Counter[str] = field(default_factory=Counter)
    """Counts of equal decisions, by kind."""
    formats: Counter[str] = field(default_factory=Counter)
    """Counts of rounds, by format of their pseudo-gradients."""
    told_now: list[ClipIncident] = field(default_factory=list)

    def peer(self, number: int) -> LearningPeer:
        """See `LearningWorld`."""
        return ReplayedPeer(self, number)

    def told(self, peer: str, incident: ClipIncident) -> None:
        """See `LearningWorld`."""
        self.told_now.append(incident)

    def published(self, fragment: int, section: GroupName, author: str, mark: PublicationVersion) -> Published:
        """Return what that peer has published."""
        peer = self.by_name[author]
        assert isinstance(peer, ReplayedPeer)
        return peer.published[fragment, section, mark]


def replay(text: RecordedText, records: Sequence[Path]) -> Replayed:
    """Replay the records of the peers of `text`, given in the same order."""
    return replay_lines(
        text,
        [
            {"peer": number, **json.loads(line)}
            for number, path in enumerate(records)
            for line in path.read_text(encoding="utf-8").splitlines()
        ],
    )


def replay_lines(text: RecordedText, lines: Sequence[Event], *, is_to_the_bit: bool = True) -> Replayed:
    """Replay lines of the records, each with the number of its peer."""
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
    """Return the ends of rounds after which others' weights replaced a merge."""
    taken, found = dict[int, Event](), set[int]()
    for line in lines:
        if line["kind"] == "taken":
            taken[line["peer"]] = line
        elif line["kind"] == "merged":
            taken.pop(line["peer"], None)
        elif line["kind"] == "adopted" and line["peer"] in taken:
            found.add(id(taken.pop(line["peer"])))
    return found
