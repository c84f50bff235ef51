"""Leaving before the run's end: what nobody else has goes into the bootstrap's archive first.

`hand_over` runs on the main thread; the coroutines run in the network thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from swarmtrain.errors import PeerError, RunTimeError
from swarmtrain.events import WarningEvent
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.control.session import ControlSession
from swarmtrain.peer.lifecycle.node import wait_for
from swarmtrain.peer.lifecycle.stop import Interrupted
from swarmtrain.peer.pipeline.stage_replica import StageReplica
from swarmtrain.protocol.archive.departure import Leave, before_leaving
from swarmtrain.v1 import control_pb2, snapshot_pb2

_T = TypeVar("_T")
_IDLE_S = 10.0
"""Seconds after which a bootstrap that takes nothing is no longer waited for; it looks every second and writes for some
seconds.
"""
_MOST_S = 100.0
"""Seconds that leaving takes at most. `swarmtrain leave` waits two minutes; a large model may take longer over a slow
link.
"""
_SAY_S = 5.0
_AGAIN_S = 0.5
_SOON_S = 0.1  # at first: most may leave as soon as the bootstrap has heard of other volunteers
_CALL_S = 1.0  # the user waits for this process, also if the daemon hangs
_GOODBYE_S = 1.0
_MOST_ASKED = 32
_WAITS = "this is the last volunteer: the bootstrap is archiving its last rounds; press Ctrl-C again to end now"


async def _answers(swarm: Swarm) -> list[bool | None]:
    """Ask each bootstrap whether it wants what this peer has before it leaves; None for one that does not answer.

    If none answers, ask the other volunteers whether they are leaving too.
    """
    request = snapshot_pb2.HelloRequest(
        run_sha256=bytes.fromhex(swarm.published.sha256), presence=swarm.presence.signed(), asks_to_leave=True
    )

    async def ask(peer: str) -> bool | None:
        try:
            return (await swarm.calls.hello(peer, request, _CALL_S)).stay
        except PeerError:
            return None

    bootstraps = [info.peer for info in swarm.membership.live() if info.is_bootstrap]
    answers = list(await asyncio.gather(*map(ask, bootstraps)))
    # No bootstrap answers. Look who is here: a volunteer killed a moment ago is still believed to train on.
    if all(answer is None for answer in answers):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CALL_S):
                await swarm.greeter.greet_some()
        if swarm.fellows is not None:
            others = [info.peer for info in swarm.membership.answering()][:_MOST_ASKED]
            told = zip(others, await asyncio.gather(*map(ask, others)), strict=True)
            swarm.fellows.told = {peer for peer, goes in told if goes}
    return answers


async def _decide(swarms: Sequence[Swarm], waited_s: float) -> list[Leave]:
    """Return the next step of leaving for each of `swarms`, in order.

    No call is answered between the decision to go and its taking effect, since no `await` lies between. Swarms that may
    be left before others are left at once: a bootstrap that was asked again would archive them again, and peers that
    leave them too would take this one for a peer that trains on.
    """
    answers = await _all_of(map(_answers, swarms))
    leaves = []
    for swarm, each in zip(swarms, answers, strict=True):
        leaving = frozenset[str]() if swarm.fellows is None else swarm.fellows.leaving
        leaves.append(before_leaving(swarm.membership, each, swarm.presence.me.round, waited_s, leaving))
        if leaves[-1] is Leave.GO and swarm.fellows is not None:
            swarm.fellows.is_going = True
    if set(leaves) != {Leave.GO}:
        free = [swarm for swarm, leave in zip(swarms, leaves, strict=True) if leave is Leave.GO]
        await _all_of(swarm.withdraw(_GOODBYE_S) for swarm in free)
    return leaves


async def _would_leave(swarms: Sequence[Swarm]) -> None:
    for swarm in swarms:
        swarm.would_leave()


async def _tell_progress(swarm: Swarm) -> None:
    """Publish this peer's progress record, so that its last rounds count: the run's tokens never fall, whoever holds
    the weights."""
    with contextlib.suppress(TimeoutError, PeerError, RunTimeError):
        async with asyncio.timeout(_CALL_S):
            await swarm.count_once_more()


async def _is_deaf(swarm: Swarm) -> bool:
    """Return whether this peer's own daemon does not answer: then the silence of others means nothing."""
    try:
        async with asyncio.timeout(_CALL_S):
            await swarm.node.addresses()
    except TimeoutError:
        return True
    return False


async def _all_of(coming: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    return list(await asyncio.gather(*coming))


def hand_over(control: ControlSession, swarms: Sequence[Swarm], network: NetworkThread, folder: Path) -> None:
    """Serve on, after an end was asked for, until a bootstrap has archived what nobody else has.

    If no bootstrap answers, wait a minute for one to come back. What is in no archive then stays in `folder`, and a
    warning says so. `swarms` is the run's, or those of the held stages.
    """
    swarms = [swarm for swarm in swarms if not swarm.rounds.away]  # those have said goodbye before a pause
    if not swarms or control.stop.failure is not None:
        return
    stop, began_s, told = control.stop.last_work(_MOST_S), time.monotonic(), set[str]()
    idle_s, quoted = began_s + _IDLE_S, shlex.quote(str(folder))

    def say(message: str, code: str) -> None:
        if message not in told:
            told.add(message)
            control.emit(WarningEvent(message=message, code=code))

    control.board.doing(
        control_pb2.PEER_STATE_FINISHING, "leaving: asking whether another peer has this peer's last rounds"
    )
    try:
        asking = network.submit(_is_deaf(swarms[0]))
        wait_for(network.submit(_all_of(map(_tell_progress, swarms))), stop)
        if wait_for(asking, stop):
            return
        wait_for(network.submit(_would_leave(swarms)), stop)
        while True:
            now = time.monotonic()
            decided = wait_for(network.submit(_decide(swarms, now - began_s)), stop)
            swarms = [swarm for swarm, leave in zip(swarms, decided, strict=True) if leave is not Leave.GO]
            leaves = set(decided) - {Leave.GO}
            if not leaves:
                return
            if not leaves & {Leave.WAIT, Leave.HAND_OVER}:
                break
            if Leave.WAIT in leaves:
                doing = "leaving: waiting for a bootstrap, since no other peer has this peer's last rounds"
                control.board.doing(control_pb2.PEER_STATE_FINISHING, doing)
                say(
                    "no other peer has this peer's last rounds, and no bootstrap answers: waiting a minute for a "
                    "bootstrap; press Ctrl-C again to end now. The rounds are kept in "
                    f"{folder} too: `swarmtrain join --dir {quoted}` continues from them",
                    code="no-bootstrap",
                )
                idle_s = now + _IDLE_S
            else:
                doing = "leaving: the bootstrap archives this peer's last rounds"
                control.board.doing(control_pb2.PEER_STATE_FINISHING, doing)
                if any(swarm.store.num_readers for swarm in swarms):
                    idle_s = now + _IDLE_S
                if now > idle_s:
                    break
                if now > began_s + _SAY_S:
                    say(_WAITS, code="last-volunteer")
            stop.sleep(_SOON_S if now < began_s + 1.0 else _AGAIN_S)
    except Interrupted:
        pass
    message = (
        f"no archive and no other peer has this peer's last rounds; they are kept in {folder}: "
        f"`swarmtrain join --dir {quoted}` continues from them"
    )
    control.emit(WarningEvent(message=message, code="rounds-not-archived"))


def hand_over_stages(
    control: ControlSession, network: NetworkThread, held: Sequence[StageReplica], folder: Path
) -> None:
    """Finish the rounds under way in all held stages, then hand over as `hand_over` does."""
    for each in held:
        each.end_round()
    hand_over(control, [each.swarm for each in held], network, folder)
