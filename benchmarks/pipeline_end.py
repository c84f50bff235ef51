"""Train a pipeline with kills and a late joiner, and the same model without a pipeline, on equal tokens.

    python benchmarks/pipeline_end.py examples/pipeline.toml --seeds 0,1,2

Both are swarms of real processes. The pipeline has six volunteers: one is killed after a quarter of the run's tokens,
one after half of them, and a seventh joins after a third. Without a pipeline two volunteers train the model, as many as
a stage has. Bar: a held-out loss within 3 %.
"""

from __future__ import annotations

import argparse
import math
import signal
import statistics
import tempfile
import time
from pathlib import Path

import tomli_w
from cold_start import read_run

from swarmtrain.events import DoneEvent, Event, MicrobatchRetryEvent, MovedEvent, RoundEvent
from swarmtrain.peer.local.swarm import LocalSwarm
from swarmtrain.run import RunFile

KILLED_AT, LATE_AT = (0.25, 0.5), 1 / 3


def trained(run: RunFile, num_peers: int, *, dies: bool) -> tuple[float, float]:
    """Train a swarm, and print what happens in it; return (held-out loss, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_text(tomli_w.dumps(run.model_dump(mode="json", exclude_none=True)))
        swarm = LocalSwarm(Path(folder))
        began_s = time.monotonic()
        try:
            company = ["--wait-for", str(num_peers)]
            swarm.start("bootstrap", ["bootstrap", str(path), *swarm.place("bootstrap", limited=False), *company])
            invite, _ = swarm.wait_for_invite()

            def join(number: int) -> None:
                name = f"volunteer-{number}"
                swarm.start(name, ["join", invite.invite, *swarm.place(name, limited=True), "--threads=1"])

            for number in range(num_peers):
                join(number)
            to_kill, late = list(KILLED_AT) if dies else [], [LATE_AT] if dies else []
            loss, victims, told, merged = math.nan, iter(("volunteer-1", "volunteer-4")), [0, 0], [0, 0]
            for event in swarm.events():
                share = event.run_tokens / run.run.total_tokens if isinstance(event, RoundEvent) else 0.0
                if to_kill and share >= to_kill[0]:
                    to_kill.pop(0)
                    swarm.children[next(victims)].process.send_signal(signal.SIGKILL)
                if late and share >= late[0]:
                    late.clear()
                    join(num_peers)
                told[0] += isinstance(event, MovedEvent)
                told[1] += event.count if isinstance(event, MicrobatchRetryEvent) else 0
                if isinstance(event, RoundEvent):
                    merged[bool(event.partners)] += 1
                loss = ended(event, loss)
            print(
                f"    {told[0]} moves, {told[1]} parts of microbatches asked again, "
                f"{merged[1]} of {sum(merged)} rounds merged somebody",
                flush=True,
            )
            return loss, time.monotonic() - began_s
        finally:
            swarm.stop()


def ended(event: Event, loss: float) -> float:
    """Return the bootstrap's loss once its event has it, else `loss`."""
    if isinstance(event, DoneEvent) and event.name == "bootstrap" and event.held_out_loss is not None:
        return event.held_out_loss
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run file")
    given = parser.parse_args()
    ratios = []
    for seed in map(int, given.seeds.split(",")):
        staged = read_run(given.run_file, given.set, seed)
        whole = read_run(given.run_file, [*given.set, "pipeline.stages=1"], seed)
        of_stages, seconds = trained(staged, 6, dies=True)
        alone, whole_s = trained(whole, 2, dies=False)
        ratios.append(of_stages / alone)
        print(f"seed {seed}: {of_stages:.4f} in {seconds:.0f} s, without {alone:.4f} in {whole_s:.0f} s", flush=True)
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    print(f"{statistics.mean(ratios):.4f} +- {error:.4f} of its loss (1.03 allowed)")


if __name__ == "__main__":
    main()
