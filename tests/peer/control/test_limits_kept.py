"""Enforcer of a peer's limits: it holds and releases the switch, and changes threads and niceness."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from codes import raises_code
from patience import PATIENCE_S

from swarmtrain.errors import UserError
from swarmtrain.events import Event, WarningEvent
from swarmtrain.model.gpt import GPT
from swarmtrain.model.parameter_count import position_numbers
from swarmtrain.model.run_model import build_run_model, check_positions, empty_model, spec_of
from swarmtrain.network.node import TrafficCount
from swarmtrain.peer.control import limits as module
from swarmtrain.peer.control import usage as usage_module
from swarmtrain.peer.control.board import Pulse, StatusBoard, Watched
from swarmtrain.peer.control.limits import LimitEnforcer, check_memory, kept_limits, limit_link
from swarmtrain.peer.control.usage import Usage
from swarmtrain.peer.estimate import Estimate, estimate, estimates_of
from swarmtrain.peer.training.pause import ASKED, PauseSwitch
from swarmtrain.protocol.limits import Limits, parse_hours
from swarmtrain.protocol.watches import COOL_S, PLUGGED_S, QUIET_S, CardMeasurement
from swarmtrain.run import NetworkSection, parse_run
from swarmtrain.run_model import ModelSection
from swarmtrain.v1 import control_pb2 as pb
from swarmtrain.words import counted, size_in_words


class FakeUsage:
    num_processors = 2
    used_bytes = 10**9
    others = 0.0
    battery: bool | None = None
    celsius: float | None = None

    def others_s(self) -> float:
        return self.others

    def memory_bytes(self) -> int:
        return self.used_bytes

    def on_battery(self) -> bool | None:
        return self.battery

    def processor_celsius(self) -> float | None:
        return self.celsius


class FakeCards:
    """Measurements of one card, which the test sets."""

    problem = ""

    def __init__(self) -> None:
        self.share: float | None = 0.0
        self.celsius: float | None = 60.0

    def measure(self) -> list[CardMeasurement]:
        program = "blender" if self.share else ""
        return [
            CardMeasurement(
                name="cuda:0",
                others_share=self.share,
                program=program,
                celsius=self.celsius,
                slowdown_celsius=93.0,
            )
        ]


class Kept:
    """Enforcer at noon, with a fake machine."""

    def __init__(self, limits: Limits | None = None, expected: Callable[[], Estimate | None] = lambda: None) -> None:
        self.pause, self.events, self.usage = PauseSwitch(), list[Event](), FakeUsage()
        self.now = datetime.datetime(2026, 11, 25, 12, 0)
        tell, usage = self.events.append, self.usage
        self.enforcer = LimitEnforcer(limits or Limits(), self.pause, tell, usage, lambda: self.now, expected=expected)


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_hours_hold_at_once_and_release_when_they_come() -> None:
    kept = Kept(Limits(hours=parse_hours("22-7")))
    kept.enforcer.start()
    assert kept.pause.held
    assert kept.pause.reason == "outside the hours 22-7; training resumes at 22:00"
    kept.now = kept.now.replace(hour=22)
    kept.enforcer.tick()
    assert not kept.pause.held


def test_a_change_of_the_hours_brings_it_back() -> None:
    kept = Kept(Limits(hours=parse_hours("22-7")))
    kept.enforcer.start()
    said = kept.enforcer.change(pb.Limits(hours="8-17"))
    assert said == "trains in the hours 8-17; it trains"
    assert not kept.pause.held
    said = kept.enforcer.change(pb.Limits(hours="0-6"))
    assert said == "trains in the hours 0-6; it is paused: outside the hours 0-6; training resumes at 0:00"
    assert kept.enforcer.change(pb.Limits(hours="any")) == "trains at any hour; it trains"


def test_what_the_person_asked_for_stays() -> None:
    kept = Kept(Limits(hours=parse_hours("22-7")))
    kept.pause.hold(ASKED, "you asked for it")
    kept.enforcer.start()
    assert kept.enforcer.change(pb.Limits(hours="any")).endswith("it is paused: you asked for it")
    kept.enforcer.tick()
    assert kept.pause.held


def test_memory_warns_by_an_event_and_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, now_s = Kept(Limits(memory_bytes=2 * 10**9)), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    kept.enforcer.tick()
    assert not kept.events
    kept.usage.used_bytes = 3 * 10**9
    kept.enforcer.tick()
    (warning,) = kept.events
    assert isinstance(warning, WarningEvent) and warning.code == "too-little-memory"
    assert "3 GB" in warning.message and "2 GB" in warning.message
    now_s[0] += 60
    kept.enforcer.tick()
    assert "`swarmtrain limits --memory` allows more" in kept.pause.reason
    assert kept.enforcer.change(pb.Limits(memory_bytes=4 * 10**9)) == "memory 4GB; it trains"
    assert len(kept.events) == 1


def test_a_limit_below_what_the_run_needs_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the estimate of `check` for as many volunteers as are present; a status asks for the limits in turn."""
    run, board, now_s = parse_run("[run]\ntotal_tokens = 50_000_000", "r"), StatusBoard("volunteer", 0.0), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])
    kept = Kept(expected=lambda: board.estimate_now(board.status()))
    board.add_looker(lambda status: status.limits.CopyFrom(kept.enforcer.limits()))
    board.add_looker(lambda status: [status.peers.add(peer=f"{n}", present=True) for n in range(3)] and None)
    assert kept.enforcer.change(pb.Limits(memory_bytes=10**9)) == "memory 1GB; it trains", "not known yet"
    pulse = Pulse(state=pb.PEER_STATE_TRAINING, doing="")
    board.watch(Watched(pulse=lambda: pulse, estimates=estimates_of(run, 14 * 10**6)))
    needs = f"this run needs about {size_in_words(estimate(run, 14 * 10**6, 3).memory_bytes)} of memory with 3 peers"
    said = kept.enforcer.change(pb.Limits(memory_bytes=10**9))
    assert said == f"memory 1GB, and {needs}: training pauses once it uses more than allowed; it trains"
    assert kept.enforcer.change(pb.Limits(memory_bytes=2 * 10**9)) == "memory 2GB; it trains"
    kept.usage.used_bytes = 3 * 10**9
    kept.enforcer.tick()
    (warning,) = kept.events
    assert isinstance(warning, WarningEvent) and warning.message.endswith(f"; {needs}")


def test_other_programs_hold_it_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, now_s = Kept(), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now_s[0])

    def work(seconds: int) -> None:
        for _ in range(seconds // 3):
            now_s[0] += 3.0
            kept.usage.others += 3.0  # one of two processors
            kept.enforcer.tick()

    work(60)
    assert not kept.pause.held
    assert (
        kept.enforcer.change(pb.Limits(only_when_idle=True)) == "trains only while other programs are idle; it trains"
    )
    work(30)
    assert kept.pause.reason == "other programs use 50% of the processors; training resumes after a quiet minute"
    assert kept.enforcer.change(pb.Limits(only_when_idle=False)) == "trains at any load; it trains"


def test_threads_change_between_two_steps_in_the_trainers_thread() -> None:
    all_threads = torch.get_num_threads()
    kept = Kept(Limits(threads=1))
    kept.enforcer.start()
    assert torch.get_num_threads() == 1
    thread = threading.Thread(target=kept.enforcer.change, args=[pb.Limits(threads=all_threads + 1)])
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 1
    kept.enforcer.between_steps()
    assert torch.get_num_threads() == all_threads + 1
    assert (
        kept.enforcer.change(pb.Limits(threads=0))
        == f"{counted(all_threads, 'thread')} from the next inner step on; it trains"
    )
    kept.enforcer.between_steps()
    assert torch.get_num_threads() == all_threads


def test_a_changed_number_of_threads_reaches_each_thread_that_trains() -> None:
    kept, changed = Kept(Limits(threads=2)), threading.Event()
    kept.enforcer.start()
    begun, ended, one_at_a_time = threading.Barrier(3), list[int](), threading.Lock()

    def train() -> None:
        kept.enforcer.between_steps()
        torch.ones(100_000).exp()  # from here on torch keeps this thread's number apart
        begun.wait(PATIENCE_S)
        assert changed.wait(PATIENCE_S)
        with one_at_a_time:
            kept.enforcer.between_steps()
        ended.append(torch.get_num_threads())

    stages = [threading.Thread(target=train) for _ in range(2)]
    for stage in stages:
        stage.start()
    begun.wait(PATIENCE_S)
    kept.enforcer.change(pb.Limits(threads=1))
    changed.set()
    for stage in stages:
        stage.join()
    assert ended == [1, 1]


def test_more_threads_than_cores_are_said_to_slow_it_down() -> None:
    enforcer = Kept().enforcer
    assert enforcer.change(pb.Limits(threads=99)) == (
        "99 threads from the next inner step on, more than the 2 cores here: that only slows it down; it trains"
    )
    assert enforcer.change(pb.Limits(threads=2)) == "2 threads from the next inner step on; it trains"


def test_more_threads_than_cores_are_warned_of_at_the_start() -> None:
    kept = Kept(Limits(threads=99))
    kept.enforcer.start()
    kept.enforcer.tick()
    (warning,) = kept.events
    assert isinstance(warning, WarningEvent) and warning.code == "too-many-threads"
    assert warning.message == "--threads 99: more than the 2 cores here: that only slows it down"
    fits = Kept(Limits(threads=2))
    fits.enforcer.start()
    assert not fits.events


def test_limits_are_told_and_what_is_absent_stays() -> None:
    kept = Kept(Limits(threads=3, memory_bytes=2 * 10**9, hours=parse_hours("8-17"), only_when_idle=True))
    kept.enforcer.change(pb.Limits(threads=2))
    told = kept.enforcer.limits()
    assert (told.threads, told.memory_bytes, told.hours, told.only_when_idle) == (2, 2 * 10**9, "8-17", True)
    assert told.nice == os.getpriority(os.PRIO_PROCESS, 0)


def test_the_link_is_limited_as_given_or_as_the_run_says_and_changes_at_once() -> None:
    kept, traffic = Kept(Limits(up_mbit=4.0)), TrafficCount()
    network = NetworkSection(up_mbit=8.0, down_mbit=16.0)
    assert not kept.enforcer.limits().HasField("up_mbit"), "before there is a link"
    assert kept.enforcer.change(pb.Limits(up_mbit=2.0)) == "sends at most 2 Mbit/s; it trains"
    kept.enforcer.limit_link(traffic, network)
    assert (traffic.up.bytes_per_s, traffic.down.bytes_per_s) == (250_000, 2_000_000)
    said = kept.enforcer.change(pb.Limits(up_mbit=0, down_mbit=1.5))
    assert said == "sends as fast as the link; receives at most 1.5 Mbit/s; it trains"
    assert (traffic.up.bytes_per_s, traffic.down.bytes_per_s) == (0, 187_500)
    told = kept.enforcer.limits()
    assert (told.up_mbit, told.down_mbit) == (0.0, 1.5)
    with raises_code("too-little-bandwidth", UserError, "up: 0.5 ", "32.8 kB/s", "0.53"):
        kept.enforcer.change(pb.Limits(up_mbit=0.5))
    assert kept.enforcer.limits() == told
    with raises_code("too-little-bandwidth", UserError, "down: 0.2 "):
        limit_link(traffic, Limits(down_mbit=0.2), network)
    limit_link(traffic, Limits(down_mbit=0.2), NetworkSection(min_pull_bytes_per_s=0, stall_limit_s=60))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (pb.Limits(up_mbit=-1), "up: -1 Mbit/s is refused; allowed: 0 (no limit) to 100000"),
        (pb.Limits(down_mbit=float("nan")), "allowed: 0 (no limit) to 100000"),
        (pb.Limits(nice=20), "nice: 20 is refused; allowed: 0 (as other programs) to 19"),
        (pb.Limits(nice=-5), "nice: -5 is refused; allowed: 0 (as other programs) to 19"),
        (pb.Limits(threads=10**6), "threads: 1000000 is refused; allowed: 0 (all) to 4096"),
        (pb.Limits(hours="never"), "22-7, 22:30-7:15, 12-13,18-8, or any"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(wanted: pb.Limits, says: str) -> None:
    kept = Kept()
    before = kept.enforcer.limits()
    with raises_code("bad-limit", UserError, says):
        kept.enforcer.change(wanted)
    assert kept.enforcer.limits() == before


NICE = """
import os, subprocess, sys, threading, time
from swarmtrain.peer.control.usage import set_niceness
before = os.getpriority(os.PRIO_PROCESS, 0)
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
ended, yields = threading.Event(), threading.Event()
def yielding():
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), before + 1)
    yields.set()
    ended.wait()
threading.Thread(target=ended.wait).start()
threading.Thread(target=yielding).start()
yields.wait()
set_niceness(before + 2)
tasks = [int(t) for pid in (os.getpid(), child.pid) for t in os.listdir(f"/proc/{pid}/task")]
print(sorted(os.getpriority(os.PRIO_PROCESS, task) - before for task in tasks))
ended.set()
child.communicate(b"\\n")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have a niceness of their own in Linux only")
@pytest.mark.skipif(os.getpriority(os.PRIO_PROCESS, 0) > 16, reason="nothing is left to yield to")
def test_niceness_is_every_threads_and_the_daemons() -> None:
    done = subprocess.run([sys.executable, "-c", NICE], capture_output=True, text=True, check=True)
    assert done.stdout == "[2, 2, 2, 3]\n"


def test_a_niceness_that_is_not_allowed_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nice: int) -> None:
        raise PermissionError

    monkeypatch.setattr(module, "set_niceness", refuse)
    with raises_code("nice-not-lowered", UserError):
        Kept().enforcer.change(pb.Limits(nice=0))
    with raises_code("nice-not-lowered", UserError, "--nice 3"):
        Kept(Limits(nice=3)).enforcer.start()


def test_a_thread_keeps_them_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    kept, ticks = Kept(), threading.Semaphore(0)
    monkeypatch.setattr(kept.enforcer, "tick", ticks.release)
    with kept_limits(kept.enforcer):
        for _ in range(3):
            assert ticks.acquire(timeout=PATIENCE_S)
    assert "limits" not in [thread.name for thread in threading.enumerate()]


def test_they_are_kept_on_whatever_one_look_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run is expected to use is asked of the status, and so of everything that it looks at."""
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    kept, ticks = Kept(), threading.Semaphore(0)

    def tick() -> None:
        ticks.release()
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(kept.enforcer, "tick", ticks.release)
    with kept_limits(kept.enforcer):
        monkeypatch.setattr(kept.enforcer, "tick", tick)
        for _ in range(4):
            assert ticks.acquire(timeout=PATIENCE_S)


def test_a_driver_that_hangs_does_not_keep_a_peer_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(module, "_LAST_LOOK_S", 0.01)
    kept, hangs, answers, over = Kept(), threading.Event(), threading.Event(), threading.Event()

    def tick() -> None:
        hangs.set()
        answers.wait()

    def live() -> None:
        with kept_limits(kept.enforcer):
            monkeypatch.setattr(kept.enforcer, "tick", tick)
            assert hangs.wait(PATIENCE_S)
        over.set()

    threading.Thread(target=live, daemon=True).start()
    is_over = hangs.wait(PATIENCE_S) and over.wait(2.0)
    answers.set()
    assert is_over


def test_a_run_that_needs_more_memory_than_allowed_is_refused() -> None:
    run = parse_run("[run]\ntotal_tokens = 50_000_000", "r")
    check_memory(run, 10**6, 0)
    check_memory(run, 10**6, 2 * 10**9)
    with raises_code("too-little-memory", UserError, "45.2 GB", "2 peers", "--memory allows 2 GB"):
        check_memory(run, 10**9, 2 * 10**9)


def test_a_run_that_fits_if_blocks_are_computed_again_is_not_refused() -> None:
    text = "[run]\ntotal_tokens = 50_000_000\n[model]\nnum_layers = 24\nwidth = 256\ncontext_tokens = 1024"
    run = parse_run(text, "r")
    usual, less = (
        estimate(run, 10**6, 2, microbatch_sequences=1, recomputes=each).memory_bytes for each in (False, True)
    )
    assert less + 200 * 10**6 < usual < estimate(run, 10**6, 2).memory_bytes
    check_memory(run, 10**6, less)
    with raises_code("too-little-memory", UserError, "2 peers"):
        check_memory(run, 10**6, less - 1)


def test_a_table_of_positions_larger_than_the_machine_is_refused_before_it_is_made() -> None:
    """It follows the sequences of a stranger's run, and not its number of parameters."""
    vast = ModelSection(context_tokens=2**20, width=2**15, num_heads=1, num_layers=1)
    run = parse_run("[run]\ntotal_tokens = 50_000_000", "r").model_copy(update={"model": vast})
    builders = [partial(build_run_model, run, None), partial(empty_model, spec_of(run, None))]
    for build in (*builders, partial(check_positions, vast)):
        with raises_code("too-little-memory", UserError, "825 GB", "table of positions"):
            build()
    small = ModelSection()
    assert position_numbers(vast) == 2**35 and position_numbers(small) == GPT(small).rotary.numel()
    narrow = run.model_copy(update={"model": vast.model_copy(update={"num_heads": 1024})})
    costs = [estimate(each, 10**6, 2).memory_bytes for each in (run, narrow)]
    assert costs[0] - costs[1] == 4 * (2**35 - 2**25)


def test_usage_counts_this_process_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the machine to have done nothing meanwhile, the others would have done less by what this process did."""
    machine = psutil.cpu_times()
    monkeypatch.setattr(psutil, "cpu_times", lambda: machine)
    usage = Usage()
    others_before_s, began = usage.others_s(), os.times()
    total = 0
    while os.times().user - began.user < 0.5:
        total += sum(range(1000))
    assert others_before_s - usage.others_s() == pytest.approx(0.5, abs=0.15)
    assert 10**7 < usage.memory_bytes() < 10**11


def test_a_change_that_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def refuse(nice: int) -> None:
        tried.append(nice)
        raise PermissionError

    monkeypatch.setattr(module, "set_niceness", refuse)
    kept, traffic = Kept(Limits(up_mbit=4.0)), TrafficCount()
    kept.enforcer.limit_link(traffic, NetworkSection())
    before = kept.enforcer.limits()
    with raises_code("nice-not-lowered", UserError):
        kept.enforcer.change(pb.Limits(up_mbit=2.0, nice=0))
    with raises_code("too-little-bandwidth", UserError, "up: 0.01 "):
        kept.enforcer.change(pb.Limits(up_mbit=0.01, nice=5))
    assert tried == [0], "what is refused anyway is not tried"
    assert kept.enforcer.limits() == before and before.up_mbit == 4.0


def test_of_two_changes_at_once_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept()
    other = threading.Thread(target=lambda: kept.enforcer.change(pb.Limits(threads=1)))

    def meanwhile(nice: int) -> None:
        other.start()
        other.join(0.1)  # where it is not kept out

    monkeypatch.setattr(module, "set_niceness", meanwhile)
    kept.enforcer.change(pb.Limits(nice=5))
    other.join(PATIENCE_S)
    assert (kept.enforcer.limits().threads, kept.enforcer.limits().nice) == (1, 5)
    assert kept.enforcer._limits.nice == 5


# ---------------------------------------------------------------- a guest on a graphics card and a laptop


class Guest(Kept):
    """Enforcer of a peer on a card, or on the processor, that looks every three seconds of virtual time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limits: Limits | None = None, *, on: str = "cuda:0") -> None:
        super().__init__(limits)
        self.now_s, self.cards = 100.0, FakeCards()
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now_s)
        self.enforcer.start()
        self.enforcer.trains_on([on], self.cards)

    def look(self, seconds: float) -> None:
        for _ in range(round(seconds / module.LOOK_EVERY_S)):
            self.now_s += module.LOOK_EVERY_S
            self.enforcer.tick()

    def warnings(self) -> list[str]:
        return [event.code for event in self.events if isinstance(event, WarningEvent)]


def test_another_program_on_the_card_pauses_it_without_being_asked_and_a_change_lets_it_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = Guest(monkeypatch)
    guest.look(30)
    assert not guest.pause.held
    guest.cards.share = 0.6
    guest.look(30)
    assert guest.pause.reason == "another program uses cuda:0 (blender); training resumes after a quiet minute"
    said = guest.enforcer.change(pb.Limits(gpu_any_time=True))
    assert said == "trains whatever other programs do on the graphics card; it trains"
    guest.look(60)
    assert not guest.pause.held
    said = guest.enforcer.change(pb.Limits(gpu_any_time=False))
    assert said == "pauses while other programs use the graphics card; it trains"
    guest.look(30)
    assert guest.pause.held
    guest.cards.share = 0.0
    guest.look(QUIET_S + 30)
    assert not guest.pause.held and not guest.events


def test_a_peer_on_the_processor_does_not_look_at_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, on="cpu")
    guest.cards.share, guest.cards.celsius = 1.0, 120.0
    guest.look(120)
    assert not guest.pause.held and not guest.events


def test_only_when_idle_is_about_the_processors_on_a_card_too(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, Limits(only_when_idle=True, gpu_any_time=True))
    guest.cards.share = 1.0
    guest.look(60)
    assert not guest.pause.held
    guest.enforcer.change(pb.Limits(only_when_idle=False, gpu_any_time=False))
    guest.look(30)
    assert guest.pause.reason.startswith("another program uses cuda:0")


def test_on_battery_it_pauses_and_one_who_says_so_trains_there(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, on="cpu")
    guest.look(30)
    assert not guest.pause.held, "a machine without a battery"
    guest.usage.battery = True
    guest.look(15)
    assert guest.pause.reason.startswith("this machine runs on battery; ")
    assert guest.enforcer.change(pb.Limits(on_battery=True)) == "trains on battery, too; it trains"
    guest.look(60)
    assert not guest.pause.held
    said = guest.enforcer.change(pb.Limits(on_battery=False))
    assert said.startswith("pauses on battery; it is paused: this machine runs on battery")
    guest.usage.battery = False
    guest.look(PLUGGED_S - 6)
    assert guest.pause.held
    guest.look(12)
    assert not guest.pause.held
    guest.usage.battery = True
    guest.look(15)
    guest.enforcer.change(pb.Limits(on_battery=True))
    guest.usage.battery = False
    assert guest.enforcer.change(pb.Limits(on_battery=False)) == "pauses on battery; it trains"
    guest.usage.battery = None  # it does not tell any more
    guest.look(60)
    assert not guest.pause.held


def test_a_hot_card_pauses_it_by_default_below_where_it_slows_itself_down(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch)
    assert guest.enforcer.limits().max_temperature == 88.0
    guest.cards.celsius = 87.0
    guest.look(60)
    assert not guest.pause.held
    guest.cards.celsius = 88.0
    guest.look(15)
    assert guest.pause.reason.startswith("cuda:0 has 88 °C, and may have 88; ")
    assert guest.enforcer.change(pb.Limits(max_temperature=0.0)) == "trains at any temperature; it trains"
    assert not guest.enforcer.limits().HasField("max_temperature")
    assert guest.enforcer.change(pb.Limits(max_temperature=80.0)) == "pauses at 80 °C; it trains"
    guest.look(15)
    assert guest.pause.reason.startswith("cuda:0 has 88 °C, and may have 80; ")
    guest.cards.celsius = 65.0
    guest.look(COOL_S + 6)
    assert not guest.pause.held
    said = guest.enforcer.change(pb.Limits(max_temperature=-1.0))
    assert said == "pauses shortly before the graphics card would slow itself down for heat; it trains"


def test_without_a_card_the_processor_may_not_be_hotter(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, on="cpu")
    guest.usage.celsius = 99.0
    guest.look(60)
    assert not guest.pause.held, "by default a processor looks after itself"
    guest.enforcer.change(pb.Limits(max_temperature=80.0))
    guest.look(15)
    assert guest.pause.reason.startswith("the processor has 99 °C, and may have 80; ")
    guest.enforcer.change(pb.Limits(max_temperature=0.0))
    assert guest.enforcer.change(pb.Limits(max_temperature=80.0)) == "pauses at 80 °C; it trains", "it begins anew"
    guest.look(15)
    assert guest.pause.held
    assert not guest.events


def test_a_processor_that_does_not_tell_its_temperature_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, Limits(max_temperature=80.0), on="cpu")
    guest.look(60)
    assert guest.warnings() == ["heat-not-measured"] and not guest.pause.held
    on_card = Guest(monkeypatch, Limits(max_temperature=80.0))
    on_card.look(60)
    assert not on_card.events, "the card's counts there"


def test_a_card_that_cannot_be_watched_is_warned_of_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch)
    guest.cards.share, guest.cards.celsius, guest.cards.problem = None, None, "its driver says: GPU is lost"
    guest.look(300)
    assert guest.warnings() == ["card-not-watched"] and not guest.pause.held
    (warning,) = guest.events
    assert isinstance(warning, WarningEvent) and warning.message == (
        "cuda:0: this peer does not see what other programs use of it and its temperature, and does not pause for it: "
        "its driver says: GPU is lost"
    )


def test_what_is_not_asked_for_may_stay_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(monkeypatch, Limits(gpu_any_time=True, max_temperature=0.0))
    guest.cards.share, guest.cards.celsius, guest.cards.problem = None, None, "its driver says: GPU is lost"
    guest.look(60)
    assert not guest.events
    hidden = Guest(monkeypatch)
    hidden.cards.share, hidden.cards.problem = None, "as in a container"
    hidden.look(60)
    (warning,) = hidden.events
    assert isinstance(warning, WarningEvent) and "its temperature" not in warning.message


def test_a_share_of_the_card_changes_while_it_runs_and_does_nothing_on_the_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest = Guest(monkeypatch, Limits(gpu_share=50))
    assert guest.enforcer.card_share == 0.5 and not guest.events
    assert guest.enforcer.change(pb.Limits(gpu_share=25)) == "uses a graphics card for 25% of its time; it trains"
    assert guest.enforcer.card_share == 0.25
    with raises_code("bad-limit", UserError, "gpu-share: 0 % is refused; allowed: 1 to 100"):
        guest.enforcer.change(pb.Limits(gpu_share=0))
    other = Guest(monkeypatch, Limits(gpu_share=50), on="cpu")
    other.look(30)
    assert other.warnings() == ["gpu-share-on-processor"]
    assert other.enforcer.change(pb.Limits(gpu_share=25)) == (
        "uses a graphics card for 25% of its time, which does nothing on the processor (--threads and --nice do); "
        "it trains"
    )


def test_a_status_tells_the_limits_that_apply_here(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = ("gpu_share", "gpu_any_time", "on_battery", "max_temperature")

    def told(guest: Guest) -> list[str]:
        limits = guest.enforcer.limits()
        return [name for name in fields if limits.HasField(name)]

    assert told(Guest(monkeypatch, on="cpu")) == []
    guest = Guest(monkeypatch)
    assert told(guest) == ["gpu_share", "gpu_any_time", "max_temperature"]
    guest.usage.battery = False
    guest.enforcer.tick()
    assert told(guest) == list(fields)
    assert not guest.enforcer.limits().on_battery


# ---------------------------------------------------------------- what a machine tells


@pytest.fixture
def supplies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Folder of a Linux machine's power supplies, empty."""
    monkeypatch.setattr(usage_module.sys, "platform", "linux")
    monkeypatch.setattr(usage_module, "_SUPPLIES", tmp_path)
    return tmp_path


def supply(folder: Path, name: str, **facts: str) -> None:
    (folder / name).mkdir()
    for fact, text in facts.items():
        (folder / name / fact).write_text(f"{text}\n")


@pytest.mark.parametrize(("plugged", "told"), [(True, False), (False, True), (None, None)])
def test_a_laptop_tells_whether_it_is_plugged_in(
    plugged: bool | None, told: bool | None, supplies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supply(supplies, "AC", type="Mains", online="1")
    supply(supplies, "BAT0", type="Battery", scope="System")
    battery = SimpleNamespace(power_plugged=plugged)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert Usage().on_battery() is told


def test_a_mouses_battery_is_not_the_machines(supplies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil takes it for one that is running down."""
    supply(supplies, "hidpp_battery_0", type="Battery", scope="Device", status="Discharging")
    monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=False), raising=False)
    assert Usage().on_battery() is None
    supply(supplies, "BAT0", type="Battery")
    assert Usage().on_battery() is True


def test_a_machine_without_a_battery_or_that_does_not_tell_is_not_on_battery(
    supplies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert Usage().on_battery() is None

    def broken() -> None:
        raise FileNotFoundError("/sys/class/power_supply")

    monkeypatch.setattr(psutil, "sensors_battery", broken)
    assert Usage().on_battery() is None
    monkeypatch.delattr(psutil, "sensors_battery")
    assert Usage().on_battery() is None


def test_the_hottest_part_of_the_processor_counts_and_no_disks_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def heats(**sensors: list[float]) -> None:
        told = {name: [SimpleNamespace(current=heat) for heat in heats] for name, heats in sensors.items()}
        monkeypatch.setattr(psutil, "sensors_temperatures", lambda: told, raising=False)

    heats(acpitz=[40.0], coretemp=[61.0, 72.5], nvme=[80.0])
    assert Usage().processor_celsius() == 72.5
    heats(acpitz=[40.0], nvme=[80.0])
    assert Usage().processor_celsius() == 40.0
    heats(nvme=[80.0])
    assert Usage().processor_celsius() is None
    monkeypatch.delattr(psutil, "sensors_temperatures")
    assert Usage().processor_celsius() is None
