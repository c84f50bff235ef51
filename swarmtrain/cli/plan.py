"""`swarmtrain plan`: predict a run with given volunteers and links, before anybody is invited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from swarmtrain.cli import swarm_options
from swarmtrain.cli.common import example, finite
from swarmtrain.cli.output import echo
from swarmtrain.cli.run_files import GivenRun, run_argument, run_examples

if TYPE_CHECKING:
    from swarmtrain.rehearsal import LinksSection
    from swarmtrain.run import RunFile
    from swarmtrain.simulate.planning.bottlenecks import Bottleneck
    from swarmtrain.simulate.planning.plan import Plan

_TOLD = 3
"""Most bottlenecks to print."""


@click.command(
    name="plan",
    epilog=run_examples()
    + example(
        "swarmtrain plan stdlib-gpt --peers 3",
        "swarmtrain plan run.toml --peers 300 --link-up 20 --link-down 100 --rtt 80",
        "swarmtrain plan run.toml --peers 300 --link-up 20 --step-s 1.5 --slowdown 1,1,2,4",
    ),
)
@run_argument
@swarm_options.PEERS
@click.option("--step-s", type=click.FloatRange(1e-6, 86_400), callback=finite, metavar="S", help="Seconds per inner step of a volunteer without slowdown.  [default: measured here, on the device that join takes, with one thread]")  # fmt: skip
@click.option("--slowdown", "slowdowns", callback=swarm_options.slowdowns, metavar="F,...", help="For an unequal swarm: how many times longer each volunteer's step takes, such as 1,1,2,4; repeated if there are more volunteers than factors.  [default: 1 for each]")  # fmt: skip
@swarm_options.RTT
@swarm_options.LINK_UP
@swarm_options.LINK_DOWN
@swarm_options.JITTER
@swarm_options.LOSS
@swarm_options.CHURN
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the random choices.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    given: GivenRun,
    peers: int | None,
    step_s: float | None,
    slowdowns: tuple[float, ...],
    rtt: float | None,
    link_up: float | None,
    link_down: float | None,
    jitter: float | None,
    loss: float | None,
    churn: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Predict a run's speed, traffic and first bottleneck.

    Plays a few rounds of a part of the volunteers in virtual time, with the rules that real peers follow. Trains
    nothing and contacts nobody.
    """
    import dataclasses
    import itertools
    import json

    run = given.load_resolved()
    said = swarm_options.links_said(rtt, link_up, link_down, jitter, loss)
    peers = swarm_options.peers_for(run, peers)
    measured = None
    if step_s is None:
        measured = _measured(run)
        step_s = measured.step_s
    from swarmtrain.rehearsal import LinksSection, RehearsalChurn  # these imports take a second or two
    from swarmtrain.simulate.planning.bottlenecks import bottlenecks
    from swarmtrain.simulate.planning.plan import plan
    from swarmtrain.simulate.planning.playback import PlaybackMachines

    factors = tuple(itertools.islice(itertools.cycle(slowdowns or (1.0,)), peers))
    machines = PlaybackMachines(
        step_s=tuple(step_s * factor for factor in factors), churn=RehearsalChurn(every_s=churn or 0.0)
    )
    links = LinksSection(**said)
    found = plan(run, machines, links, seed)
    worst = bottlenecks(run, found)
    if as_json:
        table = {"run": run.run.name, **dataclasses.asdict(found), **_derived(found)}
        rows = [dataclasses.asdict(one) for one in worst]
        for row in rows:  # the field keeps the name that programs know
            row["strain"] = row.pop("utilization")
        echo(json.dumps({**table, "hurts": rows}, allow_nan=False))
        return
    shared = [] if measured is None else _shared_here(slowdowns, peers, measured)
    for line in (*report(run, found, links), *shared, *_worst(worst)):
        echo(line)


@dataclass(frozen=True)
class _Measured:
    """Inner step that was measured here."""

    step_s: float
    device: str
    """Name of the device, as torch calls it."""


def _measured(run: RunFile) -> _Measured:
    """Measure an inner step on the device that `join` takes by itself, with one thread, as `swarmtrain local` gives each
    volunteer.
    """
    from swarmtrain.peer.devices.choice import choose_compute
    from swarmtrain.peer.lifecycle.node import use_threads
    from swarmtrain.peer.training.speed import LIMIT_S, measure_speed
    from swarmtrain.protocol.devices import DeviceRequest
    from swarmtrain.words import device_in_words

    use_threads(1)
    chosen = choose_compute(run, DeviceRequest(), "auto")
    compute, choice = chosen.compute, chosen.choice
    device = str(compute.device)
    where = f"{device_in_words(device, choice.title)} in {compute.precision}"
    echo(
        f"measuring an inner step on {where} ({choice.why}), for at most {LIMIT_S:.0f} s; --step-s skips this", err=True
    )
    return _Measured(run.tokens_per_step / measure_speed(run, compute=compute), device)


def _derived(found: Plan) -> dict[str, Any]:
    """Return numbers that follow from a plan, for its JSON."""
    return {
        "publication_bytes": found.publication_bytes,
        "rounds_per_hour": found.rounds_per_hour,
        "up_bytes": found.up_bytes,
        "down_bytes": found.down_bytes,
        "up_bytes_per_day": found.up_bytes_per_day,
        "down_bytes_per_day": found.down_bytes_per_day,
        "up_share": found.up_share,
        "down_share": found.down_share,
    }


def report(run: RunFile, found: Plan, links: LinksSection) -> list[str]:
    """Describe a plan in lines for a person, without its bottlenecks."""
    from swarmtrain.words import count_in_words as count
    from swarmtrain.words import counted
    from swarmtrain.words import size_in_words as size
    from swarmtrain.words import time_in_words as time

    traffic, unequal = found.traffic, found.step_most_s > found.step_least_s
    speeds = f" (the median; {_step(found.step_least_s)} to {_step(found.step_most_s)})" if unequal else ""
    rounds = f"{_number(found.rounds_per_hour)} an hour for each volunteer, {time(found.round_s)} each"
    if found.round_most_s > 1.05 * found.round_least_s:
        rounds += f" (the median; {time(found.round_least_s)} to {time(found.round_most_s)})"
    partners = f"{found.partners_per_round:.3g}"
    merging = f"a round merges the work of {partners} other peer{'' if partners == '1' else 's'}"
    if run.merge.kind.own_weights:
        merging += f"; {found.fresh_share:.0%} of the rounds merge new work of others"
    rows = {
        "inner step": f"{_step(found.step_s)}{speeds}",
        "rounds": f"{rounds}; {_number(found.num_rounds)} in the whole run",
        "whole run": f"{time(found.run_s)} for {count(run.run.total_tokens)} tokens, {count(found.tokens_per_s)} a second",
        "stall": f"a volunteer does not train for {found.stall_share:.2%} of its time",
        "merging": merging,
        "sent": _link_in_words(traffic.parts_up, found.up_share, found.up_bytes, found.run_s),
        "received": _link_in_words(traffic.parts_down, found.down_share, found.down_bytes, found.run_s),
        "bootstrap": f"{_mbit(traffic.bootstrap_up)} sent, {_mbit(traffic.bootstrap_down)} received",
        "memory": f"about {size(found.memory_bytes)} of each volunteer's, and {size(found.disk_bytes)} of its disk",
        "known by": found.by,
    }
    if run.merge.kind.has_server:
        del rows["merging"]
    if run.merge.kind.common_step and (target := run.batch_target).grows:
        grows = f"{count(target.first_tokens)} to {count(target.most_tokens)}"
        rows["rounds"] += (
            f"; batches grow from {grows} tokens, and are planned as if all had {count(target.mean_tokens)}"
        )
    if any(source.has_samples for source in run.data.mixture):
        rows["whole run"] = f"at least {rows['whole run']}; only tokens that are learnt count"
    head = f"run {run.run.name} with {counted(found.num_peers, 'volunteer')}, {_links_in_words(links)}"
    return [head, *(f"  {name:<10} {text}" for name, text in rows.items())]


def _number(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def _step(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _mbit(bytes_per_s: float) -> str:
    mbit = bytes_per_s * 8 / 1e6
    return f"{mbit:.2g} Mbit/s" if mbit < 10 else f"{mbit:,.0f} Mbit/s"


def _link_in_words(parts: dict[str, float], share: float | None, whole: float, run_s: float) -> str:
    """Describe what a volunteer sends or receives: `parts` maps a purpose to bytes per second, `whole` is for the run."""
    from swarmtrain.words import size_in_words as size

    rate = sum(parts.values())
    of = "" if share is None else f", {share:.1%} of the link"
    if share is not None and share > 1.0005:
        of = f", but the link carries {_mbit(rate / share)}: it cannot be, change what is named below"
    told = [f"{name} {part / rate:.0%}" for name, part in parts.items() if part >= 0.005 * rate > 0]
    by = f"; {', '.join(told)}" if told else ""
    day = f"{size(86_400 * rate)} a day, " if run_s >= 86_400 else ""
    return f"{_mbit(rate)} by each volunteer{of}: {day}{size(whole)} in the whole run{by}"


def _links_in_words(links: LinksSection) -> str:
    said = [f"{links.up_mbit:g} Mbit/s up"] if links.up_mbit else []
    said += [f"{links.down_mbit:g} Mbit/s down"] if links.down_mbit else []
    said += [f"{links.rtt_ms:g} ms"] if links.rtt_ms else []
    said += [f"{links.jitter_ms:g} ms of jitter"] if links.jitter_ms else []
    said += [f"{links.loss_percent:g} % lost"] if links.loss_percent else []
    return ", ".join(said) or "no limit on their links"


def _shared_here(slowdowns: tuple[float, ...], peers: int, measured: _Measured) -> list[str]:
    """Warn that a rehearsal on this machine would be slower, if the volunteers would share its cores, or its card."""
    import os

    from swarmtrain.words import counted

    cores = (os.cpu_count() or 1) if measured.device == "cpu" else 1
    busy = sum(1 / (slowdowns[number % len(slowdowns)] if slowdowns else 1.0) for number in range(peers)) / cores
    if busy <= 1:
        return []
    return [
        f"  here       a rehearsal on this machine (swarmtrain local) would be about {_number(busy)} times slower: "
        f"{counted(peers, 'volunteer')} would share "
        + (counted(cores, "core") if measured.device == "cpu" else measured.device)
    ]


def _worst(found: tuple[Bottleneck, ...]) -> list[str]:
    from swarmtrain.simulate.planning.bottlenecks import FELT

    felt = [one for one in found if one.utilization >= FELT]
    if not felt:
        return [f"  no bottleneck; closest to one: {one.what}: {one.why}" for one in found[:1]]
    lines = []
    for number, one in enumerate(felt[:_TOLD]):
        lines += [f"  {'next' if number else 'first bottleneck'}: {one.what}: {one.why}", f"    change {one.change}"]
    return [*lines, "  after a change, plan again: another bottleneck may then come first"]
