"""Today's `network.gossiping.Gossip`, driven by recorded events alone; what it decides is written as when it was
recorded, to be compared line by line."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import boundary
import recording
from lines import Line, Recording

from swarmtrain import errors
from swarmtrain.errors import PeerError
from swarmtrain.model.gpt import build_model
from swarmtrain.network import gossiping
from swarmtrain.network.codec import tensor_specs
from swarmtrain.network.gossiping import Gossip
from swarmtrain.network.hosting import Routes
from swarmtrain.network.lanes import Plan
from swarmtrain.network.snapshots import PullLimits
from swarmtrain.peer.gossip_exchange import codecs_of, gossip_settings
from swarmtrain.protocol.lifecycle import PeerInfo
from swarmtrain.protocol.partners import Ledger, Mark
from swarmtrain.run import parse_published_untrusted, run_sha256
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["Difference", "drive"]

_NOT_GOSSIPS = (
    "round", "published", "plans", "expected", "moved", "asked_for", "learned", "accepted", "announces", "taken",
    "merged", "adopted", "restarts", "peers",
)  # fmt: skip
"""What the trainer's side does, and what is told."""
_NOT_COMPARED = ("at_s", "number", "block", "peer")


@dataclass(frozen=True)
class Difference:
    """What came of a block of events, and what was recorded."""

    block: int
    found: Sequence[Line]
    recorded: Sequence[Line]

    def __str__(self) -> str:
        for found, recorded in itertools.zip_longest(self.found, self.recorded):
            if found != recorded:
                return f"block {self.block}: found\n  {found}\nand recorded was\n  {recorded}"
        return "none"


def drive(recorded: Recording, peer: int) -> Iterator[tuple[int, Difference | None]]:
    """Each block of the record of that peer: how many decisions were the same, or where they differ."""
    driver = _Driver(recorded, peer)
    with asyncio.Runner() as runner:
        try:
            driver.put_in()
            yield from runner.run(driver.play())
        finally:
            recording.take_out()


@dataclass
class _Others:
    """What `Membership` says."""

    me: str
    known: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def tell(self, line: Line) -> None:
        """What is known of them has changed."""
        self.known |= line["known"]
        for peer in line["forgotten"]:
            del self.known[peer]

    def volunteers(self) -> list[PeerInfo]:
        """Those who are there and train."""
        of = self.known
        return [self.info(peer) for peer in sorted(of) if of[peer]["is_live"] and self._trains(of[peer])]

    @staticmethod
    def _trains(told: Mapping[str, Any]) -> bool:
        return bool(told["training"]) and not told["is_bootstrap"]

    def info(self, peer: str) -> Any:
        """What was told of it last."""
        if peer not in self.known:
            return None
        told = self.known[peer]
        fields = {name: told[name] for name in boundary.TOLD} | {"hosts": tuple(told["hosts"])}
        return PeerInfo(peer=peer, **fields)

    def so_far_since_s(self, peer: str) -> float:
        """See `Membership`."""
        return float(self.known[peer]["so_far_since_s"]) if peer in self.known else float("-inf")


class _Driver:
    def __init__(self, recorded: Recording, peer: int) -> None:
        header = recorded.header
        self.me = header.peers[peer]["id"]
        self.blocks: list[list[Line]] = []
        for _, lines in itertools.groupby(recorded.of(peer), key=lambda line: line["block"]):
            self.blocks.append(list(lines))
        self.others, self.now = _Others(self.me), 0.0
        self.gates: dict[Any, asyncio.Future[Any]] = {}
        self.written: list[Line] = []
        self.up_bytes_per_s: float | None = None
        self.expected_s: float | None = None
        published = header.how["run_toml"].encode()
        sha256 = run_sha256(published)
        self.run = parse_published_untrusted(published, sha256)
        specs = tensor_specs(build_model(self.run.model, 0).named_parameters())
        rounds = SimpleNamespace(run_sha256=sha256, max_tokens=2**40, pull=PullLimits(stall_limit_s=1.0))
        self.swarm: Any = SimpleNamespace(
            published=SimpleNamespace(run=self.run), specs=specs, rounds=SimpleNamespace(settings=rounds)
        )

    # ------------------------------------------------------------- in place of the network

    def put_in(self) -> None:
        """Everything that is outside of gossip, then what writes down."""
        put, record = recording.put, _Written(self.written)
        put(gossiping, "swarm_time", lambda: self.now)
        put(gossiping, "bring", self._bring)
        put(gossiping, "publication_untrusted", self._publication)
        put(gossiping, "is_signed_by_untrusted", lambda *_: True)
        put(Routes, "to", self._sources)
        put(boundary, "asyncio", _Gated(self))
        recording.record_choices(record)
        recording.record_news(record)
        boundary.Boundary(record).put_in()
        record.before_block = lambda lines: None
        for name, gate in ("_pull", self._starts), ("_fill", self._looks), ("_prepare", self._prepares):
            recording.around(Gossip, name, gate)

    def gossip(self) -> Gossip:
        """As `GossipExchange` makes it."""
        section = self.run.merge
        settings = gossip_settings(self.swarm, codecs_of(self.swarm))
        node = SimpleNamespace(traffic=SimpleNamespace(up=self))
        calls: Any = SimpleNamespace(node=node, publication=self._answer)
        others: Any = self.others
        return Gossip(
            me=self.me,
            calls=calls,
            membership=others,
            settings=settings,
            decode_weights=_decode,
            decode_gradient=_decode,
            presence=pb.Signed,
            heard_untrusted=lambda peer, reply: None,
            counted=lambda peer, tokens: None,
            refused=lambda peer, error: None,
            ledgers=[
                Ledger(section.max_staleness_rounds, section.publications_per_round, section.num_partners)
                for _ in settings.sizes
            ],
            expected_s=lambda _: self.expected_s,
            variant=section.partners,
            routes=Routes(SimpleNamespace(), others),  # type: ignore[arg-type]
        )

    @property
    def bytes_per_s(self) -> float | None:
        """Of what it sends."""
        return self.up_bytes_per_s

    def gate(self, *key: Any) -> asyncio.Future[Any]:
        """What is waited for, until `opens`."""
        gate = self.gates.get(key)
        if gate is None or gate.cancelled():
            gate = self.gates[key] = asyncio.get_running_loop().create_future()
        return gate

    async def passes(self, *key: Any) -> Any:
        """Wait for it."""
        gate = self.gate(*key)
        try:
            return await gate
        finally:
            if self.gates.get(key) is gate:
                del self.gates[key]

    def opens(self, *key: Any, found: Any = None) -> None:
        """It has happened; an error is raised where it is waited for."""
        gate = self.gate(*key)
        if isinstance(found, Exception):
            gate.set_exception(found)
        else:
            gate.set_result(found)

    async def _starts(self, original: Any, *args: Any) -> Any:
        await self.passes("starts", boundary.asked.get())
        return await original(*args)

    async def _looks(self, original: Any, *args: Any) -> None:
        await self.passes("looks")
        await original(*args)

    async def _prepares(self, original: Any, *args: Any) -> None:
        await self.passes("prepares")
        await original(*args)

    async def _sources(self, *_: Any) -> Any:
        return await self.passes("sources", boundary.asked.get())

    async def _answer(self, source: str, request: Any) -> Any:
        return await self.passes("reply", boundary.asked.get())

    async def _bring(self, *_: Any) -> Any:
        return await self.passes("bytes", boundary.asked.get())

    @staticmethod
    def _publication(rules: Any, peer: str, signed: Any) -> Any:
        manifest = pb.Manifest.FromString(signed.payload)
        held = SimpleNamespace(snapshot=SimpleNamespace(manifest=manifest))
        return held, Mark(manifest.round, manifest.part, manifest.tokens)

    # ------------------------------------------------------------- what happens

    async def play(self) -> list[tuple[int, Difference | None]]:
        """All blocks."""
        gossip, found = self.gossip(), list[tuple[int, Difference | None]]()
        blocks = iter(self.blocks)
        for block in blocks:
            number = block[0]["block"]
            if any(line["kind"] == "stops" for line in block):  # others' ends come between, in any order
                while not any(line["kind"] == "forgets" for line in block):
                    block = [*block, *next(blocks)]
            expected = [_plain(line) for line in block if line["kind"] not in _NOT_GOSSIPS]
            if any(line["kind"] in ("peers", *_HAPPENS) for line in block):
                await self._happens(gossip, block)
            written, self.written[:] = [_plain(line) for line in self.written], []
            if any(line["kind"] == "stops" for line in block):
                for lines in (written, expected):
                    lines[:] = sorted(({**line, "now": 0.0} for line in lines), key=str)
            if not expected and not written:
                continue
            is_same = written == expected
            found.append((len(expected), None if is_same else Difference(number, written, expected)))
            if not is_same:
                break  # what follows would differ for that
        await gossip.stop()
        return found

    async def _happens(self, gossip: Gossip, block: Sequence[Line]) -> None:
        kinds = [line["kind"] for line in block]
        for line in block:
            if line["kind"] == "peers":
                self.others.tell(line)
            elif line["kind"] == "expects":
                self.expected_s = line["found"]
        for line in block:
            kind = line["kind"]
            if kind not in _HAPPENS or (kind == "forgets" and {"stops", "took_states"} & set(kinds)):
                continue
            self.now = line.get("now", self.now)
            await asyncio.sleep(0)  # a block of its own
            stays = _HAPPENS[kind](self, gossip, line)
            await self._until_nothing_happens()
            if stays is not None:
                assert stays.done(), f"{kind} lasts"

    @staticmethod
    async def _until_nothing_happens() -> None:
        loop: Any = asyncio.get_running_loop()
        await asyncio.sleep(0)
        while loop._ready:  # noqa: ASYNC110 - nothing else sets an event
            await asyncio.sleep(0)

    def _begins(self, gossip: Gossip, line: Line) -> None:
        tuples = ("began_s", "fragments")
        plans = [
            Plan(**{**plan, **{name: tuple(plan[name]) for name in tuples}}, prepare=_prepare) for plan in line["plans"]
        ]
        gossip.begin(line["round"], plans)

    def _format(self, gossip: Gossip, line: Line) -> None:
        self.up_bytes_per_s = line["up"]
        gossip.gradient_format(line["others"], line["round_s"])

    def _took_states(self, gossip: Gossip, line: Line) -> None:
        told = [
            [{peer: (place[0], place[1]) for peer, place in each.items()} for each in of_state]
            for of_state in line["told"]
        ]
        gossip.took_states(told, line["rounds"], line["round"])

    def _replied(self, gossip: Gossip, line: Line) -> None:
        reply = pb.PublicationReply(busy=line["busy"], away=line["away"])
        if line["mark"] is not None:
            manifest = pb.Manifest(**line["mark"], total_bytes=line["num_bytes"])
            reply.manifest.payload = manifest.SerializeToString()
        self.opens("reply", line["ask"], found=reply)

    def _came(self, gossip: Gossip, line: Line) -> None:
        self.opens("bytes", line["ask"], found=None if line["wrong"] is None else _error(line["wrong"]))

    def _prepared(self, gossip: Gossip, line: Line) -> None:
        self.opens("prepared", line["fragment"], found=object() if line["is_good"] else ValueError("unmergeable"))

    def _opens(self, name: str, found: Callable[[Line], Any] = lambda line: None) -> Callable[[Gossip, Line], None]:
        return lambda gossip, line: self.opens(name, line["ask"], found=found(line))


def _ask(name: str, found: Callable[[Line], Any] = lambda line: None) -> Callable[[_Driver, Gossip, Line], Any]:
    return lambda driver, gossip, line: driver.opens(name, line["ask"], found=found(line))


_HAPPENS: dict[str, Callable[[_Driver, Gossip, Line], Any]] = {
    "begins": _Driver._begins,
    "looks": lambda driver, gossip, line: driver.opens("looks"),
    "starts": _ask("starts"),
    "sources": _ask("sources", lambda line: tuple(line["found"])),
    "replied": _Driver._replied,
    "unanswered": _ask("reply", lambda line: _error(line)),
    "came": _Driver._came,
    "broke": _ask("bytes", lambda line: _error(line)),
    "decoded": _ask("decoded", lambda line: SimpleNamespace(tokens=line["tokens"])),
    "refused": _ask("decoded", lambda line: _error(line)),
    "prepares": lambda driver, gossip, line: driver.opens("prepares"),
    "prepared": _Driver._prepared,
    "settled": _ask("settled"),
    "due": lambda driver, gossip, line: (gossip.take(line["round"], line["fragment"]), None)[1],
    "forgets": lambda driver, gossip, line: gossip.forget_pulled(),
    "took_states": _Driver._took_states,
    "stops": lambda driver, gossip, line: asyncio.ensure_future(gossip.stop()),
    "calls": lambda driver, gossip, line: gossip.called(line["author"]),
    "format": _Driver._format,
    "shows": lambda driver, gossip, line: (gossip.places(line["round"]), None)[1],
    "keeps": lambda driver, gossip, line: (gossip.ledger_rows(), None)[1],
}


class _Written(recording.Record):
    """In memory."""

    def __init__(self, written: list[Line]) -> None:
        super().__init__("/dev/null")
        self._file.close()
        self.written = written

    def _put(self, lines: list[dict[str, Any]]) -> None:
        self.written.extend(lines)


class _Gated:
    """What `boundary` knows as the module asyncio."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def wait_for(self, work: Any, limit_s: float) -> Any:
        """Until it looks again."""
        work.close()
        await self._driver.passes("looks")

    async def shield(self, work: Any) -> None:
        """Until it goes on with what was prepared."""
        await asyncio.shield(work)
        await self._driver.passes("settled", boundary.asked.get())

    async def to_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        """Until it is decoded or prepared."""
        if call is _decode:
            return await self._driver.passes("decoded", boundary.asked.get())
        return await self._driver.passes("prepared", args[0])


def _decode(*_: Any) -> Any:
    raise AssertionError("nothing is decoded here")


def _prepare(*_: Any) -> Any:
    raise AssertionError("nothing is prepared here")


def _error(told: Mapping[str, Any]) -> PeerError:
    error: PeerError = getattr(errors, told["error"])(told["reason"])
    return error


def _plain(line: Line) -> Line:
    found: Line = json.loads(json.dumps({key: line[key] for key in line if key not in _NOT_COMPARED}))
    return found
