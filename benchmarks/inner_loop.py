"""Compare the inner loop of `swarmtrain join`, everything included, with a plain PyTorch loop of the same model.

    python benchmarks/inner_loop.py                                       # 10 million parameters
    python benchmarks/inner_loop.py --size 124
    python benchmarks/inner_loop.py --size 124 --device cuda --precision bf16 --compile on
    python benchmarks/inner_loop.py --size 124 --device cuda --precision bf16 --compile on --halves

Alternates turns of a plain loop and of a volunteer that joins a swarm by gossip, and prints the median of the ratios
volunteer / plain in tokens a second, one ratio a pair. The corpus is the standard library's sources.

- The plain loop: eager unless `--compile on`, torch.optim.AdamW (fused), `clip_grad_norm_`, a cosine schedule, the same
  batches and microbatches, windows of an array as batches, and the loss read once in 50 steps. After some steps it is
  measured for 40 steps and `--seconds` at least.
- The volunteer: a real process over real sockets. It joins anew in each turn, and is measured over whole rounds, two
  and `--seconds` at least, from the end of its first one, which is short, to the end of a later one, by the times and
  tokens of its `round` events. So batches, steps, publications, merges, checkpoints, presence and all that the process
  does between its steps count.

On processors both have one thread and the same core, in turns. A partner trains on the other core all the time, also
during the plain loop's turns, so that both have the same share of memory bandwidth and clock; the bootstrap is there
too. The volunteer's network daemon is moved to the partner's core when training begins; `--daemon own` leaves it where
the volunteer is. The network's threads within the volunteer's process stay on its core.

With a card nobody is pinned, the partner trains on the processor, and the processor's time is not reported. `--halves`
starts two volunteers on the card (or on the core) and no partner: the sum of both is compared with one plain loop. Ends
with exit code 2 if there is no card.

Columns: tokens a second, seconds a step, and the peak of main memory (of the volunteer and its daemon, each at its
own peak); `stall`: the sum of the rounds' `stall_s` over the time; `merged`: rounds in which a partner's gradient was
merged; the volunteer's other threads, and its daemon, as shares of one core; `queued`: share of the time in which the
training thread was ready to run while something else had its core, of both (of the volunteer this includes its own
other threads; more than these means that other programs disturbed the measurement); `by processor time`: the ratio of
the processor times that the two processes spent on a step, in which others' programs and a volunteer's waiting count
for nothing.

Bars: a median of at least 0.97 at 10 and 124 million parameters, 0.90 with `--halves`; on a card besides a model FLOPs
utilisation of at least 0.35 (6N + 12LTD operations a token, N without the embedding), and a stall of at most 0.1 %.
0.46 million parameters have no bar. The bars are for a machine on which nothing else runs: the row's `load` is then
a little above 2.

Five pairs on one core, in steps of 1,024 tokens, take some 25 minutes at 10 million parameters; at 124 million, in
steps of 512 tokens, two hours (`--pairs 3`: more than one), and 16 GB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from swarmtrain.cli.join import command as join_command
from swarmtrain.events import ErrorEvent, Event, RoundEvent, StartedEvent, WarningEvent
from swarmtrain.network.daemon import owned_process_args
from swarmtrain.peer.local.swarm import BOOTSTRAP, LocalSwarm
from swarmtrain.run import RunFile
from swarmtrain.words import counted

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = {
    "model": {"width": 128, "num_layers": 2, "num_heads": 4, "feed_forward_ratio": 2.667},
    "inner": {"learning_rate": 3e-3},
}
MEDIUM = {
    "model": {"width": 320, "num_layers": 8, "num_heads": 5, "feed_forward_ratio": 2.667},
    "inner": {"learning_rate": 1e-3},
    "merge": {"round_limit_s": 14_400},
}


@dataclass(frozen=True)
class Size:
    """Model of one size, with the steps that are taken unless the command line says otherwise, in tokens."""

    tables: dict[str, Any]
    """Tables of its run file."""
    context: int
    batch: int


SIZES = {
    "0.46": Size(SMALL, 128, 2048),
    "10": Size(MEDIUM, 128, 1024),
    "124": Size(tomllib.loads((EXAMPLES / "gpt-124m.toml").read_text()), 512, 512),
}
CARD_CONTEXT, CARD_BATCH = 1024, 32_768
"""Steps on a card, in tokens, of 124 million parameters."""
LEAST_RATIO, LEAST_RATIO_OF_HALVES, LEAST_USE, MOST_STALL = 0.97, 0.90, 0.35, 0.001
WARM_UP_STEPS, LEAST_STEPS, LOSS_EVERY = 5, 40, 50
TEXT_BYTES = 24_000_000
HUGE = 10**14
"""Tokens of a run that does not end."""
LEAVE_S, CARD_LOOK_S = 180.0, 3.0
PARTNER = "partner"


# ---------------------------------------------------------------- cores and processes


@dataclass(frozen=True)
class Cores:
    """Cores of this machine: `own` for who is measured, `others` for everybody else. Both empty: nobody is pinned."""

    own: frozenset[int] = frozenset()
    others: frozenset[int] = frozenset()

    @classmethod
    def here(cls, is_card: bool) -> Cores:
        """Return this machine's last core, and the others."""
        found = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        return cls(frozenset(found[-1:]), frozenset(found[:-1])) if len(found) > 1 and not is_card else cls()

    @contextlib.contextmanager
    def of_children(self, *, is_measured: bool) -> Iterator[None]:
        """Pin the processes that this thread starts meanwhile."""
        cores = self.own if is_measured else self.others
        if cores:
            os.sched_setaffinity(0, cores)  # a child has the cores of the thread that starts it
        try:
            yield
        finally:
            self.pin_others(os.getpid())

    def pin_others(self, pid: int) -> None:
        """Move all threads of a process to the cores of those who are not measured."""
        if self.others:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):  # it has ended
                    os.sched_setaffinity(int(thread.name), self.others)

    def __str__(self) -> str:
        if not self.own:
            return "nobody is pinned"
        own, others = (",".join(map(str, sorted(cores))) for cores in (self.own, self.others))
        return f"measured on core {own}, everybody else on core {others}"


@dataclass(frozen=True)
class Processor:
    """Processor time so far, in seconds."""

    trainer_s: float = 0.0
    queued_s: float = 0.0
    """Time in which the training thread was ready to run and waited for its core."""
    others_s: float = 0.0
    """Time of the process's other threads."""
    daemons_s: float = 0.0
    """Time of the processes that it has started."""

    def __sub__(self, before: Processor) -> Processor:
        return Processor(
            self.trainer_s - before.trainer_s,
            self.queued_s - before.queued_s,
            self.others_s - before.others_s,
            self.daemons_s - before.daemons_s,
        )


def processor_of(pid: int) -> Processor:
    """Return the processor time of a process whose main thread trains; zeros where the system does not say."""
    try:
        threads = {int(path.name): _ran_and_queued_s(path) for path in Path(f"/proc/{pid}/task").iterdir()}
    except OSError:
        return Processor()
    trainer_s, queued_s = threads.pop(pid)
    daemons_s = sum(
        _ran_and_queued_s(path)[0] for child in _children(pid) for path in Path(f"/proc/{child}/task").iterdir()
    )
    return Processor(trainer_s, queued_s, sum(ran_s for ran_s, _ in threads.values()), daemons_s)


def _ran_and_queued_s(thread: Path) -> tuple[float, float]:
    try:
        ran, queued = (thread / "schedstat").read_text().split()[:2]
    except (OSError, ValueError):  # it has ended, or the kernel does not count
        return 0.0, 0.0
    return 1e-9 * int(ran), 1e-9 * int(queued)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def peak_of(pid: int) -> int:
    """Return the largest resident set that a process has had, in bytes; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class CardMemory:
    """Largest use of the cards' memory, by all programs together, as `nvidia-smi` reports it."""

    def __init__(self, is_card: bool) -> None:
        self._peak_mib, self._ended = 0, threading.Event()
        if is_card and shutil.which("nvidia-smi"):
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.wait(CARD_LOOK_S):
            said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
            self._peak_mib = max([self._peak_mib, *(int(word) for word in said if word.isdigit())])

    def take_peak(self) -> int:
        """Return the peak since the last call, in bytes; 0 if it is not known."""
        peak, self._peak_mib = self._peak_mib, 0
        return peak << 20

    def close(self) -> None:
        """Look no more."""
        self._ended.set()


# ---------------------------------------------------------------- what is trained


def run_of(options: argparse.Namespace) -> RunFile:
    """Return the run file of the size that was asked for, in steps that were asked for."""
    size, is_large_card = SIZES[options.size], options.size == "124" and options.is_card
    context = options.context or (CARD_CONTEXT if is_large_card else size.context)
    batch = options.batch_tokens or (CARD_BATCH if is_large_card else size.batch)
    if batch % context:
        sys.exit(f"error: --batch-tokens {batch} is not a multiple of the context of {context} tokens (--context)")
    values = {name: dict(table) for name, table in size.tables.items()}
    for name, table in {
        "run": {"name": "inner-loop", "total_tokens": HUGE},
        "model": {"context_tokens": context},
        "inner": {
            "batch_sequences": batch // context,
            "microbatch_sequences": options.microbatch,
            "warmup_fraction": 0.0,
        },
        "merge": {"method": "gossip", "inner_steps": options.inner_steps},
        "evaluation": {"every_rounds": 0},
    }.items():
        values.setdefault(name, {}).update(table)
    values["data"] = {"source": "text", "paths": ["text.txt"], "held_out_bytes": 65_536}
    for change in options.set:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = tomllib.loads(f"value = {value}")["value"]
    return RunFile.model_validate(values)


def write_text(path: Path) -> None:
    """Write the standard library's sources, as far as they are needed."""
    library, left = Path(os.__file__).parent, TEXT_BYTES
    with path.open("wb") as out:
        for source in sorted(library.rglob("*.py")):
            data = b"" if "site-packages" in source.parts or left < 0 else source.read_bytes()
            with contextlib.suppress(UnicodeDecodeError):  # some tests of Python's are in other encodings
                left -= out.write(data.decode().encode())


def operations_a_token(run: RunFile) -> float:
    """Return the floating-point operations of training on one token: 6N + 12LTD, N without the embedding."""
    from swarmtrain.model.parameter_count import num_parameters

    model = run.model
    weights = num_parameters(model) - model.vocabulary_size * model.width
    return 6 * weights + 12 * model.num_layers * model.context_tokens * model.width


# ---------------------------------------------------------------- a plain loop


def plain(folder: Path, options: argparse.Namespace) -> None:
    """Run the plain loop on the run that the bootstrap in `folder` has published; print its `Speed`."""
    import numpy as np
    import torch

    from swarmtrain.data.tokens import tokenizer_from_bytes_untrusted
    from swarmtrain.model.gpt import build_model
    from swarmtrain.peer.lifecycle.folder import PeerFolder

    published = PeerFolder(folder / BOOTSTRAP).kept_run()
    assert published is not None, "the bootstrap keeps its run before it prints an invite"
    run, device = published.run, torch.device(options.device or "cpu")
    inner, context = run.inner, run.model.context_tokens
    tokenizer = tokenizer_from_bytes_untrusted(published.tokenizer, run.model.vocabulary_size)
    tokens = tokenizer.encode((folder / "text.txt").read_bytes())
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = build_model(run.model, run.run.seed).to(device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": inner.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = inner.beta1, inner.beta2
    optimizer = torch.optim.AdamW(groups, lr=inner.learning_rate, betas=betas, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100_000)
    loss_of = torch.compile(model.loss) if options.compile == "on" else model.loss
    random, offsets, losses = np.random.default_rng(0), np.arange(context + 1), []

    def step(number: int) -> None:
        starts = random.integers(len(tokens) - context, size=inner.batch_sequences)
        batch = torch.from_numpy(tokens[starts[:, None] + offsets].astype(np.int64))
        if device.type == "cuda":
            batch = batch.pin_memory().to(device, non_blocking=True)
        parts = torch.split(batch, run.microbatch_sequences)
        for part in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                loss = loss_of(part)
            (loss / len(parts) if len(parts) > 1 else loss).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, inner.gradient_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if number % LOSS_EVERY == 0:
            losses.append(float(loss.detach()))

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for number in range(WARM_UP_STEPS):
        step(number)
    finish()
    num_steps, before, began_s = 0, processor_of(os.getpid()), time.perf_counter()
    while num_steps < LEAST_STEPS or time.perf_counter() - began_s < options.seconds:
        step(num_steps)
        num_steps += 1
    finish()
    seconds = time.perf_counter() - began_s
    used = processor_of(os.getpid()) - before
    assert math.isfinite(losses[-1]), "the plain loop diverged"
    told = {
        "tokens_per_s": num_steps * run.tokens_per_step / seconds,
        "step_s": seconds / num_steps,
        "peak_bytes": peak_of(os.getpid()),
        "queued": used.queued_s / seconds,
        "processor_s": (used.trainer_s + used.others_s) / num_steps,
    }
    print(json.dumps(told))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of a loop in its turn, and its peak of main memory."""

    tokens_per_s: float
    step_s: float
    peak_bytes: int
    queued: float
    """Share of the time in which the training thread was ready and waited for its core."""
    processor_s: float
    """Processor time that all threads of the process spent on a step, its daemon's not included."""


# ---------------------------------------------------------------- volunteers


@dataclass(kw_only=True)
class Volunteer:
    """Volunteer that is measured."""

    name: str
    pid: int
    started_s: float = 0.0
    rounds: list[RoundEvent] = field(default_factory=list)
    """Rounds in the order of their ends."""
    used: list[Processor] = field(default_factory=list)
    """Processor time of its process at the end of each."""

    def window(self, since_s: float) -> list[int]:
        """Return the rounds that ended at `since_s` or later, by their numbers in `rounds`."""
        return [number for number, event in enumerate(self.rounds) if event.time >= since_s]

    def is_settled(self, options: argparse.Namespace) -> bool:
        """Return whether the rounds that come now are measured."""
        return bool(self.rounds) and self.rounds[-1].time >= self.started_s + options.settle

    def is_measured(self, since_s: float, options: argparse.Namespace) -> bool:
        """Return whether enough whole rounds came after the first one that ended at `since_s` or later."""
        window = self.window(since_s)
        if len(window) <= options.rounds:
            return False
        return bool(self.rounds[window[-1]].time - self.rounds[window[0]].time >= options.seconds)

    def result(self, since_s: float) -> Measured:
        """Return what was measured from the first end of a round at `since_s` or later to the last one."""
        first, *rest = self.window(since_s)
        rounds = [self.rounds[number] for number in rest]
        seconds = rounds[-1].time - self.rounds[first].time
        num_steps = sum(event.inner_steps for event in rounds)
        used = self.used[rest[-1]] - self.used[first]
        return Measured(
            tokens_per_s=sum(event.tokens for event in rounds) / seconds,
            step_s=seconds / num_steps,
            processor_s=(used.trainer_s + used.others_s) / num_steps,
            peak_bytes=peak_of(self.pid) + sum(peak_of(child) for child in _children(self.pid)),
            queued=used.queued_s / seconds,
            stall=sum(event.stall_s for event in rounds) / seconds,
            num_rounds=len(rounds),
            num_merged=sum(any(event.weights) for event in rounds),
            others=used.others_s / seconds,
            daemons=used.daemons_s / seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Measured(Speed):
    """Speed of a volunteer, and what else it did meanwhile. Shares are of the time by the clock."""

    stall: float
    num_rounds: int
    num_merged: int
    others: float
    daemons: float


class Swarm:
    """Swarm of a bootstrap, the partner and, in their turns, the volunteers that are measured."""

    def __init__(self, folder: Path, cores: Cores, options: argparse.Namespace) -> None:
        self.folder, self.cores, self.options = folder, cores, options
        self._swarm, self._count = LocalSwarm(folder), 0
        self._invite = ""

    def start(self, run: RunFile) -> None:
        """Start the bootstrap and, unless two volunteers are each other's, the partner; wait until it trains."""
        path = self.folder / "run.toml"
        path.write_text(tomli_w.dumps(run.model_dump(mode="json", exclude_none=True, exclude_unset=True)))
        with self.cores.of_children(is_measured=False):
            self._swarm.start(BOOTSTRAP, ["bootstrap", str(path), *self._swarm.place(BOOTSTRAP, limited=False)])
        self._invite = self._swarm.wait_for_invite(600.0)[0].invite
        if self.options.halves:
            return
        with self.cores.of_children(is_measured=False):
            self._join(PARTNER, partner_words(self.options))
        for event in self._events():
            if isinstance(event, StartedEvent) and event.name == PARTNER:
                return

    def measure(self) -> list[Measured]:
        """Let a volunteer join, or two, and leave again when it was measured."""
        self._count += 1
        letters = "ab" if self.options.halves else "a"
        found: dict[str, Volunteer] = {}
        with self.cores.of_children(is_measured=True):
            for name in (f"volunteer-{self._count}{letter}" for letter in letters):
                found[name] = Volunteer(name=name, pid=self._join(name, volunteer_words(self.options)))
        since_s = math.inf
        for event in self._events():
            one = found.get(event.name)
            if isinstance(event, StartedEvent) and one is not None:
                one.started_s = event.time
                if self.options.daemon == "others":
                    for child in _children(one.pid):
                        self.cores.pin_others(child)
            elif isinstance(event, RoundEvent) and one is not None:
                one.used.append(processor_of(one.pid))
                one.rounds.append(event)
                if since_s == math.inf and all(each.is_settled(self.options) for each in found.values()):
                    since_s = event.time
                if all(each.is_measured(since_s, self.options) for each in found.values()):
                    break
        results = [each.result(since_s) for each in found.values()]
        for name in found:
            self._swarm.end(name, cleanly=True)
        for name in found:
            self._wait_gone(name)
        return results

    def kill(self) -> None:
        """End all processes at once."""
        for child in self._swarm.children.values():
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGKILL)
            child.process.wait()

    def _join(self, name: str, words: Sequence[str]) -> int:
        """Start a volunteer; return its process's number."""
        place = self._swarm.place(name, limited=True)
        self._swarm.start(name, ["join", self._invite, "--data", str(self.folder), *place, *words])
        return self._swarm.children[name].process.pid

    def _events(self) -> Iterator[Event]:
        """Yield events; end this program if a process has ended that should run."""
        for event in self._swarm.events():
            if isinstance(event, ErrorEvent):
                sys.exit(f"error: {event.name}: {event.message}")
            if isinstance(event, WarningEvent):
                print(f"  {event.name}: warning: {event.message}", file=sys.stderr)
            for name, child in self._swarm.children.items():
                if child.closed:
                    sys.exit(f"error: {name} has ended; its log:\n{child.log.read_text()[-2000:]}")
            yield event

    def _wait_gone(self, name: str) -> None:
        child = self._swarm.children.pop(name)
        try:
            child.process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
        shutil.rmtree(self.folder / name, ignore_errors=True)  # a checkpoint has 12 bytes a parameter


def volunteer_words(options: argparse.Namespace) -> list[str]:
    """Return the options of a volunteer that is measured.

    What was not asked for is named too, if `join` knows it: it must not choose another precision than the plain loop's.
    """
    known = {word for parameter in join_command.params for word in parameter.opts}
    words = [] if options.is_card else ["--threads", "1"]
    for name, default in (("device", "cpu"), ("precision", "fp32"), ("compile", "off")):
        given, option = getattr(options, name), f"--{name}"
        if given and option not in known:
            sys.exit(f"error: `swarmtrain join` has no {option}; leave the option out")
        words += [option, given or default] if option in known else []
    return words


def partner_words(options: argparse.Namespace) -> list[str]:
    """Return the options of the partner, which is on the processor."""
    if not options.is_card:
        return volunteer_words(options)
    return ["--device", "cpu", "--threads", str(max(1, (os.cpu_count() or 1) // 2))]


# ---------------------------------------------------------------- turns and the table


@dataclass(frozen=True)
class Pair:
    """Turns of the plain loop and of a volunteer, or of two that share a card or a core."""

    plain: Speed
    volunteers: list[Measured]

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of the volunteers together."""
        return sum(each.tokens_per_s for each in self.volunteers)

    @property
    def ratio(self) -> float:
        return self.tokens_per_s / self.plain.tokens_per_s

    @property
    def processor_ratio(self) -> float:
        """Ratio of the processor times of a step."""
        return self.plain.processor_s / statistics.mean(each.processor_s for each in self.volunteers)


def plain_turn(folder: Path, cores: Cores) -> Speed:
    """Measure a plain loop in a process of its own."""
    words = [sys.executable, __file__, *sys.argv[1:], "--plain", str(folder)]
    with cores.of_children(is_measured=True):
        process = subprocess.Popen(owned_process_args(words), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    told, _ = process.communicate()
    if process.returncode:
        sys.exit(f"error: the plain loop ended with status {process.returncode}")
    return Speed(**json.loads(told))


def turns(swarm: Swarm, options: argparse.Namespace) -> Iterator[Pair]:
    """Yield pairs; who has the first turn changes from one to the next."""
    for number in range(options.pairs):
        before = plain_turn(swarm.folder, swarm.cores) if number % 2 == 0 else None
        volunteers = swarm.measure()
        yield Pair(before or plain_turn(swarm.folder, swarm.cores), volunteers)


HEAD = (
    "pair  plain tokens/s  s/step     MB  queued  volunteer tokens/s  s/step     MB  queued  threads  daemon"
    "    stall  merged   ratio  by processor time  load"
)


def show(number: int, pair: Pair) -> None:
    """Print a row for the pair, and one more for a second volunteer."""
    one, (first, *more) = pair.plain, pair.volunteers
    print(
        f"{number:4}  {one.tokens_per_s:14,.1f}  {one.step_s:6.3f}  {one.peak_bytes / 1e6:5.0f}  {one.queued:6.2%}"
        f"  {in_row(first)}  {pair.ratio:6.4f}  {pair.processor_ratio:17.4f}"
        f"  {os.getloadavg()[0]:4.1f}",
        flush=True,
    )
    for each in more:
        print(f"{'':43}{in_row(each)}", flush=True)


def in_row(one: Measured) -> str:
    return (
        f"{one.tokens_per_s:18,.1f}  {one.step_s:6.3f}  {one.peak_bytes / 1e6:5.0f}  {one.queued:6.2%}"
        f"  {one.others:7.2%}  {one.daemons:6.2%}  {one.stall:7.3%}  {one.num_merged:2} of {one.num_rounds}"
    )


def judge(pairs: Sequence[Pair], run: RunFile, options: argparse.Namespace) -> None:
    """Print the medians, and whether the bars hold."""
    held = {True: "holds", False: "DOES NOT HOLD"}
    ratios = [pair.ratio for pair in pairs]
    median, least = statistics.median(ratios), LEAST_RATIO_OF_HALVES if options.halves else LEAST_RATIO
    has_bar = options.size in (("124",) if options.is_card else ("10", "124"))
    bar = f"at least {least}: {held[median >= least]}" if has_bar else "no bar"
    print(f"\nratio: median {median:.4f} of {', '.join(f'{ratio:.4f}' for ratio in ratios)}; {bar}")
    if not options.is_card:
        print(f"ratio by processor time: median {statistics.median(pair.processor_ratio for pair in pairs):.4f}")
    stall = max(each.stall for pair in pairs for each in pair.volunteers)
    bar = f"; at most {MOST_STALL:.1%}: {held[stall <= MOST_STALL]}" if options.is_card else ""
    print(f"stall: the worst of a turn {stall:.3%}{bar}")
    merged, rounds = (
        sum(getattr(each, name) for pair in pairs for each in pair.volunteers) for name in ("num_merged", "num_rounds")
    )
    print(f"merged a partner's gradient in {merged} of {rounds} rounds")
    if options.peak_tflops:
        operations = operations_a_token(run)
        plain, volunteers = (
            operations * statistics.median(speeds) / (1e12 * options.peak_tflops)
            for speeds in ([pair.plain.tokens_per_s for pair in pairs], [pair.tokens_per_s for pair in pairs])
        )
        bar = f"; at least {LEAST_USE:.0%}: {held[volunteers >= LEAST_USE]}" if options.is_card and has_bar else ""
        print(
            f"model FLOPs utilisation, {operations / 1e9:.3f} GFLOP a token of {options.peak_tflops:g} TFLOP/s: plain "
            f"{plain:.1%}, volunteer {volunteers:.1%}{bar}"
        )


def about(run: RunFile, cores: Cores, options: argparse.Namespace) -> str:
    """Say what is compared, and where."""
    from swarmtrain.model.parameter_count import num_parameters

    parts = counted(-(-run.inner.batch_sequences // run.microbatch_sequences), "microbatch", "microbatches")
    daemon = "there too" if options.daemon == "own" else "with the others"
    where = [str(cores)] if options.is_card or not cores.own else [str(cores), f"the volunteer's daemon {daemon}"]
    return (
        f"{num_parameters(run.model) / 1e6:.2f} million parameters, {options.device or 'cpu'}, "
        f"{options.precision or 'fp32'}, compile {options.compile or 'off'}; steps of {run.tokens_per_step} tokens in "
        f"{parts}, context {run.model.context_tokens}, H = {run.merge.inner_steps}\n"
        f"{os.cpu_count()} cores, {', '.join(where)}; load {os.getloadavg()[0]:.1f} before"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES], default="10", help="million parameters; default 10")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--inner-steps", type=int, default=100, help="H; default 100")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a step; the default depends on the size")
    parser.add_argument("--context", type=int, help="tokens of a sequence; the default depends on the size")
    parser.add_argument("--microbatch", type=int, default=0, help="sequences computed at once; default 0: all")
    parser.add_argument("--rounds", type=int, default=2, help="whole rounds of a turn, at least; default 2")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured in a turn, at least; default 60")
    parser.add_argument("--settle", type=float, help="seconds of training not measured; default 0, 240 with compile")
    parser.add_argument("--device", help="cpu (the default), cuda or cuda:N")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default fp32")
    parser.add_argument("--compile", choices=("on", "off"), help="default off")
    parser.add_argument("--halves", action="store_true", help="two volunteers share what the plain loop has alone")
    parser.add_argument("--peak-tflops", type=float, help="of the device; default on a card 989, an H100's in bf16")
    parser.add_argument("--daemon", choices=("others", "own"), default="others", help="cores of the network daemon")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--dir", help="where the swarm's folders lie meanwhile")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.is_card = (options.device or "cpu") != "cpu"
    if options.settle is None:
        options.settle = 240.0 if options.compile == "on" else 0.0
    if options.peak_tflops is None and options.is_card:
        options.peak_tflops = 989.0
    return options


def require_card() -> None:
    """End with exit code 2 if there is no card."""
    import torch

    if not torch.cuda.is_available():
        print("error: torch finds no card here, so nothing was measured; leave --device out", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    options = parse()
    if options.plain:
        plain(options.plain, options)
        return
    if options.is_card:
        require_card()
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that the folder is removed
    volunteer_words(options)  # ends this program if `join` lacks an option
    run, cores, began_s = run_of(options), Cores.here(options.is_card), time.monotonic()
    print(about(run, cores, options), flush=True)
    card, pairs = CardMemory(options.is_card), list[Pair]()
    with tempfile.TemporaryDirectory(prefix="inner-loop-", dir=options.dir) as folder:
        write_text(Path(folder) / "text.txt")
        swarm = Swarm(Path(folder), cores, options)
        try:
            swarm.start(run)
            print(HEAD, flush=True)
            for number, pair in enumerate(turns(swarm, options), 1):
                pairs.append(pair)
                show(number, pair)
                if peak := card.take_peak():
                    print(f"{'':6}the card's memory in use in both turns: at most {peak / 1e9:.1f} GB", flush=True)
        finally:
            card.close()
            swarm.kill()
    judge(pairs, run, options)
    print(f"({time.monotonic() - began_s:.0f} s in all, load {os.getloadavg()[0]:.1f} after)", flush=True)


if __name__ == "__main__":
    main()
