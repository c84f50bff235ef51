"""The exception tree: whose fault it was.

    SwarmtrainError
    +-- UserError            the person's input; the message is one line and names the next step (exit 2)
    |   +-- RunFileError     a run file, or what it points to, cannot be used
    |   +-- InviteError      an invite is garbled, truncated, or of another version
    +-- PeerError            a remote peer's fault; costs that peer, never the process
    |   +-- BadBytesError    what it sent is malformed, oversized, not finite, wrongly hashed or signed
    |   |   +-- NewerRunError   the run it sent is of a newer swarmtrain
    |   +-- BusyError        it serves as many readers as it may
    |   +-- GoneError        it does not have any more what is asked of it: begin again from an earlier point
    |   +-- UnreachableError it did not answer in time, or its connection broke
    |       +-- BrokenOffError  its stream ended too early
    |       +-- StalledError it holds a transfer up: nothing for long, or a little now and then
    +-- RunTimeError         the process cannot go on (exit 1): nobody answers, a disk is full
        +-- ClockError       the others' clock is far from this machine's: a person is to decide
        +-- VersionError     this swarmtrain and those of the run cannot train together

Errors of dependencies are translated at the adapter that meets them.
"""

from __future__ import annotations

__all__ = [
    "BadBytesError",
    "BrokenOffError",
    "BusyError",
    "ClockError",
    "GoneError",
    "InviteError",
    "NewerRunError",
    "PeerError",
    "RunFileError",
    "RunTimeError",
    "StalledError",
    "SwarmtrainError",
    "UnreachableError",
    "UserError",
    "VersionError",
]


class SwarmtrainError(Exception):
    """Base of everything swarmtrain raises on purpose; `str(error)` is one line for a person.

    An error with several arguments is several problems at once: a terminal shows each on a line of its own.
    """

    exit_code = 1

    @property
    def lines(self) -> tuple[str, ...]:
        """The problems, one line each."""
        return tuple(map(str, self.args)) or ("",)

    def __str__(self) -> str:
        return "; also ".join(self.lines)


class UserError(SwarmtrainError):
    """The person's input cannot be used; the message says what to do."""

    exit_code = 2


class RunFileError(UserError):
    """A run file, or the data it points to, cannot be used."""


class InviteError(UserError):
    """An invite is garbled, truncated, or of another version."""


class PeerError(SwarmtrainError):
    """A remote peer's fault."""

    is_incident = False
    """Whether an event names the peer for it."""


class BadBytesError(PeerError):
    """Bytes from a remote peer are malformed, oversized, not finite, wrongly hashed or wrongly signed."""

    is_incident = True


class NewerRunError(BadBytesError):
    """A run was published for a newer swarmtrain than this one; the message says which it needs."""


class BusyError(PeerError):
    """A remote peer serves as many readers as it may; try another, or the same one later."""


class GoneError(PeerError):
    """A remote peer does not have any more what is asked of it; begin again from an earlier point."""


class UnreachableError(PeerError):
    """A remote peer did not answer within its time limit, or its connection broke."""


class BrokenOffError(UnreachableError):
    """A remote peer's stream ended too early: what had come by then is here, and who asks again may go on from it."""


class StalledError(UnreachableError):
    """A remote peer began a transfer and holds it up: it sends nothing for long, or too little."""

    is_incident = True


class RunTimeError(SwarmtrainError):
    """The process cannot go on, through nobody's input; the message says what happened and what to try."""


class ClockError(RunTimeError):
    """The others' clock is so far from this machine's that a person is to decide by which one this peer goes."""


class VersionError(RunTimeError):
    """This swarmtrain is too old or too new for a run's peers; the message says who must update to what."""
