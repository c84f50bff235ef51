"""Run a swarm under a random schedule of kills, stops and restarts, and compare with the same run without faults.

    make soak                                    ten runs of ten minutes
    python tests/processes/soak.py --runs 1 --minutes 2 --seed 7

In each run a bootstrap and four volunteers train a tiny model. Throughout the run, about every second one of them is
killed (SIGKILL), asked to end (SIGTERM) or stopped for a while (SIGSTOP), and started again with its folder and the
first invite. At the end the invariants are checked; each run prints a line of figures.

A token is *acknowledged* when another peer has read the progress record that counts it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.events import DoneEvent, EvalEvent, Event, RoundEvent

VOLUNTEERS = ("anna", "ben", "carl", "dora")
BOOTSTRAP = "bootstrap"
EVERYONE = (BOOTSTRAP, *VOLUNTEERS)
ROUND_STEPS = 20
BATCH_TOKENS = 8 * 64
ROUND_TOKENS = ROUND_STEPS * BATCH_TOKENS
LOSS_TOLERANCE = 0.02
MIN_FAULTS = 5
"""Least number of faults for a meaningful run."""
PROBE_ROUNDS = 40
"""Rounds that suffice to measure how many tokens this machine trains in a minute."""
FAULTY_SHARE = 0.7
"""Rough share of tokens that a run with faults trains in the same time, to size the runs."""
NUM_TEXTS = 400
"""Number of texts, 6.4 MB: on fewer, a run of ten minutes would overfit, and the held-out loss would rise."""
LIMIT_S = 90.0
"""Seconds that the run may need to end after the last fault, beyond training."""


@dataclass(frozen=True)
class Plan:
    """Schedule: number of tokens, a fault about every `fault_every_s`, and the seed of all choices."""

    seed: int
    total_tokens: int
    fault_every_s: float = 5.0
    max_down: int = 3
    slowdown: float = 1.0
    """Factor by which volunteers train slower than they could, so that other load on the machine changes little."""


@dataclass
class Peer:
    """Participant over all its processes."""

    name: str
    arguments: tuple[str, ...]
    lives: list[Child] = field(default_factory=list)
    kills: int = 0
    back_at_s: float | None = None
    stopped: list[int] = field(default_factory=list)

    @property
    def child(self) -> Child:
        return self.lives[-1]

    @property
    def up(self) -> bool:
        return self.back_at_s is None

    def events(self, kind: type[Event]) -> list[Any]:
        return [event for life in self.lives for event in list(life.events) if isinstance(event, kind)]


@dataclass
class Outcome:
    """Outcome of a run. Losses are in nats per byte."""

    loss: float
    seconds: float
    rounds: int
    faults: dict[str, int]
    lost_tokens: dict[str, int]
    acknowledged: int
    counted: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_file(folder: Path, total_tokens: int) -> Path:
    return write_run(
        folder,
        NUM_TEXTS,
        run={"total_tokens": total_tokens, "seed": 11},
        inner={"batch_sequences": 8, "warmup_fraction": 0.05},
        merge={"inner_steps": ROUND_STEPS, "silence_s": 2.0, "outer_momentum": 0.5, "min_peers": len(VOLUNTEERS)},
        network={"call_limit_s": 3.0, "stall_limit_s": 3.0, "presence_ttl_s": 15.0, "archive_every_s": 5.0},
    )


class Soak:
    """Run with its faults."""

    def __init__(self, swarm: Swarm, plan: Plan) -> None:
        self.swarm, self.plan = swarm, plan
        self.chance = random.Random(plan.seed)
        self.faults = dict.fromkeys(("SIGKILL", "SIGTERM", "SIGSTOP", "restart"), 0)
        self.acknowledged: dict[str, int] = {}
        self.peers: dict[str, Peer] = {}
        path = run_file(swarm.folder, plan.total_tokens)
        self._add(BOOTSTRAP, ("bootstrap", str(path)))
        invite = self.peers[BOOTSTRAP].child.invite.invite
        slowed = ("--slowdown", f"{plan.slowdown:g}") if plan.slowdown > 1 else ()
        for name in VOLUNTEERS:
            self._add(name, ("join", invite, "--threads", "1", "--data", str(swarm.folder), *slowed))

    def _add(self, name: str, arguments: Sequence[str]) -> None:
        own = ("--json", "--name", name, "--dir", str(self.swarm.folder / name))
        listen = ("--listen", f"127.0.0.1:{free_port()}", "--log-level", "info")
        self.peers[name] = Peer(name, (*arguments, *own, *listen))
        self._start(self.peers[name])

    def _start(self, peer: Peer) -> None:
        peer.lives.append(self.swarm.start(peer.name, peer.arguments))
        peer.back_at_s = None

    @property
    def volunteers(self) -> list[Peer]:
        return [self.peers[name] for name in VOLUNTEERS]

    # ------------------------------------------------------------- faults

    def run(self, with_faults: bool) -> Outcome:
        began_s = time.monotonic()
        wait_until(lambda: all(p.events(RoundEvent) for p in self.volunteers), "a first round of all")
        next_fault_s = time.monotonic()
        progress = (0, time.monotonic())
        while not self._over():
            time.sleep(0.1)
            self._note_acknowledged()
            now = time.monotonic()
            self._bring_back(now)
            if with_faults and now >= next_fault_s:
                self._fault(now)
                next_fault_s = now + self.chance.uniform(0.5, 1.5) * self.plan.fault_every_s
            tokens = self._run_tokens()
            progress = progress if tokens <= progress[0] else (tokens, now)
            assert now < progress[1] + LIMIT_S, f"nothing was trained for {LIMIT_S:g} s\n{self._stories()}"
        self._end()
        return self._outcome(time.monotonic() - began_s)

    def _over(self) -> bool:
        """Return whether the run has all its tokens, by its peers' reports."""
        return self._run_tokens() >= self.plan.total_tokens

    def _run_tokens(self) -> int:
        return max((event.run_tokens for peer in self.volunteers for event in peer.events(RoundEvent)), default=0)

    def _fault(self, now: float) -> None:
        down = [peer for peer in self.peers.values() if not peer.up]
        up = [peer for peer in self.peers.values() if peer.up and peer.child.process.poll() is None]
        if len(down) >= self.plan.max_down or not up:
            return
        peer = self.chance.choice(up)
        kind = self.chance.choice(("SIGKILL", "SIGKILL", "SIGTERM", "SIGSTOP"))
        process = peer.child.process
        if kind == "SIGSTOP":
            peer.stopped = [process.pid]
            os.kill(process.pid, signal.SIGSTOP)
        elif kind == "SIGKILL":
            peer.child.kill()
            peer.kills += 1
        else:
            process.send_signal(signal.SIGTERM)
        self.faults[kind] += 1
        peer.back_at_s = now + self.chance.uniform(0.2, 8.0)

    def _bring_back(self, now: float) -> None:
        for peer in self.peers.values():
            if peer.up and peer.child.process.poll() == 1:
                peer.back_at_s = now + 1.0
            if peer.back_at_s is None or now < peer.back_at_s:
                continue
            if peer.stopped:
                self._wake(peer)
            elif peer.child.process.poll() is not None:
                self._check_exit(peer)
                self.faults["restart"] += 1
                self._start(peer)

    def _wake(self, peer: Peer) -> None:
        for pid in peer.stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        peer.stopped, peer.back_at_s = [], None

    def _check_exit(self, peer: Peer) -> None:
        """Check that it was killed or ended cleanly as asked, unless the signal came before it could handle it."""
        code = peer.child.wait()
        if code == -signal.SIGTERM and not peer.child.events:
            return
        if code == 1 and peer.child.error_line().endswith("[nobody-answers]"):
            return  # all others were down, and it had not joined them yet
        assert code in (0, -signal.SIGKILL), f"code {code}: {peer.child.story()}"

    # ------------------------------------------------------------- the end

    def _end(self) -> None:
        """Restart all, let them end by themselves, and check that nothing is left."""
        for peer in self.peers.values():
            if peer.stopped:
                self._wake(peer)
            if peer.child.process.poll() not in (None, 0) or (
                peer.child.process.poll() == 0 and not self._finished(peer)
            ):
                self._start(peer)
        for peer in self.peers.values():
            if not peer.up:  # it was asked to end: it ends, and comes back for the end of the run
                self._check_exit(peer)
                if not self._finished(peer):
                    self._start(peer)
        for peer in self.peers.values():
            code = peer.child.wait(3 * LIMIT_S)
            assert code == 0 and self._finished(peer), peer.child.story()
        self._note_acknowledged()
        self.swarm.assert_nothing_left()

    @staticmethod
    def _finished(peer: Peer) -> bool:
        return any(event.reason == "total_tokens" for event in peer.events(DoneEvent))

    def _stories(self) -> str:
        return "\n".join(peer.child.story() for peer in self.peers.values())

    # ------------------------------------------------------------- what was counted

    def _status(self, peer: Peer) -> dict[str, Any]:
        """Return the last status that it left."""
        try:
            loaded: dict[str, Any] = json.loads((self.swarm.folder / peer.name / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return loaded

    def _counts(self, peer: Peer, field: str) -> dict[str, int]:
        """Return its counts of all peers: `tokens`, or `acknowledged_tokens`."""
        rows = self._status(peer).get("peers", [])
        return {row["peer"]: int(row.get(field, 0)) for row in rows}

    def _note_acknowledged(self) -> None:
        for reader in self.peers.values():
            own = self._status(reader).get("peer", "")
            for peer, tokens in self._counts(reader, "acknowledged_tokens").items():
                if peer != own:
                    self.acknowledged[peer] = max(tokens, self.acknowledged.get(peer, 0))

    def _outcome(self, seconds: float) -> Outcome:
        counted = [self._counts(peer, "tokens") for peer in self.peers.values()]
        assert all(counted), "every peer leaves a status"
        totals = self._counts(self.peers[BOOTSTRAP], "tokens")  # it ends last: others cannot count later reports
        assert sum(self.acknowledged.values()) > 0, "nothing was acknowledged"
        for peer, tokens in self.acknowledged.items():
            assert totals[peer] >= tokens, f"{tokens} tokens of {peer} were acknowledged, {totals[peer]} are counted"
        lost = {}
        for peer in self.volunteers:
            merged = sum(e.tokens for e in peer.events(RoundEvent) if peer.child.id in e.partners)
            lost[peer.name] = merged - totals.get(peer.child.id, 0)
            allowed = ROUND_TOKENS * peer.kills
            assert lost[peer.name] <= allowed, f"{peer.name} lost {lost[peer.name]} tokens in {peer.kills} kills"
        (loss,) = {round(e.held_out_loss, 6) for e in self._last_evals()}
        return Outcome(
            loss=loss,
            seconds=seconds,
            rounds=1 + max(e.round for p in self.volunteers for e in p.events(RoundEvent)),
            faults=self.faults,
            lost_tokens=lost,
            acknowledged=sum(self.acknowledged.values()),
            counted=sum(totals.values()),
        )

    def _last_evals(self) -> list[EvalEvent]:
        return [peer.child.all(EvalEvent)[-1] for peer in self.peers.values() if peer.child.all(EvalEvent)]


def one_run(folder: Path, plan: Plan, with_faults: bool) -> Outcome:
    with Swarm(folder) as swarm:
        return Soak(swarm, plan).run(with_faults)


def assert_enough_faults(outcome: Outcome) -> None:
    """Check that enough faults happened."""
    assert sum(outcome.faults[kind] for kind in ("SIGKILL", "SIGTERM", "SIGSTOP")) >= MIN_FAULTS, outcome


def compare(folder: Path, plan: Plan, baseline: Outcome) -> Outcome:
    """Play a run with faults; its loss must be within `LOSS_TOLERANCE` of the baseline's."""
    outcome = one_run(folder, plan, with_faults=True)
    assert_enough_faults(outcome)
    assert outcome.loss <= baseline.loss * (1 + LOSS_TOLERANCE), f"{outcome.loss} against {baseline.loss} without"
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=10.0, help="about how long each run with faults takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slowdown", type=float, default=4.0, help="volunteers train so many times slower than alone")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"in {folder}, which a run that fails leaves behind", flush=True)
    probed = Plan(seed=0, total_tokens=PROBE_ROUNDS * ROUND_TOKENS * len(VOLUNTEERS), slowdown=options.slowdown)
    probe = one_run(folder / "probe", probed, False)
    total = round(probed.total_tokens / probe.seconds * options.minutes * 60 * FAULTY_SHARE)
    sized = replace(probed, total_tokens=total)
    baseline = one_run(folder / "baseline", sized, False)
    print(f"{total} tokens; without faults: loss {baseline.loss:.4f} after {baseline.seconds:.0f} s", flush=True)
    losses = []
    for number in range(options.runs):
        plan = replace(sized, seed=options.seed + number)
        outcome = compare(folder / f"run-{number}", plan, baseline)
        losses.append(outcome.loss)
        print(f"run {number}: {outcome}", flush=True)
        shutil.rmtree(folder / f"run-{number}")
    worst = max(losses) / baseline.loss - 1
    print(f"{len(losses)} runs held; loss {statistics.mean(losses):.4f}, the worst {worst:+.2%} against no faults")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
