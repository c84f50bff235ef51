"""A volunteer that leaves before the end: what nobody else has goes into the bootstrap's archive first."""

from __future__ import annotations

import asyncio
import time

from swarmtrain.errors import PeerError
from swarmtrain.events import WarningEvent
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.common import Interrupted, wait_for
from swarmtrain.peer.controlled import Controlled
from swarmtrain.v1 import control_pb2, snapshot_pb2

__all__ = ["hand_over"]

_IDLE_S = 10.0
"""A bootstrap looks every second, and writes for some: if it takes nothing for so long, it will not."""
_MOST_S = 100.0
"""Somebody waits for the end, `swarmtrain leave` for two minutes: a large model may take longer over a slow link."""
_SAY_S = 5.0
_AGAIN_S = 0.5
_CALL_S = 1.0  # the process waits for it, and the user for the process, also where the daemon hangs
_WAITS = "nobody else trains: the bootstrap is archiving what only this peer has; Ctrl-C again does not wait for that"
_NOT_TAKEN = (
    "this peer's last rounds are in no archive, and nobody else has them; they are kept in its folder: join again "
    "from there to bring them back"
)


async def _should_stay(swarm: Swarm) -> bool:
    """Whether a bootstrap wants what this peer has, before it leaves; False too if none answers."""
    request = snapshot_pb2.HelloRequest(
        run_sha256=bytes.fromhex(swarm.published.sha256), presence=swarm.signed_presence(), asks_to_leave=True
    )

    async def ask(peer: str) -> bool:
        try:
            return (await swarm.calls.hello(peer, request, _CALL_S)).stay
        except PeerError:
            return False

    bootstraps = [info.peer for info in swarm.membership.live() if info.is_bootstrap]
    return any(await asyncio.gather(*map(ask, bootstraps)))


def hand_over(control: Controlled, swarm: Swarm, network: NetworkThread) -> None:
    """An end was asked for: serve on as long as a bootstrap has yet to archive what nobody else has."""
    if swarm.rounds.away or control.stop.failure is not None:
        return  # it has said goodbye before its pause, or cannot go on
    stop, began_s, told = control.stop.last_work(_MOST_S), time.monotonic(), False
    idle_s = began_s + _IDLE_S
    control.board.doing(control_pb2.PEER_STATE_FINISHING, "leaving: asking whether anybody else has what this peer has")
    try:
        while wait_for(network.submit(_should_stay(swarm)), stop):
            control.board.doing(control_pb2.PEER_STATE_FINISHING, "leaving: the archive takes what only this peer has")
            now = time.monotonic()
            if swarm.store.num_readers:
                idle_s = now + _IDLE_S
            if now > idle_s:
                break
            if not told and now > began_s + _SAY_S:
                control.emit(WarningEvent(message=_WAITS))
                told = True
            stop.sleep(_AGAIN_S)
        else:
            return
    except Interrupted:
        pass
    control.emit(WarningEvent(message=_NOT_TAKEN))
