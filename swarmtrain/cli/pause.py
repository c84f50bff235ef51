"""`swarmtrain pause`: stop training for a while."""

from __future__ import annotations

import click

from swarmtrain.cli.common import WhichPeer, example, which_peer
from swarmtrain.cli.output import echo


@click.command(name="pause", epilog=example("swarmtrain pause", "swarmtrain pause anna"))
@which_peer
def command(which: WhichPeer) -> None:
    """Pause a peer's training; its process keeps running.

    The peer finishes its inner step and leaves the swarm, so that no other peer waits for it. `swarmtrain resume`
    brings it back.
    """
    from swarmtrain.cli.peers import find_running, tell
    from swarmtrain.v1 import control_pb2 as wire

    echo(tell(find_running(which), "Pause", wire.PauseRequest()))
