"""Exceptions: the class says whose fault an error is, the code says which error it is.

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

Codes are short and stable (`port-taken`): people search for them, programs and tests compare them, and the sentences
stay free to change. `swarmtrain/error_codes.py` lists them.
"""

from __future__ import annotations

CODE_KEY = "swarmtrain-error-code"
"""Key of the trailing metadata in which the control service sends an error's code to its caller."""
INTERRUPTED = 130
"""Exit code of a command that a person ended by Ctrl-C."""


class Problem(str):
    """Line for a person that carries the code of its problem."""

    code: str

    def __new__(cls, text: str, code: str) -> Problem:
        problem = super().__new__(cls, text)
        problem.code = code
        return problem

    def __reduce__(self) -> tuple[type[Problem], tuple[str, str]]:  # an error of a worker process goes to its parent
        return Problem, (str(self), self.code)

    def found_in(self, origin: str) -> Problem:
        """Return the same problem, with `origin`, the file or thing that has it, named first."""
        return Problem(f"{origin}: {self}", self.code)


def with_code(line: str, code: str) -> str:
    """Return the line as a person sees it: with the code at its end, if there is one."""
    return f"{line} [{code}]" if code else line


class SwarmtrainError(Exception):
    """Base of all errors that swarmtrain raises on purpose; `str(error)` is one line for a person.

    Several arguments are several problems at once: a terminal shows each on its own line. Each has the error's code,
    unless it is a `Problem` with its own.
    """

    exit_code = 1
    code = ""
    """Identifies the error. Set where it is raised, unless all errors of the class mean the same."""

    def __init__(self, *lines: str, code: str = "") -> None:
        super().__init__(*lines)
        first = next((line.code for line in lines if isinstance(line, Problem)), "")
        self.code = code or first or self.code

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Problems, one line each, with their codes."""
        lines = self.args or ("",)
        return tuple(line if isinstance(line, Problem) else Problem(str(line), self.code) for line in lines)

    def __str__(self) -> str:
        return "; also ".join(self.problems)


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

    code = "bad-bytes"
    is_incident = True


class NewerRunError(BadBytesError):
    """Run published for a newer swarmtrain than this one; the message names the version it needs."""

    code = "run-needs-newer"


class BusyError(PeerError):
    """Remote peer at its limit of readers; try another one, or the same one later."""

    code = "busy"


class GoneError(PeerError):
    """Remote peer that no longer has what was asked for; begin again from an earlier point."""

    code = "gone"


class UnreachableError(PeerError):
    """Remote peer that did not answer within its time limit, or whose connection broke."""

    code = "unreachable"


class BrokenOffError(UnreachableError):
    """Stream of a remote peer that ended too early; what had arrived is kept, and another try may continue from it."""

    code = "broken-off"


class StalledError(UnreachableError):
    """Transfer that a remote peer began and stalls: it sends nothing for long, or too slowly."""

    code = "stalled"
    is_incident = True


class RunTimeError(SwarmtrainError):
    """Failure outside anybody's input that ends the process; the message says what happened and what to try."""


class ClockError(RunTimeError):
    """Clocks so far apart that a person must decide whether this peer uses its own or the others'."""

    code = "clock-differs"


class VersionError(RunTimeError):
    """Version too old or too new for a run's peers; the message says who must update to what."""
