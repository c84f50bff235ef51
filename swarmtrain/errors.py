"""Exceptions, by who caused them: the person, another peer, or the environment.

    SwarmtrainError
    +-- UserError            the person's input; the message is one line and names the next step (exit 2)
    |   +-- RunFileError     a run file, or what it points to, cannot be used
    |   +-- InviteError      an invite is garbled, truncated, or of another version
    +-- PeerError            a remote peer's fault; costs that peer, never the process
    |   +-- BadBytesError    what it sent is malformed, oversized, not finite, wrongly hashed or signed
    |   |   +-- NewerRunError   the run it sent is of a newer swarmtrain
    |   +-- BusyError        it serves as many readers as its limit allows
    |   +-- GoneError        it no longer has what was asked for: begin again from an earlier point
    |   +-- UnreachableError it did not answer in time, or its connection broke
    |       +-- BrokenOffError  its stream ended too early
    |       +-- StalledError it stalls a transfer: sends nothing for long, or too slowly
    +-- RunTimeError         the process cannot go on (exit 1): nobody answers, a disk is full
        +-- ClockError       the others' clock is far from this machine's: a person must decide
        +-- VersionError     this swarmtrain and those of the run cannot train together

The adapter of a dependency translates its errors into these.
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
    """Base of all errors that swarmtrain raises on purpose; `str(error)` is one line for a person.

    Several arguments are several problems at once: a terminal shows each on its own line.
    """

    exit_code = 1

    @property
    def lines(self) -> tuple[str, ...]:
        """Problems, one line each."""
        return tuple(map(str, self.args)) or ("",)

    def __str__(self) -> str:
        return "; also ".join(self.lines)


class UserError(SwarmtrainError):
    """Unusable input of a person; the message says what to do."""

    exit_code = 2


class RunFileError(UserError):
    """Unusable run file, or unusable data that it points to."""


class InviteError(UserError):
    """Garbled or truncated invite, or one of another version."""


class PeerError(SwarmtrainError):
    """Fault of a remote peer; it costs that peer, and never this process."""

    is_incident = False
    """True if an event reports the peer for this error."""


class BadBytesError(PeerError):
    """Malformed, oversized, non-finite, wrongly hashed or wrongly signed bytes from a remote peer."""

    is_incident = True


class NewerRunError(BadBytesError):
    """Run published for a newer swarmtrain than this one; the message names the version it needs."""


class BusyError(PeerError):
    """Remote peer at its limit of readers; try another one, or the same one later."""


class GoneError(PeerError):
    """Remote peer that no longer has what was asked for; begin again from an earlier point."""


class UnreachableError(PeerError):
    """Remote peer that did not answer within its time limit, or whose connection broke."""


class BrokenOffError(UnreachableError):
    """Stream of a remote peer that ended too early; what had arrived is kept, and another try may continue from it."""


class StalledError(UnreachableError):
    """Transfer that a remote peer began and stalls: it sends nothing for long, or too slowly."""

    is_incident = True


class RunTimeError(SwarmtrainError):
    """Failure outside anybody's input that ends the process; the message says what happened and what to try."""


class ClockError(RunTimeError):
    """Clocks so far apart that a person must decide whether this peer uses its own or the others'."""


class VersionError(RunTimeError):
    """Version too old or too new for a run's peers; the message says who must update to what."""
