"""Events and commands of a driver of microbatches (`protocol.pipeline.driver`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.ledger import Key, Kind, Settlement

__all__ = [
    "AskStage",
    "Back",
    "CancelStageCall",
    "DrawMicrobatch",
    "DrivingCommand",
    "DrivingEvent",
    "Fault",
    "GiveUp",
    "Lost",
    "MicrobatchDrawn",
    "NoMicrobatch",
    "NotTold",
    "PartDone",
    "PartFailed",
    "PeersSeen",
    "Retried",
    "Shut",
    "Tell",
    "TimeCame",
    "ToldOf",
    "Wrong",
]

Fault: TypeAlias = Literal["busy", "gone", "unreachable", "wrong"]


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class MicrobatchDrawn:
    """A microbatch of this driver's data, which begins its way; its number is `DrivingEngine.next_sequence`."""

    tokens: int


@dataclass(frozen=True, slots=True)
class NoMicrobatch:
    """There is no data for what was to begin, or the first stage does not compute: not before peers are seen again."""


@dataclass(frozen=True, slots=True)
class PeersSeen:
    """Who holds each stage now, this peer included, and what they say of themselves."""

    peers: Mapping[int, Collection[str]]
    places: Sequence[StagePeer] = ()


@dataclass(frozen=True, slots=True)
class PartDone:
    """The answer to a call, by a peer in one of its lives; of a tail with the loss, mean nats per token."""

    call: int
    life: int
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class PartFailed:
    """There is no answer to a call."""

    call: int
    why: Fault
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """A microbatch is given up here: nothing of it counts."""

    sequence: int


@dataclass(frozen=True, slots=True)
class ToldOf:
    """A peer knows what counts; `late` of it cannot any more."""

    call: int
    late: Collection[Key]


@dataclass(frozen=True, slots=True)
class NotTold:
    """It could not be told."""

    call: int
    reason: str


@dataclass(frozen=True, slots=True)
class Shut:
    """None begins any more."""


@dataclass(frozen=True, slots=True)
class TimeCame:
    """It is as late as `wake_at` said."""


DrivingEvent: TypeAlias = (
    MicrobatchDrawn | NoMicrobatch | PeersSeen | PartDone | PartFailed | GiveUp | ToldOf | NotTold | Shut | TimeCame
)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class DrawMicrobatch:
    """Take the next microbatch of the data."""


@dataclass(frozen=True, slots=True)
class AskStage:
    """Ask `peer`, at the first stage this one itself, for a part of a microbatch. What a forward and a tail take is the
    stage's input, what a backward takes is the last gradient that came."""

    call: int
    kind: Kind
    stage: int
    peer: str
    key: Key
    tokens: int
    """The microbatch's."""


@dataclass(frozen=True, slots=True)
class CancelStageCall:
    """Nobody waits for this call any more."""

    call: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell a peer of a stage what counts and what does not."""

    call: int
    peer: str
    stage: int
    settlement: Settlement


@dataclass(frozen=True, slots=True)
class Back:
    """A microbatch has come back all the way, with its loss, mean nats per token; or this peer's own stage computes
    nothing now, for this reason, and it is given up."""

    sequence: int
    loss: float
    given_up: str = ""


@dataclass(frozen=True, slots=True)
class Retried:
    """A part of a microbatch is asked again, or of another."""

    sequence: int
    stage: int
    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """A peer answered what it must not."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The gradient of a microbatch does not count at this stage, though it was computed."""

    stage: int
    peer: str
    key: Key
    reason: str


DrivingCommand: TypeAlias = DrawMicrobatch | AskStage | CancelStageCall | Tell | Back | Retried | Wrong | Lost
