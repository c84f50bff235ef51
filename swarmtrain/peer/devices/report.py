"""Tell what a peer trains on: at its start, and whenever it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarmtrain.events import DeviceEvent, Event, WarningEvent
from swarmtrain.peer.devices.choice import ChosenCompute
from swarmtrain.peer.devices.compute import ComputeDevice
from swarmtrain.run import RunFile


@dataclass
class ComputeReport:
    """Emits a `device` event for each state of a peer's device."""

    run: RunFile
    chosen: ChosenCompute
    emit: Callable[[Event], None]
    is_compiled: bool = False
    _microbatch_sequences: int = 0

    def start(self) -> None:
        """Tell what was chosen and why."""
        reasons = [self.chosen.choice.why, self.chosen.microbatch_why]
        self._tell(self.chosen.compute.microbatch_sequences, "; ".join(reason for reason in reasons if reason))

    def smaller(self, before: ComputeDevice, now: ComputeDevice) -> None:
        """Tell that memory ran out, and how a batch is computed from now on."""
        device, num_before = self.chosen.choice.names, before.microbatch_sequences
        if now.recomputes and not before.recomputes:
            message = (
                f"memory of {device} ran out with one sequence at once: this peer repeats the step, and from now on "
                "computes blocks again in the backward pass, which takes longer; nothing is lost"
            )
            why = "blocks are computed again in the backward pass, since memory ran out with one sequence at once"
        else:
            message = (
                f"memory of {device} ran out with {num_before} sequences at once: this peer repeats the step with "
                f"{now.microbatch_sequences}, and goes on so; nothing is lost"
            )
            why = f"memory ran out with {num_before} sequences at once"
        self.emit(WarningEvent(message=message, code="smaller-microbatch"))
        self._tell(now.microbatch_sequences, why)

    def compiled(self, is_compiled: bool, why: str) -> None:
        """Tell whether the model is compiled from now on, and why."""
        self.is_compiled = is_compiled
        self._tell(self._microbatch_sequences, why)

    def _tell(self, microbatch_sequences: int, why: str) -> None:
        choice, self._microbatch_sequences = self.chosen.choice, microbatch_sequences
        self.emit(
            DeviceEvent(
                device=choice.names,
                title=choice.title,
                precision=choice.precision,
                compiled=self.is_compiled,
                microbatch_sequences=microbatch_sequences,
                batch_sequences=self.run.inner.batch_sequences,
                why=why,
            )
        )
