"""Events that a driver's engine takes, and commands that it answers with (`driver.py`); plain data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.ledger import Key, Kind, Settlement

Fault: TypeAlias = Literal["busy", "gone", "unreachable", "wrong"]
"""Why a call has no result.

- "busy": the peer's queue is full;
- "gone": the peer has moved, or does not have what is needed any more; nobody's fault;
- "unreachable": no answer;
- "wrong": the answer was invalid.
"""


# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class MicrobatchDrawn:
    """A microbatch of this driver's data starts now. Its number is the engine's `next_sequence`."""

    tokens: int


@dataclass(frozen=True, slots=True)
class NoMicrobatch:
    """There is no data for the microbatch that was to start, or the first stage does not compute now. None is drawn
    before the next `PeersSeen`."""


@dataclass(frozen=True, slots=True)
class PeersSeen:
    """The peers that hold each stage now, this peer included, and what they advertise."""

    peers: Mapping[int, Collection[str]]
    places: Sequence[StagePeer] = ()


@dataclass(frozen=True, slots=True)
class StageCallDone:
    """A call was answered by a peer; `incarnation` numbers that peer's process since its last start. `loss`: mean nats
    per
    token, of the last stage."""

    call: int
    incarnation: int
    loss: float = 0.0


@dataclass(frozen=True, slots=True)
class StageCallFailed:
    """A call has no result."""

    call: int
    why: Fault
    reason: str
    code: str = ""
    """Code of the error."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The caller gives up a microbatch: none of its gradients may count."""

    sequence: int


@dataclass(frozen=True, slots=True)
class ToldOf:
    """A peer has received a settlement. The microbatches in `late` came too late to count there."""

    call: int
    late: Collection[Key]


@dataclass(frozen=True, slots=True)
class NotTold:
    """A settlement could not be delivered."""

    call: int
    reason: str


@dataclass(frozen=True, slots=True)
class Shut:
    """No more microbatches start."""


@dataclass(frozen=True, slots=True)
class TimeCame:
    """The time that `DriverEngine.wake_at` asked for has come."""


DrivingEvent: TypeAlias = (
    MicrobatchDrawn
    | NoMicrobatch
    | PeersSeen
    | StageCallDone
    | StageCallFailed
    | GiveUp
    | ToldOf
    | NotTold
    | Shut
    | TimeCame
)


# ---------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class DrawMicrobatch:
    """Draw the next microbatch of the data."""


@dataclass(frozen=True, slots=True)
class AskStage:
    """Ask `peer` for one part of a microbatch; at the first stage this is the driver itself.

    The input of a forward and of a tail is the stage's stored input; that of a backward is the last gradient received.
    """

    call: int
    kind: Kind
    stage: int
    peer: str
    key: Key
    tokens: int
    """Tokens of the microbatch."""


@dataclass(frozen=True, slots=True)
class CancelStageCall:
    """Stop waiting for this call."""

    call: int


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell a peer of a stage which microbatches count and which do not; ended by `ToldOf` or `NotTold`."""

    call: int
    peer: str
    stage: int
    settlement: Settlement


@dataclass(frozen=True, slots=True)
class Back:
    """A microbatch has come all the way back, with its loss in mean nats per token.

    If `given_up` is not empty, the microbatch was given up for that reason, because this peer's own stage computes
    nothing now.
    """

    sequence: int
    loss: float
    given_up: str = ""


@dataclass(frozen=True, slots=True)
class Retried:
    """One part of a microbatch is asked for again, of the same peer or another."""

    sequence: int
    stage: int
    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """A peer sent an invalid answer."""

    peer: str
    reason: str
    code: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The gradient of a microbatch does not count at this stage, although it was computed."""

    stage: int
    peer: str
    key: Key
    reason: str


DrivingCommand: TypeAlias = DrawMicrobatch | AskStage | CancelStageCall | Tell | Back | Retried | Wrong | Lost
