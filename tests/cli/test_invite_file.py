"""Invites by file, health in one word, options by the environment."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from codes import codes_in

from swarmtrain.cli.join import _word_in
from swarmtrain.cli.main import run
from swarmtrain.events import Event, WarningEvent
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, where_it_serves
from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.peer.lifecycle.folder import peer_folder
from swarmtrain.peer.lifecycle.node import show_invite
from swarmtrain.peer.lifecycle.stop import StopFlag


@pytest.mark.parametrize("text", ["st1abc\n", "swarmtrain join st1abc\n", "  st1abc"])
def test_the_invite_is_the_last_word_of_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "invite").write_text(text)
    assert _word_in(tmp_path / "invite", StopFlag()) == "st1abc"
    assert _word_in(None, StopFlag()) == ""


def test_a_file_with_a_broken_line_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "invite").write_text("swarmtrain join st1abc\n  def\n")
    assert _word_in(tmp_path / "invite", StopFlag()) == "st1abc def"


def test_join_takes_the_whole_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told by the message: of something that is no invite, and of one of which a part is missing."""
    for words, said in ((["swarmtrain", "join", "st1abc"], "garbled"), (["swarmtrain join", "us"], "not an invite")):
        assert run(["join", *words, "--dir", str(tmp_path / "peer"), "--threads", "1"]) == 2
        assert said in capsys.readouterr().err


def test_lines_of_several_peers_are_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    home = tmp_path / "swarmtrain"
    with peer_folder(home / "bootstrap-tiny") as first, peer_folder(home / "volunteer-anna") as second:
        first.write_invite("swarmtrain join st1one")
        assert run(["invite"]) == 0
        assert capsys.readouterr().out == "swarmtrain join st1one\n", "one alone can be piped"
        second.write_invite("swarmtrain join st1two")
        (second.path / "status.json").write_text('{"name": "anna", "runName": "tiny"}')
        assert run(["invite"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            f"bootstrap-tiny ({first.path}):",
            "swarmtrain join st1one",
            f"anna, run tiny ({second.path}):",
            "swarmtrain join st1two",
        ]
        assert run(["invite", "--json"]) == 0
        assert '"name": "anna", "run": "tiny"' in capsys.readouterr().out


def test_an_invite_of_private_addresses_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    peer = load_or_create_identity(tmp_path / "key").peer_id
    told: list[Event] = []
    with peer_folder(tmp_path / "swarmtrain" / "bootstrap-tiny") as folder:
        for hosts, said in (
            (("127.0.0.1", "192.168.1.5"), "addresses of a local network only (192.168.1.5): it serves this network;"),
            (("127.0.0.1",), "this machine only;"),
            (("192.168.1.5", "8.8.8.8"), ""),
            (("192.168.1.5", "203.0.113.5"), "leads to 203.0.113.5, which is an example of the documentation"),
        ):
            addresses = tuple(f"/ip4/{host}/tcp/31337" for host in hosts)
            invite, told[:] = Invite("ab" * 32, (InvitedPeer(peer, addresses),)), []
            for is_bootstrap in (False, True):
                me = SimpleNamespace(me=SimpleNamespace(is_bootstrap=is_bootstrap))
                swarm = SimpleNamespace(invite=lambda made=invite: made, presence=me)
                show_invite(swarm, folder, told.append)  # type: ignore[arg-type]
            warned = "192.168.1.5" in hosts and bool(said)  # a rehearsal's bootstrap is at this machine alone
            assert [event.event for event in told] == ["invite", *["warning"] * warned, "invite"]
            assert all(said in event.message for event in told if isinstance(event, WarningEvent))
            assert run(["invite"]) == 0
            printed = capsys.readouterr()
            assert printed.out.startswith("swarmtrain join st1") and bool(printed.err) == bool(said)
            if said:
                is_example = "203.0.113.5" in hosts  # which is not advised again
                assert said in printed.err and ("such as --announce 203.0.113.5:31337" in printed.err) != is_example
    assert where_it_serves(Invite("ab" * 32, (InvitedPeer(peer, ("/dns/home.example.org/tcp/1",)),))) == ""


def test_join_waits_until_the_file_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found, waited = tmp_path / "invite", [], threading.Event()

    class Looked(StopFlag):
        def sleep(self, seconds: float) -> None:
            waited.set()
            super().sleep(0.01)

    thread = threading.Thread(target=lambda: found.append(_word_in(path, Looked())))
    thread.start()
    assert waited.wait(10)
    path.write_text("")  # somebody has just opened it
    path.write_text("st1abc\n")
    thread.join(10)
    assert found == ["st1abc"]
    assert capsys.readouterr().err == f"waiting for an invite in {path}\n"


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for arguments, codes in (
        (["join", "st1abc", "--invite-file", "x"], ["options-conflict"]),
        (["join", "--invite-file", str(tmp_path / "bytes")], ["file-unreadable"]),
        (["join", "--invite-file", str(tmp_path)], []),  # Click's own
        (["status", "--healthy", "--all"], ["options-conflict"]),
        (["status", "--healthy", "--dir", str(tmp_path)], ["no-such-peer"]),
    ):
        assert run(arguments) == 2, arguments
        assert codes_in(capsys.readouterr().err) == codes


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SWARMTRAIN_JOIN_SLOWDOWN", "0.5")
    assert run(["join", "st1abc"]) == 2
    assert "slowdown" in capsys.readouterr().err.lower()
    assert run(["join", "st1abc", "--slowdown", "2", "--dir", "/nowhere/at/all"]) != 0
    assert "slowdown" not in capsys.readouterr().err.lower(), "what is typed goes before"


@pytest.mark.parametrize(
    ("variable", "option", "arguments"),
    [("JOIN_UP", "--up", ["x"]), ("PLAN_LINK_DOWN", "--link-down", ["x"]), ("LOCAL_SLOWDOWN", "--slowdown", ["x"])],
)
def test_a_variable_is_named_as_the_option_is_typed(
    variable: str,
    option: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"SWARMTRAIN_{variable}", "nothing")
    assert run([variable.partition("_")[0].lower(), *arguments]) == 2
    assert option in capsys.readouterr().err
