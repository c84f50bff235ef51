"""Records anew, by today's code: `PYTHONPATH=. python tests/recordings/make.py [real] [learning] [systems] [NAME...]`.

Without arguments all of it. What is simulated is the same at each time. Real runs take a minute each, and need a
machine that is not too busy; "real-hidden" needs root, for network namespaces. Recordings are the referee of what
replaces the code that made them: make one anew only where what was recorded is wrong, and say so.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "processes"), str(HERE.parent / "simulate")]

from boundary import prelude  # noqa: E402 - they are beside this file
from lines import Recording, header_of, save  # noqa: E402
from namespaces import PORT, machines  # noqa: E402
from simulated import LEARNING, SYSTEMS, record_learning, record_systems  # noqa: E402
from swarm import Child, Swarm, write_run  # noqa: E402

from swarmtrain.events import DoneEvent, InviteEvent  # noqa: E402
from swarmtrain.peer.checkpoint import load_newest  # noqa: E402
from swarmtrain.peer.checkpoint_files import CheckpointFolder  # noqa: E402
from swarmtrain.run import parse_published_untrusted, run_sha256  # noqa: E402

CONTEXT_TOKENS, BATCH_SEQUENCES, INNER_STEPS = 32, 8, 24
ROUND_TOKENS = INNER_STEPS * BATCH_SEQUENCES * CONTEXT_TOKENS
MODEL = {"context_tokens": CONTEXT_TOKENS, "num_layers": 2, "width": 16, "num_heads": 2, "feed_forward_ratio": 2.0}
NUM_TEXTS = 12
LIMIT_S = 240.0


@dataclass(frozen=True)
class RealRun:
    """Volunteers by name, with what they are started with, and what happens to them."""

    name: str
    merge: dict[str, Any]
    volunteers: dict[str, tuple[str, ...]]
    network: dict[str, Any] = field(default_factory=dict)
    rounds: int = 15
    """Of all together."""
    at_first: int = 3
    """So many begin it; the others come by what happens."""
    hidden: tuple[str, ...] = ()
    happens: Callable[[Recorded], None] = lambda recorded: None


@dataclass
class Recorded:
    """A run that is recorded."""

    run: RealRun
    swarm: Swarm
    invite: str
    children: dict[str, Child] = field(default_factory=dict)

    def join(self, name: str) -> Child:
        """Start this volunteer."""
        path = self.swarm.folder / f"{name}.jsonl"
        child = self.swarm.join(name, self.invite, *self.run.volunteers[name], prelude=prelude(path))
        self.children[name] = child
        return child


def _dies_and_comes(recorded: Recorded) -> None:
    """Ben is killed in his third round, and Dora comes later."""
    children = recorded.children
    children["ben"].wait_round(1, LIMIT_S)
    children["ben"].kill()
    children["anna"].wait_more_rounds(1, LIMIT_S)
    recorded.join("dora")


def _stands_still(recorded: Recorded) -> None:
    """Carl is stopped for some rounds of the others, and takes their weights after that."""
    carl, anna = recorded.children["carl"], recorded.children["anna"]
    carl.wait_round(1, LIMIT_S)
    os.kill(carl.process.pid, signal.SIGSTOP)
    anna.wait_more_rounds(5, LIMIT_S)
    os.kill(carl.process.pid, signal.SIGCONT)


def _host_dies(recorded: Recorded) -> None:
    """Ben, who serves what those publish that nobody can dial, is killed."""
    recorded.children["carl"].wait_round(3, LIMIT_S)
    recorded.children["ben"].kill()


def _rests(recorded: Recorded) -> None:
    """Carl is paused, and goes on after some rounds of the others."""
    carl, anna = recorded.children["carl"], recorded.children["anna"]
    carl.wait_round(0, LIMIT_S)
    for word in ("pause", "resume"):
        done = recorded.swarm.run(word, "--dir", str(carl.folder))
        assert done.code == 0, done.stderr
        anna.wait_more_rounds(2, LIMIT_S)


def _slowdowns(**factors: int) -> dict[str, tuple[str, ...]]:
    return {name: ("--slowdown", str(factor)) for name, factor in factors.items()}


SLOW = _slowdowns(anna=16, ben=24, carl=40)
_SHORT = {"call_limit_s": 1.0, "stall_limit_s": 2.0, "presence_ttl_s": 6.0}
REAL = [
    RealRun("defaults", {}, SLOW),
    RealRun(
        "other-rules",
        {"gradient_format": "int4", "robust": "direction", "partners": "longest-unmerged"},
        SLOW,
        rounds=24,
        happens=_rests,
    ),
    RealRun(
        "stands-still",
        {"fragments": 1, "partners": "freshest", "pacing": False, "robust": "clip", "max_staleness_rounds": 2},
        _slowdowns(anna=16, ben=18, carl=20),
        network=_SHORT | {"presence_ttl_s": 30.0},
        rounds=30,
        happens=_stands_still,
    ),
    RealRun(
        "comes-and-goes",
        {"fragments": 2, "robust": "trimmed"},
        SLOW | _slowdowns(dora=20),
        network=_SHORT,
        rounds=26,
        happens=_dies_and_comes,
    ),
    RealRun(
        "bad-links",
        {
            "init": "own",
            "fragments": 1,
            "publications_per_round": 8,
            "partners": "random-permutation",
            "robust": "none",
            "theta_format": "fp32",
            "gradient_format": "fp32",
        },
        {
            "anna": (*SLOW["anna"], "--fail-pulls", "60"),
            "ben": (*SLOW["ben"], "--fail-pulls", "30"),
            "carl": (*SLOW["carl"], "--up", "2"),
            "dora": (*SLOW["ben"], "--up", "2"),
        },
        network={"max_readers": 1},
        rounds=24,
        at_first=4,
    ),
    RealRun(
        "hidden",
        {"fragments": 2, "num_partners": 2},
        _slowdowns(anna=24, ben=24, carl=30, dora=30),
        rounds=30,
        at_first=4,
        hidden=("carl", "dora"),
        happens=_host_dies,
    ),
]


def record_real(run: RealRun) -> Recording:
    """Run its volunteers, and put what they wrote together."""
    with tempfile.TemporaryDirectory(prefix="recording-") as folder, _swarm_of(run, Path(folder)) as swarm:
        path = write_run(
            swarm.folder,
            NUM_TEXTS,
            run={"total_tokens": run.rounds * ROUND_TOKENS},
            model=MODEL,
            inner={"warmup_fraction": 0.1, "batch_sequences": BATCH_SEQUENCES},
            merge={
                "method": "gossip",
                "inner_steps": INNER_STEPS,
                "min_peers": run.at_first,
                "max_staleness_rounds": 50,
                **run.merge,
            },
            network={"presence_ttl_s": 15.0, **run.network},
        )
        invite = swarm.bootstrap(path).wait_event(InviteEvent, limit_s=LIMIT_S).invite
        recorded = Recorded(run, swarm, invite)
        for name in list(run.volunteers)[: run.at_first]:
            recorded.join(name)
        run.happens(recorded)
        return _put_together(recorded)


@contextlib.contextmanager
def _swarm_of(run: RealRun, folder: Path) -> Iterator[Swarm]:
    with contextlib.ExitStack() as stack:
        swarm = Swarm(folder)
        if run.hidden:
            names = ["bootstrap", *run.volunteers]
            swarm.inside, swarm.listen = stack.enter_context(machines(names, hidden=run.hidden)), f"0.0.0.0:{PORT}"
        yield stack.enter_context(swarm)


def _put_together(recorded: Recorded) -> Recording:
    run, swarm = recorded.run, recorded.swarm
    children = list(recorded.children.values())
    for child in children:
        code = child.wait(LIMIT_S)
        was_killed = code == -signal.SIGKILL
        assert was_killed or code == 0, child.story()
        assert was_killed or child.wait_event(DoneEvent).reason == "total_tokens", child.story()
    published = (children[0].folder / "run.toml").read_bytes()
    how = {
        "run_toml": published.decode(),
        "held_out": base64.b64encode((children[0].folder / "held-out.txt").read_bytes()).decode(),
        "text": {
            "made_by": "write_run of tests/processes/swarm.py",
            "number": NUM_TEXTS,
            "sha256": text_sha256(swarm.folder),
        },
        "threads": 1,
        "generator": "random.Random(f'choices of {PeerID}')",
    }
    peers = [{"name": child.name, "id": child.id, "arguments": run.volunteers[child.name]} for child in children]
    for child, peer in zip(children, peers, strict=True):
        peer["last"] = _last_of(child, published)
    lines = [
        {"peer": number, **json.loads(line)}
        for number, child in enumerate(children)
        for line in (swarm.folder / f"{child.name}.jsonl").read_text().splitlines()
    ]
    lines = _of_whole_rounds(lines)
    lines.sort(key=lambda line: (line["at_s"], line["peer"], line["number"]))
    return Recording(header_of("real", run.name, peers, how), lines)


def _of_whole_rounds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the first plans of a round in whose beginning a peer was killed: it is written after them."""
    begun = {line["peer"]: line["number"] for line in lines if line["kind"] == "round"}
    first = {"plans": lambda line: not line["done"], "expected": lambda line: not line["inputs"][2]}
    return [
        line
        for line in lines
        if line["number"] < begun.get(line["peer"], 0) or not first.get(line["kind"], lambda line: False)(line)
    ]


def _last_of(child: Child, published: bytes) -> dict[str, Any] | None:
    """Its last checkpoint; None of one that was killed."""
    if not child.all(DoneEvent):
        return None
    sha = run_sha256(published)
    run = parse_published_untrusted(published, sha)
    size = _num_parameters(run)
    found = load_newest(CheckpointFolder(child.folder / "checkpoints", sha, child.id), run, size, print)
    assert found is not None and found[0].own is not None
    state = found[0].state
    return {
        "round": found[0].progress.round,
        "batches": found[0].own.batches,
        "theta": vector_text(state.theta),
    }


def _num_parameters(run: Any) -> int:
    from swarmtrain.model.gpt import build_model

    return sum(each.numel() for each in build_model(run.model, 0).parameters())


def vector_text(vector: Any) -> str:
    """An fp32 vector's bytes, in base64."""
    return base64.b64encode(vector.numpy().tobytes()).decode()


def text_sha256(folder: Path) -> str:
    """Of the texts that a run trains on."""
    found = sha256()
    for path in sorted((folder / "texts").glob("*.txt")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _learnt(name: str) -> Recording:
    with tempfile.TemporaryDirectory(prefix="recording-") as folder:
        return record_learning(name, Path(folder))


def main(wanted: Sequence[str]) -> None:
    """Record what is wanted."""
    torch.set_num_threads(1)
    runs: list[tuple[str, str, Callable[[], Recording]]] = []
    runs += [("learning", name, partial(_learnt, name)) for name in LEARNING]
    runs += [("systems", name, partial(record_systems, name)) for name in SYSTEMS]
    runs += [("real", run.name, partial(record_real, run)) for run in REAL]
    for what, name, record in runs:
        if not wanted or {what, name} & set(wanted):
            began_s, recording = time.monotonic(), record()
            path, took_s = save(recording), time.monotonic() - began_s
            print(f"{path.name}: {len(recording.lines)} lines, {path.stat().st_size / 1e3:.0f} kB, {took_s:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
