"""Drive the gossip engine with a real peer's recorded events only, and compare its decisions line by line.

When the runs were recorded, starting a pull, preparing a merge and ending a pull happened one callback after their
cause, at `starts`, `prepares` and `settled`. `_Deferred` waits for these too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import recording
from lines import Line, Recording, news_name

from swarmtrain import errors
from swarmtrain.compatibility import PROTOCOL
from swarmtrain.model.gpt import build_model
from swarmtrain.network.codec import tensor_specs
from swarmtrain.peer.merging.gossip_exchange import codecs_of, gossip_settings
from swarmtrain.protocol.gossip import started_pulls
from swarmtrain.protocol.gossip.engine import GossipEngine
from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.merged import MergedPublications
from swarmtrain.protocol.gossip.messages import (
    AdvertisedProgress,
    AskPartner,
    CancelPull,
    ConsensusTaken,
    DecodePublication,
    DownloadPublication,
    FindRoute,
    LinkRateAssumed,
    MergeDue,
    MergeFragment,
    MergePrepared,
    MergesPlanned,
    PartnerBackedOff,
    PartnerReplied,
    PartnersChanged,
    PeerCalled,
    PrepareMerge,
    PublicationDecoded,
    PublicationDownloaded,
    PullFailed,
    PullFailure,
    PullsPaused,
    PullTimerFired,
    ReportFailure,
    RouteFound,
)
from swarmtrain.protocol.gossip.open_pulls import OpenPull, OpenPulls
from swarmtrain.protocol.gossip.partners import BackOff, Partners, PublicationVersion
from swarmtrain.protocol.gossip.peers import PartnerChoice
from swarmtrain.protocol.gossip.pulls import PullTimes
from swarmtrain.protocol.gossip.started_pulls import GossipPulls
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.run import parse_published_untrusted, run_sha256

_COMPARED = (
    "asks", "began", "busy", "called", "answered", "failed", "choice", "decodes", "downloads", "ended", "host_failed",
    "incident", "merges", "news", "places", "publishes_as", "readies", "requests", "rows", "times.assume",
    "times.bytes_begin", "times.bytes_end", "times.merged", "times.round_ended",
)  # fmt: skip
_NOT_COMPARED = ("at_s", "number", "block", "peer")


_TOLD = (
    "training", "is_bootstrap", "round", "part", "part_tokens", "inner_steps", "inner_steps_done", "steps_per_s",
    "run_tokens", "hidden",
)  # fmt: skip
"""What was recorded of a presence."""


@dataclass(frozen=True)
class Difference:
    """Decisions on a block of events that differ from the recorded ones."""

    block: int
    found: Sequence[Line]
    recorded: Sequence[Line]

    def __str__(self) -> str:
        for found, recorded in itertools.zip_longest(self.found, self.recorded):
            if found != recorded:
                return f"block {self.block}: found\n  {found}\nand recorded was\n  {recorded}"
        return "none"


def drive(recorded: Recording, peer: int) -> Iterator[tuple[int, Difference | None]]:
    """Yield for each block of that peer's record the number of equal decisions, or the difference."""
    driver = _Driver(recorded, peer)
    try:
        driver.put_in()
        yield from driver.play()
    finally:
        recording.take_out()


@dataclass
class _Others:
    """Known facts of the other peers."""

    known: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def tell(self, line: Line) -> None:
        """Apply a change."""
        self.known |= line["known"]
        for peer in line["forgotten"]:
            del self.known[peer]

    def volunteers(self) -> list[PeerInfo]:
        """List the peers that are present and train."""
        found = []
        for peer, told in sorted(self.known.items()):
            if told["is_live"] and told["training"] and not told["is_bootstrap"]:
                fields = {name: told[name] for name in _TOLD} | {"hosts": tuple(told["hosts"])}
                found.append(PeerInfo(peer=peer, **fields))
        return found

    def told(self, peer: str) -> AdvertisedProgress | None:
        """Return the progress that a peer reports."""
        if (told := self.known.get(peer)) is None:
            return None
        names = ("round", "inner_steps", "inner_steps_done", "steps_per_s")
        return AdvertisedProgress(*(told[name] for name in names), since_s=told["so_far_since_s"])


class _Deferred(GossipEngine[Any, Any, Any]):
    """Engine that prepares and settles when the recorded peer did."""

    now = 0.0
    is_prepared = False
    """True just after a merge, whose consequences follow at once."""

    def _prepare_more(self, now: float) -> None:
        if self.is_prepared:
            super()._prepare_more(now)

    def prepares(self, now: float) -> list[Any]:
        """Return what is prepared by now."""
        self.is_prepared = True
        self._prepare_more(now)
        self.is_prepared = False
        return self._commands.take()

    def _prepared(self, number: int, merge: Any, now: float) -> None:
        self.is_prepared = True
        super()._prepared(number, merge, now)
        self.is_prepared = False

    def _end_prepared(self, pull: Any, now: float) -> None:
        """Later."""

    def settles(self, number: int, now: float) -> None:
        """Settle the pull of that number."""
        if (pull := self._pulls.by_number.get(number)) is not None:
            super()._end_prepared(pull, now)


def run_bytes(recorded: str) -> bytes:
    """Return a recorded run file as it would be published now: when it was, no run stated its protocol."""
    return recorded.replace("[published]\n", f"[published]\nprotocol = {PROTOCOL}\n").encode()


class _Driver:
    def __init__(self, recorded: Recording, peer: int) -> None:
        header = recorded.header
        self.me = header.peers[peer]["id"]
        self.blocks = [
            (block, list(lines)) for block, lines in itertools.groupby(recorded.of(peer), lambda line: line["block"])
        ]
        self.others, self.written = _Others(), list[Line]()
        published = run_bytes(header.how["run_toml"])
        sha256 = run_sha256(published)
        run = parse_published_untrusted(published, sha256)
        specs = tensor_specs(build_model(run.model, 0).named_parameters())
        swarm: Any = SimpleNamespace(published=SimpleNamespace(run=run), specs=specs)
        settings = gossip_settings(swarm, codecs_of(swarm))
        self.engine = _Deferred(self.me, settings, recording.generator(self.me))
        self.asks: dict[int, int] = {}
        """Map a pull's number to its number in the record."""
        self.pulls: dict[int, int] = {}
        self.of: dict[OpenPull, int] = {}
        self.source: dict[int, tuple[str, str]] = {}
        """Map a pull to the peer asked last and the author."""
        self.asked: dict[int, AskPartner] = {}
        """Requests not yet written."""
        self.preparing: dict[int, int] = {}
        """Map a fragment to the number of its prepared merge."""
        self.wake_s: float | None = None
        """Time at which the engine wanted to wake."""

    # ------------------------------------------------------------- what is written

    def put_in(self) -> None:
        """Hook into the engine to write its inner decisions."""
        around, engine = recording.around, self.engine

        def choose(original: Any, choice: PartnerChoice, section: Any, round: int, here: Any, now: float) -> Any:
            self.choosing = {"fragment": choice.fragment, "section": section, "now": now, "own_round": round}
            self.choosing |= {"rounds": dict(choice.view().rounds)}
            self.choosing |= {"with_weights": sorted(engine._states[choice.fragment].open.coming("weights", here))}
            return original(choice, section, round, here, now)

        def chosen(original: Any, partners: Partners, candidates: Any, **how: Any) -> Any:
            found = original(partners, candidates, **how)
            among = [[one.peer, one.round, one.part, one.tokens] for one in candidates]
            what = {"candidates": among, "exclude": sorted(how["exclude"]), "found": found}
            self.write("choice", **self.choosing, **what)
            return found

        def begin(original: Any, pulls: Any, lane: Any, section: str, peer: str, round_s: float, now: float) -> None:
            assert self.wake_s is not None and self.wake_s <= now, "the engine would have asked nobody"
            ask = len(self.asks)
            self.write("asks", ask=ask, fragment=lane.number, section=section, author=peer, round_s=round_s)
            original(pulls, lane, section, peer, round_s, now)
            number = max(pulls.by_number)
            self.asks[number], self.pulls[ask] = ask, number
            self.of[pulls.by_number[number].open] = ask

        def news(
            original: Any,
            merged: MergedPublications[Any],
            section: str,
            peer: str,
            mark: PublicationVersion,
            reference: int,
        ) -> Any:
            found = original(merged, section, peer, mark, reference)
            self.write(
                "news",
                fragment=next(lane.number for lane in engine._states if lane.merged is merged),
                author=peer,
                section=section,
                mark=mark,
                is_here=self.is_here,
                is_own=not self.is_here and self.source[self.current][0] == peer,
                reference=reference,
                found=[None, 0] if found is None else [news_name(found[0]), found[0].tokens],
            )
            return found

        def told(name: str) -> Callable[..., Any]:
            def call(original: Any, thing: Any, *args: Any) -> Any:
                found = original(thing, *args)
                if thing is engine._others.hosts.back_off and name == "failed":
                    host, _, reason = args
                    self.write("host_failed", ask=self.asks[self.current], host=host, reason=reason)
                elif not isinstance(thing, BackOff) or thing is engine._others.back_off:
                    self.write(name if isinstance(thing, BackOff) else f"times.{name}", args=args, found=found)
                return found

            return call

        def began(original: Any, *args: Any) -> Any:
            found = original(*args)
            self.write("began", args=args, found=found)
            return found

        def ended(name: str) -> Callable[..., Any]:
            def call(original: Any, pulls: OpenPulls, pull: OpenPull, *args: Any) -> Any:
                ask = self.of.pop(pull, None)
                found = original(pulls, pull, *args)
                if ask is not None:
                    self.write("ended", ask=ask, how=name, found=found)
                return found

            return call

        around(PartnerChoice, "choose", choose)
        around(Partners, "choose", chosen)
        around(GossipPulls, "begin", begin)
        around(MergedPublications, "news", news)
        around(started_pulls, "round_began_s", began)
        for name in ("busy", "failed", "answered", "called"):
            around(BackOff, name, told(name))
        for name in ("bytes_begin", "bytes_end", "merged", "round_ended", "assume"):
            around(PullTimes, name, told(name))
        for name in ("end", "nothing_new", "fail", "give_up"):
            around(OpenPulls, name, ended(name))

    def write(self, kind: str, **what: Any) -> None:
        """Write a line in the recorded form."""
        self.written.append({"kind": kind, **what})

    def does(self, commands: Sequence[Any]) -> None:
        """Write the engine's commands."""
        for command in commands:
            match command:
                case FindRoute() | CancelPull() | PartnerBackedOff():
                    pass
                case AskPartner(number, source, author):
                    self.source[number] = source, author
                    if self.is_looking:
                        self.asked[number] = command
                    else:
                        self.requests(command)
                case DownloadPublication(number, source, held):
                    self.write("downloads", ask=self.asks[number], source=source, mark=held.version)
                case DecodePublication(number, _, section, fragment, held, found, earlier):
                    what = {"news": news_name(found), **asdict(found), "has_earlier": earlier is not None}
                    decoded = None if section == "weights" else what
                    self.write("decodes", ask=self.asks[number], fragment=fragment, mark=held.version, what=decoded)
                case PrepareMerge(number, _, fragment, pulled):
                    self.preparing[fragment] = number
                    self.write("readies", fragment=fragment, pulled=_named(pulled))
                case MergeFragment(fragment, merge, pulled):
                    found = None if merge is None else _named(pulled)
                    self.write("merges", fragment=fragment, round=self.due, pulled=found)
                case ReportFailure(peer, failure):
                    self.write("incident", author=peer, reason=failure.reason)
                case _:
                    raise AssertionError(command)

    def requests(self, ask: AskPartner) -> None:
        """Write a request."""
        known = None if ask.known is None else [ask.known.round, ask.known.part]
        self.write("requests", ask=self.asks[ask.pull], source=ask.source, known=known)

    # ------------------------------------------------------------- what happens

    def play(self) -> Iterator[tuple[int, Difference | None]]:
        """Play all blocks."""
        blocks = iter(self.blocks)
        for number, block in blocks:
            stops = any(line["kind"] == "stops" for line in block)
            if stops:  # ends of other pulls come between, in any order
                while not any(line["kind"] == "forgets" for line in block):
                    block += next(blocks)[1]
            for line in block:
                if line["kind"] == "peers":
                    self.others.tell(line)
                    self.does(self.engine.receive(PartnersChanged(self.others.volunteers()), self.engine.now))
            kinds = {line["kind"] for line in block}
            for line in sorted(block, key=lambda line: line["kind"] != "expects"):  # known before
                assert line["kind"] != "forgets" or kinds & {"stops", "took_states"}, "it never came alone"
                self.happens(line)
            written = [_plain(line) for line in self.written]
            self.written.clear()
            expected = [_plain(_as_written(line)) for line in block if line["kind"] in _COMPARED]
            if stops:
                written, expected = (sorted(lines, key=str) for lines in (written, expected))
            if expected or written:
                is_same = written == expected
                yield len(expected), None if is_same else Difference(number, written, expected)
                if not is_same:
                    return  # later lines would differ because of this one

    def happens(self, line: Line) -> None:
        """Feed one recorded event to the engine."""
        engine, kind, now = self.engine, line["kind"], line.get("now", self.engine.now)
        engine.now, self.is_here, self.is_looking = now, kind == "came", kind == "looks"
        if "ask" in line:
            self.current = self.pulls.get(line["ask"], -1)
        event: Any = None
        match kind:
            case "begins":
                event = MergesPlanned(line["round"], [_plan(plan) for plan in line["plans"]])
            case "looks":
                self.wake_s = engine.wake_at()
                event = PullTimerFired()
            case "expects":
                event = LinkRateAssumed(line["num_bytes"] / line["found"]) if line["found"] else None
            case "sources":
                self.sources(line)
            case "replied":
                event = self.replied(line)
            case "unanswered":
                is_authors_word = self.source[self.current][0] == self.source[self.current][1]
                event = PullFailed(self.current, _failure(line, is_ask=is_authors_word))
            case "came":
                wrong = None if line["wrong"] is None else _failure(line["wrong"])
                event = PublicationDownloaded(self.current, line["num_bytes"], wrong)
            case "broke":
                event = PullFailed(self.current, _failure(line))
            case "decoded":
                event = PublicationDecoded(self.current, None)
            case "refused":
                event = PullFailed(self.current, _failure(line, is_authors=True))
            case "prepares":
                self.does(engine.prepares(now))
            case "prepared":
                event = MergePrepared(self.preparing[line["fragment"]], "merge" if line["is_good"] else None)
            case "settled":
                engine.settles(self.current, now)
            case "due":  # whoever had fallen behind looked at that afterwards, when it was recorded
                self.due = line["round"]
                event = MergeDue(line["round"], line["fragment"], may_catch_up=False)
            case "took_states":
                event = _took_states(line)
            case "stops":
                event = PullsPaused()
            case "calls":
                event = PeerCalled(line["author"])
            case "format":
                self.write("publishes_as", found=engine.gradient_format(line["round_s"], line["up"]))
            case "shows":
                self.write("places", found=engine.places(line["round"]))
            case "keeps":
                self.write("rows", found=engine.rows())
        if event is not None:
            self.does(engine.receive(event, now))

    def sources(self, line: Line) -> None:
        """Feed the sources of a pull; hosts are drawn at random."""
        number, found = self.current, list(line["found"])
        author = self.engine._pulls.by_number[number].open.peer
        if (ask := self.asked.pop(number, None)) is None:
            is_direct = found == [author]
            if not is_direct:
                recording.put(self.engine._others.hosts, "rng", _Lot(found))
            self.does(self.engine.receive(RouteFound(number, is_direct), self.engine.now))
        else:
            assert found == [author]
            self.engine._pulls.by_number[number].asked_s = self.engine.now
            self.requests(ask)

    def replied(self, line: Line) -> Any:
        """Return the reply of the author or of one of its hosts."""
        source, author = self.source[self.current]
        if source != author and line["away"]:
            return PullFailed(self.current, PullFailure("", "away"))
        if line["busy"]:
            return PullFailed(self.current, PullFailure("it serves as many readers as it may", "busy"))
        if line["mark"] is None:
            return PartnerReplied(self.current)
        mark = PublicationVersion(**line["mark"])
        return PartnerReplied(self.current, mark, SimpleNamespace(version=mark), self.others.told(author))


class _Lot:
    """Random source that draws hosts in their recorded order."""

    def __init__(self, order: Sequence[str]) -> None:
        self.order = order

    def sample(self, among: Sequence[str], number: int) -> list[str]:
        """Return all of them in the recorded order."""
        assert sorted(among) == sorted(self.order)
        return list(self.order)


def _took_states(line: Line) -> ConsensusTaken:
    told = [
        [{peer: (place[0], place[1]) for peer, place in each.items()} for each in of_state] for of_state in line["told"]
    ]
    return ConsensusTaken(line["round"], told, line["rounds"])


def _plan(told: Mapping[str, Any]) -> MergePlan:
    tuples = {name: tuple(told[name]) for name in ("began_s", "fragments")}
    return MergePlan(**{**told, **tuples})


def _failure(told: Mapping[str, Any], *, is_ask: bool = False, is_authors: bool = False) -> PullFailure:
    error = getattr(errors, told["error"])
    kind: Any = "failed"
    if issubclass(error, errors.BusyError):
        kind = "busy"
    elif is_ask and issubclass(error, errors.UnreachableError):
        kind = "silent"
    return PullFailure(told["reason"], kind, told["is_incident"], is_authors)


def _named(pulled: Sequence[Any]) -> list[Any]:
    return [[each.group, each.peer, each.version] for each in pulled]


def _as_written(line: Line) -> Line:
    """Drop fields of a recorded choice that the decision does not use."""
    if line["kind"] != "choice":
        return line
    view = line["view"]
    among = [[one["peer"], one["round"], one["part"], one["tokens"]] for one in view["candidates"]]
    what = {name: line[name] for name in ("kind", "fragment", "section", "now", "found")}
    what |= {"own_round": view["own_round"], "rounds": view["rounds"], "candidates": among}
    return {**what, "with_weights": sorted(view["with_weights"]), "exclude": sorted(view["exclude"])}


def _plain(line: Line) -> Line:
    found: Line = json.loads(
        json.dumps({key: line[key] for key in line if key not in _NOT_COMPARED}, default=recording.plain)
    )
    return found
