"""Files that a peer keeps in its folder while it runs: known peers, its newest checkpoint on request, its run."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from codes import raises_code

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.events import Event, WarningEvent, to_plain_line
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.discovery.token_accounting import TokenAccounting
from swarmtrain.network.identity import new_identity
from swarmtrain.network.rounds.roster import sign_roster
from swarmtrain.peer.bootstrap import publish_run
from swarmtrain.peer.checkpoints import export
from swarmtrain.peer.checkpoints.checkpoint import Checkpoint
from swarmtrain.peer.checkpoints.export import export_from_folder, model_of_folder, onlooker_place
from swarmtrain.peer.checkpoints.files import CheckpointFolder, StoredCheckpoint
from swarmtrain.peer.checkpoints.manager import (
    CheckpointManager,
    PeersFile,
    checkpointer_of,
    kept_stages,
    known_peers,
    run_to_resume,
)
from swarmtrain.peer.lifecycle.folder import PeerFolder, peer_folder
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.rosters import Roster, RoundPublication
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.protocol.tokens.tally import CountingRules
from swarmtrain.run import parse_run
from swarmtrain.v1 import control_pb2 as pb

IDENTITY = new_identity()
ME = IDENTITY.peer_id
BEN = new_identity().peer_id
LIMIT_S = 60.0


def invited(peer: str, port: int) -> InvitedPeer:
    return InvitedPeer(peer, (f"/ip4/127.0.0.1/tcp/{port}",))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    base = tmp_path_factory.mktemp("run")
    for number in range(50):
        (base / f"{number}.txt").write_text("".join(f"line {number} {i * i}\n" for i in range(200)))
    text = (
        "[run]\ntotal_tokens = 100_000\n[data]\nsource = 'text'\npaths = ['*.txt']\nheld_out_bytes = 1024\n"
        "[model]\ncontext_tokens = 16\nnum_layers = 1\nwidth = 16\nnum_heads = 2\n"
    )
    return publish_run(parse_run(text, "r"), base, datetime.datetime.now(datetime.UTC))


def merged(published: PublishedRun, value: float) -> Checkpoint:
    """Return a state after one round, with all weights `value`."""
    entry = RoundPublication(peer=ME, snapshot="11" * 32, tokens=published.run.tokens_per_step, inner_steps=1)
    roster = Roster(round=0, signer=ME, entries=(entry,))
    theta = torch.full((num_parameters(published.run.model),), value)
    return Checkpoint(
        state=OuterState(theta, torch.zeros_like(theta)),
        progress=Progress().after((ME,), (entry.tokens,), roster.digest),
        roster=roster,
        signed_roster=sign_roster(IDENTITY, published.sha256, roster),
    )


def swarm_of(published: PublishedRun, now: float = 50.0, **parts: Any) -> Any:
    """Make the parts of a swarm that a checkpoint manager uses."""
    return SimpleNamespace(
        published=published, asynchronous=True, accounting=accounting(published, now), membership=None, **parts
    )


def manager(path: Path, published: PublishedRun, now: float = 50.0) -> tuple[CheckpointManager, list[Event]]:
    events: list[Event] = []
    path.mkdir(exist_ok=True)
    folder = PeerFolder(path)
    folder.keep_run(published)
    checkpointer = checkpointer_of(folder, published, ME, events.append)
    return CheckpointManager(folder, checkpointer, swarm_of(published, now), events.append), events


def test_who_is_away_is_remembered_after_those_who_are_here() -> None:
    before = (invited("a", 1), invited("b", 2))
    assert known_peers([invited("c", 3), invited("a", 9)], before) == (
        invited("c", 3),
        invited("a", 9),
        invited("b", 2),
    )
    assert known_peers([], before) == before
    many = [invited(str(n), n) for n in range(99)]
    assert known_peers(many, ()) == tuple(many[:16])
    assert known_peers(many, before) == (*many[:14], *before), "a full list does not push out who is away"
    others = tuple(invited(f"away {n}", n) for n in range(9))
    assert known_peers(many, others) == (*many[:12], *others[:4])
    assert known_peers(many[:10], others) == (*many[:10], *others[:6])


def accounting(published: PublishedRun, now: float) -> TokenAccounting:
    anything: Any = None
    rules = CountingRules(began_s=0.0, burst_tokens=200, most_tokens=10**9)
    return TokenAccounting(ME, rules, anything, lambda: {BEN: 10.0, ME: 10.0}, lambda: now, lambda *told: None)


def test_counts_outlive_a_kill_between_two_checkpoints_and_an_old_folder_takes_nothing_away(
    tmp_path: Path, published: PublishedRun
) -> None:
    kept, events = manager(tmp_path / "peer", published)
    kept.keep_counts()
    path = kept.folder.path / "counts.json"
    assert not path.exists(), "there are none"
    kept.swarm.accounting.adopt([{BEN: 5000}])
    kept.keep_counts()
    written = path.read_bytes()
    kept.keep_counts()
    assert path.read_bytes() == written, "nothing has changed"

    again, _ = manager(tmp_path / "peer", published, 60.0)
    again.restore_counts()
    assert again.swarm.accounting.contributions() == {BEN: 5000}
    newer, of_newer = manager(tmp_path / "peer", published, 60.0)
    newer.swarm.accounting.adopt([{BEN: 9000}])
    newer.restore_counts()
    assert newer.swarm.accounting.contributions() == {BEN: 9000}

    for other in (b'{"run_sha256": "ab"}', b"[]", b"no json"):
        path.write_bytes(other)
        of_another, told = manager(tmp_path / "peer", published, 60.0)
        of_another.restore_counts()
        assert of_another.swarm.accounting.contributions() == {} and not told
    path.write_text(f'{{"run_sha256": "{published.sha256}", "tally": [[1]]}}')
    newer.restore_counts()
    (warning,) = of_newer
    assert isinstance(warning, WarningEvent) and warning.code == "checkpoint-partly-used"
    assert newer.swarm.accounting.contributions() == {BEN: 9000}
    assert not events


def test_a_stage_has_counts_of_its_own(tmp_path: Path, published: PublishedRun) -> None:
    manager(tmp_path / "peer", published)
    folder = PeerFolder(tmp_path / "peer")
    first, second = (
        CheckpointManager(
            folder,
            checkpointer_of(folder, published, ME, [].append, stage),
            swarm_of(published),
            [].append,
            stage=stage,
        )
        for stage in (0, 1)
    )
    first.swarm.accounting.adopt([{BEN: 5000}])
    first.keep_counts()
    second.restore_counts()
    assert second.swarm.accounting.contributions() == {} and (folder.path / "counts-stage-0.json").exists()


def test_peers_are_written_down_when_they_change(tmp_path: Path, published: PublishedRun) -> None:
    live: list[PeerInfo] = []
    swarm: Any = SimpleNamespace(membership=SimpleNamespace(live=lambda: live))
    kept_by, _ = manager(tmp_path / "peer", published)
    kept = PeersFile(kept_by.folder, swarm)
    kept.keep()
    assert kept_by.folder.kept_peers() == ()
    other = new_identity().peer_id
    live.append(PeerInfo(peer=other, addresses=("/ip4/127.0.0.1/tcp/4711",)))
    kept.keep()
    assert kept_by.folder.kept_peers() == (invited(other, 4711),)
    some = [PeerInfo(peer=new_identity().peer_id, addresses=("/ip4/127.0.0.1/tcp/1",)) for _ in range(20)]
    live += [*some, PeerInfo(peer=ME, addresses=("/ip4/127.0.0.1/tcp/2",), is_bootstrap=True)]
    kept.keep()
    assert kept_by.folder.kept_peers()[:2] == (invited(ME, 2), invited(other, 4711)), "bootstraps first"
    (kept_by.folder.path / "peers.json").unlink()
    kept.keep()
    assert kept_by.folder.kept_peers() == (), "nothing has changed: nothing is written"
    kept_by.peers = kept
    kept_by.keep(merged(published, 1.0))
    kept_by.close()
    assert kept_by.folder.kept_peers() == (), "and still nothing, beside a checkpoint"
    live.append(PeerInfo(peer=new_identity().peer_id, addresses=("/ip4/127.0.0.1/tcp/3",), is_bootstrap=True))
    kept_by, _ = manager(tmp_path / "peer", published)
    kept_by.peers = kept
    kept_by.keep(merged(published, 2.0))
    kept_by.close()
    assert len(kept_by.folder.kept_peers()) == 16, "those who came are, beside the next"


def test_whoever_asks_gets_the_newest_checkpoint(tmp_path: Path, published: PublishedRun) -> None:
    kept, _ = manager(tmp_path / "peer", published)
    status = pb.PeerStatus()
    kept.show(status)
    assert not status.HasField("checkpoint")
    with raises_code("no-checkpoint", RunTimeError):
        kept.flushed()
    kept.keep(merged(published, 1.0))
    reply = kept.flushed()
    assert reply.round == 1 and Path(reply.path).exists()
    kept.show(status)
    assert status.checkpoint.round == 1 and status.checkpoint.size_bytes > 0 and status.checkpoint.time > 0
    assert kept.checkpointer.durable is not None and kept.checkpointer.durable.round == 1

    wrong: Any = object()
    kept.keep(dataclasses.replace(merged(published, 1.0), extra={"wrong": wrong}))
    with raises_code("checkpoint-not-written", RunTimeError):
        kept.flushed()
    kept.close()


def test_a_run_is_resumed_only_with_a_checkpoint_of_it(tmp_path: Path, published: PublishedRun) -> None:
    invite = Invite(published.sha256, (invited(new_identity().peer_id, 4711),))
    kept, _ = manager(tmp_path / "peer", published)
    assert run_to_resume(PeerFolder(tmp_path), invite, ME) is None, "no run is here"
    assert run_to_resume(kept.folder, invite, ME) is None, "there is no checkpoint"
    kept.keep(merged(published, 1.0))
    kept.close()
    assert run_to_resume(kept.folder, invite, ME) == published
    assert run_to_resume(kept.folder, Invite("ab" * 32, invite.peers), ME) is None, "it is another run"
    assert run_to_resume(kept.folder, invite, new_identity().peer_id) is None, "it is another peer's"
    kept.folder.checkpoints_path.rename(tmp_path / "elsewhere")
    kept.folder.checkpoints_path.write_text("no folder")
    assert run_to_resume(kept.folder, invite, ME) is None, "its checkpoints cannot be read"
    kept.folder.checkpoints_path.unlink()
    (tmp_path / "elsewhere").rename(kept.folder.checkpoints_path)
    (kept.folder.path / "held-out.txt").write_bytes(b"altered")
    assert run_to_resume(kept.folder, invite, ME) is None, "a file of the run is not whole"


def test_which_stages_of_a_pipeline_were_kept(tmp_path: Path, published: PublishedRun) -> None:
    first, _ = manager(tmp_path / "peer", published)
    assert kept_stages(first.folder, published, ME, 4) == {}
    for stage, rounds in (0, 1), (2, 3), (3, 3):
        run = published.of_stage(stage)
        files = checkpointer_of(first.folder, run, ME, lambda event: None, stage)
        of_stage = CheckpointManager(first.folder, files, swarm_of(run), lambda event: None, stage=stage)
        state = merged(published, 1.0)
        for number in range(rounds):
            progress = dataclasses.replace(state.progress, round=number + 1)
            of_stage.keep(dataclasses.replace(state, progress=progress))
            assert of_stage.checkpointer.flush(LIMIT_S)
        of_stage.close()
    assert kept_stages(first.folder, published, ME, 4) == {0: 1, 2: 3, 3: 3}
    assert kept_stages(first.folder, published, ME, 3) == {0: 1, 2: 3}
    assert kept_stages(first.folder, published, new_identity().peer_id, 4) == {}


def test_a_restart_finds_what_was_kept(tmp_path: Path, published: PublishedRun) -> None:
    first, _ = manager(tmp_path / "peer", published)
    first.keep(merged(published, 1.0))
    first.keep(merged(published, 2.0))
    first.close()
    newest = max((tmp_path / "peer" / "checkpoints").glob("*.safetensors"))
    again, events = manager(tmp_path / "peer", published)
    kept = again.checkpointer.load(published.run, num_parameters(published.run.model))
    assert kept is not None and float(kept.state.theta[0]) == 2.0 and not events
    assert again.checkpointer.durable == kept.progress and again.checkpointer.last is not None
    newest.write_bytes(b"")
    again, events = manager(tmp_path / "peer", published)
    again.checkpointer.load(published.run, num_parameters(published.run.model))
    assert len(events) == 1 and "is not used: its tensors were torn or altered" in to_plain_line(events[0])


def test_the_model_of_a_running_peer_is_its_newest_checkpoint(tmp_path: Path, published: PublishedRun) -> None:
    """Read while the peer holds its folder. Beside the final model or an archive, those are taken."""
    folder, place = tmp_path / "peer", onlooker_place(tmp_path, None, StopFlag())
    with raises_code("no-model", UserError, "is not the folder of a peer"):
        model_of_folder(folder, place)
    with peer_folder(folder):
        kept, _ = manager(folder, published)
        with raises_code("no-model", UserError, "from the first merged round on"):
            model_of_folder(folder, place)
        kept.keep(merged(published, 0.25))
        kept.keep(merged(published, 0.5))
        assert kept.checkpointer.flush(LIMIT_S)
        before = sorted(folder.rglob("*"))
        exported, what = model_of_folder(folder, place)
        assert before == sorted(folder.rglob("*")), "nothing is written"
        kept.close()
    assert all(bool((tensor == 0.5).all()) for tensor in exported.model.trained_tensors())
    assert exported.run_tokens == published.run.tokens_per_step and exported.held_out == published.held_out
    assert what.startswith(f"the peer's model after 1 round and {exported.run_tokens} tokens of the run, written ")

    export_from_folder(folder, folder / "archive", place)
    assert "newest archive" in model_of_folder(folder, place)[1]
    export_from_folder(folder, folder / "model", place)
    assert "final model" in model_of_folder(folder, place)[1]
    (folder / "model" / "model.safetensors").write_bytes(b"torn")
    assert "newest archive" in model_of_folder(folder, place)[1], "one that is damaged is passed over"


def test_checkpoints_that_the_running_peer_removes_meanwhile_are_looked_for_again(
    tmp_path: Path, published: PublishedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept, _ = manager(tmp_path / "peer", published)
    kept.keep(merged(published, 1.0))
    assert kept.checkpointer.flush(LIMIT_S)
    read, raced = CheckpointFolder.tensors_of, list[str]()

    def raced_once(folder: CheckpointFolder, found: StoredCheckpoint) -> Path:
        if not raced:
            raced.append(found.stem)
            for path in folder.path.iterdir():
                path.unlink()
            kept.keep(merged(published, 2.0))
            assert kept.checkpointer.flush(LIMIT_S)
        return read(folder, found)

    monkeypatch.setattr(CheckpointFolder, "tensors_of", raced_once)
    exported, _ = model_of_folder(tmp_path / "peer", onlooker_place(tmp_path, None, StopFlag()))
    kept.close()
    assert raced and not caplog.records
    assert all(bool((tensor == 2.0).all()) for tensor in exported.model.trained_tensors())


def test_who_holds_stages_takes_the_model_from_the_swarm(
    tmp_path: Path, published: PublishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the invite of the running peer, else through the peers that it knew."""
    asked: list[Invite] = []

    def of_swarm(invite: Invite, place: object, *, accept_clock: bool) -> SimpleNamespace:
        asked.append(invite)
        return SimpleNamespace(run_tokens=7)

    sections = published.run.pipeline.model_copy(update={"stages": 2})
    cut = dataclasses.replace(published, run=published.run.model_copy(update={"pipeline": sections}))
    monkeypatch.setattr(PeerFolder, "kept_run", lambda folder: cut)
    monkeypatch.setattr(export, "model_of_swarm", of_swarm)
    own = Invite(published.sha256, (invited(ME, 7),))
    folder, place = tmp_path / "peer", onlooker_place(tmp_path, None, StopFlag())
    with peer_folder(folder) as held:
        held.keep_peers([invited(BEN, 8)])
        held.write_invite(f"swarmtrain join {format_invite(own)}")
        assert "after 7 tokens" in model_of_folder(folder, place)[1]
    model_of_folder(folder, place)
    assert [[each.peer for each in invite.peers] for invite in asked] == [[ME], [BEN]]
    assert {invite.run_sha256 for invite in asked} == {published.sha256}
