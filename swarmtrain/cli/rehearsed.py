"""The options of a swarm that is rehearsed (`swarmtrain local`) or planned (`swarmtrain plan`)."""

from __future__ import annotations

import click

from swarmtrain.cli.common import finite, limit

__all__ = ["CHURN", "JITTER", "LINK_DOWN", "LINK_UP", "LOSS", "RTT", "links_said", "slowdowns"]

_MAX_RTT_MS = 2000
_LEAST_MBIT = 0.1

RTT = click.option("--rtt", type=click.FloatRange(0, _MAX_RTT_MS), callback=finite, metavar="MS", help="To rehearse the internet: milliseconds from a peer to another and back.  [default: none added]")  # fmt: skip
LINK_UP = click.option("--link-up", type=click.FloatRange(_LEAST_MBIT, 100_000), callback=finite, metavar="MBIT", help="... what each volunteer can send, in Mbit/s.  [default: no limit]")  # fmt: skip
LINK_DOWN = click.option("--link-down", type=click.FloatRange(_LEAST_MBIT, 100_000), callback=finite, metavar="MBIT", help="... and receive.  [default: no limit]")  # fmt: skip
JITTER = click.option("--jitter", type=click.FloatRange(0, 2000), callback=finite, metavar="MS", help="... by how many milliseconds more what is sent is late at most.  [default: none]")  # fmt: skip
LOSS = click.option("--loss", type=click.FloatRange(0, 50), callback=finite, metavar="PCT", help="... how many per cent of the packets are lost each way, as a stream notices it.  [default: none]")  # fmt: skip
CHURN = click.option("--churn", type=click.FloatRange(1), callback=finite, metavar="S", help="... about how often, in seconds, a volunteer is killed or leaves, and comes back.  [default: never]")  # fmt: skip


def slowdowns(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    """An option's factors."""
    return tuple(limit("parse_slowdown")(ctx, param, part) for part in value.split(",")) if value is not None else ()


def links_said(
    rtt: float | None, link_up: float | None, link_down: float | None, jitter: float | None, loss: float | None
) -> dict[str, float]:
    """What the options say, by the keys of a rehearsal's `[links]`."""
    said = {"rtt_ms": rtt, "up_mbit": link_up, "down_mbit": link_down, "jitter_ms": jitter, "loss_percent": loss}
    return {key: value for key, value in said.items() if value is not None}
