"""`swarmtrain doctor`: each fault that it names, provoked and found; and what is printed."""

from __future__ import annotations

import errno
import os
import socket
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swarmtrain.cli.main import run as run_command
from swarmtrain.errors import RunTimeError, UnreachableError
from swarmtrain.network.discovery.invite import Invite, InvitedPeer, format_invite
from swarmtrain.network.identity import Identity, new_identity
from swarmtrain.network.reachability.probe import DialOutcome, GreetingAnswer
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.peer.doctor import doctor as doctor_module
from swarmtrain.peer.doctor import machine
from swarmtrain.peer.doctor.devices import check_card, check_card_watch, check_devices
from swarmtrain.peer.doctor.doctor import (
    DialBackPeer,
    Doctor,
    DoctorSettings,
    check_clock,
    check_reachable,
    check_speed,
)
from swarmtrain.peer.doctor.machine import (
    Finding,
    check_addresses,
    check_ports,
    check_power,
    check_python,
    check_torch,
    place_of,
)
from swarmtrain.peer.training.speed import measure_speed
from swarmtrain.protocol.devices import FoundDevice, ProbeResult
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.run import RunFile, parse_run


def a_run(text: str = "") -> RunFile:
    return parse_run(f"[run]\ntotal_tokens = 3_000_000\n{text}", "r")


def a_problem(finding: Finding, found: str, advice: str) -> None:
    assert finding.level == "problem", finding
    assert found in finding.found and advice in finding.advice, finding


def a_warning(finding: Finding, found: str, advice: str) -> None:
    assert finding.level == "warning", finding
    assert found in finding.found and advice in finding.advice, finding


# ---------------------------------------------------------------- Python and torch


def test_python() -> None:
    assert check_python().level == "ok"
    a_problem(check_python((3, 10, 4)), "3.10.4", "Python 3.11 or newer")
    a_problem(check_python((3, 12, 0), "Windows"), "on Windows", "WSL 2")
    a_warning(check_python((3, 12, 0), "Darwin", "arm64"), "3.12.0 on Darwin arm64", "Linux")


def fake_torch(version: str = "2.6.0", instructions: str = "AVX2") -> Any:
    return types.SimpleNamespace(
        __version__=version,
        get_num_threads=lambda: 4,
        backends=types.SimpleNamespace(cpu=types.SimpleNamespace(get_cpu_capability=lambda: instructions)),
    )


def test_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    def broken(name: str) -> Any:
        raise OSError("libtorch.so: cannot open\nand more")

    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    a_problem(check_torch(missing), "No module named 'torch'", "pip install torch")
    a_problem(check_torch(broken), "libtorch.so: cannot open", "pip install torch")
    a_problem(check_torch(lambda name: fake_torch("2.3.1+cpu")), "2.3.1+cpu; 2.4 or newer", "--upgrade torch")
    a_warning(check_torch(lambda name: fake_torch(instructions="DEFAULT")), "no AVX", "slow")
    fine = check_torch(lambda name: fake_torch(), 8)
    assert fine.level == "ok" and "4 of 8 cores" in fine.found


# ---------------------------------------------------------------- ports and addresses


def test_a_taken_port_and_who_has_it() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"
        a_problem(check_ports([address]), f"cannot listen at {address}: the port is taken", "--listen")
        a_problem(check_ports([address], "your peer"), "is taken by your peer", "stop it first")
    assert check_ports([address]).level == "ok", "it is free again"


def test_ports_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_ports(["/ip4/127.0.0.1/tcp/0"]).level == "ok"
    a_problem(check_ports(["/ip4/192.0.2.77/tcp/4001"]), "no such address", "--announce")
    a_problem(check_ports(["/dns/localhost/tcp/1"]), "not an IP address", "--listen")

    def refuse(error: int) -> Callable[..., None]:
        def listen(family: str, host: str, port: int) -> None:
            if family == "ip6" or error == errno.EACCES:
                raise OSError(error, os.strerror(error))

        return listen

    monkeypatch.setattr(machine, "_listen", refuse(errno.EACCES))
    a_problem(check_ports(["/ip4/0.0.0.0/tcp/80"]), "not allowed", "above 1023")
    monkeypatch.setattr(machine, "_listen", refuse(errno.EAFNOSUPPORT))
    assert check_ports(["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0"]).level == "ok", "a machine without IPv6"
    assert check_ports(["/ip6/::/tcp/31337"]).level == "problem", "but that was asked for"


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("10.1.2.3", "private"),
        ("fd00::1", "private"),
        ("100.70.1.2", "provider"),
        ("8.8.8.8", "public"),
        ("2a00:1450::1", "public"),
        ("fe80::1%eth0", None),
        ("224.0.0.1", None),
        ("nonsense", None),
    ],
)
def test_where_an_address_is_reached_from(address: str, place: str | None) -> None:
    assert place_of(address) == place


def test_own_addresses() -> None:
    a_warning(check_addresses(["127.0.0.1", "::1", "fe80::1%lo"]), "loopback only", "connect it to a network")
    assert "private only: 10.0.0.5" in check_addresses(["127.0.0.1", "10.0.0.5"]).found
    assert "public: 8.8.8.8, and private ones" in check_addresses(["10.0.0.5", "8.8.8.8"]).found
    assert check_addresses(doctor_module.own_addresses()).check == "addresses"


# ---------------------------------------------------------------- the run's cost


def test_the_clock() -> None:
    assert check_clock(-0.2, 3).level == "ok"
    a_warning(check_clock(7.5, 3), "7.5 s behind the swarm's (3 peers asked)", "set-ntp")
    a_warning(check_clock(-90, 1), "90.0 s ahead of the swarm's (1 peer asked)", "set it right")


def test_a_slow_machine() -> None:
    run = a_run("[merge]\nmethod = 'diloco'\n")
    round_tokens = run.merge.inner_steps * run.tokens_per_step
    assert check_speed(run, round_tokens / 10, {}).found.endswith("10.0 s for a round of 25 inner steps")
    a_problem(check_speed(run, round_tokens / 601, {}), "10 min 1 s for a round", "would be left out")
    others = {"a": 10.0, "b": 12.0, "c": 0.1}
    a_warning(check_speed(run, run.tokens_per_step, others), "10 times as many steps", "merge.pacing")
    assert check_speed(run, 9 * run.tokens_per_step, others).level == "ok"
    paced = a_run("[merge]\nmethod = 'diloco'\npacing = true\n")
    assert check_speed(paced, paced.tokens_per_step, others).level == "ok", "then nobody waits for long"
    gossip = a_run()
    assert check_speed(gossip, gossip.tokens_per_step / 100, others).level == "ok", "it takes fewer steps in a round"


def test_a_slow_machine_has_its_part_of_a_large_batch() -> None:
    """Nobody computes a whole one, and there is no pacing to ask for."""
    run = a_run("[merge]\nmethod = 'batch'\ninner_steps = 1000\nmax_wait_s = 10\n")
    slow = check_speed(run, run.model.context_tokens / 9, {"a": 1e6})
    assert slow.level == "ok" and "9.0 s for a sequence" in slow.found
    a_problem(check_speed(run, run.model.context_tokens / 11, {}), "11.0 s for a sequence", "merge.max_wait_s")


def test_speed_is_measured_or_guessed() -> None:
    small = a_run(
        "[model]\ncontext_tokens = 16\nnum_layers = 1\nwidth = 16\nnum_heads = 1\n[inner]\nbatch_sequences = 2\n"
    )
    assert measure_speed(small, 0.2) > 0
    huge = a_run("[model]\nnum_layers = 90\nwidth = 8192\nnum_heads = 8\n")
    assert 0 < measure_speed(huge, 0.2) < 1000, "it would not fit here: nothing was built"


def test_reachable_from_outside_or_not() -> None:
    out = "/ip4/8.8.8.8/tcp/1"
    reached = DialBackPeer("anna", out, DialOutcome.REACHED, "/ip4/1.1.1.1/tcp/31337")
    not_reached, busy = DialBackPeer("ben", out, DialOutcome.NOT_REACHED), DialBackPeer("cleo", out, DialOutcome.BUSY)
    old, silent = DialBackPeer("dora", out, DialOutcome.CANNOT), DialBackPeer("emil", out, DialOutcome.SILENT)
    fine = check_reachable([not_reached, busy, reached], [31337], fixed=True)
    assert fine == Finding("reachable", "ok", "anna could dial this machine at /ip4/1.1.1.1/tcp/31337")
    near = DialBackPeer("anna", out, DialOutcome.REACHED, "/ip4/192.168.1.7/tcp/1")
    assert "within this network; nobody outside" in check_reachable([near], [1], fixed=True).found
    here = DialBackPeer("anna", out, DialOutcome.REACHED, "/ip6/::1/tcp/1")
    assert "on this machine; nobody outside" in check_reachable([here], [1], fixed=True).found

    closed = check_reachable([old, not_reached, busy], [31337], fixed=True)
    a_warning(closed, "ben could not dial this machine at port 31337", "forward it in the router")
    assert "--listen" not in closed.advice and "only with peers that it dials" in closed.found
    served = check_reachable([not_reached], [31337], fixed=True, hosted=True)
    a_warning(served, "two others will serve its work on", "nothing need be done; to be dialled, let the port in")
    a_warning(check_reachable([not_reached], [40000], fixed=False), "port 40000", "--listen :31337")
    a_warning(check_reachable([old], [31337], fixed=True), "dora run an older swarmtrain", "TCP port 31337")
    a_warning(check_reachable([old, busy, silent], [1], fixed=True), "cleo: busy, emil: no answer", "in a minute")


# ---------------------------------------------------------------- devices

CPU = FoundDevice(name="cpu", title="")
CARD = FoundDevice(name="cuda:0", title="A Card", precisions=("fp32", "bf16"), free_bytes=8_000_000_000)


def test_devices_are_listed_and_a_card_that_torch_misses_is_warned_of() -> None:
    none = check_devices([CPU], "")
    assert none.level == "ok" and none.found == "the processor; no graphics card was found"
    assert check_devices([CARD, CPU], "").found == "cuda:0 (A Card), 8 GB free; the processor"
    a_warning(
        check_devices([CPU], "a graphics card is here, but"), "the processor; a graphics card is here", "pytorch.org"
    )


def test_a_card_is_tried_if_the_run_fits() -> None:
    tried: list[FoundDevice] = []

    def probe(result: ProbeResult) -> Callable[[FoundDevice], ProbeResult]:
        def look(card: FoundDevice) -> ProbeResult:
            tried.append(card)
            return result

        return look

    works = probe(ProbeResult(tokens_per_s={"fp32": 100.0, "bf16": 310.0}))
    small = check_card(CARD, 9_000_000_000, works)
    a_warning(small, "8 GB free, and this run needs at least 9 GB there", "on the processor: end other programs")
    assert not tried
    fine = check_card(CARD, 7_000_000_000, works)
    assert fine.level == "ok" and "in bf16: in a probe 3.1 times as fast as fp32" in fine.found and tried == [CARD]
    broken = check_card(CARD, 1, probe(ProbeResult(tokens_per_s={}, problem="bf16: it computes a loss of 3")))
    a_warning(broken, "cuda:0 (A Card) does not work: bf16: it computes", "the card's driver")


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("problem", ["", "no kernel image is available"])
def test_speed_is_that_of_a_card_that_works(
    stages: int, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed_on: list[ComputeDevice | None] = []

    def measure(run: RunFile, compute: ComputeDevice | None) -> float:
        computed_on.append(compute)
        return 1e6

    result = ProbeResult(tokens_per_s={} if problem else {"fp32": 100.0, "bf16": 310.0}, problem=problem)
    monkeypatch.setattr("swarmtrain.peer.devices.machine.find_devices", lambda parameters: [CARD, CPU])
    monkeypatch.setattr("swarmtrain.peer.devices.machine.probe_device", lambda run, card, precisions: result)
    monkeypatch.setattr("swarmtrain.peer.training.speed.measure_speed", measure)
    monkeypatch.setattr("swarmtrain.peer.devices.card_usage.card_problem", lambda name: "")
    settings = DoctorSettings(invite=None, directory=tmp_path)
    with Doctor(settings) as doctor:
        assert [each.found for each in doctor.look_at_devices()] == [
            "cuda:0 (A Card), 8 GB free; the processor",
            "cuda:0 can be watched: training pauses while other programs use it",
        ]
        doctor.run = a_run(f"[pipeline]\nstages = {stages}\n")
        devices, (speed,) = list(doctor.look_at_devices()), list(doctor.look_at_speed())
    assert len(devices) == 3
    if problem:
        assert computed_on == [None] and "tokens/s:" in speed.found
    else:
        sequences = doctor.run.inner.batch_sequences if stages == 1 else doctor.run.microbatch_sequences
        assert computed_on == [ComputeDevice(torch.device("cuda:0"), "bf16", sequences)]
        assert "1 M tokens/s on cuda:0: " in speed.found


def test_a_card_that_cannot_be_watched() -> None:
    problem = "nvidia-ml-py is not installed here (pip install nvidia-ml-py)"
    a_warning(check_card_watch("cuda:0", problem), f"while other programs use it: {problem}", "--gpu-share")
    assert check_card_watch("cuda:0", "").level == "ok"


def test_power() -> None:
    assert check_power(None) == [], "a machine without a battery"
    (plugged,) = check_power(False)
    assert plugged.level == "ok"
    (unplugged,) = check_power(True)
    a_warning(unplugged, "runs on battery, on which training pauses", "--on-battery")


# ---------------------------------------------------------------- a whole examination


@pytest.fixture
def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Finding]]]:
    """Examines with what is given, without a daemon; everything local is fine."""
    monkeypatch.setattr(Doctor, "_start", lambda self, name, listen, announce=(): FakeNode())
    monkeypatch.setattr(doctor_module.Usage, "on_battery", lambda self: None)

    def examine(invite: str | None = None, **changes: Any) -> list[Finding]:
        settings = DoctorSettings(
            invite=invite,
            directory=tmp_path / "peer",
            **changes,
        )
        looked_at: list[str] = []
        with Doctor(settings) as doctor:
            doctor.look_at_daemon = lambda: Finding("daemon", "ok", "fake")  # type: ignore[method-assign]
            findings = list(doctor.findings(looked_at.append))
            temporary = Path(doctor._temporary.name)
        assert not temporary.exists() and not doctor.network._thread.is_alive()
        assert {finding.check for finding in findings} <= set(looked_at)
        return findings

    yield examine


class FakeNode:
    identity = new_identity(bytes([2]) * 32)

    async def stop(self) -> None: ...

    async def addresses(self) -> tuple[str, ...]:
        return ("/ip4/127.0.0.1/tcp/31337", "/ip6/::1/tcp/31338", "/ip4/10.0.0.1/tcp/31337")


def worst(findings: list[Finding], check: str) -> Finding:
    order = {"ok": 0, "warning": 1, "problem": 2}
    return max((finding for finding in findings if finding.check == check), key=lambda f: order[f.level])


def test_without_an_invite_only_this_machine_is_looked_at(examined: Callable[..., list[Finding]]) -> None:
    findings = examined()
    assert [finding.check for finding in findings] == [
        "python", "torch", "daemon", "ports", "addresses", "device",
    ]  # fmt: skip
    assert {finding.level for finding in findings} <= {"ok", "warning"}


def test_without_torch_the_rest_is_still_looked_at(
    examined: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "check_torch", lambda: Finding("torch", "problem", "missing", "install it"))
    assert [finding.check for finding in examined()] == [
        "python", "torch", "ports", "addresses",
    ]  # fmt: skip


def test_a_check_that_trips_is_a_finding(
    examined: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "own_addresses", lambda: 1 / 0)
    a_problem(worst(examined(), "addresses"), "ZeroDivisionError", "please report it")


def test_a_daemon_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Doctor, name: str, listen: object) -> None:
        raise RunTimeError("the network daemon did not start: Exec format error")

    monkeypatch.setattr(Doctor, "_start", refuse)
    settings = DoctorSettings(invite=None, directory=tmp_path)
    with Doctor(settings) as doctor:
        a_problem(doctor.look_at_daemon(), "Exec format error", "install hivemind again")


RUN_SHA256 = "ab" * 32
ANNA, BEN = new_identity(bytes(32)).peer_id, new_identity(bytes([1]) * 32).peer_id
WORD = format_invite(
    Invite(
        RUN_SHA256,
        (InvitedPeer(ANNA, ("/ip4/203.0.113.5/tcp/1",)), InvitedPeer(BEN, ("/ip4/203.0.113.6/tcp/2",))),
    )
)


def an_answer(peer: str, **changes: Any) -> GreetingAnswer:
    known = (PeerInfo(peer=peer, name="anna", steps_per_s=2.0),)
    fields: dict[str, Any] = {
        "peer": peer,
        "name": "anna" if peer == ANNA else "",
        "address": "/ip4/203.0.113.5/tcp/1",
        "round_trip_s": 0.0123,
        "offset_s": 0.1,
        "version": doctor_module.__version__,
        "known": known,
    }
    return GreetingAnswer(**{**fields, **changes})


def knocking(answers: dict[str, GreetingAnswer | str]) -> Callable[..., Any]:
    async def knock(node: object, run_sha256: str, peer: InvitedPeer, limit_s: float) -> GreetingAnswer:
        answer = answers.get(peer.peer, "it does not answer")
        if isinstance(answer, str):
            raise UnreachableError(answer)
        return answer

    return knock


def test_a_garbled_invite(examined: Callable[..., list[Finding]]) -> None:
    findings = examined(WORD[:-3])
    a_problem(worst(findings, "invite"), "garbled or cut off", "copy it in one piece")
    assert "peers" not in {finding.check for finding in findings}
    a_problem(worst(examined("st9abc"), "invite"), "another version (st9", "update it where you installed it from")


def test_nobody_answers_and_another_run(
    examined: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "knock", knocking({}))
    findings = examined(WORD)
    assert len([finding for finding in findings if finding.check == "peers"]) == 2
    a_problem(worst(findings, "peers"), "does not answer at /ip4/203.0.113.", "is the swarm up")
    assert not {"clock", "speed", "data"} & {finding.check for finding in findings}
    other = "it does not serve this run"
    monkeypatch.setattr(doctor_module, "knock", knocking({ANNA: other, BEN: other}))
    a_problem(worst(examined(WORD), "peers"), "/ip4/203.0.113.5/tcp/1 serves another run", "new invite")


def test_one_silent_peer_of_two_an_old_one_and_a_wrong_clock(
    examined: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "knock", knocking({ANNA: an_answer(ANNA, offset_s=60.0, version="9.1")}))

    async def nothing(self: object, peer: str, sha256: str, max_bytes: int) -> bytes:
        raise UnreachableError("it does not hold this file of the run")

    monkeypatch.setattr(doctor_module.PeerCalls, "blob_untrusted", nothing)
    findings = examined(WORD)
    peers = [finding for finding in findings if finding.check == "peers"]
    a_warning(peers[0], "anna answers in 12.3 ms at /ip4/203.0.113.5/tcp/1; it runs swarmtrain 9.1", "the version")
    a_warning(peers[1], f"{BEN[-6:]} does not answer", "nothing need be done")
    a_warning(worst(findings, "clock"), "60.0 s behind", "set it right")
    a_problem(worst(findings, "run"), "nobody who answers delivers the run file", "new invite")


def test_a_run_that_was_altered(examined: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    async def altered(self: object, peer: str, sha256: str, max_bytes: int) -> bytes:
        return b"[run]\n"

    monkeypatch.setattr(doctor_module, "knock", knocking({ANNA: an_answer(ANNA), BEN: an_answer(BEN)}))
    monkeypatch.setattr(doctor_module.PeerCalls, "blob_untrusted", altered)
    a_problem(worst(examined(WORD), "run"), "does not match its hash", "new invite")


def test_a_few_are_asked_to_dial_the_nearest_to_everyone_first(
    examined: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    async def ask(node: object, run: str, peer: str, listener: Identity, ports: list[int]) -> tuple[DialOutcome, str]:
        assert listener is FakeNode.identity
        asked.append((peer, tuple(ports)))
        return DialOutcome.NOT_REACHED, ""

    near = an_answer(ANNA, address="/ip4/127.0.0.1/tcp/1")
    far = an_answer(BEN, address="/ip4/8.8.8.8/tcp/2")
    monkeypatch.setattr(doctor_module, "knock", knocking({ANNA: near, BEN: far}))
    monkeypatch.setattr(doctor_module, "ask_to_dial", ask)
    monkeypatch.setattr(Doctor, "look_at_run", lambda self: iter(()))
    finding = worst(examined(WORD), "reachable")
    a_warning(finding, f"{BEN[-6:]}, anna could not dial this machine at port 31337 or 31338", "--listen :31337")
    assert asked == [(BEN, (31337, 31338)), (ANNA, (31337, 31338))]

    def taken(self: Doctor, name: str, listen: object, announce: object = ()) -> FakeNode:
        if name == "listener":
            raise RunTimeError("cannot listen: the port is taken")
        return FakeNode()

    monkeypatch.setattr(Doctor, "_start", taken)
    a_warning(worst(examined(WORD), "reachable"), "nothing could listen here", "see ports")
    assert len(asked) == 2, "nobody is asked then"


# ---------------------------------------------------------------- the command


class FakeDoctor:
    findings_to_give: tuple[Finding, ...] = ()

    def __init__(self, settings: DoctorSettings) -> None:
        assert settings.directory.name in ("volunteer", "here")

    def __enter__(self) -> FakeDoctor:
        return self

    def __exit__(self, *_: object) -> None: ...

    def findings(self, begin: Callable[[str], None]) -> Iterator[Finding]:
        begin("python")
        yield from self.findings_to_give


FINE, POOR = Finding("python", "ok", "3.12"), Finding("clock", "warning", "off", "set it")
BAD = Finding("ports", "problem", "taken\x1b[2J", "choose another")


def test_lines_and_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor_module, "Doctor", FakeDoctor)
    monkeypatch.setattr(FakeDoctor, "findings_to_give", (FINE, POOR))
    assert run_command(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "ok       python     3.12",
        "warning  clock      off",
        " " * 20 + "-> set it",
        "1 warning",
    ]
    assert err == ""
    monkeypatch.setattr(FakeDoctor, "findings_to_give", (FINE, BAD, POOR))
    assert run_command(["doctor", "INVITE", "--dir", "here"]) == 1
    out = capsys.readouterr().out
    assert r"taken\x1b[2J" in out and out.endswith("1 problem, 1 warning\n")
    monkeypatch.setattr(FakeDoctor, "findings_to_give", (FINE,))
    assert run_command(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("all is well\n")


def test_wrong_use_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--listen", "nowhere"]) == 2
    assert run_command(["doctor", "--data", "/nowhere"]) == 2
    assert run_command(["doctor", "a", "b"]) == 2
