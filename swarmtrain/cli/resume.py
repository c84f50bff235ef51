"""`swarmtrain resume`: go on after a pause."""

from __future__ import annotations

import click

from swarmtrain.cli.common import WhichPeer, example, which_peer
from swarmtrain.cli.output import echo


@click.command(name="resume", epilog=example("swarmtrain resume", "swarmtrain resume anna"))
@which_peer
def command(which: WhichPeer) -> None:
    """Resume a paused peer.

    The peer continues from its own weights, or, if the others are more than a few rounds ahead, from theirs.
    """
    from swarmtrain.cli.peers import find_running, tell
    from swarmtrain.v1 import control_pb2 as wire

    echo(tell(find_running(which), "Resume", wire.ResumeRequest()))
