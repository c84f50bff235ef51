"""Emulate the link of one peer that has a network of its own: a container of wan.yaml, started by start.py.

Where all peers of a swarm are on one machine, `proxy` knows both ends of a connection. Here each peer carries its own
half: the firewall of its network redirects what it dials and what others dial to us (start.py), and we connect to the
original target. What the peer sends passes the line up, what it receives the line down, both with the link's delay; at
the other end the other peer's link does the same.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
from collections.abc import Callable

from swarmtrain.network.links.impairments import Lateness
from swarmtrain.network.links.proxy import (
    Line,
    LinkShape,
    Way,
    accepted,
    carry,
    listening_socket,
    plain_socket,
    receiver,
    sender,
)
from swarmtrain.network.tasks import end_tasks

_log = logging.getLogger(__name__)
_SO_ORIGINAL_DST = 80
"""Linux's socket option for the original target of a connection that the firewall redirected."""

_HERE = "127.0.0.1"
_ANYWHERE = "0.0.0.0"

Address = tuple[str, int]


def was_to_go(connection: socket.socket) -> Address:
    """Return the original target of a connection that this network's firewall redirected to this process."""
    port, packed = struct.unpack("!2xH4s8x", connection.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16))
    return socket.inet_ntoa(packed), port


class OwnLink:
    """Carries one peer's connections in the event loop in which `serve` is awaited.

    Random numbers follow from `seed`; `target` returns the original target of a redirected connection.
    """

    def __init__(self, shape: LinkShape, seed: str, target: Callable[[socket.socket], Address] = was_to_go) -> None:
        self._shape, self._seed, self._target = shape, seed, target
        self._up, self._down = Line(shape.up_bytes_per_s), Line(shape.down_bytes_per_s)
        self._num_ways = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._dialled, self._dialling = listening_socket(_ANYWHERE), listening_socket(_HERE)

    @property
    def dialled_port(self) -> int:
        """Local port to which the firewall has to redirect connections that others open to the peer."""
        return int(self._dialled.getsockname()[1])

    @property
    def dialling_port(self) -> int:
        """Local port to which the firewall has to redirect connections that the peer opens."""
        return int(self._dialling.getsockname()[1])

    async def serve(self) -> None:
        """Carry connections until cancelled."""
        try:
            await asyncio.gather(self._take_those_dialled(), self._take_those_dialling())
        finally:
            await end_tasks(self._tasks)

    async def _take_those_dialled(self) -> None:
        async for near, _ in accepted(self._dialled):
            if (target := self._target_of(near)) is not None:
                self._start(near, (_HERE, target[1]), self._down, self._up)

    async def _take_those_dialling(self) -> None:
        async for near, _ in accepted(self._dialling):
            if (target := self._target_of(near)) is not None:
                self._start(near, target, self._up, self._down)

    def _target_of(self, near: socket.socket) -> Address | None:
        """Return a connection's original target, or hang up and return None if that is unknown or was this link."""
        try:
            target = self._target(near)
            if target[1] not in (self.dialled_port, self.dialling_port):
                return target
        except OSError as error:
            _log.debug("the link refused a connection with an unknown target: %s", error)
        near.close()
        return None

    def _start(self, near: socket.socket, target: Address, there: Line, back: Line) -> None:
        task = asyncio.ensure_future(self._carry(near, target, self._way(there), self._way(back)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, near: socket.socket, target: Address, there: Way, back: Way) -> None:
        """Carry a connection until one end closes. libp2p never closes one direction alone: an end that has closed
        reads no more."""
        with near, plain_socket() as far:
            near.setblocking(False)
            await asyncio.sleep(there.delay_s + back.delay_s)
            try:
                await asyncio.get_running_loop().sock_connect(far, target)
            except OSError:
                return  # nobody is there: the caller sees its connection end
            ways = [(near, far, there), (far, near, back)]
            tasks = [asyncio.create_task(carry(receiver(a), sender(b), way)) for a, b, way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end_tasks(tasks)

    def _way(self, line: Line) -> Way:
        shape, self._num_ways = self._shape, self._num_ways + 1
        lateness = Lateness(
            jitter_s=shape.jitter_s,
            loss=shape.loss,
            rtt_s=4.0 * shape.delay_s,  # as if the other peer's link were as long
            rng=random.Random(f"{self._seed} {self._num_ways}"),
        )
        return Way(line, shape.delay_s, Line(), lateness)
