"""`swarmtrain limits`: show or change what a peer may use of its machine while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from swarmtrain.cli.common import WhichPeer, example, finite, limit, which_peer
from swarmtrain.cli.output import echo

if TYPE_CHECKING:
    from swarmtrain.protocol.limits import Hours


@click.command(name="limits", epilog=example("swarmtrain limits", "swarmtrain limits anna --threads 2 --hours 22-7"))
@which_peer
@click.option(
    "--threads", type=click.IntRange(0, 4096), metavar="N", help="Processor threads to train with; 0: all cores."
)
@click.option(
    "--memory",
    callback=limit("parse_size"),
    metavar="SIZE",
    help="Memory the peer may use, such as 4GB; none: no limit.",
)
@click.option(
    "--nice",
    type=click.IntRange(0, 19),
    metavar="N",
    help="Processor priority. 0: the same as other programs; 19: only idle time.",
)
@click.option(
    "--only-when-idle/--any-time",
    "idle",
    default=None,
    help="Pause while other programs use the processors; --any-time: train whatever they do.",
)
@click.option("--gpu-share", type=click.IntRange(1, 100), metavar="PCT", help="Percentage of the graphics card's time to train for; the peer rests after each step.")  # fmt: skip
@click.option(
    "--gpu-when-idle/--gpu-any-time",
    "gpu_idle",
    default=None,
    help="Pause while other programs use the graphics card; --gpu-any-time: train whatever they do there.",
)
@click.option("--on-battery/--mains-only", "on_battery", default=None, help="Train on battery, too; --mains-only: pause on battery.")  # fmt: skip
@click.option("--max-temperature", callback=limit("parse_temperature"), metavar="C", help="Pause when the graphics card, or without one the processor, has so many degrees Celsius; none: never; auto: shortly before the card would slow itself down.")  # fmt: skip
@click.option(
    "--hours",
    callback=limit("parse_hours"),
    metavar="FROM-TO",
    help="Hours in which to train, local time, such as 22-7 or 12-13,18:30-8; any: always.",
)
@click.option("--up", type=click.FloatRange(0, 100_000), callback=finite, metavar="MBIT", help="Upload limit in Mbit/s; 0: no limit.")  # fmt: skip
@click.option("--down", type=click.FloatRange(0, 100_000), callback=finite, metavar="MBIT", help="Limit in Mbit/s of what comes from other peers; 0: none. Models and data sets of the Hugging Face hub come unlimited, as its library knows no limit.")  # fmt: skip
def command(
    which: WhichPeer,
    threads: int | None,
    memory: int | None,
    nice: int | None,
    idle: bool | None,
    gpu_share: int | None,
    gpu_idle: bool | None,
    on_battery: bool | None,
    max_temperature: float | None,
    hours: Hours | None,
    up: float | None,
    down: float | None,
) -> None:
    """Show or change what a peer may use of its machine.

    Without options, prints the limits. Options change them while the peer runs; limits without an option stay.
    """
    from swarmtrain.cli.facts import limits_in_words
    from swarmtrain.cli.peers import ask, find_running, tell, title
    from swarmtrain.v1 import control_pb2 as wire

    peer = find_running(which)
    asked: dict[str, float | str | None] = {"threads": threads, "memory_bytes": memory, "nice": nice}
    asked |= {"only_when_idle": idle, "hours": None if hours is None else hours.text, "up_mbit": up, "down_mbit": down}
    asked |= {"gpu_share": gpu_share, "gpu_any_time": None if gpu_idle is None else not gpu_idle}
    asked |= {"on_battery": on_battery, "max_temperature": max_temperature}
    limits = wire.Limits()
    for name, value in asked.items():
        if value is not None:
            setattr(limits, name, value)
    if limits.ByteSize():
        echo(tell(peer, "Limit", limits))
        return
    status = ask(peer, "Status", wire.StatusRequest())
    echo(f"{title(status, peer.folder)} may use {limits_in_words(status.limits)}")
