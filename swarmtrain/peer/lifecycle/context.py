"""What a volunteer has once it has the run: the parts of its training are made with this."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from swarmtrain.errors import RunTimeError
from swarmtrain.events import WarningEvent
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.swarm import PublishedRun
from swarmtrain.peer.control.limits import LimitKeeper
from swarmtrain.peer.control.session import ControlSession
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import Emit, PeerSettings, wait_for
from swarmtrain.peer.lifecycle.run_fetch import RunFetcher
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.local.slowdown import SlowedSteps
from swarmtrain.peer.training.pause import PauseSwitch
from swarmtrain.protocol.pipeline.ledger import Kind
from swarmtrain.run import RunFile

__all__ = ["SlowedWork", "VolunteerContext"]

_T = TypeVar("_T")

SlowedWork = Callable[[Kind | None], AbstractContextManager[None]]
"""Makes what a piece of a stage's work of that kind runs in."""


@dataclass(frozen=True, kw_only=True)
class VolunteerContext:
    """A volunteer's run, its machine, its network, and who may limit, pause and end it."""

    published: PublishedRun
    settings: PeerSettings
    folder: PeerFolder
    network: NetworkThread
    node: Node
    control: ControlSession
    emit: Emit
    """Takes events, which are this peer's then."""
    limits: LimitKeeper
    pause: PauseSwitch
    name: str
    fetcher: RunFetcher
    nobody: RunTimeError | None = None
    """Nobody answered: what a peer says that cannot go on alone."""

    @property
    def run(self) -> RunFile:
        """What it trains."""
        return self.published.run

    @property
    def me(self) -> str:
        """Its PeerID."""
        return self.node.identity.peer_id

    @property
    def stop(self) -> StopFlag:
        """Set when it is to end."""
        return self.control.stop

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Have the network thread do it; raises as `StopFlag.check` does as soon as an end is asked for."""
        return wait_for(self.network.submit(work), self.stop)

    def slowed(self) -> Callable[[], AbstractContextManager[None]]:
        """What each inner step runs in: a wait after it, if this peer is slower than it could be."""
        factor = self.settings.limits.slowdown
        if factor == 1:
            return nullcontext

        def too_busy() -> None:
            message = (
                f"this machine is too busy for --slowdown {factor:g}, this peer is slower than that; give every "
                "volunteer of the rehearsal a larger factor, or start fewer"
            )
            self.emit(WarningEvent(message=message, code="too-busy"))

        return SlowedSteps(factor, self.stop.sleep, lambda: self.pause.held, too_busy)

    def slowed_work(self) -> SlowedWork:
        """What each piece of a stage's work runs in: a factor of its own for each kind, which take different times."""
        kinds = {kind: self.slowed() for kind in ("forward", "backward", "tail", None)}
        return lambda kind: kinds[kind]()
