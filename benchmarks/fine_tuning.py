"""Compare ways to fine-tune a model of 10 million parameters together: all weights, adapters, one volunteer alone.

    python benchmarks/fine_tuning.py                          # all of it, some 50 minutes on two cores
    python benchmarks/fine_tuning.py --base runs/fine-tuning/base     # with a base that is there already
    python benchmarks/fine_tuning.py --quick --dir /tmp/quick         # whether it works: a tiny model, one seed

A swarm of two pretrains the built-in model on the code of Python's standard library, its docstrings left out, and the
model is exported. Then swarms of real processes (`swarmtrain local`, gossip) fine-tune it on the docstrings, one part
of which is held out:

- full: three volunteers train all weights;
- equal: three volunteers train a LoRA adapter of rank 16 beside all linear layers, each of them all of it;
- unequal: the same adapter, of which the volunteers train components worth ranks 4, 8 and 16 in each round;
- alone: one volunteer trains the adapter of rank 16 by itself, on as many tokens as each of three does.

The first three train on equally many tokens together. Learning rates are of one grid, chosen on a seed of their own:
from a rate in the middle to better neighbours until both are worse; with several outer steps, then the other ones.
"unequal" and "alone" take what was chosen for "equal". Then each is run with three other seeds, of which the initial
adapter, the order of the text and the held-out part follow.

Prints each held-out loss, its fall from the base's loss on the same text, the mean fall as a share of full
fine-tuning's, and the bytes that a volunteer sent in all rounds (`bytes_sent` of its `round` events; nothing is
archived before the end, and each volunteer has the base's files from the start). Bars: "equal" and "unequal" reach 70 %
of the fall with at most 8 % of the bytes, and the loss of "unequal" is at most 2 % above that of "equal".

Each finished run is a line of results.jsonl in the folder; a rerun with the same folder does only what is missing, and
continues an unfinished pretraining. Ctrl-C ends the swarm that runs.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from swarmtrain.data.documents import read_documents
from swarmtrain.events import DoneEvent, ErrorEvent, Event, RoundEvent, WarningEvent, parse_event
from swarmtrain.network.daemon import owned_process_args
from swarmtrain.peer.local.swarm import BOOTSTRAP
from swarmtrain.run import DataSection

DOCSTRINGS = Path(__file__).resolve().parent.parent / "examples" / "docstrings.py"
RANK, ALPHA, GROUP_RANK = 16, 32.0, 4
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
OUTERS = ((0.7, 0.8), (1.0, 0.0))
"""Outer learning rate and momentum."""
TUNING_SEED = 0
LEAST_FALL, MOST_BYTES, MOST_LOSS = 0.70, 0.08, 1.02
GROUP = -1 if sys.platform.startswith("linux") else 0
"""Process group of a swarm: Ctrl-C does not reach it. On Linux it has a session of its own."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Model, and how long it is trained."""

    model: dict[str, Any]
    base_tokens: int
    """Tokens of the pretraining."""
    base_batch: int
    tokens: int
    """Tokens of a fine-tuning of three volunteers."""
    batch: int
    """Sequences of an inner step."""
    inner_steps: int
    held_out_bytes: int
    rates: tuple[float, ...] = RATES
    outers: tuple[tuple[float, float], ...] = OUTERS

    @property
    def sha256(self) -> str:
        """Hash that differs between sizes, so that results of one are not taken for another's."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


WHOLE = Size(
    model={"width": 512, "num_layers": 3, "num_heads": 8, "feed_forward_ratio": 2.667, "context_tokens": 128},
    base_tokens=1_800_000,
    base_batch=8,
    tokens=98_304,
    batch=1,
    inner_steps=16,
    held_out_bytes=32_768,
    outers=OUTERS[:1],
)
QUICK = Size(
    model={"width": 64, "num_layers": 2, "num_heads": 2, "feed_forward_ratio": 2.0, "context_tokens": 32},
    base_tokens=81_920,
    base_batch=8,
    tokens=12_288,
    batch=2,
    inner_steps=8,
    held_out_bytes=8192,
    rates=(3e-3,),
    outers=OUTERS[:1],
)


@dataclass(frozen=True)
class Constants:
    """Inner learning rate, and the outer step."""

    rate: float
    outer: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.rate:g}, outer {self.outer[0]:g} and {self.outer[1]:g}"


@dataclass(frozen=True)
class Way:
    """One of the ways to fine-tune."""

    name: str
    ranks: tuple[int, ...]
    """Rank of each volunteer; 0 if it trains all weights."""
    first_rate: float
    tuned_as: str = ""
    """Way whose constants it takes; empty: its own."""

    @property
    def is_full(self) -> bool:
        return not any(self.ranks)

    @property
    def told(self) -> str:
        return "all weights" if self.is_full else f"rank {', '.join(map(str, self.ranks))}"


FULL, EQUAL = Way("full", (0, 0, 0), 1e-3), Way("equal", (RANK,) * 3, 3e-3)
UNEQUAL, ALONE = Way("unequal", (4, 8, 16), 3e-3, tuned_as="equal"), Way("alone", (RANK,), 3e-3, tuned_as="equal")
WAYS = (FULL, EQUAL, UNEQUAL, ALONE)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a fine-tuning."""

    way: str
    seed: int
    rate: float
    outer: tuple[float, float]
    size: str
    base: str
    loss: float
    """Nats a byte of held-out docstrings, of the consensus."""
    base_loss: float
    """The base's on the same text."""
    run_tokens: int
    tokens: tuple[int, ...]
    """Of each volunteer."""
    sent_bytes: tuple[int, ...]
    """Of each volunteer, in all rounds."""
    rounds: int
    """Most of a volunteer."""
    seconds: float

    @property
    def fall(self) -> float:
        return self.base_loss - self.loss

    @property
    def key(self) -> tuple[object, ...]:
        """What tells runs apart."""
        return self.way, self.seed, self.rate, tuple(self.outer), self.size, self.base


class ResultLog:
    """Finished runs, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[tuple[object, ...], Result] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                table = json.loads(line)
            except ValueError:
                continue  # cut short, as this program was killed while writing
            for name in ("outer", "tokens", "sent_bytes"):
                table[name] = tuple(table[name])
            result = Result(**table)
            self._found[result.key] = result

    def get(self, key: tuple[object, ...]) -> Result | None:
        return self._found.get(key)

    def add(self, result: Result) -> None:
        self._found[result.key] = result
        is_torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write("\n" * is_torn + json.dumps(dataclasses.asdict(result)) + "\n")
            file.flush()
            os.fsync(file.fileno())


# ---------------------------------------------------------------- text


def without_docstrings(source: bytes) -> bytes:
    """Return a Python source without its docstrings; empty if it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return b""
    lines = source.splitlines(keepends=True)
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + len(line))
    cuts = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            said = node.body[0]
            assert said.end_lineno is not None and said.end_col_offset is not None
            begin = begins[said.lineno - 1] + said.col_offset
            cuts.append((begin, begins[said.end_lineno - 1] + said.end_col_offset))
    for begin, end in sorted(cuts, reverse=True):
        source = source[:begin] + source[end:]
    return source


def write_texts(folder: Path) -> None:
    """Write the code, and the docstrings."""
    if not (folder / "code.jsonl").exists():
        with (folder / "code.part").open("w") as file:
            for document in read_documents(DataSection(), Path()):
                if text := without_docstrings(document.text):
                    file.write(json.dumps({"text": text.decode()}) + "\n")
        (folder / "code.part").rename(folder / "code.jsonl")
    subprocess.run([sys.executable, DOCSTRINGS, folder / "docstrings.jsonl"], check=True, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------- swarms


class Bench:
    """Folder in which everything is done."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self.log = ResultLog(folder / "results.jsonl")
        self.base = Path()
        self.base_sha256 = ""

    def prepare(self, base: Path | None) -> None:
        """Pretrain the base, unless there is one."""
        write_texts(self.folder)
        self.base = (base or self.folder / "base").resolve()
        if not self.base.is_dir():
            if base is not None:
                sys.exit(f"error: {base}: is no folder; give an export with --base, or leave it out")
            self._pretrain()
        weights = sorted(self.base.glob("*.safetensors"))
        if not weights:
            sys.exit(f"error: {self.base}: has no weights; give an export with --base")
        self.base_sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16]

    def _pretrain(self) -> None:
        batch_tokens = self.size.base_batch * self.size.model["context_tokens"]
        table = {
            "run": {"name": "base", "total_tokens": self.size.base_tokens},
            "model": self.size.model,
            "data": {"source": "jsonl", "paths": ["code.jsonl"], "held_out_bytes": self.size.held_out_bytes},
            "inner": {"batch_sequences": self.size.base_batch, "learning_rate": 1.5e-3},
            "merge": {"inner_steps": 25},
            "network": {"archive_every_s": 60.0},
        }
        path = self._write("base.toml", table)
        began_s, swarm = time.monotonic(), self.folder / "pretraining"
        print(f"pretraining, {self.size.base_tokens:,} tokens in steps of {batch_tokens}", flush=True)
        events = list(self._local(path, swarm, ["--peers", "2"]))
        done = next(event for event in events if isinstance(event, DoneEvent) and event.name == BOOTSTRAP)
        print(f"  {done.held_out_loss:.4f} nats a byte of code; {time.monotonic() - began_s:.0f} s", flush=True)
        command("export", "--dir", str(swarm / BOOTSTRAP), "--to", str(self.folder / "base"))

    def run(self, way: Way, seed: int, constants: Constants) -> Result:
        """Fine-tune once, unless that was done before."""
        key = (way.name, seed, constants.rate, constants.outer, self.size.sha256, self.base_sha256)
        if (found := self.log.get(key)) is not None:
            return found
        swarm, began_s = self.folder / "swarm", time.monotonic()
        shutil.rmtree(swarm, ignore_errors=True)
        path = self._write("tuning.toml", self._tuning(way, seed, constants))
        words = ["--peers", str(len(way.ranks)), "--model-dir", str(self.base)]
        words += [] if way.is_full else ["--ranks", ",".join(map(str, way.ranks))]
        rounds: dict[str, list[RoundEvent]] = {}
        done: dict[str, DoneEvent] = {}
        for event in self._local(path, swarm, words):
            if isinstance(event, RoundEvent):
                rounds.setdefault(event.name, []).append(event)
            elif isinstance(event, DoneEvent):
                done[event.name] = event
        whole = done.pop(BOOTSTRAP)
        assert whole.held_out_loss is not None and len(done) == len(way.ranks) == len(rounds), "all came to the end"
        result = Result(
            way=way.name,
            seed=seed,
            rate=constants.rate,
            outer=constants.outer,
            size=self.size.sha256,
            base=self.base_sha256,
            loss=whole.held_out_loss,
            base_loss=self._base_loss(swarm / BOOTSTRAP / "held-out.txt"),
            run_tokens=whole.run_tokens,
            tokens=tuple(done[name].tokens for name in sorted(done)),
            sent_bytes=tuple(sum(event.bytes_sent for event in rounds[name]) for name in sorted(rounds)),
            rounds=max(map(len, rounds.values())),
            seconds=time.monotonic() - began_s,
        )
        self.log.add(result)
        shutil.rmtree(swarm)
        print(
            f"  {way.name}, seed {seed}, rate {constants}: {result.loss:.4f} nats a byte, from {result.base_loss:.4f}; "
            f"{result.run_tokens:,} tokens, {result.rounds} rounds, {result.seconds:.0f} s",
            flush=True,
        )
        return result

    def _tuning(self, way: Way, seed: int, constants: Constants) -> dict[str, Any]:
        """Return the run file of a fine-tuning."""
        size = self.size
        table: dict[str, Any] = {
            "run": {"name": way.name, "seed": seed, "total_tokens": size.tokens * len(way.ranks) // 3},
            "model": {
                "source": "huggingface",
                "base": str(self.base),
                "context_tokens": size.model["context_tokens"],
            },
            "data": {"source": "jsonl", "paths": ["docstrings.jsonl"], "held_out_bytes": size.held_out_bytes},
            "inner": {"batch_sequences": size.batch, "learning_rate": constants.rate, "weight_decay": 0.0},
            "merge": {
                "inner_steps": size.inner_steps,
                "outer_learning_rate": constants.outer[0],
                "outer_momentum": constants.outer[1],
            },
            "network": {"archive_every_s": 36_000.0},
        }
        if not way.is_full:
            table["adapter"] = {
                "method": "lora",
                "rank": RANK,
                "alpha": ALPHA,
                "group_rank": GROUP_RANK,
                "targets": ["all-linear"],
            }
        return table

    def _write(self, name: str, table: dict[str, Any]) -> Path:
        path = self.folder / name
        path.write_text(tomli_w.dumps(table))
        return path

    def _local(self, run: Path, swarm: Path, words: Sequence[str]) -> Iterator[Event]:
        """Run a swarm to its end and yield its events; end this program if it fails."""
        arguments = [sys.executable, "-m", "swarmtrain.cli", "local", str(run), "--json", "--dir", str(swarm), *words]
        said = self.folder / "local.log"
        with said.open("w") as errors:
            process = subprocess.Popen(
                owned_process_args(arguments), stdout=subprocess.PIPE, stderr=errors, process_group=GROUP
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    event = parse_event(line)
                    if isinstance(event, WarningEvent | ErrorEvent):
                        print(f"  {event.name}: {event.message} [{event.code}]", file=sys.stderr, flush=True)
                    yield event
            except BaseException:
                process.terminate()  # it ends its peers one after the other
                process.stdout.read()
                process.wait()
                raise
            if process.wait():
                sys.exit(f"error: {run.name} failed; what it said:\n{said.read_text()[-2000:]}")

    def _base_loss(self, held_out: Path) -> float:
        """Return the base's loss on a held-out text."""
        sha256 = hashlib.sha256(held_out.read_bytes()).hexdigest()[:16]
        kept = self.folder / f"base-loss-{self.base_sha256}-{sha256}"
        if not kept.exists():
            said = command("eval", str(self.base), "--text", str(held_out), "--json", "--device", "cpu")
            kept.write_text(str(json.loads(said)["held_out_loss"]))
        return float(kept.read_text())


def command(*words: str) -> str:
    """Run a command of swarmtrain; return what it prints."""
    done = subprocess.run([sys.executable, "-m", "swarmtrain.cli", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: swarmtrain {' '.join(words)}: {done.stderr[-2000:]}")
    return done.stdout


# ---------------------------------------------------------------- tuning and tables


def tuned(bench: Bench, way: Way) -> Constants:
    """Return the best constants on the tuning seed: rates from the middle on, then outer steps."""
    rates, outers = bench.size.rates, bench.size.outers
    at = rates.index(way.first_rate) if way.first_rate in rates else 0

    def loss(index: int) -> float:
        return bench.run(way, TUNING_SEED, Constants(rates[index], outers[0])).loss

    while better := [each for each in (at - 1, at + 1) if 0 <= each < len(rates) and loss(each) < loss(at)]:
        at = min(better, key=loss)
    each = [Constants(rates[at], outer) for outer in outers]
    return min(each, key=lambda constants: bench.run(way, TUNING_SEED, constants).loss)


HEAD = (
    "way      trains            rate    outer       loss (seeds)          mean loss    fall  of full's  own tokens"
    "  sent by a volunteer  of full's"
)


def show(results: dict[str, list[Result]], chosen: dict[str, Constants]) -> None:
    """Print the table, and whether the bars hold."""
    print(f"\n{HEAD}")
    full_fall, full_sent = mean_fall(results["full"]), mean_sent(results["full"])
    for way in WAYS:
        found, constants = results[way.name], chosen[way.tuned_as or way.name]
        losses = " ".join(f"{each.loss:.4f}" for each in found)
        own = statistics.mean(tokens for each in found for tokens in each.tokens)
        print(
            f"{way.name:8} {way.told:16}  {constants.rate:<6g}  {constants.outer[0]:g}, {constants.outer[1]:<5g}  "
            f"{losses:22}  {mean_loss(found):8.4f}  {mean_fall(found):6.4f}  {mean_fall(found) / full_fall:9.1%}  "
            f"{own:10,.0f}  {mean_sent(found) / 1e6:16.3f} MB  {mean_sent(found) / full_sent:9.2%}"
        )
    print(f"the base: {statistics.mean(each.base_loss for each in results['full']):.4f} nats a byte")
    by_rank = [statistics.mean(each.sent_bytes[n] for each in results["unequal"]) / 1e6 for n in range(3)]
    print(f"sent with ranks 4, 8 and 16: {', '.join(f'{each:.3f}' for each in by_rank)} MB")
    print()
    for name in ("equal", "unequal"):
        share, sent = mean_fall(results[name]) / full_fall, mean_sent(results[name]) / full_sent
        print(f"{name}: {share:.1%} of the fall, at least {LEAST_FALL:.0%}: {held(share >= LEAST_FALL)}")
        print(f"{name}: {sent:.2%} of the bytes, at most {MOST_BYTES:.0%}: {held(sent <= MOST_BYTES)}")
    ratio = mean_loss(results["unequal"]) / mean_loss(results["equal"])
    print(f"unequal: {ratio:.4f} of equal's loss, at most {MOST_LOSS:g}: {held(ratio <= MOST_LOSS)}")


def held(is_held: bool) -> str:
    return "holds" if is_held else "DOES NOT HOLD"


def mean_loss(results: Sequence[Result]) -> float:
    return statistics.mean(each.loss for each in results)


def mean_fall(results: Sequence[Result]) -> float:
    return statistics.mean(each.fall for each in results)


def mean_sent(results: Sequence[Result]) -> float:
    """Return the bytes that a volunteer sent in a run."""
    return statistics.mean(statistics.mean(each.sent_bytes) for each in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/fine-tuning"), help="folder of it all; a rerun continues"
    )
    parser.add_argument("--base", type=Path, help="export to fine-tune; default: pretrain one, in the folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one seed, no tuning: whether it works")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that the swarm ends
    bench = Bench(options.dir, QUICK if options.quick else WHOLE)
    bench.folder.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    try:
        bench.prepare(options.base)
        print(
            f"{len(bench.size.rates)} rates and {len(bench.size.outers)} outer steps, on seed {TUNING_SEED}", flush=True
        )
        chosen = {way.name: tuned(bench, way) for way in WAYS if not way.tuned_as}
        results: dict[str, list[Result]] = {way.name: [] for way in WAYS}
        print("measuring", flush=True)
        for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + (1 if options.quick else options.seeds)):
            for way in WAYS:
                results[way.name].append(bench.run(way, seed, chosen[way.tuned_as or way.name]))
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command continues, from {bench.folder}")
    show(results, chosen)
    print(f"({time.monotonic() - began_s:.0f} s, load {os.getloadavg()[0]:.1f} after)")


if __name__ == "__main__":
    main()
