"""`swarmtrain leave`: end a peer as Ctrl-C does, from anywhere on its machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from swarmtrain.cli.common import WhichPeer, example, which_peer
from swarmtrain.cli.output import echo

if TYPE_CHECKING:
    from swarmtrain.cli.peers import LocalPeer

END_LIMIT_S = 120.0
_LOOK_EVERY_S = 0.1
_LOOK_FOR_WARNINGS_S = 1.0


@click.command(name="leave", epilog=example("swarmtrain leave", "swarmtrain leave anna --no-wait"))
@which_peer
@click.option("--no-wait", is_flag=True, help="Return at once; do not wait until the process has ended.")
@click.pass_context
def command(ctx: click.Context, which: WhichPeer, no_wait: bool) -> None:
    """End a peer cleanly and wait until it has ended.

    The peer finishes its inner step, tells the other peers that it leaves, and ends, as after Ctrl-C. The run continues
    without it; `swarmtrain join` with the same --dir brings it back.
    """
    from swarmtrain.cli.peers import NoAnswerError, find_running, tell
    from swarmtrain.peer.lifecycle.folder_lock import holder_pid
    from swarmtrain.v1 import control_pb2 as wire

    peer, warnings = find_running(which), _Warnings()
    process = holder_pid(peer.folder) if peer.folder is not None else 0
    try:
        said = tell(peer, "Leave", wire.LeaveRequest())
    except NoAnswerError:
        if peer.folder is None:
            raise
        said = _interrupt(peer)
    said, code = (said, 0) if no_wait else _wait_for_end(peer, process, warnings)
    echo(said)
    ctx.exit(code)


def _interrupt(peer: LocalPeer) -> str:
    """End a peer that does not answer yet by SIGTERM, which does the same. Raises RunTimeError if that is not allowed."""
    import os
    import signal

    from swarmtrain.errors import RunTimeError
    from swarmtrain.peer.lifecycle.folder_lock import holder_pid

    assert peer.folder is not None
    process = holder_pid(peer.folder)
    if not process:
        return "it has ended"
    try:
        os.kill(process, signal.SIGTERM)
    except ProcessLookupError:
        return "it has ended"
    except PermissionError:
        raise RunTimeError(f"process {process} runs as another user; ask as that user", code="other-user") from None
    return f"process {process} was told to end (SIGTERM): it does not answer its control socket"


class _Warnings:
    """Warnings of a peer while it leaves, printed here too, since nobody may see its own screen."""

    def __init__(self) -> None:
        import time

        self._since_s = time.time()
        self._told: set[str] = set()

    def look(self, peer: LocalPeer) -> None:
        """Print the peer's new warnings, if it answers."""
        from swarmtrain.cli.peers import ask
        from swarmtrain.errors import SwarmtrainError
        from swarmtrain.v1 import control_pb2 as wire

        try:
            self.say(ask(peer, "Status", wire.StatusRequest(), limit_s=1.0))
        except SwarmtrainError:
            return  # it ends

    def say(self, status: Any) -> None:
        """Print warnings of a status that are new."""
        from swarmtrain.words import one_line

        for notice in status.notices:
            if notice.time >= self._since_s and notice.message not in self._told:
                self._told.add(notice.message)
                echo(f"warning: {one_line(notice.message)}", err=True)


def _wait_for_end(peer: LocalPeer, process: int, warnings: _Warnings) -> tuple[str, int]:
    """Wait for the end; return how it ended, in a sentence, and the exit code. Prints its warnings meanwhile.

    Raises RunTimeError if it has not ended by the time limit.
    """
    import threading
    import time

    from swarmtrain.cli.peers import title
    from swarmtrain.errors import RunTimeError

    give_up_s = time.monotonic() + END_LIMIT_S
    pause, next_look_s = threading.Event(), time.monotonic() + _LOOK_FOR_WARNINGS_S
    while _lives(peer, process):
        if time.monotonic() > give_up_s:
            raise RunTimeError(
                f"the peer has not ended {END_LIMIT_S:.0f} s after it was told to; `swarmtrain status` shows what it does",
                code="still-ending",
            )
        pause.wait(_LOOK_EVERY_S)
        if time.monotonic() >= next_look_s:
            warnings.look(peer)
            next_look_s = time.monotonic() + _LOOK_FOR_WARNINGS_S
    if peer.folder is None:
        return f"{peer.address} has ended", 0
    from swarmtrain.cli.facts import sentence
    from swarmtrain.cli.peers import PeerPhase, look

    view = look(peer)
    warnings.say(view.status)
    ended = f"{title(view.status, peer.folder)}: {sentence(view)}"
    if view.phase is not PeerPhase.ENDED:
        return ended, 1
    from swarmtrain.cli.closing_line import last_line

    last = last_line(view.status.end_reason, view.status, peer.folder)
    return "\n".join(line for line in (ended, last) if line), 0


def _lives(peer: LocalPeer, process: int) -> bool:
    """Return whether the peer holds its folder or its process still exists; over TCP, whether it answers."""
    from swarmtrain.cli.peers import NoAnswerError, ask
    from swarmtrain.peer.lifecycle.folder_lock import is_in_use
    from swarmtrain.v1 import control_pb2 as wire

    if peer.folder is not None:
        return is_in_use(peer.folder) or _is_process(process)
    try:
        ask(peer, "Status", wire.StatusRequest(), limit_s=1.0)
    except NoAnswerError as error:
        return error.timed_out
    return True


def _is_process(number: int) -> bool:
    """Return whether a process runs. One that has ended stays listed as a zombie until its parent reads its code."""
    import psutil

    try:
        return number > 0 and psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
