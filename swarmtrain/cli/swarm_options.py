"""Options of a swarm that is rehearsed (`swarmtrain local`) or planned (`swarmtrain plan`, `swarmtrain check`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import PEERS_ASSUMED, finite, limit
from swarmtrain.cli.option_errors import OptionsError
from swarmtrain.words import counted

if TYPE_CHECKING:
    from swarmtrain.run import RunFile

_MAX_RTT_MS = 2000
_LEAST_MBIT = 0.1

PEERS = click.option("--peers", type=click.IntRange(1, 100_000), metavar="N", help=f"Number of volunteers to assume, each on its own machine.  [default: {PEERS_ASSUMED}, or one for each stage if that is more]")  # fmt: skip
RTT = click.option("--rtt", type=click.FloatRange(0, _MAX_RTT_MS), callback=finite, metavar="MS", help="Round-trip time to add between two peers, in ms.  [default: 0]")  # fmt: skip
LINK_UP = click.option("--link-up", type=click.FloatRange(_LEAST_MBIT, 100_000), callback=finite, metavar="MBIT", help="Upload bandwidth of each volunteer, in Mbit/s.  [default: no limit]")  # fmt: skip
LINK_DOWN = click.option("--link-down", type=click.FloatRange(_LEAST_MBIT, 100_000), callback=finite, metavar="MBIT", help="Download bandwidth of each volunteer, in Mbit/s.  [default: no limit]")  # fmt: skip
JITTER = click.option("--jitter", type=click.FloatRange(0, 2000), callback=finite, metavar="MS", help="Largest random delay to add to --rtt, each way, in ms.  [default: 0]")  # fmt: skip
LOSS = click.option("--loss", type=click.FloatRange(0, 50), callback=finite, metavar="PCT", help="Percentage of packets lost each way; a stream sees a lost packet as a delay.  [default: 0]")  # fmt: skip
CHURN = click.option("--churn", type=click.FloatRange(1), callback=finite, metavar="S", help="Mean seconds between departures: a volunteer is killed or leaves, and comes back.  [default: never]")  # fmt: skip


def peers_for(run: RunFile, peers: int | None) -> int:
    """Return how many volunteers to assume. Raises a usage error if they are too few to hold a stage each."""
    stages = run.pipeline.stages
    if peers is None:
        return max(PEERS_ASSUMED, stages)
    if peers < stages:
        raise OptionsError(
            f"--peers: {counted(peers, 'volunteer')} cannot hold {stages} stages (pipeline.stages), since here each holds one; "
            f"allowed: {stages} or more (swarmtrain local can run fewer)",
            code="too-few-peers",
        )
    return peers


def slowdowns(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Parse the factors of `--slowdown`."""
    return tuple(limit("parse_slowdown")(ctx, param, part) for part in value.split(",")) if value is not None else ()


def ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Parse the numbers of `--ranks`."""
    number = click.IntRange(1, 1024)
    return tuple(number(part, param, ctx) for part in value.split(",")) if value is not None else ()


def links_said(
    rtt: float | None, link_up: float | None, link_down: float | None, jitter: float | None, loss: float | None
) -> dict[str, float]:
    """Return the given options by the keys of a rehearsal's `[links]`."""
    said = {"rtt_ms": rtt, "up_mbit": link_up, "down_mbit": link_down, "jitter_ms": jitter, "loss_percent": loss}
    return {key: value for key, value in said.items() if value is not None}
