"""Times at which the bootstrap archives: soon after there is something to archive, then periodically."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from swarmtrain.algorithm.outer import OuterState, flatten
from swarmtrain.events import ArchivedEvent, Event, WarningEvent
from swarmtrain.model.gpt import build_model
from swarmtrain.network.codec import tensor_specs
from swarmtrain.network.discovery.presence import OwnPresence
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.identity import new_identity
from swarmtrain.network.node import NetworkThread
from swarmtrain.peer import bootstrap
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag
from swarmtrain.peer.merging import consensus_state
from swarmtrain.peer.merging.consensus_state import ConsensusState
from swarmtrain.protocol.archive.departure import DepartureQueue
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile


class Waiting(DepartureQueue):
    """Somebody waits at 85 s, with tokens that are new, and at 95 s, with tokens that are not."""

    def __init__(self, now: list[float]) -> None:
        self.now, self.told = now, list[float]()

    def take_news(self) -> bool:
        return False

    def waiting(self, now: float) -> tuple[str, ...]:
        return ("anna",) if self.now[0] in {85.0, 95.0} else ()

    def taken(self, peers: tuple[str, ...], now: float) -> None:
        assert peers == ("anna",)
        self.told.append(self.now[0])


def test_who_asks_to_leave_need_not_wait_for_the_next_look_however_often_somebody_asks() -> None:
    """Seen: everybody who left waited for a second."""
    naps: list[float] = []
    control: Any = SimpleNamespace(emit=None, stop=SimpleNamespace(sleep=naps.append))
    anything: Any = None
    settings = PeerSettings(directory=Path("/nowhere"), name="bootstrap")
    peer = bootstrap._Bootstrap(anything, settings, anything, anything, control)

    def rest(*news: bool) -> float:
        """Return how long it pauses, if somebody begins to ask during these of its waits."""
        told = [*news, *([False] * 10)]
        naps.clear()
        peer.rest([cast(Any, SimpleNamespace(take_news=lambda: told.pop(0)))])
        return round(sum(naps), 3)

    assert rest() == 1.0
    assert rest(False, True) == 0.2
    always = [True] * 10
    assert [rest(*always) for _ in range(4)] == [0.1, 0.1, 1.0, 0.1], "three in a row are early"
    assert rest(False, False, True) == 0.3 and rest() == 1.0


@pytest.mark.parametrize(
    ("somebody_leaves", "at"), [(False, [10.0, 70.0, 130.0]), (True, [10.0, 70.0, 85.0, 145.0])], ids=str
)
def test_the_first_state_is_archived_at_once(
    monkeypatch: pytest.MonkeyPatch, somebody_leaves: bool, at: list[float]
) -> None:
    """A volunteer that joins while all others are dead finds what they had trained; and so do those who come once the
    last one has left."""
    sections = {"merge": {"method": "diloco"}, "network": {"archive_every_s": 60}}
    run = RunFile.model_validate({"run": {"total_tokens": 100_000}, **sections})
    anything: Any = None
    board = SimpleNamespace(beat=lambda: None)
    control: Any = SimpleNamespace(emit=lambda event: None, stop=StopFlag(), board=board)
    peer = bootstrap._Bootstrap(
        PublishedRun(b"", "ab" * 32, run, b"", b""),
        PeerSettings(directory=Path("/nowhere"), name="bootstrap"),
        anything,
        anything,
        control,
    )
    now, archived = [0.0], list[float]()

    class Archived(bootstrap._Bootstrap):
        def _archive(self, swarm: Any, last: bool = False) -> bool:
            archived.append(now[0])
            self.progress = Progress(run_tokens=told[0].run_tokens)
            return True

        def _ask_how_far(self, swarm: Any) -> None:
            now[0] += 1.0
            if now[0] >= 150:
                raise Interrupted

    peer.__class__ = Archived
    monkeypatch.setattr(bootstrap, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(peer.stop, "sleep", lambda seconds: None)
    told = [SimpleNamespace(run_tokens=0)]

    def volunteers() -> list[Any]:
        told[0].run_tokens = 0 if now[0] < 10 else 5_000 + int(min(now[0], 85) if somebody_leaves else now[0])
        told[0].run_tokens += 1000 * (now[0] > 95)
        return told

    leavers = Waiting(now) if somebody_leaves else None
    swarm: Any = SimpleNamespace(membership=SimpleNamespace(volunteers=volunteers), asynchronous=False)
    peer.leavers = cast(Any, leavers)
    with pytest.raises(Interrupted):
        peer._archive_until_the_end(swarm)
    assert archived == at
    assert leavers is None or leavers.told == [85.0, 95.0], "it may go: what it has is in the archive"


def test_only_what_is_on_the_disk_is_told() -> None:
    """At the end the volunteers leave once the archive says that it has the last state."""
    anything: Any = None
    network = NetworkThread()
    control: Any = SimpleNamespace(emit=lambda event: None, stop=StopFlag())
    settings = PeerSettings(directory=Path("/nowhere"), name="bootstrap")
    peer = bootstrap._Bootstrap(anything, settings, anything, network, control)
    checkpointer = SimpleNamespace(durable=None)
    manager: Any = SimpleNamespace(checkpointer=checkpointer)
    peer.manager = manager
    presence = OwnPresence(new_identity(), "ab" * 32, PeerInfo(peer="P", is_bootstrap=True), lambda: 0)
    swarm: Any = SimpleNamespace(presence=presence, asynchronous=False)
    try:
        peer.progress = Progress(round=9, run_tokens=1000)
        peer._tell_archived(swarm)
        assert (presence.me.round, presence.me.run_tokens) == (0, 0), "the disk is slow, or full"
        checkpointer.durable = Progress(round=8, run_tokens=900)
        peer._tell_archived(swarm)
        assert (presence.me.round, presence.me.run_tokens) == (8, 900)
        run = RunFile.model_validate({"run": {"total_tokens": 100_000}, "merge": {"method": "gossip"}})
        peer.published = PublishedRun(b"", "ab" * 32, run, b"", b"")
        swarm.asynchronous = True
        peer.progress = checkpointer.durable = Progress(round=99, run_tokens=101_000)
        peer._tell_archived(swarm)
        assert presence.me.run_tokens == 99_999, "not all last weights are in it: nobody may leave yet"
        peer.is_final = True
        peer._tell_archived(swarm)
        assert presence.me.run_tokens == 101_000
    finally:
        network.stop()


def test_an_archive_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a folder that holds other files: the bootstrap goes on, and serves the state all the same."""
    run = RunFile.model_validate({"run": {"total_tokens": 100_000}, "merge": {"method": "diloco"}})
    anything: Any = None
    events: list[Event] = []
    control: Any = SimpleNamespace(emit=events.append, stop=StopFlag())
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "notes.txt").write_text("mine")
    peer = bootstrap._Bootstrap(
        PublishedRun(b"", "ab" * 32, run, b"", b""),
        PeerSettings(directory=tmp_path, name="bootstrap"),
        PeerFolder(tmp_path),
        anything,
        control,
    )
    checkpointer = SimpleNamespace(flush=lambda limit_s: True, durable=None)
    offered: list[Any] = []  # and nothing is counted again: this peer's own counts are in it
    manager = SimpleNamespace(checkpointer=checkpointer, extra=dict, keep=lambda kept: None, offer=offered.append)
    peer.manager = cast(Any, manager)
    theta = flatten(build_model(run.model, run.run.seed).parameters())
    state = OuterState(theta, torch.zeros_like(theta))
    monkeypatch.setattr(
        bootstrap, "fetch_consensus_state", lambda *given: ConsensusState(state=state, progress=Progress())
    )
    monkeypatch.setattr(bootstrap, "wait_for", lambda future, stop: future)
    peer.network = cast(Any, SimpleNamespace(submit=lambda future: future))
    nobody = SimpleNamespace(volunteers=list, answering=list)
    swarm: Any = SimpleNamespace(membership=nobody, asynchronous=False, specs=specs_of(run))
    peer.swarm = swarm
    assert peer._archive(swarm) and len(offered) == 1
    (event,) = events
    assert isinstance(event, WarningEvent) and event.code == "archive-not-written"


# ---------------------------------------------------------------- when it is asked to leave


def specs_of(run: RunFile) -> Any:
    return tensor_specs(build_model(run.model, run.run.seed).named_parameters())


@dataclass
class Volunteers:
    """Stands in for the swarm: who is here, how far each is, and who does not answer."""

    tokens: Mapping[str, int]
    specs: Any = field(default_factory=lambda: specs_of(RunFile.model_validate({"run": {"total_tokens": 100_000}})))
    silent: tuple[str, ...] = ()
    before_it_delivers: Callable[[], None] = lambda: None
    delivers: bool = True
    fetched: list[int] = field(default_factory=list)
    asynchronous = False

    @property
    def membership(self) -> Any:
        infos = [SimpleNamespace(peer=peer, run_tokens=tokens) for peer, tokens in self.tokens.items()]
        return SimpleNamespace(volunteers=lambda: infos)

    @property
    def rounds(self) -> Any:
        return SimpleNamespace(search=self)

    async def ask_now(self, peers: Sequence[str]) -> dict[str, int]:
        if any(peer in self.silent for peer in peers):
            await asyncio.Event().wait()
        return {peer: self.tokens[peer] for peer in peers}

    async def fetch_advertised_state(self, told: Mapping[str, int], reason: str, above_tokens: int) -> Any:
        self.before_it_delivers()
        if not self.delivers:
            await asyncio.Event().wait()
        newest = max(told.values(), default=0)
        if newest <= above_tokens:
            return None
        self.fetched.append(newest)
        return SimpleNamespace(roster=None, signed_roster=None, tokens=newest)


@dataclass
class Leaving:
    """Bootstrap that was asked to leave, with its archive at 500 tokens."""

    peer: Any
    stop: StopFlag
    events: list[Event] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    def asked(self, swarm: Volunteers) -> int:
        """Ask it; the tokens its archive is at then."""
        self.stop.stop()
        self.peer.swarm = swarm
        self.peer.archive_once_more()
        return self.peer.done("asked").run_tokens  # type: ignore[no-any-return]


@pytest.fixture
def leaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leaving]:
    monkeypatch.setattr(bootstrap, "_LAST_ANSWER_S", 0.2)
    run = RunFile.model_validate({"run": {"total_tokens": 100_000}, "merge": {"method": "diloco"}})
    theta = flatten(build_model(run.model, run.run.seed).parameters())
    state = OuterState(theta, torch.zeros_like(theta))
    monkeypatch.setattr(consensus_state, "state_of", lambda new: (state, Progress(round=9, run_tokens=new.tokens)))
    stop, network = StopFlag(), NetworkThread()
    control: Any = SimpleNamespace(emit=None, stop=stop, board=SimpleNamespace(doing=lambda state, sentence: None))
    leaving = Leaving(None, stop)
    control.emit = leaving.events.append
    published = PublishedRun(b"", "ab" * 32, run, b"", b"")
    settings = PeerSettings(directory=tmp_path, name="bootstrap", samples_archive=False)
    peer = leaving.peer = bootstrap._Bootstrap(published, settings, PeerFolder(tmp_path), network, control)
    manager = SimpleNamespace(extra=dict, keep=leaving.kept.append)
    peer.manager = cast(Any, manager)
    peer.progress = Progress(round=1, run_tokens=500)
    yield leaving
    network.stop()


def test_asked_to_leave_it_takes_one_last_archive(leaving: Leaving, tmp_path: Path) -> None:
    """After a short run too: what was trained since the last archive is not only with the volunteers."""
    assert leaving.asked(Volunteers({"anna": 900, "ben": 1000})) == 1000
    assert [kept.progress.run_tokens for kept in leaving.kept] == [1000]
    (event,) = leaving.events
    assert isinstance(event, ArchivedEvent) and (event.round, event.run_tokens) == (9, 1000)
    assert (tmp_path / "archive" / "config.json").exists()


def test_who_does_not_answer_is_not_waited_for(leaving: Leaving) -> None:
    assert leaving.asked(Volunteers({"anna": 900, "ben": 1000}, silent=("ben",))) == 900


@pytest.mark.parametrize(
    "swarm", [Volunteers({}), Volunteers({"anna": 500}), Volunteers({"anna": 9}, silent=("anna",))]
)
def test_where_there_is_nothing_newer_the_archive_stays(leaving: Leaving, swarm: Volunteers) -> None:
    assert leaving.asked(swarm) == 500
    assert not leaving.events and not leaving.kept


def test_a_last_archive_that_takes_too_long_is_given_up(leaving: Leaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "LAST_ARCHIVE_S", 0.3)
    assert leaving.asked(Volunteers({"anna": 900}, delivers=False)) == 500


def test_an_end_that_is_asked_for_again_is_obeyed_at_once(leaving: Leaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "LAST_ARCHIVE_S", 3600.0)
    assert leaving.asked(Volunteers({"anna": 900}, before_it_delivers=leaving.stop.insist, delivers=False)) == 500


def test_a_run_that_is_over_needs_no_other_archive(leaving: Leaving) -> None:
    swarm = Volunteers({"anna": 100_500})
    leaving.peer.progress = Progress(round=99, run_tokens=100_400)
    assert leaving.asked(swarm) == 100_400 and not swarm.fetched


# ---------------------------------------------------------------- the end of a run in which each has its own weights


def test_an_archive_between_two_looks_that_had_all_tokens_ends_it_when_everyone_has_left(tmp_path: Path) -> None:
    """Seen: the volunteers left, because the archive had the run's tokens, and the bootstrap waited for them."""
    run = RunFile.model_validate({"run": {"total_tokens": 100_000}, "merge": {"method": "gossip"}})
    looks = iter([[90_000, 95_000], [90_000, 95_000], []])
    here: list[int] = []
    told: list[int] = []
    control: Any = SimpleNamespace(emit=None, stop=StopFlag(), board=SimpleNamespace(beat=lambda: None))
    published, settings = PublishedRun(b"", "ab" * 32, run, b"", b""), PeerSettings(directory=tmp_path, name="b")
    peer: Any = bootstrap._Bootstrap(published, settings, PeerFolder(tmp_path), cast(Any, None), control)
    peer.stop = SimpleNamespace(sleep=lambda seconds: None)
    swarm: Any = SimpleNamespace(
        asynchronous=True,
        membership=SimpleNamespace(volunteers=lambda: [SimpleNamespace(run_tokens=tokens) for tokens in here]),
        accounting=SimpleNamespace(total=0),
    )

    def archive(swarm: Any, last: bool) -> bool:
        assert not last
        peer.progress = Progress(round=9, run_tokens=101_000)  # more than they had said
        return True

    peer._ask_how_far = lambda swarm: here.__setitem__(slice(None), next(looks))
    peer._archive = archive
    peer._tell_archived = lambda swarm: told.append(peer.is_final)
    peer._archive_until_the_end(swarm)
    assert peer.is_final and told == [True]
