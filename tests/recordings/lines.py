"""Recordings of gossip: reading and writing the files, and a type for each kind of line (see README.md)."""

from __future__ import annotations

import dataclasses
import functools
import json
import lzma
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from swarmtrain import __version__
from swarmtrain.compatibility import PROTOCOL

FOLDER = Path(__file__).parent
Line: TypeAlias = Mapping[str, Any]
"""Line of the file: `kind`, `peer` (the number of its peer), and the fields of the kind."""


# ---------------------------------------------------------------- the files


@dataclass(frozen=True)
class Header:
    """First line of a file."""

    what: str
    """ "real", "learning" or "systems"."""
    name: str
    swarmtrain_version: str
    protocol: int
    torch_version: str
    cpu_capability: str
    """CPU capability as torch reports it."""
    probe_sha256: str
    """Digest of some training steps by torch alone, with one thread. Processors of equal capability may still compute
    different bits."""
    peers: Sequence[Mapping[str, Any]]
    """Names of the peers, and other facts of each."""
    how: Mapping[str, Any]
    """Parameters needed to play it."""

    @property
    def is_to_the_bit(self) -> bool:
        """True if weights computed here with one thread are bitwise equal to the recorded ones."""
        recorded = self.torch_version, self.cpu_capability, self.probe_sha256
        return recorded == (torch.__version__, _capability(), probe_sha256())


@dataclass(frozen=True)
class Recording:
    """Recording: one file."""

    header: Header
    lines: Sequence[Line]

    def of(self, peer: int) -> list[Line]:
        """Return one peer's lines in order."""
        return sorted((line for line in self.lines if line["peer"] == peer), key=lambda line: line["number"])

    def blocks(self, peer: int) -> Iterator[Block]:
        """Yield one peer's events, each with the decisions that follow from it at once."""
        for _, lines in groupby(self.of(peer), key=lambda line: line["block"]):
            found = list(lines)
            known = [typed(line) for line in found if kind_of(line) is not None]
            events = [each for each in known if isinstance(each, Event)]
            if known:
                yield Block(events, [each for each in known if isinstance(each, Decision)])


@dataclass(frozen=True)
class Block:
    """Events that reached a peer in one moment, and its decisions on them."""

    events: Sequence[Event]
    decisions: Sequence[Decision]


def header_of(what: str, name: str, peers: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> Header:
    """Make a header with the versions of this process."""
    computes = torch.__version__, _capability(), probe_sha256()
    return Header(what, name, __version__, PROTOCOL, *computes, peers, how)


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def probe_sha256() -> str:
    """Compute the probe of `Header`. It uses no product code, so that a bug there cannot pass for another processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _probe()
    finally:
        torch.set_num_threads(before)


def _probe() -> str:
    chance = torch.Generator().manual_seed(1)
    shapes = ((257, 16), (16, 48), (16, 16), (16, 32), (32, 16))
    weights = [(0.2 * torch.randn(shape, generator=chance)).requires_grad_() for shape in shapes]
    tokens = torch.randint(0, 257, (8, 33), generator=chance)
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    embedding, to_heads, out, up, down = weights
    for _ in range(10):
        x = functional.embedding(tokens[:, :-1], embedding)
        q, k, v = (functional.layer_norm(x, (16,)) @ to_heads).view(8, 32, 3, 2, 8).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(8, 32, 16)
        x = x + seen @ out
        x = x + functional.gelu(functional.layer_norm(x, (16,)) @ up) @ down
        loss = functional.cross_entropy((x @ embedding.T).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return sha256(torch.cat([each.detach().flatten() for each in weights]).numpy().tobytes()).hexdigest()


def all_files(what: str) -> list[Path]:
    """List the recordings of a sort."""
    return sorted(FOLDER.glob(f"{what}-*.jsonl.xz"))


def save(recording: Recording, folder: Path = FOLDER) -> Path:
    """Write a recording under its name; returns the path."""
    header = recording.header
    path = folder / f"{header.what}-{header.name}.jsonl.xz"
    rows = [json.dumps(dataclasses.asdict(header)), *(json.dumps(line) for line in recording.lines)]
    path.write_bytes(lzma.compress("\n".join(rows).encode(), preset=9))
    return path


def load(path: Path) -> Recording:
    """Read a recording."""
    header, *lines = lzma.decompress(path.read_bytes()).decode().split("\n")
    return Recording(Header(**json.loads(header)), [json.loads(line) for line in lines])


def typed(line: Line) -> Any:
    """Return a line as its event or decision type."""
    kind = kind_of(line)
    names = [each.name for each in dataclasses.fields(kind)]
    return kind(**{name: line[name] for name in names if name in line})


def kind_of(line: Line) -> Any:
    """Return a line's type; None if it is neither an event nor a decision."""
    name = line["kind"]
    return Plan if name.startswith("plan of ") else EVENTS.get(name) or DECISIONS.get(name)


# ---------------------------------------------------------------- what happened


Mark: TypeAlias = Mapping[str, int]
"""`round`, `part` and `tokens` of a publication; part 0 is of weights."""
Named: TypeAlias = Sequence[Any]
"""Pulled publication: section, author, mark."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Event that reached a peer at `now`: swarm time for a real peer, virtual time for a simulated one."""

    now: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Peers(Event):
    """What a real peer knows of the others before the next event: peers whose entry changed, and those removed.

    An entry has `is_live`, `answers` (the last call to it did not fail), `so_far_since_s`, and the fields of the
    presence that gossip reads.
    """

    known: Mapping[str, Mapping[str, Any]]
    forgotten: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Others(Event):
    """What a simulated peer knows of the others. Learning: the round, part and tokens that each reports. Systems: for
    peers whose presence it has read, the fields that gossip uses and when their rounds end."""

    known: Mapping[str, Sequence[Any]]
    forgotten: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Expects(Event):
    """Before the first pull: expected seconds for `num_bytes`, from other transfers."""

    num_bytes: int
    found: float | None


@dataclass(frozen=True, kw_only=True)
class Round(Event):
    """The trainer begins a round. `start` is what it is told, decided from `steps_of` (its speed, the others' speeds,
    and the seconds until their rounds end), `everybodys_of` and `format_of` (others, seconds, and other sizes)."""

    round: int
    run_tokens: int = 0
    start: Mapping[str, Any] | None = None
    steps_of: Sequence[Any] = ()
    everybodys_of: Sequence[Any] = ()
    format_of: Sequence[Any] = ()
    steps: int = 0
    """Systems work: the decided number of steps, with `every` and `shard`."""
    every: int = 0
    shard: int = -1


@dataclass(frozen=True, kw_only=True)
class Paces(Event):
    """Learning: inputs of the decision on the next round's length."""

    round: int
    knows_speed: bool
    step_s: float
    ends_s: Sequence[float | None]
    speeds: Sequence[float]
    live: Sequence[str]
    bytes_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Published(Event):
    """The trainer has published: the mark of each fragment (round, part, tokens), after `done` steps of its round."""

    found: Sequence[Any]
    done: int = 0


@dataclass(frozen=True, kw_only=True)
class Begins(Event):
    """The trainer's plans reach gossip, each with `round`, `began_s` of its `fragments`, `ends_s`, `gradient_format`
    and `is_sure`. They replace all earlier plans."""

    round: int
    plans: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Format(Event):
    """The trainer asks in which format to publish, with `others` peers and a round of `round_s`. `up` is its upload
    limit in bytes per second."""

    others: int
    round_s: float
    up: float | None


@dataclass(frozen=True, kw_only=True)
class Looks(Event):
    """The pulling loop checks whether a pull is due: at its start, at a set time, or because something has ended.
    Simulated peers: for which fragment and section."""

    fragment: int | None = None
    section: str | None = None


@dataclass(frozen=True, kw_only=True)
class Starts(Event):
    """The driver starts a requested pull."""

    ask: int


@dataclass(frozen=True, kw_only=True)
class Sources(Event):
    """Sources in order: the author, or the hosts of a hidden peer."""

    ask: int
    found: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Replied(Event):
    """A source answered: with a manifest at `mark`, with nothing newer (None), busy, or that it is no host.
    Systems: `author`, `section`, and in `found` the mark, the text of a refusal, or None without an answer."""

    ask: int = -1
    mark: Mark | None = None
    num_bytes: int = 0
    busy: bool = False
    away: bool = False
    author: str = ""
    section: str = ""
    found: Any = None


@dataclass(frozen=True, kw_only=True)
class Failure(Event):
    """Failure: the error class of `swarmtrain.errors`, its text, and whether it is an incident."""

    ask: int
    error: str
    reason: str
    is_incident: bool


@dataclass(frozen=True, kw_only=True)
class Unanswered(Failure):
    """The request for a publication was not answered."""


@dataclass(frozen=True, kw_only=True)
class Broke(Failure):
    """The transfer of its bytes failed."""


@dataclass(frozen=True, kw_only=True)
class Refused(Failure):
    """The received data are no publication, or one that the run's rule refuses."""


@dataclass(frozen=True, kw_only=True)
class Breaks(Event):
    """Learning: the pull fails, without any answer if `mute`."""

    ask: int
    reason: str
    mute: bool


@dataclass(frozen=True, kw_only=True)
class Transfers(Event):
    """Learning: a transfer of `left` bytes begins, with `attempts` attempts left."""

    ask: int
    left: int
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Came(Event):
    """All bytes have arrived; `wrong`: other misbehaviour of the source. Systems: as `Replied`."""

    ask: int = -1
    num_bytes: int = 0
    wrong: Mapping[str, Any] | None = None
    mark: Mark | None = None
    author: str = ""
    section: str = ""
    found: Any = None


@dataclass(frozen=True, kw_only=True)
class Decoded(Event):
    """The publication may enter a merge, with `tokens`."""

    ask: int
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Prepares(Event):
    """The driver checks whether to prepare a merge."""


@dataclass(frozen=True, kw_only=True)
class Prepared(Event):
    """A fragment's merge has been prepared, or could not be."""

    fragment: int
    is_good: bool


@dataclass(frozen=True, kw_only=True)
class Settled(Event):
    """The pull of a prepared merge continues to its end."""

    ask: int


@dataclass(frozen=True, kw_only=True)
class Due(Event):
    """A fragment is due to be merged."""

    fragment: int = -1
    round: int = -1


@dataclass(frozen=True, kw_only=True)
class Calls(Event):
    """Another peer has called this one."""

    author: str


@dataclass(frozen=True, kw_only=True)
class Restarts(Event):
    """The trainer stops after `done` steps of its round, and drops what it trained since each fragment's merge."""

    done: int


@dataclass(frozen=True, kw_only=True)
class Shows(Event):
    """A state of the round after `round` is offered, with each peer's progress in it."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Keeps(Event):
    """A checkpoint is written, with the ledger."""


@dataclass(frozen=True, kw_only=True)
class Forgets(Event):
    """Pulled publications are dropped: merged by now, or too old."""


@dataclass(frozen=True, kw_only=True)
class TookStates(Event):
    """This peer continues in `round` from others' weights. `told`: progress of each peer in each state, by fragment;
    `rounds`: rounds of their authors; `heard`: rounds of all peers."""

    round: int
    told: Sequence[Any] = ()
    rounds: Mapping[str, int] = field(default_factory=dict)
    heard: Mapping[str, int] = field(default_factory=dict)
    theta_sha256: str = ""
    momentum_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Stops(Event):
    """This peer pauses, or is done."""


@dataclass(frozen=True, kw_only=True)
class Adopted(Event):
    """The trainer continues with these weights (fp32 in base64) of others."""

    round: int
    run_tokens: int
    reason: str
    theta: str
    momentum: str


@dataclass(frozen=True, kw_only=True)
class Lives(Event):
    """A simulated machine comes, goes, hangs or continues; with what is known of it then."""

    speed: float | None = None
    theta: float | None = None
    round: int | None = None
    author: str | None = None


# ---------------------------------------------------------------- what was decided


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Decision that follows at once from the events of its block. `now` is recorded if used, or for simulated peers."""

    now: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StartsWith(Decision):
    """Learning: how the next round begins."""

    found: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plans(Decision):
    """What the trainer tells gossip of the next merges after `done` steps of its round, with all inputs."""

    done: int
    round: int = 0
    merge_after: Sequence[int] = ()
    inner_steps: int = 0
    gradient_format: str = ""
    steps_per_s: float = 0.0
    round_began_s: float = 0.0
    began_s: Sequence[float] = ()
    found: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Plan(Decision):
    """Times of pulls for `fragments`. `inputs`: the number of others, the start and the end."""

    inputs: Sequence[float]
    found: Mapping[str, Any]
    fragments: Sequence[int] = ()
    format: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Choice(Decision):
    """Peer to ask for a section, or None, with the reason; `view` is what it was chosen from."""

    found: Sequence[str | None]
    section: str = ""
    fragment: int = 0
    view: Mapping[str, Any] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    with_weights: Sequence[str] = ()
    first: Sequence[str] = ()
    reference: int = 0


@dataclass(frozen=True, kw_only=True)
class Asks(Decision):
    """A partner is asked; later lines refer to the pull by `ask`."""

    ask: int
    section: str
    author: str
    fragment: int = 0
    round_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Requests(Decision):
    """A source is asked for a publication newer than `known` (round and part, or None)."""

    ask: int
    source: str
    known: Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class News(Decision):
    """What is new in a publication, relative to the median round `reference`: its type's name and the tokens; learning:
    whether anything is new. `is_own`: its author has just reported it; `is_here`: its bytes have arrived."""

    author: str
    section: str
    mark: Mark
    reference: int
    found: Any
    fragment: int = 0
    is_own: bool = False
    is_here: bool = False


@dataclass(frozen=True, kw_only=True)
class Downloads(Decision):
    """The bytes are pulled from a source."""

    ask: int
    source: str
    mark: Mark


@dataclass(frozen=True, kw_only=True)
class Decodes(Decision):
    """A publication is decoded: a gradient with what is new in it, and whether the base of that difference is here."""

    ask: int
    fragment: int
    mark: Mark
    what: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Readies(Decision):
    """A merge of what was pulled is prepared."""

    fragment: int
    pulled: Sequence[Named]


@dataclass(frozen=True, kw_only=True)
class Ended(Decision):
    """A pull has ended by one of `OpenPulls`' methods: "end", "nothing_new" (`found`: how long that peer is not asked
    again), "fail" (`found`: the consequence in words) or "give_up"."""

    ask: int
    how: str
    found: Any


@dataclass(frozen=True, kw_only=True)
class Incident(Decision):
    """An incident is reported to the person."""

    author: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class HostFailed(Decision):
    """A host failed; the next source is tried."""

    ask: int
    host: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Accepted(Decision):
    """Verdict of the run's rule: tokens, or why it is refused."""

    author: str
    section: str
    mark: Mark
    found: Sequence[Any]
    fragment: int = 0


@dataclass(frozen=True, kw_only=True)
class Merges(Decision):
    """Inputs of the merge; None if nothing is ready. Systems: the resulting weights, `theta` and `momentum`, in
    hexadecimal."""

    round: int
    pulled: Sequence[Named] | None
    fragment: int = 0
    reference: int = 0
    ahead_rounds: Sequence[float] = ()
    found: Any = None
    theta: str = ""
    momentum: str = ""


@dataclass(frozen=True, kw_only=True)
class Merged(Decision):
    """Resulting weights: all of a real peer, one fragment of a simulated one; `found`: tokens by author."""

    fragment: int
    theta_sha256: str
    momentum_sha256: str
    found: Sequence[Any] = ()


@dataclass(frozen=True, kw_only=True)
class CatchesUp(Decision):
    """Learning: the peer takes the others' weights, since it is too far behind."""

    found: bool


@dataclass(frozen=True, kw_only=True)
class PublishesAs(Decision):
    """Format in which it publishes."""

    found: str


@dataclass(frozen=True, kw_only=True)
class Places(Decision):
    """Progress of each peer in the weights, by fragment: round and part."""

    found: Sequence[Mapping[str, Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class Rows(Decision):
    """Ledger of each fragment, as a checkpoint has it."""

    found: Sequence[Sequence[Sequence[Any]]]


@dataclass(frozen=True, kw_only=True)
class Announces(Decision):
    """The peer announces this part of its round."""

    part: int
    tokens: int


NEWS = {"Full": "Whole", "Delta": "Difference", "WeightsOnly": "Theta", "Stale": "Nothing"}
"""The recordings' names of the classes of `protocol.gossip.partners`, from when they were recorded."""


def news_name(found: object) -> str:
    """Return the recordings' name of what is new in a publication."""
    return NEWS[type(found).__name__]


def _kind(type: type[Any]) -> str:
    return re.sub("(?<=.)([A-Z])", r"_\1", type.__name__).lower()


EVENTS: dict[str, type[Event]] = {
    _kind(each): each
    for each in (
        Peers, Others, Expects, Round, Paces, Published, Begins, Format, Looks, Starts, Sources, Replied, Unanswered,
        Broke, Refused, Breaks, Transfers, Came, Decoded, Prepares, Prepared, Settled, Due, Calls, Forgets, TookStates,
        Stops, Adopted, Restarts, Shows, Keeps,
    )
} | dict.fromkeys(
    ("comes", "die", "freeze", "thaw", "leave", "resumes", "took_state", "goes", "returns"), Lives
)  # fmt: skip
"""By the `kind` of their lines."""

DECISIONS: dict[str, type[Decision]] = {
    _kind(each): each
    for each in (
        StartsWith, Plans, Plan, Choice, Asks, Requests, News, Downloads, Decodes, Readies, Ended, Incident, HostFailed,
        Accepted, Merges, Merged, CatchesUp, PublishesAs, Announces, Places, Rows,
    )
}  # fmt: skip
"""The same."""

INNER = frozenset((
    "busy", "failed", "answered", "called", "times.bytes_begin", "times.bytes_end", "times.merged", "times.assume",
    "times.round_ended", "began", "expected", "moved", "learned", "asked_for", "taken",
))  # fmt: skip
"""Kinds of lines that are neither: what back-off and the times of pulls were told, when another's round began, what a
step is expected to take, whether merges have moved, what the rule learnt, what was encoded, and `merges` at length."""
