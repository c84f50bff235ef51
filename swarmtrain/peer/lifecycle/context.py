"""Context of a volunteer once it has fetched its run. The parts of its training are made from this."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from swarmtrain.errors import RunTimeError
from swarmtrain.events import WarningEvent
from swarmtrain.network.discovery.run_lookup import PublishedRun
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.peer.control.limits import LimitEnforcer
from swarmtrain.peer.control.session import ControlSession
from swarmtrain.peer.devices.compute import ComputeDevice, finish
from swarmtrain.peer.devices.step_rests import StepRests
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.node import Emit, PeerSettings, wait_for
from swarmtrain.peer.lifecycle.run_fetch import RunFetcher
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.local.faults import SlowedSteps
from swarmtrain.peer.training.pause import PauseSwitch
from swarmtrain.protocol.pipeline.ledger import Kind
from swarmtrain.run import RunFile

_T = TypeVar("_T")

SlowedWork = Callable[[Kind | None], AbstractContextManager[None]]
"""Function of a kind of work on a stage; returns the context in which to do it, which may sleep on exit."""


@dataclass(frozen=True, kw_only=True)
class VolunteerContext:
    """Run, machine and network of a volunteer, and what may limit, pause and end it."""

    published: PublishedRun
    settings: PeerSettings
    folder: PeerFolder
    network: NetworkThread
    node: Node
    control: ControlSession
    emit: Emit
    """Takes events; fills in this peer's PeerID and name."""
    limits: LimitEnforcer
    pause: PauseSwitch
    name: str
    fetcher: RunFetcher
    model_folder: Path | None = None
    """Folder with the files of the run's model, each checked by its hash; None for a built-in model."""
    nobody: RunTimeError | None = None
    """Error that nobody answered, which a peer raises that cannot continue alone; None if somebody answered."""
    card_turn: threading.Lock = field(default_factory=threading.Lock)
    """Held by the thread that computes on the graphics card, or rests after that; see `StepRests`."""

    @property
    def run(self) -> RunFile:
        """Run file of the run."""
        return self.published.run

    @property
    def me(self) -> str:
        """PeerID of this peer."""
        return self.node.identity.peer_id

    @property
    def stop(self) -> StopFlag:
        """Flag that is set when this peer must end."""
        return self.control.stop

    def wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run the coroutine in the network thread and return its result; raise as `StopFlag.check` does when an end is
        asked for.
        """
        return wait_for(self.network.submit(work), self.stop)

    def slowed(
        self, on_processor: bool = True, leaves: Callable[[], bool] = lambda: False
    ) -> Callable[[], AbstractContextManager[None]]:
        """Return a maker of the context for each inner step, which sleeps on exit if this peer simulates a slower
        machine.

        Work on the processor is timed by the processor time of its thread, work on another device by the clock.
        `leaves` returns whether what is trained is being left: the sleep then ends, as in a pause.
        """
        factor = self.settings.limits.slowdown
        if factor == 1:
            return nullcontext

        def too_busy() -> None:
            message = (
                f"this machine is too busy for --slowdown {factor:g}: this peer is slower than that; give every "
                "volunteer of the rehearsal a larger factor, or start fewer volunteers"
            )
            self.emit(WarningEvent(message=message, code="too-busy"))

        alone_clock = time.thread_time if on_processor else time.monotonic
        return SlowedSteps(
            factor, self.stop.sleep, lambda: self.pause.held or leaves(), too_busy, processor_clock=alone_clock
        )

    def rests(
        self, compute: ComputeDevice, leaves: Callable[[], bool] = lambda: False
    ) -> Callable[[], AbstractContextManager[None]]:
        """Return a maker of the context for each inner step, which rests on exit so that a graphics card is busy for
        the share of the time that the limits allow; on the processor it does nothing. `leaves` is as for `slowed`."""
        if compute.is_host:
            return nullcontext
        limits, pause = self.limits, self.pause
        return StepRests(
            share=lambda: limits.card_share,
            finish=partial(finish, compute.device),
            sleep=self.stop.sleep,
            ends_early=lambda: pause.held or leaves(),
            turn=self.card_turn,
        )

    def slowed_work(self, compute: ComputeDevice, leaves: Callable[[], bool]) -> SlowedWork:
        """Return `slowed` and `rests` for a stage's work, the former with its own timing for each kind: kinds take
        different times. `leaves` returns whether the stage is being left."""
        kinds = {kind: self.slowed(compute.is_host, leaves) for kind in ("forward", "backward", "tail", None)}
        rests = self.rests(compute, leaves)

        @contextmanager
        def both(kind: Kind | None) -> Iterator[None]:
            with kinds[kind](), rests():
                yield

        return both
