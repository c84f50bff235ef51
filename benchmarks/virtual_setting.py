"""What a run in virtual time is made of, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from cold_start import Text

from swarmtrain.algorithm.outer import (
    OuterConstants,
    momentum_at,
)
from swarmtrain.algorithm.pacing import paced_inner_steps, reference_speed
from swarmtrain.run import RunFile


@dataclass(frozen=True)
class Hang:
    """A volunteer that stands still for a while."""

    number: int
    from_s: float
    for_s: float

    @staticmethod
    def of(text: str) -> Hang:
        """NUMBER:FROM:SECONDS."""
        number, from_s, for_s = text.split(":")
        return Hang(int(number), float(from_s), float(for_s))

    def is_on(self, number: int, now_s: float) -> bool:
        """Whether volunteer `number` stands still now."""
        return number == self.number and self.from_s <= now_s < self.from_s + self.for_s


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is made of: seconds an inner step of each volunteer, and the wire's share."""

    text: Text
    step_s: tuple[float, ...]
    link_bytes_per_s: float
    """Of everybody, in each direction; infinite: nothing takes time."""
    rtt_s: float
    failing: float
    """The share of pulls that bring nothing."""
    momentum: float
    hang: Hang | None = None
    own_weights: bool = False
    corrected: bool = True

    @property
    def run(self) -> RunFile:
        """The run file."""
        return self.text.run

    def constants(self, round: int) -> OuterConstants:
        """Of the outer step."""
        section = self.run.merge
        momentum = momentum_at(round, self.momentum, section.momentum_ramp_rounds)
        return OuterConstants(learning_rate=section.outer_learning_rate, momentum=momentum)

    def exchange_s(self, num_volunteers: int, num_parameters: int) -> float:
        """A synchronous round's: everybody's shares of the pseudo-gradient to their hosts, then the averages back."""
        share = (num_volunteers - 1) / num_volunteers
        return 2 * (share * 4 * num_parameters / self.link_bytes_per_s + self.rtt_s)

    def paced(self, number: int) -> int:
        """H_i."""
        speeds = [1 / step_s for step_s in self.step_s]
        return paced_inner_steps(speeds[number], reference_speed(speeds), self.run.merge.inner_steps)


@dataclass(frozen=True)
class Result:
    """What came of it: nats per byte, virtual seconds, the share of rounds that merged somebody."""

    loss: float
    seconds: float
    tokens: int
    fresh: float = 1.0
