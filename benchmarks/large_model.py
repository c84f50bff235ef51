"""Train a large model for an hour as a swarm of two volunteers, one core each, and compare it with a lone plain loop.

    python benchmarks/large_model.py --dir FOLDER              # 124 million parameters: two hours on two cores
    python benchmarks/large_model.py --dir FOLDER --phase plain      # only the plain loop, of a swarm that has ended
    python benchmarks/large_model.py --dir FOLDER --size 10 --tokens 60000      # to try it: some minutes

The run file is `examples/gpt-124m.toml` with steps of `--context` tokens (one sequence), H = 20, and the standard
library's sources as text; it ends after `--tokens` of both volunteers together. A bootstrap and two volunteers run as
real processes over real sockets, each volunteer with one thread on a core of its own, and their network daemons with
them. When the second one has merged `--kill-after` rounds it is killed (SIGKILL), and is started again in its folder
after `--away` seconds.

The plain loop then trains the same model from the same seed, with torch.optim.AdamW and the same learning-rate
schedule, on as many tokens as the volunteer that trained most, drawn from the same text as a volunteer's. Both are
measured on the run's held-out text.

It prints each volunteer's merges, tokens, peak memory (proportional set size of the process and its daemon) and what
`swarmtrain check` says of it, the bytes of a round, the bytes a step that H = 500 would take, and both losses. Bars: at
least 8 merges of each volunteer, a loss of the swarm of at most 1.03 of the plain loop's, peaks within 10 % of what
`check` says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from inner_loop import SIZES, write_text
from memory import pss_of

from swarmtrain.events import DoneEvent, EvalEvent, JoinedEvent, RoundEvent, WarningEvent
from swarmtrain.model.gpt import build_model
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.peer.estimate import estimate
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import held_out_loss_of
from swarmtrain.peer.local.swarm import BOOTSTRAP, LocalSwarm
from swarmtrain.run import RunFile

LEAST_MERGES, MOST_LOSS, MOST_ERROR = 8, 1.03, 0.10
NAMES = ("first", "second")
SAMPLE_S, TELL_EVERY = 0.25, 50
MANY_STEPS = 500
"""Inner steps of a round for which the bytes are computed."""


def run_of(options: argparse.Namespace) -> RunFile:
    """Return the run file of the size that was asked for."""
    values: dict[str, Any] = {name: dict(table) for name, table in SIZES[options.size].tables.items()}
    for name, table in {
        "run": {"name": "large-model", "total_tokens": options.tokens, "seed": options.seed},
        "model": {"context_tokens": options.context},
        "inner": {"batch_sequences": 1, "microbatch_sequences": 1},
        "merge": {"method": "gossip", "inner_steps": options.inner_steps, "min_peers": len(NAMES)},
        "evaluation": {"every_rounds": 0, "batch_sequences": 1},
    }.items():
        values.setdefault(name, {}).update(table)
    values["data"] = {"source": "text", "paths": ["text.txt"], "held_out_bytes": options.held_out_bytes}
    for change in options.set:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = json.loads(value)
    return RunFile.model_validate(values)


# ---------------------------------------------------------------- the swarm


@dataclass
class Volunteer:
    """Volunteer as it was observed."""

    rounds: list[RoundEvent] = field(default_factory=list)
    peak_bytes: int = 0
    deaths: int = 0
    resumed: list[int] = field(default_factory=list)
    """Rounds of the checkpoints that it resumed from."""
    held_out_loss: float | None = None
    own_loss: float | None = None
    tokens: int = 0

    @property
    def merges(self) -> int:
        """Rounds in which somebody else's gradient was merged."""
        return sum(any(event.weights) for event in self.rounds)


class Sampler:
    """Samples the memory of processes with all that they have started, by a thread."""

    def __init__(self, found: dict[str, Volunteer]) -> None:
        self._found, self._ended = found, threading.Event()
        self.pids: dict[str, int] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            for name, pid in list(self.pids.items()):
                with contextlib.suppress(psutil.Error, OSError):
                    children = psutil.Process(pid).children(recursive=True)
                    total = pss_of(pid) + sum(pss_of(child.pid) for child in children)
                    self._found[name].peak_bytes = max(self._found[name].peak_bytes, total)

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()


class Hour:
    """Swarm of a bootstrap and two volunteers, of which one is killed and comes back."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options, self._swarm = options, LocalSwarm(folder)
        self.found = {name: Volunteer() for name in NAMES}
        self._folder, self._sampler = folder, Sampler(self.found)
        self._back_s = 0.0
        self._cores = sorted(os.sched_getaffinity(0))

    def train(self) -> None:
        """Train the run to its end."""
        began_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(self._sampler.close)
            stack.callback(self._swarm.stop)
            place = self._swarm.place(BOOTSTRAP, limited=False)
            self._swarm.start(BOOTSTRAP, ["bootstrap", str(self._folder / "run.toml"), *place])
            invite = self._swarm.wait_for_invite(600.0)[0].invite
            for name, core in zip(NAMES, self._cores, strict=False):
                self._start(name, core, invite)
            while not all(self._has_ended(name) for name in NAMES):
                for event in self._swarm.events(limit_s=1.0):
                    self._note(event, time.monotonic() - began_s)
                    if self._back_s:
                        break
                if self._back_s and time.monotonic() > self._back_s:
                    self._back_s = 0.0
                    self._start(NAMES[1], self._cores[1], invite)

    def _start(self, name: str, core: int, invite: str) -> None:
        """Start a volunteer on its core."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})  # a child has the cores of the thread that starts it
        try:
            words = ["--data", str(self._folder), *self._swarm.place(name, limited=True), "--threads", "1"]
            self._swarm.start(name, ["join", invite, *words, *self.options.join])
        finally:
            os.sched_setaffinity(0, before)
        self._sampler.pids[name] = self._swarm.children[name].process.pid

    def _has_ended(self, name: str) -> bool:
        child = self._swarm.children.get(name)
        return child is not None and child.closed and not self._back_s and child.process.returncode == 0

    def _note(self, event: object, now_s: float) -> None:
        if isinstance(event, WarningEvent):
            print(f"  {now_s:6.0f} s  {event.name}: warning: {event.message}", file=sys.stderr, flush=True)
        one = self.found.get(getattr(event, "name", ""))
        if one is None:
            return
        if isinstance(event, JoinedEvent):
            if event.resumed_round is not None:
                one.resumed.append(event.resumed_round)
            print(f"  {now_s:6.0f} s  {event.name} joined in round {event.round}", flush=True)
        elif isinstance(event, RoundEvent):
            one.rounds.append(event)
            print(
                f"  {now_s:6.0f} s  {event.name}: round {event.round}, {event.seconds:.0f} s, loss {event.loss:.3f}, "
                f"stall {event.stall_s:.2f} s, {event.bytes_sent / 1e6:.0f} MB sent, merged {sum(event.weights)} of "
                f"others' tokens, run {event.run_tokens}; memory at most {one.peak_bytes / 1e6:.0f} MB",
                flush=True,
            )
            second = self.found[NAMES[1]]
            if event.name == NAMES[1] and not one.deaths and second.merges >= self.options.kill_after:
                one.deaths += 1
                self._swarm.end(NAMES[1], cleanly=False)
                self._back_s = time.monotonic() + self.options.away
                print(f"  {now_s:6.0f} s  {NAMES[1]} killed", flush=True)
        elif isinstance(event, EvalEvent):
            one.held_out_loss, one.own_loss = event.held_out_loss, event.own_loss
        elif isinstance(event, DoneEvent):
            one.tokens = event.tokens
            print(f"  {now_s:6.0f} s  {event.name} is done: {event}", flush=True)


# ---------------------------------------------------------------- the plain loop


def plain(folder: Path, own_tokens: int, options: argparse.Namespace) -> float:
    """Train a plain loop on `own_tokens` tokens; return its held-out loss in nats per byte."""
    import torch

    from swarmtrain.algorithm.inner import learning_rate_at
    from swarmtrain.data.prepare import PeerPlace, training_batches, training_data
    from swarmtrain.peer.training.loop import inner_constants

    published = PeerFolder(folder / BOOTSTRAP).kept_run()
    assert published is not None, "the bootstrap keeps its run before it prints an invite"
    run = published.run
    torch.set_num_threads(options.plain_threads)
    data = training_data(run, folder, published.held_out, published.tokenizer, folder / "cache")
    place = PeerPlace(run_sha256=published.sha256, peer_id="plain", position=0)
    batches = training_batches(run, data, place)
    model = build_model(run.model, run.run.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": run.inner.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = run.inner.beta1, run.inner.beta2
    optimizer = torch.optim.AdamW(groups, lr=run.inner.learning_rate, betas=betas, fused=True)
    constants, losses = inner_constants(run), list[float]()
    num_steps, began_s = own_tokens // run.tokens_per_step, time.monotonic()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(constants, step / num_steps)
        loss = model.loss(batches.next_batch())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.inner.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % TELL_EVERY == 0:
            print(
                f"  {time.monotonic() - began_s:6.0f} s  plain: step {step + 1} of {num_steps}, "
                f"loss {statistics.mean(losses[-TELL_EVERY:]):.3f}",
                flush=True,
            )
    return held_out_loss_of(model, published, data.tokenizer).nats_per_byte


# ---------------------------------------------------------------- what is printed


def swarm_phase(folder: Path, options: argparse.Namespace) -> None:
    """Train the swarm, print what was seen, and keep in the folder what the plain loop is compared with."""
    run = run_of(options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(tomli_w.dumps(run.model_dump(mode="json", exclude_none=True, exclude_unset=True)))
    write_text(folder / "text.txt")
    parameters = num_parameters(run.model)
    cost = estimate(run, parameters, len(NAMES))
    print(
        f"{parameters / 1e6:.1f} million parameters, steps of {run.tokens_per_step} tokens, "
        f"H = {run.merge.inner_steps}, {run.run.total_tokens} tokens; `check` says {cost.memory_bytes / 1e6:.0f} MB",
        flush=True,
    )
    hour, began_s = Hour(folder, options), time.monotonic()
    hour.train()
    print(f"({time.monotonic() - began_s:.0f} s, load {os.getloadavg()[0]:.1f})")
    held = {True: "holds", False: "DOES NOT HOLD"}
    for name, one in hour.found.items():
        sent = [event.bytes_sent for event in one.rounds]
        median = statistics.median(sent)
        error = one.peak_bytes / cost.memory_bytes - 1
        came = "".join(f", resumed from round {number}" for number in one.resumed)
        print(
            f"{name}: {one.tokens} tokens, {len(one.rounds)} rounds, {one.merges} merges (bar {LEAST_MERGES}: "
            f"{held[one.merges >= LEAST_MERGES]}), killed {one.deaths} times{came}\n"
            f"  memory at most {one.peak_bytes / 1e6:.0f} MB, {error:+.1%} of `check` "
            f"(bar {MOST_ERROR:.0%}: {held[abs(error) <= MOST_ERROR]})\n"
            f"  {median / 1e6:.1f} MB sent a round, {median / run.merge.inner_steps / 1e6:.2f} MB a step; with "
            f"H = {MANY_STEPS}, computed and not measured: {median / MANY_STEPS / 1e6:.3f} MB a step\n"
            f"  held-out loss {one.held_out_loss}, of its own weights {one.own_loss}",
            flush=True,
        )
    losses = [one.held_out_loss for one in hour.found.values() if one.held_out_loss is not None]
    (folder / "swarm.json").write_text(
        json.dumps({"losses": losses, "tokens": [one.tokens for one in hour.found.values()]})
    )


def plain_phase(folder: Path, options: argparse.Namespace) -> None:
    """Train the plain loop and compare."""
    told = json.loads((folder / "swarm.json").read_text())
    own_tokens, swarm_loss = max(told["tokens"]), max(told["losses"])
    loss = plain(folder, own_tokens, options)
    ratio = swarm_loss / loss
    print(
        f"held-out loss, nats per byte: swarm {swarm_loss:.4f} (the worse of both), plain loop of {own_tokens} tokens "
        f"{loss:.4f}; ratio {ratio:.4f}, at most {MOST_LOSS}: {'holds' if ratio <= MOST_LOSS else 'DOES NOT HOLD'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where the swarm's folders lie; they are kept")
    parser.add_argument("--phase", choices=("both", "swarm", "plain"), default="both")
    parser.add_argument("--size", choices=[*SIZES], default="124", help="million parameters; default 124")
    parser.add_argument("--tokens", type=int, default=800_000, help="tokens of both volunteers; default 800,000")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--inner-steps", type=int, default=20, help="H; default 20")
    parser.add_argument("--kill-after", type=int, default=5, help="merges; default 5")
    parser.add_argument("--away", type=float, default=60.0, help="seconds that the killed one is away; default 60")
    parser.add_argument("--held-out-bytes", type=int, default=65_536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--join", action="append", default=[], metavar="WORD", help="a word more for `join`")
    options = parser.parse_args()
    folder = options.dir.resolve()
    if options.phase != "plain":
        swarm_phase(folder, options)
    if options.phase != "swarm":
        plain_phase(folder, options)


if __name__ == "__main__":
    main()
