"""Memory of a peer's folder: options given once, limits changed since, and a pause."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from swarmtrain.cli.facts import sentence
from swarmtrain.cli.main import run
from swarmtrain.cli.peers import PeerPhase, View
from swarmtrain.events import DoneEvent
from swarmtrain.network.discovery.invite import Invite, InvitedPeer
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.links.proxy import FailingPulls
from swarmtrain.peer.control.limits import options_of
from swarmtrain.peer.lifecycle.folder import PeerFolder, peer_folder
from swarmtrain.peer.lifecycle.node import PeerSettings
from swarmtrain.peer.lifecycle.run_fetch import RunFetcher
from swarmtrain.peer.lifecycle.start_options import Started, StartedFile
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.protocol.limits import AUTO_TEMPERATURE, Limits, exact_size, parse_size
from swarmtrain.run import parse_run
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.v1 import control_pb2 as wire

DONE = DoneEvent(held_out_loss=None, tokens=0, run_tokens=0, wall_s=0.0, reason="asked")


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PeerSettings]:
    """Collect the settings of each volunteer or bootstrap that is started, without running it."""
    found: list[PeerSettings] = []

    def live(*args: Any) -> DoneEvent:
        settings = next(item for item in args if isinstance(item, PeerSettings))
        settings.directory.mkdir(exist_ok=True)
        (settings.directory / "run.toml").write_text("")
        StartedFile(settings.directory).keep_command(settings.started)
        found.append(settings)
        return DONE

    monkeypatch.setattr("swarmtrain.peer.volunteer.run_volunteer", live)
    monkeypatch.setattr("swarmtrain.peer.bootstrap.run_bootstrap", live)
    monkeypatch.setattr("swarmtrain.cli.join._of_folder", lambda directory: None)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    return found


Lives = list[PeerSettings]
GIVEN = (
    "--data texts --threads 2 --listen 127.0.0.1:4001 --memory 1.5GiB --nice 5 --only-when-idle --hours 22-7 --up 3.5 "
    "--gpu-share 50 --gpu-any-time --on-battery --max-temperature 80 "
    "--name anna --announce 203.0.113.5:4001"
)


def test_a_volunteer_needs_to_be_told_nothing_the_second_time(
    lives: Lives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["join", "--dir", "peer", *GIVEN.split()]) == 0
    assert "as last time" not in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(["join", "--dir", str(tmp_path / "peer")]) == 0
    first, second = lives
    assert second.data_folder == tmp_path / "texts", "wherever it is started"
    assert (second.limits, second.listen, second.announce) == (first.limits, first.listen, first.announce)
    assert second.name == "anna" and first.limits.memory_bytes == 1_610_612_736
    said = capsys.readouterr().err
    assert f"as last time in {tmp_path / 'peer'}: " in said and f"--data {tmp_path / 'texts'}" in said
    assert run(["join", "--dir", str(tmp_path / "peer")]) == 0
    assert lives[2].limits == first.limits, "what was taken is remembered on"


def test_a_rehearsal_brings_its_failing_pulls_and_without_one_all_is_served(lives: Lives) -> None:
    assert run(["join", "--dir", "failing", "--name", "anna", "--fail-pulls", "50"]) == 0
    assert run(["join", "--dir", "whole", "--name", "anna"]) == 0
    failing, whole = (each.num_served_by("anna") for each in lives)
    same = FailingPulls(0.5, "anna")
    served = [failing(20) for _ in range(50)]
    assert served == [same.num_served(20) for _ in range(50)] and min(served) < 20
    assert [whole(20) for _ in range(50)] == [20] * 50


def test_nothing_is_said_of_a_folder_that_is_in_use(
    lives: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["join", "--dir", "peer", "--threads", "2"])
    with peer_folder(tmp_path / "peer"):
        run(["join", "--dir", "peer"])
    assert "as last time" not in capsys.readouterr().err, "it is refused, in one line"


def test_what_is_given_anew_replaces_what_is_remembered(lives: Lives, capsys: pytest.CaptureFixture[str]) -> None:
    run(["join", "--dir", "peer", *GIVEN.split()])
    assert run(["join", "--dir", "peer", "--threads", "1", "--listen", ":5001", "--listen", "[::1]:5002"]) == 0
    said = capsys.readouterr().err
    assert "--threads" not in said and "--listen" not in said and "--nice 5" in said
    assert run(["join", "--dir", "peer", "--hours", "any"]) == 0
    last = lives[-1]
    assert last.limits.threads == 1 and last.listen == ("/ip4/0.0.0.0/tcp/5001", "/ip6/::1/tcp/5002")
    assert not last.limits.hours.ranges and last.limits.nice == 5


def test_what_the_environment_says_is_kept_there_alone(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMTRAIN_JOIN_NICE", "7")
    assert run(["join", "--dir", "peer", "--threads", "2"]) == 0
    monkeypatch.delenv("SWARMTRAIN_JOIN_NICE")
    assert run(["join", "--dir", "peer"]) == 0
    assert [phase.limits.nice for phase in lives] == [7, None]
    assert lives[1].limits.threads == 2


def test_a_folder_of_texts_that_is_gone_is_said(
    lives: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["join", "--dir", "peer", "--data", "texts"])
    (tmp_path / "texts").rmdir()
    assert run(["join", "--dir", "peer"]) == 2
    said = capsys.readouterr().err
    assert (
        "--data, which peer remembers from last time" in said
        and "does not exist" in said
        and "give --data again" in said
    )


def test_a_bootstrap_too(lives: Lives, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\ntotal_tokens = 100_000\n")
    assert run(["bootstrap", "run.toml", "--dir", "boot", "--wait-for", "3", "--listen", ":4001", "--up", "5"]) == 0
    assert run(["bootstrap", "run.toml", "--dir", "boot"]) == 0
    assert lives[1].listen == lives[0].listen and lives[1].limits.up_mbit == 5
    started = StartedFile(tmp_path / "boot").read()
    assert shlex.split(started.line())[:3] == ["swarmtrain", "bootstrap", str(tmp_path / "run.toml")]
    assert started.options["--wait-for"] == ("3",)


def test_the_line_to_start_it_again_has_all_that_was_given(lives: Lives, tmp_path: Path) -> None:
    run(["join", "--dir", "peer", "--data", "texts", "--threads", "2"])
    folder = tmp_path / "peer"
    seen = View(status=wire.PeerStatus(end_reason="no", exit_code=1), phase=PeerPhase.FAILED, folder=folder)
    assert f"start it again with `swarmtrain join --data {tmp_path / 'texts'} --threads 2 --dir {folder}`" in sentence(
        seen
    )


def test_without_a_name_the_last_folder_is_gone_on_in(
    lives: Lives, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home" / "swarmtrain").mkdir(parents=True)
    run(["join", "--name", "anna", "--threads", "3"])
    capsys.readouterr()
    assert run(["join"]) == 0
    assert lives[1].name == "anna" and lives[1].limits.threads == 3
    assert f"continuing in {tmp_path / 'home' / 'swarmtrain' / 'volunteer-anna'}" in capsys.readouterr().err


def test_limits_that_were_changed_are_remembered(lives: Lives, tmp_path: Path) -> None:
    run(["join", "--dir", "peer", *GIVEN.split()])
    file = StartedFile(tmp_path / "peer")
    file.keep_options(options_of(pb.Limits(threads=0, only_when_idle=False, up_mbit=2, memory_bytes=1_234_567_891)))
    run(["join", "--dir", "peer"])
    limits = lives[1].limits
    assert (limits.threads, limits.only_when_idle, limits.up_mbit, limits.memory_bytes) == (0, False, 2, 1_234_567_891)
    file.keep_options(options_of(pb.Limits(hours="any", memory_bytes=0, nice=7)))
    run(["join", "--dir", "peer"])
    limits = lives[2].limits
    assert (limits.hours.ranges, limits.memory_bytes, limits.nice) == ((), 0, 7)


def guest(limits: Limits) -> tuple[int, bool, bool, float]:
    return limits.gpu_share, limits.gpu_any_time, limits.on_battery, limits.max_temperature


def test_how_considerate_it_is_is_remembered_and_given_up_by_a_change(lives: Lives, tmp_path: Path) -> None:
    run(["join", "--dir", "peer"])
    assert guest(lives[0].limits) == (100, False, False, AUTO_TEMPERATURE)
    file = StartedFile(tmp_path / "peer")
    file.keep_options(options_of(pb.Limits(gpu_share=50, gpu_any_time=True, on_battery=True, max_temperature=82.5)))
    run(["join", "--dir", "peer"])
    assert guest(lives[1].limits) == (50, True, True, 82.5)
    file.keep_options(options_of(pb.Limits(on_battery=False, max_temperature=0.0)))
    run(["join", "--dir", "peer", "--gpu-share", "25"])
    assert guest(lives[2].limits) == (25, True, False, 0.0)
    file.keep_options(options_of(pb.Limits(gpu_share=100, gpu_any_time=False, max_temperature=AUTO_TEMPERATURE)))
    run(["join", "--dir", "peer"])
    assert lives[3].limits == lives[0].limits and not file.read().options


@pytest.mark.parametrize("size", ["4GB", "500MB", "1.5GiB", "1.234kB", "0.5kB", "2000TB"])
def test_a_size_is_remembered_to_the_byte(size: str) -> None:
    assert parse_size(exact_size(parse_size(size))) == parse_size(size)


def test_a_file_that_was_torn_is_no_memory(tmp_path: Path) -> None:
    for text in ("", "[]", '{"command": 3}', '{"command": [], "options": [], "paused": true}'):
        (tmp_path / "started.json").write_text(text)
        assert StartedFile(tmp_path).read() == Started()


def test_a_pause_is_kept_through_a_new_command(tmp_path: Path) -> None:
    file = StartedFile(tmp_path)
    file.keep_pause(True)
    file.keep_command(Started(("join",), {"--threads": ("2",)}))
    assert file.read() == Started(("join",), {"--threads": ("2",)}, paused=True)
    file.keep_pause(False)
    assert not file.read().paused


def test_a_disk_that_is_full_only_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swarmtrain.peer.lifecycle.start_options.write_atomically", full)
    StartedFile(tmp_path).keep_pause(True)
    assert not StartedFile(tmp_path).read().paused


def test_whom_the_invite_named_is_remembered_from_the_first_answer_on(tmp_path: Path) -> None:
    run_file = parse_run("[run]\ntotal_tokens = 100_000\n", "run.toml")
    published = PublishedRun(b"", "ab" * 32, run_file, b"text", b"")
    invited = (InvitedPeer("12D3KooW" + "b" * 44, ("/ip4/203.0.113.7/tcp/31337",)),)
    folder = PeerFolder(tmp_path)
    fetcher: Any = RunFetcher(
        invite=Invite("ab" * 32, invited),
        folder=folder,
        network=None,  # type: ignore[arg-type]
        node=None,  # type: ignore[arg-type]
        emit=lambda event: None,
        stop=StopFlag(),
        settings=PeerSettings(directory=tmp_path, name="anna"),
    )
    fetcher.find, fetcher._fetch_from = lambda limit_s: "ben", lambda source: published
    assert fetcher.fetch() == (published, None)
    assert folder.kept_peers() == invited, "it may fail for want of its data before it knows anybody"
