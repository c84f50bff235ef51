"""Started again after a run's end: the model that the run ended with stays, unless others give a later one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.outer import OuterState, flatten
from swarmtrain.data.batches import Batches
from swarmtrain.data.tokens import MAGIC, ByteTokenizer
from swarmtrain.events import ArchivedEvent, DoneEvent, EvalEvent, Event, WarningEvent, to_json_line
from swarmtrain.model.export import load_exported
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.network.codec import tensor_specs
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.peer import bootstrap
from swarmtrain.peer.control.history import PeerHistory
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import PeerSettings, held_out_loss_of, kept_final_model, save_model, weights_in
from swarmtrain.peer.lifecycle.stop import Interrupted, StopFlag
from swarmtrain.peer.merging.updates import Replaced
from swarmtrain.peer.pipeline import bootstrap as pipeline_bootstrap
from swarmtrain.peer.training.loop import ModelLoop
from swarmtrain.peer.training.model_training import ModelTraining
from swarmtrain.peer.training.session import Session
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import RunFile, published_bytes, run_sha256
from swarmtrain.run_model import ModelSection

TOTAL = 10_000
TEXT = bytes(range(256))
Spoil = Callable[[Path], object]


def published_run(method: str = "gossip") -> PublishedRun:
    sections: dict[str, Any] = {
        "run": {"total_tokens": TOTAL},
        "model": {"context_tokens": 16, "num_layers": 1, "width": 16, "num_heads": 2},
        "data": {"source": "text", "paths": ("x",)},
        "inner": {"batch_sequences": 4, "warmup_fraction": 0.0},
        "merge": {"method": method},
        "evaluation": {"batch_sequences": 16},
    }
    run = RunFile.model_validate(sections)
    data = published_bytes(run)
    return PublishedRun(data, run_sha256(data), run, TEXT, b"")


def weights_of(published: PublishedRun, seed: int) -> Tensor:
    return flatten(build_model(published.run.model, seed).parameters())


def leave_model(folder: PeerFolder, published: PublishedRun, theta: Tensor, run_tokens: int = TOTAL + 512) -> None:
    """Leave a model as a peer does at its end; with an old time, so that a rewritten file is recognised."""
    progress = Progress(round=9, run_tokens=run_tokens)
    save_model(folder.model_path, build_model(published.run.model, 0), theta, published, progress)
    os.utime(folder.model_path / "model.safetensors", (1000, 1000))


def is_untouched(folder: PeerFolder) -> bool:
    return (folder.model_path / "model.safetensors").stat().st_mtime == 1000


def model_in(folder: PeerFolder) -> Tensor:
    return flatten(load_exported(folder.model_path).model.parameters())


def remove(path: Path) -> None:
    for child in path.iterdir():
        child.unlink()
    path.rmdir()


def claim_fewer_tokens(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["swarmtrain"]["run_tokens"] = TOTAL - 1
    (path / "config.json").write_text(json.dumps(config))


SPOILT: list[Spoil] = [
    remove,
    lambda path: (path / "model.safetensors").write_bytes(b"torn"),
    lambda path: (path / "held-out.txt").unlink(),
    lambda path: (path / "run.toml").write_text("another run"),
    claim_fewer_tokens,
]


# ---------------------------------------------------------------- a volunteer


class Life:
    """Volunteer in a folder, from its checkpoint on; its swarm delivers what a test says, by default nothing."""

    def __init__(self, path: Path, method: str = "gossip", round: int = 9, run_tokens: int = TOTAL + 512) -> None:
        self.published, self.folder = published_run(method), PeerFolder(path)
        self.events: list[Event] = []
        self.own, self.consensus, self.later = (weights_of(self.published, seed) for seed in (1, 2, 3))
        self.present: Replaced | None = None
        self.last: Tensor | None = None
        run = self.published.run
        model = build_model(run.model, 1)
        batches = Batches(TEXT * 8, context_tokens=16, batch_sequences=4, run_sha256="ab" * 32, peer_id="eve")
        training: Any = ModelTraining.__new__(ModelTraining)
        self.training = training
        stop: Any = SimpleNamespace(check=lambda: None, sleep=lambda seconds: None)
        control = SimpleNamespace(starting=lambda what: None, finishing=lambda what: None)
        training.context = SimpleNamespace(
            published=self.published,
            run=run,
            folder=self.folder,
            model_folder=None,
            control=control,
            stop=stop,
            me="eve",
            emit=self.events.append,
            wait=lambda work: None,
        )
        training.data = SimpleNamespace(tokenizer=ByteTokenizer())
        training.loop = ModelLoop(run, model, batches)
        training.exchange = SimpleNamespace(
            present_state=lambda progress: self.present,
            final_theta=lambda own: own if self.last is None else self.last,
            still_needed=lambda progress: "",
            restore=lambda extra: None,
        )
        nothing = SimpleNamespace(greet_everyone=lambda: None)
        training.swarm = SimpleNamespace(
            asynchronous=method != "diloco",
            greeter=nothing,
            count_once_more=lambda: None,
            come_back=lambda: None,
            store=SimpleNamespace(num_readers=0),
            membership=SimpleNamespace(live=list),
        )
        training.manager = SimpleNamespace(restore=lambda kept: None)
        training.session = Session(
            run=run, parameters=training.loop.parameters, loop=training.loop, exchange=training.exchange, report=print
        )
        training.resumed_round, training.has_joined = None, False
        training._had_ended = training._took_state = False
        training.session.loop = SimpleNamespace(
            resume=lambda own: None, weights_replaced=lambda: None, end=lambda: None
        )
        state = OuterState(self.own.clone(), torch.zeros_like(self.own))
        progress = Progress(round=round, run_tokens=run_tokens)
        local_checkpoint: Any = SimpleNamespace(own_tokens=2048, steps_per_s=1.0)
        training.resume(SimpleNamespace(state=state, progress=progress, own=local_checkpoint, extra={}))

    def leave(self, theta: Tensor) -> None:
        leave_model(self.folder, self.published, theta)

    def diverge(self) -> None:
        """Let one of its own weights be no number."""
        replica = self.training.session.replica
        theta = replica.state.theta.clone()
        theta[3] = math.nan
        replica.state = OuterState(theta, replica.state.momentum)

    def live(self) -> DoneEvent:
        """Play what is left of its life if the run has all its tokens."""
        self.training._take_present()
        return self.training.finish()

    def said(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, WarningEvent)]


@pytest.mark.parametrize("method", ["gossip", "server", "diloco"])
def test_the_model_of_the_runs_end_stays_where_nobody_gives_another(tmp_path: Path, method: str) -> None:
    """Seen: it was replaced by that peer's own last weights, another model than the one that everybody else has."""
    life = Life(tmp_path, method)
    life.leave(life.consensus)
    done = life.live()
    assert is_untouched(life.folder) and torch.equal(model_in(life.folder), life.consensus)
    assert life.said() == ["run-had-ended"]
    (measured,) = (event for event in life.events if isinstance(event, EvalEvent))
    assert measured.bits_per_byte == pytest.approx(measured.held_out_loss / math.log(2))
    assert measured.perplexity == pytest.approx(math.exp(measured.held_out_loss)), "a token is a byte here"
    assert done.reason == "total_tokens" and done.held_out_loss == measured.held_out_loss
    assert done.own_loss is not None and done.own_loss != done.held_out_loss, "the loss is the kept model's"


def test_weights_that_are_the_models_are_measured_once(tmp_path: Path) -> None:
    life = Life(tmp_path, "diloco")
    life.leave(life.own)
    assert life.live().own_loss is None
    assert is_untouched(life.folder) and life.said() == ["run-had-ended"]


def test_a_checkpoint_that_lacks_the_last_round_changes_nothing(tmp_path: Path) -> None:
    """The disk had no room for it, but had for the model: the peer trains the round again, alone."""
    life = Life(tmp_path, run_tokens=TOTAL - 1)
    life.leave(life.consensus)
    life.live()
    assert is_untouched(life.folder) and life.said() == ["run-had-ended"]


@pytest.mark.parametrize("when", ["joining", "at the end"])
def test_what_others_give_is_written(tmp_path: Path, when: str) -> None:
    life = Life(tmp_path)
    life.leave(life.consensus)
    if when == "joining":
        state = OuterState(life.later.clone(), torch.zeros_like(life.later))
        progress = Progress(round=12, run_tokens=TOTAL + 4096)
        life.present = Replaced(state=state, progress=progress, from_peer="ben", reason="was away")
    else:
        life.last = life.later
    done = life.live()
    assert torch.equal(model_in(life.folder), life.later) and not life.said()
    assert done.own_loss is None or when == "at the end"


@pytest.mark.parametrize("method", ["gossip", "diloco"])
@pytest.mark.parametrize("spoil", SPOILT)
def test_a_model_that_is_missing_broken_or_another_is_written(tmp_path: Path, spoil: Spoil, method: str) -> None:
    life = Life(tmp_path, method)
    life.leave(life.consensus)
    spoil(life.folder.model_path)
    life.live()
    assert torch.equal(model_in(life.folder), life.own)
    assert life.said() == (["no-final-model"] if method == "gossip" else []), "in rounds its state is the run's"


@pytest.mark.parametrize(("run_tokens", "said"), [(TOTAL, []), (TOTAL - 1, ["going-on-alone"])])
def test_it_does_not_say_that_it_goes_on_where_nothing_is_left_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_tokens: int, said: list[str]
) -> None:
    monkeypatch.setattr("swarmtrain.peer.training.model_training._ALONE_AFTER_S", 0.0)
    life = Life(tmp_path, run_tokens=run_tokens)
    life.training._look_for_others()
    assert life.said() == said


def test_a_first_life_that_ends_alone_writes_its_model(tmp_path: Path) -> None:
    life = Life(tmp_path, run_tokens=TOTAL - 1)
    life.live()
    assert torch.equal(model_in(life.folder), life.own) and not life.said()


@pytest.mark.parametrize("diverged", ["both", "the consensus", "its own"])
def test_a_final_model_without_a_finite_loss_is_saved_and_told(tmp_path: Path, diverged: str) -> None:
    """Seen: no event can hold a NaN, so the peer failed with the loss in its hand, before it saved."""
    life = Life(tmp_path)
    life.last = life.later
    if diverged != "the consensus":
        life.diverge()
    if diverged != "its own":
        life.last[3] = math.nan
    done = life.live()
    assert torch.equal(model_in(life.folder).nan_to_num(), life.last.nan_to_num())
    told = [event for event in life.events if isinstance(event, EvalEvent)]
    if diverged == "its own":
        assert done.held_out_loss == told[0].held_out_loss and told[0].own_loss is None and not life.said()
    else:
        assert done.held_out_loss is None and life.said() == ["training-diverged"] and not told
        assert "not a finite number" in (life.folder.model_path / "README.md").read_text()
    assert (done.own_loss is not None) is (diverged == "the consensus")
    assert done.reason == "total_tokens" and all(to_json_line(event) for event in [*life.events, done])


def test_a_peer_that_is_stopped_between_a_loss_that_is_not_finite_and_the_end_still_ends(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.diverge()

    def is_asked(theta: Tensor) -> Tensor:
        raise Interrupted

    life.training.exchange.final_theta = is_asked
    assert life.live().held_out_loss is None


def test_a_model_of_another_run_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    folder, published = PeerFolder(tmp_path), published_run()
    leave_model(folder, published, weights_of(published, 2))
    assert kept_final_model(folder, published) is not None
    other, learnt = published_run("diloco"), MAGIC + bytes([97, 0, 0, 0, 98, 0, 0, 0])
    assert kept_final_model(folder, other) is None
    assert kept_final_model(folder, dataclasses.replace(published, tokenizer=learnt)) is None


# ---------------------------------------------------------------- a bootstrap


def boot(path: Path, kind: type[Any] = bootstrap._Bootstrap) -> tuple[Any, list[Event]]:
    """Restart a bootstrap in `path`, with the run's last state."""
    events: list[Event] = []
    control: Any = SimpleNamespace(emit=events.append, stop=StopFlag())
    published, anything = published_run(), None
    peer = kind(
        published, PeerSettings(directory=path, name="b", samples_archive=False), PeerFolder(path), anything, control
    )
    return peer, events


KINDS = {"whole": bootstrap._Bootstrap, "pipeline": pipeline_bootstrap.PipelineBootstrap}


def has(peer: Any, theta: Tensor) -> None:
    """Check that the folder has these weights of the run."""
    progress = Progress(round=9, run_tokens=TOTAL)
    if isinstance(peer, bootstrap._Bootstrap):
        peer.state, peer.progress = OuterState(theta, theta), progress
    else:
        peer.archives = [SimpleNamespace(progress=progress)]
        model = build_model(peer.published.run.model, 0)
        peer._joined = lambda: weights_in(model, theta)


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_model_writes_a_sample_for_the_page(tmp_path: Path, kind: str) -> None:
    peer, _ = boot(tmp_path, KINDS[kind])
    peer.settings = dataclasses.replace(peer.settings, samples_archive=True)
    history = PeerHistory()
    history.begin(peer.published.sha256, TOTAL)
    peer.control.board = SimpleNamespace(history=history, beat=lambda: None)
    peer.has_news = True
    has(peer, weights_of(peer.published, 4))
    peer._measure_and_save()
    told = history.message()
    assert told.sample.run_tokens == TOTAL and told.sample.round == 9 and told.sample.prompt
    assert [point.held_out_loss for point in told.points] == [peer.loss.nats_per_byte]


@pytest.mark.parametrize("kind", KINDS)
def test_a_final_model_that_cannot_write_ends_its_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    monkeypatch.setattr("swarmtrain.peer.lifecycle.bootstrap_peer.text_sample", fail)
    peer, _ = boot(tmp_path, KINDS[kind])
    peer.settings = dataclasses.replace(peer.settings, samples_archive=True)
    history = PeerHistory()
    history.begin(peer.published.sha256, TOTAL)
    peer.control.board = SimpleNamespace(history=history, beat=lambda: None)
    peer.has_news = True
    has(peer, weights_of(peer.published, 4))
    peer._measure_and_save()
    told = history.message()
    assert [point.held_out_loss for point in told.points] == [peer.loss.nats_per_byte] and not told.HasField("sample")


@pytest.mark.parametrize("kind", KINDS)
def test_a_bootstrap_saves_a_final_model_without_a_finite_loss(tmp_path: Path, kind: str) -> None:
    peer, events = boot(tmp_path, KINDS[kind])
    peer.settings = dataclasses.replace(peer.settings, samples_archive=True)
    theta = weights_of(peer.published, 4)
    theta[3] = math.nan
    peer.has_news = True
    has(peer, theta)
    peer._measure_and_save()
    assert torch.equal(model_in(peer.folder).isnan(), theta.isnan())
    assert [getattr(event, "code", event) for event in events] == ["training-diverged"]
    assert peer.ended("total_tokens", TOTAL).held_out_loss is None
    again, events = boot(tmp_path, KINDS[kind])
    has(again, weights_of(peer.published, 5))
    again._measure_and_save()
    assert [getattr(event, "code", event) for event in events] == ["training-diverged", "run-had-ended"]
    assert bool(model_in(peer.folder).isnan().any()), "it stays as it is"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bootstrap_that_is_started_again_leaves_its_model_as_it_is(tmp_path: Path, kind: str) -> None:
    peer, events = boot(tmp_path, KINDS[kind])
    consensus, archived = (weights_of(peer.published, seed) for seed in (2, 4))
    leave_model(peer.folder, peer.published, consensus)
    has(peer, archived)
    peer._measure_and_save()
    assert is_untouched(peer.folder)
    (said,) = [event for event in events if isinstance(event, WarningEvent)]
    assert said.code == "run-had-ended" and str(peer.folder.model_path) in said.message
    kept = load_exported(peer.folder.model_path).model
    assert peer.loss == held_out_loss_of(kept, peer.published, ByteTokenizer())


def test_an_archive_is_written_from_the_state_without_building_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, events = boot(tmp_path, bootstrap._Bootstrap)
    theta = weights_of(peer.published, 4)
    specs = tensor_specs(build_model(peer.published.run.model, 0).named_parameters())
    peer.swarm = SimpleNamespace(specs=specs)

    def build(self: GPT, section: ModelSection) -> None:
        raise AssertionError("a model as large as the state")

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "__init__", build)
        peer._write_kept(SimpleNamespace(state=OuterState(theta, theta), progress=Progress(round=9, run_tokens=7)))
    (said,) = [event for event in events if isinstance(event, ArchivedEvent)]
    archived = load_exported(peer.folder.archive_path)
    assert torch.equal(flatten(archived.model.parameters()), theta) and archived.run_tokens == said.run_tokens == 7


@pytest.mark.parametrize("source", ["volunteers", "server", "stage"])
def test_a_bootstrap_writes_what_it_has_archived_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    peer, events = boot(tmp_path, KINDS["pipeline" if source == "stage" else "whole"])
    consensus, archived = (weights_of(peer.published, seed) for seed in (2, 4))
    leave_model(peer.folder, peer.published, consensus)
    kept: Any = SimpleNamespace(state=None, progress=None)
    manager = SimpleNamespace(
        keep=lambda kept: None, offer=lambda kept: None, checkpointer=SimpleNamespace(flush=lambda seconds: True)
    )
    peer.manager = manager
    peer._have = peer._write_kept = lambda *what: None
    if source == "volunteers":
        present: Future[object] = Future()
        present.set_result("present")
        peer.network = SimpleNamespace(submit=lambda work: present)
        monkeypatch.setattr(bootstrap, "fetch_consensus_state", lambda *what: None)
        peer._kept = lambda present: kept
        assert peer._archive(SimpleNamespace(membership=SimpleNamespace(volunteers=list)))
    elif source == "server":
        peer.server, peer._of_server = SimpleNamespace(arrivals=7), lambda server: kept
        assert peer._archive_own(None, False)
    else:
        peer._wait = lambda work: None
        archive = SimpleNamespace(number=0, manager=manager, archived=SimpleNamespace(kept_of=lambda present: kept))
        peer._keep(archive, None)
    has(peer, archived)
    peer._measure_and_save()
    assert torch.equal(model_in(peer.folder), archived)
    assert not [event for event in events if isinstance(event, WarningEvent)]


@pytest.mark.parametrize("spoil", [None, *SPOILT])
@pytest.mark.parametrize("has_all", [True, False])
def test_a_pipelines_bootstrap_started_again_knows_that_the_run_had_ended(
    tmp_path: Path, spoil: Spoil | None, has_all: bool
) -> None:
    """Seen: it served on for good, for nobody was there to say that the run was over."""
    peer, _ = boot(tmp_path, pipeline_bootstrap.PipelineBootstrap)
    leave_model(peer.folder, peer.published, weights_of(peer.published, 2))
    if spoil is not None:
        spoil(peer.folder.model_path)
    peer.archives = [SimpleNamespace(state=has_all or None, swarm=None, leavers=None, is_final=False)]

    def rest(leavers: object) -> None:
        raise Interrupted

    peer.rest = rest
    if spoil is None and has_all:
        peer._archive_until_the_end(None)
        assert peer.archives[0].is_final
    else:
        with pytest.raises(Interrupted):
            peer._archive_until_the_end(None)


def test_a_bootstrap_writes_a_model_where_the_one_it_left_is_of_before_the_end(tmp_path: Path) -> None:
    """Nobody had delivered the last state in its life before."""
    peer, _ = boot(tmp_path)
    leave_model(peer.folder, peer.published, weights_of(peer.published, 2), run_tokens=TOTAL - 1)
    archived = weights_of(peer.published, 4)
    has(peer, archived)
    peer._measure_and_save()
    assert torch.equal(model_in(peer.folder), archived)


@pytest.mark.parametrize("has_joined", [False, True])
def test_who_is_to_end_hands_over_what_is_on_its_disk_once_it_has_joined(
    monkeypatch: pytest.MonkeyPatch, has_joined: bool
) -> None:
    """Before, nobody else lacks what it has: it would wait for an archive of what it has not touched."""
    done: list[str] = []
    monkeypatch.setattr("swarmtrain.peer.training.model_training.hand_over", lambda *given: done.append("hand over"))
    training: Any = ModelTraining.__new__(ModelTraining)
    checkpointer = SimpleNamespace(flush=lambda limit_s: done.append("flush"))
    training.manager, training.swarm = SimpleNamespace(checkpointer=checkpointer), None
    training.loop = SimpleNamespace(close=lambda: None)
    training.context = SimpleNamespace(
        control=None, network=None, folder=SimpleNamespace(path=None), stop=SimpleNamespace(reason="interrupted")
    )
    training.session = SimpleNamespace(replica=SimpleNamespace(own_tokens=7, progress=Progress(run_tokens=9)))
    training.has_joined = has_joined
    told = training.hand_over()
    assert (told.tokens, told.run_tokens, told.reason) == (7, 9, "interrupted")
    assert done == (["flush", "hand over"] if has_joined else [])
