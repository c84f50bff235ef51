"""The exception tree says whose fault an error was; the code of an error says which error it was.

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

Codes are short and stable (`port-taken`): people search for them, programs and tests compare them, and the sentences
stay free to change. `swarmtrain/error_codes.py` lists them.
"""

from __future__ import annotations

__all__ = [
    "CODE_KEY",
    "BadBytesError",
    "BrokenOffError",
    "BusyError",
    "ClockError",
    "GoneError",
    "InviteError",
    "NewerRunError",
    "PeerError",
    "Problem",
    "RunFileError",
    "RunTimeError",
    "StalledError",
    "SwarmtrainError",
    "UnreachableError",
    "UserError",
    "VersionError",
    "with_code",
]


CODE_KEY = "swarmtrain-error-code"
"""Where the control service tells a caller which error it was: a key of the call's trailing metadata."""


class Problem(str):
    """A line for a person that carries the code of what is wrong."""

    code: str

    def __new__(cls, text: str, code: str) -> Problem:
        problem = super().__new__(cls, text)
        problem.code = code
        return problem

    def found_in(self, origin: str) -> Problem:
        """The same problem, with the file or the thing that has it named first."""
        return Problem(f"{origin}: {self}", self.code)


def with_code(line: str, code: str) -> str:
    """The line as a person sees it: the code at its end, where there is one."""
    return f"{line} [{code}]" if code else line


class SwarmtrainError(Exception):
    """Base of everything swarmtrain raises on purpose; `str(error)` is one line for a person.

    An error with several arguments is several problems at once: a terminal shows each on a line of its own. Each has
    the error's code, unless it is a `Problem` with one of its own.
    """

    exit_code = 1
    code = ""
    """Which error this is. Given where it is raised, unless all errors of the class mean the same."""

    def __init__(self, *lines: str, code: str = "") -> None:
        super().__init__(*lines)
        first = next((line.code for line in lines if isinstance(line, Problem)), "")
        self.code = code or first or self.code

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems, one line each, with their codes."""
        lines = self.args or ("",)
        return tuple(line if isinstance(line, Problem) else Problem(str(line), self.code) for line in lines)

    def __str__(self) -> str:
        return "; also ".join(self.problems)


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

    code = "bad-bytes"
    is_incident = True


class NewerRunError(BadBytesError):
    """A run was published for a newer swarmtrain than this one; the message says which it needs."""

    code = "run-needs-newer"


class BusyError(PeerError):
    """A remote peer serves as many readers as it may; try another, or the same one later."""

    code = "busy"


class GoneError(PeerError):
    """A remote peer does not have any more what is asked of it; begin again from an earlier point."""

    code = "gone"


class UnreachableError(PeerError):
    """A remote peer did not answer within its time limit, or its connection broke."""

    code = "unreachable"


class BrokenOffError(UnreachableError):
    """A remote peer's stream ended too early: what had come by then is here, and who asks again may go on from it."""

    code = "broken-off"


class StalledError(UnreachableError):
    """A remote peer began a transfer and holds it up: it sends nothing for long, or too little."""

    code = "stalled"
    is_incident = True


class RunTimeError(SwarmtrainError):
    """The process cannot go on, through nobody's input; the message says what happened and what to try."""


class ClockError(RunTimeError):
    """The others' clock is so far from this machine's that a person is to decide by which one this peer goes."""

    code = "clock-differs"


class VersionError(RunTimeError):
    """This swarmtrain is too old or too new for a run's peers; the message says who must update to what."""
