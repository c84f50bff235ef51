"""Runs inside a volunteer, beside `recording`: writes down the events that reach its gossip and what that decides.

Each callback of the network's loop, and each call of the trainer's thread, is one block of the record: one event, then
the decisions that follow from it, at one moment `now`. Nothing of the volunteer is changed, but that the clock of its
gossip stands still within a block, that nothing of two blocks is mixed, and that what its gossip starts starts next.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import recording
from recording import Record, around, put

from swarmtrain.errors import PeerError
from swarmtrain.network import gossiping
from swarmtrain.network.gossiping import Gossip
from swarmtrain.network.hosting import Routes
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.gossip_exchange import GossipExchange
from swarmtrain.protocol.lifecycle import Membership, PeerState
from swarmtrain.protocol.open_pulls import OpenPull, OpenPulls
from swarmtrain.protocol.partners import Mark

__all__ = ["Boundary", "asked", "prelude", "record"]

TOLD = (
    "training", "is_bootstrap", "round", "part", "part_tokens", "inner_steps", "inner_steps_done", "steps_per_s",
    "run_tokens", "hidden", "hosts",
)  # fmt: skip
"""What gossip reads of a presence."""

_WRITTEN = (
    "begins", "looks", "starts", "sources", "replied", "unanswered", "came", "broke", "decoded", "refused", "prepares",
    "prepared", "settled", "due", "forgets", "took_states", "stops", "calls", "format", "shows", "keeps",
)  # fmt: skip
"""Events: what is known of the others is written before each."""

asked: ContextVar[int] = ContextVar("ask", default=-1)


def prelude(path: Path) -> str:
    """Python that has a volunteer write its record to `path`, for `Swarm.join`."""
    here = Path(__file__).parent
    folders = [str(here), str(here.parent / "processes")]
    return f"import sys; sys.path[:0] = {folders!r}; import boundary; boundary.record({str(path)!r})"


def record(path: str) -> None:
    """Write to `path` from now on."""
    record = recording.record(path)
    Boundary(record).put_in()


class Boundary:
    """What is put around the volunteer's own functions."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.membership: Membership | None = None
        self.known: dict[str, Any] = {}
        self.numbers = itertools.count()
        self.asks: dict[OpenPull, int] = {}
        self.asking = -1

    def put_in(self) -> None:
        self.record.before_block = self._tell_of_others
        self._blocks()
        self._gossip()
        self._pulls()
        self._trainer()

    def event(self, kind: str, **what: Any) -> None:
        self.record.write(kind, now=gossiping.swarm_time(), **what)

    # ------------------------------------------------------------- moments

    def _blocks(self) -> None:
        record, clock = self.record, gossiping.swarm_time

        def run(original: Any, handle: asyncio.Handle) -> None:
            with record.block():
                original(handle)

        def now() -> float:
            if getattr(record.thread, "lines", None) is None:
                return clock()
            if record.thread.now is None:
                record.thread.now = clock()
            return float(record.thread.now)

        around(asyncio.Handle, "_run", run)
        put(gossiping, "swarm_time", now)
        put(gossiping, "asyncio", _Asyncio(self))

    def _tell_of_others(self, lines: list[dict[str, Any]]) -> None:
        """Before the first event: what is known of the others by now, where that has changed."""
        if self.membership is None or not any(line["kind"] in _WRITTEN for line in lines):
            return
        known = {peer: self._told(entry) for peer, entry in self.membership._entries.items()}
        changed = {peer: told for peer, told in known.items() if self.known.get(peer) != told}
        forgotten = [peer for peer in self.known if peer not in known]
        if changed or forgotten:
            lines.insert(0, {"kind": "peers", "at_s": lines[0]["at_s"], "known": changed, "forgotten": forgotten})
        self.known = known

    @staticmethod
    def _told(entry: Any) -> dict[str, Any]:
        told = {name: getattr(entry.info, name) for name in TOLD}
        told |= {"hosts": list(told["hosts"]), "is_live": entry.state is PeerState.LIVE}
        return {**told, "answers": not entry.failures, "so_far_since_s": entry.so_far_since_s}

    # ------------------------------------------------------------- the state

    def _gossip(self) -> None:
        def post_init(original: Any, gossip: Gossip) -> None:
            original(gossip)
            self.membership = gossip.membership
            expected_s, refused = gossip.expected_s, gossip.refused

            def expects(num_bytes: int) -> float | None:
                found = expected_s(num_bytes)
                self.record.write("expects", num_bytes=num_bytes, found=found)
                return found

            def is_refused(peer: str, error: PeerError) -> None:
                refused(peer, error)
                self.record.write("incident", author=peer, reason=str(error))

            gossip.expected_s, gossip.refused = expects, is_refused
            gossip.calls = _Calls(self, gossip.calls)  # type: ignore[assignment]

        def begin(original: Any, gossip: Gossip, round: int, plans: Any) -> None:
            self.event("begins", round=round, plans=[_plain_plan(plan) for plan in plans])
            original(gossip, round, plans)

        async def fill(original: Any, gossip: Gossip, plans: Any) -> None:
            self.event("looks")
            await original(gossip, plans)

        async def prepare(original: Any, gossip: Gossip) -> None:
            self.event("prepares")
            await original(gossip)

        async def stop(original: Any, gossip: Gossip) -> None:
            self.event("stops")
            await original(gossip)

        def take(original: Any, gossip: Gossip, round: int, fragment: int = 0) -> Any:
            with self.record.block():
                self.event("due", fragment=fragment, round=round)
                ready = original(gossip, round, fragment)
                pulled = None if ready is None else [[each.section, each.peer, each.mark] for each in ready.pulled]
                self.record.write("merges", fragment=fragment, round=round, pulled=pulled)
                return ready

        def forget(original: Any, gossip: Gossip) -> None:
            with self.record.block():
                self.event("forgets")
                original(gossip)

        def took_states(original: Any, gossip: Gossip, told: Any, rounds: Any, round: int) -> None:
            with self.record.block():
                heard = {info.peer: info.round for info in gossip.membership.volunteers()}
                self.event("took_states", told=told, rounds=rounds, round=round, heard=heard)
                original(gossip, told, rounds, round)

        def format(original: Any, gossip: Gossip, others: int, round_s: float) -> Any:
            with self.record.block():
                up = gossip.calls.node.traffic.up.bytes_per_s
                self.event("format", others=others, round_s=round_s, up=up)
                found = original(gossip, others, round_s)
                self.record.write("publishes_as", found=found)
                return found

        def places(original: Any, gossip: Gossip, round: int) -> Any:
            with self.record.block():
                self.event("shows", round=round)
                found = original(gossip, round)
                self.record.write("places", found=found)
                return found

        def rows(original: Any, gossip: Gossip) -> Any:
            with self.record.block():
                self.event("keeps")
                found = original(gossip)
                self.record.write("rows", found=found)
                return found

        def called(original: Any, gossip: Gossip, peer: str) -> None:
            self.event("calls", author=peer)
            original(gossip, peer)

        around(Gossip, "__post_init__", post_init)
        around(Gossip, "begin", begin)
        around(Gossip, "_fill", fill)
        around(Gossip, "_prepare", prepare)
        around(Gossip, "stop", stop)
        around(Gossip, "take", take)
        around(Gossip, "forget_pulled", forget)
        around(Gossip, "took_states", took_states)
        around(Gossip, "gradient_format", format)
        around(Gossip, "places", places)
        around(Gossip, "ledger_rows", rows)
        around(Gossip, "called", called)

    # ------------------------------------------------------------- pulls

    def _pulls(self) -> None:
        def start(original: Any, gossip: Gossip, lane: Any, peer: str, section: str, round_s: float) -> None:
            self.asking = next(self.numbers)
            token = asked.set(self.asking)
            what = {"fragment": lane.number, "section": section, "author": peer, "round_s": round_s}
            self.record.write("asks", ask=self.asking, **what)
            original(gossip, lane, peer, section, round_s)
            asked.reset(token)

        def begin(original: Any, pulls: OpenPulls, *args: Any) -> OpenPull:
            pull: OpenPull = original(pulls, *args)
            self.asks[pull] = self.asking
            return pull

        async def pull(original: Any, *args: Any) -> bool:
            self.event("starts", ask=asked.get())
            return bool(await original(*args))

        async def sources(original: Any, *args: Any) -> Any:
            found = await original(*args)
            if asked.get() >= 0:
                self.event("sources", ask=asked.get(), found=found)
            return found

        async def bring(original: Any, calls: Any, source: str, held: Any, *args: Any) -> Any:
            self.record.write("downloads", ask=asked.get(), source=source, mark=_mark(held))
            try:
                wrong = await original(calls, source, held, *args)
            except PeerError as error:
                self.event("broke", ask=asked.get(), **_error(error))
                raise
            num_bytes = held.snapshot.manifest.total_bytes
            self.event("came", ask=asked.get(), num_bytes=num_bytes, wrong=None if wrong is None else _error(wrong))
            return wrong

        def host_failed(original: Any, gossip: Gossip, host: str, error: Any) -> Any:
            self.record.write("host_failed", ask=asked.get(), host=host, reason=str(error))
            return original(gossip, host, error)

        around(Gossip, "_start_pull", start)
        around(OpenPulls, "begin", begin)
        around(Gossip, "_pull", pull)
        around(Routes, "to", sources)
        around(gossiping, "bring", bring)
        around(Gossip, "_host_failed", host_failed)
        for name in ("end", "nothing_new", "fail", "give_up"):
            around(OpenPulls, name, functools.partial(self._ended, name))

    def _ended(self, name: str, original: Any, pulls: OpenPulls, pull: OpenPull, *args: Any) -> Any:
        """Within `nothing_new`, `fail` and `give_up` it ends too."""
        if (ask := self.asks.pop(pull, None)) is None:
            return original(pulls, pull, *args)
        found = original(pulls, pull, *args)
        self.record.write("ended", ask=ask, how=name, found=found)
        return found

    # ------------------------------------------------------------- the trainer's side

    def _trainer(self) -> None:
        def plans(original: Any, exchange: GossipExchange, done: int, now: float) -> Any:
            found, start = original(exchange, done, now), exchange._start
            self.record.write(
                "plans",
                done=done,
                now=now,
                round=exchange._progress.round,
                merge_after=start.merge_after,
                inner_steps=start.inner_steps,
                gradient_format=start.gradient_format,
                steps_per_s=exchange._steps_per_s,
                round_began_s=exchange._round_began_s,
                began_s=exchange._began_s,
                found=[_plain_plan(plan) for plan in found],
            )
            return found

        def describe_part(original: Any, swarm: Swarm, part: int, tokens: int) -> None:
            original(swarm, part, tokens)
            self.record.write("announces", part=part, tokens=tokens)

        around(GossipExchange, "_plans", plans)
        around(Swarm, "describe_part", describe_part)


class _Asyncio:
    """What `gossiping` knows as the module asyncio."""

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def create_task(self, work: Any) -> Any:
        """It starts next, after what else this block has started."""
        task, ready, thread = asyncio.create_task(work), asyncio.get_running_loop()._ready, self._boundary.record.thread  # type: ignore[attr-defined]
        ready.insert(thread.num_tasks, ready.pop())
        thread.num_tasks += 1
        return task

    async def wait_for(self, work: Any, limit_s: float) -> Any:
        """The pulling loop waits for news or until it is time."""
        try:
            found = await asyncio.wait_for(work, limit_s)
        except TimeoutError:
            self._boundary.event("looks")
            raise
        self._boundary.event("looks")
        return found

    async def shield(self, work: Any) -> None:
        """A pull waits for the merge that is prepared with it."""
        await asyncio.shield(work)
        self._boundary.event("settled", ask=asked.get())

    async def to_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        """Decoding, or preparing a merge."""
        boundary = self._boundary
        if getattr(call, "__name__", "").startswith("_decode"):
            return await self._decode(call, *args)
        fragment, pulled = args
        what = [[each.section, each.peer, each.mark] for each in pulled]
        boundary.record.write("readies", fragment=fragment, pulled=what)
        is_good = False
        try:
            found = await asyncio.to_thread(call, *args)
            is_good = True
            return found
        finally:
            boundary.event("prepared", fragment=fragment, is_good=is_good)

    async def _decode(self, call: Callable[..., Any], fragment: int, held: Any, *what: Any) -> Any:
        boundary, ask, news = self._boundary, asked.get(), None
        if what:
            news = {"news": type(what[0]).__name__, **dataclasses.asdict(what[0]), "has_earlier": what[1] is not None}
        boundary.record.write("decodes", ask=ask, fragment=fragment, mark=_mark(held), what=news)
        try:
            found = await asyncio.to_thread(call, fragment, held, *what)
        except PeerError as error:
            boundary.event("refused", ask=ask, **_error(error))
            raise
        boundary.event("decoded", ask=ask, tokens=found.tokens)
        return found


class _Calls:
    """What gossip knows as `PeerCalls`."""

    def __init__(self, boundary: Boundary, calls: Any) -> None:
        self._boundary, self._calls = boundary, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)

    async def publication(self, source: str, request: Any) -> Any:
        """Ask for one."""
        boundary, ask = self._boundary, asked.get()
        known = [request.round, request.part] if request.has_any else None
        boundary.record.write("requests", ask=ask, source=source, known=known)
        try:
            reply = await self._calls.publication(source, request)
        except PeerError as error:
            boundary.event("unanswered", ask=ask, **_error(error))
            raise
        mark, num_bytes = None, 0
        if reply.HasField("manifest"):
            manifest = gossiping.pb.Manifest.FromString(reply.manifest.payload)
            mark, num_bytes = Mark(manifest.round, manifest.part, manifest.tokens), manifest.total_bytes
        boundary.event("replied", ask=ask, mark=mark, num_bytes=num_bytes, busy=reply.busy, away=reply.away)
        return reply


def _mark(held: Any) -> Mark:
    manifest = held.snapshot.manifest
    return Mark(manifest.round, manifest.part, manifest.tokens)


def _error(error: PeerError) -> dict[str, Any]:
    return {"error": type(error).__name__, "reason": str(error), "is_incident": error.is_incident}


def _plain_plan(plan: Any) -> dict[str, Any]:
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan) if field.name != "prepare"}
