"""Recordings of gossip: reads and writes the files, and has a type for each kind of line (README.md describes them)."""

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

__all__ = [
    "DECISIONS",
    "EVENTS",
    "FOLDER",
    "INNER",
    "Block",
    "Decision",
    "Event",
    "Header",
    "Line",
    "Recording",
    "all_files",
    "header_of",
    "load",
    "news_name",
    "probe_sha256",
    "save",
    "typed",
]

FOLDER = Path(__file__).parent
Line: TypeAlias = Mapping[str, Any]
"""As it is in the file: `kind`, `peer` (the number of whose it is), and what the kind has."""


# ---------------------------------------------------------------- the files


@dataclass(frozen=True)
class Header:
    """A file's first line."""

    what: str
    """ "real", "learning" or "systems"."""
    name: str
    swarmtrain_version: str
    protocol: int
    torch_version: str
    cpu_capability: str
    """As torch has it."""
    probe_sha256: str
    """Of what some steps of training lead to by torch alone, with one thread: processors of one capability may differ,
    and do not compute the same bits."""
    peers: Sequence[Mapping[str, Any]]
    """Their names, and what else is known of each."""
    how: Mapping[str, Any]
    """All that is needed to play it."""

    @property
    def is_to_the_bit(self) -> bool:
        """Whether weights are the recorded ones bit by bit, computed here with one thread."""
        recorded = self.torch_version, self.cpu_capability, self.probe_sha256
        return recorded == (torch.__version__, _capability(), probe_sha256())


@dataclass(frozen=True)
class Recording:
    """A file."""

    header: Header
    lines: Sequence[Line]

    def of(self, peer: int) -> list[Line]:
        """What one peer wrote, in the order in which it did."""
        return sorted((line for line in self.lines if line["peer"] == peer), key=lambda line: line["number"])

    def blocks(self, peer: int) -> Iterator[Block]:
        """One peer's events, each with the decisions that follow from it at once."""
        for _, lines in groupby(self.of(peer), key=lambda line: line["block"]):
            found = list(lines)
            known = [typed(line) for line in found if kind_of(line) is not None]
            events = [each for each in known if isinstance(each, Event)]
            if known:
                yield Block(events, [each for each in known if isinstance(each, Decision)])


@dataclass(frozen=True)
class Block:
    """What reached a peer in one moment, and what it decided on that."""

    events: Sequence[Event]
    decisions: Sequence[Decision]


def header_of(what: str, name: str, peers: Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> Header:
    """Of what is recorded by this process's versions."""
    computes = torch.__version__, _capability(), probe_sha256()
    return Header(what, name, __version__, PROTOCOL, *computes, peers, how)


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def probe_sha256() -> str:
    """See `Header`. Nothing of the product is in it, so that a mistake there does not count as another processor."""
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
    """The recordings of that sort."""
    return sorted(FOLDER.glob(f"{what}-*.jsonl.xz"))


def save(recording: Recording, folder: Path = FOLDER) -> Path:
    """Write it, under its name."""
    header = recording.header
    path = folder / f"{header.what}-{header.name}.jsonl.xz"
    rows = [json.dumps(dataclasses.asdict(header)), *(json.dumps(line) for line in recording.lines)]
    path.write_bytes(lzma.compress("\n".join(rows).encode(), preset=9))
    return path


def load(path: Path) -> Recording:
    """Read it."""
    header, *lines = lzma.decompress(path.read_bytes()).decode().split("\n")
    return Recording(Header(**json.loads(header)), [json.loads(line) for line in lines])


def typed(line: Line) -> Any:
    """An event or a decision as its type."""
    kind = kind_of(line)
    names = [each.name for each in dataclasses.fields(kind)]
    return kind(**{name: line[name] for name in names if name in line})


def kind_of(line: Line) -> Any:
    """Its type; None of what is neither an event nor a decision."""
    name = line["kind"]
    return Plan if name.startswith("plan of ") else EVENTS.get(name) or DECISIONS.get(name)


# ---------------------------------------------------------------- what happened


Mark: TypeAlias = Mapping[str, int]
"""`round`, `part` and `tokens` of a publication; part 0 is of weights."""
Named: TypeAlias = Sequence[Any]
"""What was pulled: section, author, mark."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Reached a peer at `now`: swarm time of a real one, the virtual clock's of a simulated one."""

    now: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Peers(Event):
    """What a real peer knows of the others, before the event that follows: those of whom that has changed (`is_live`,
    `answers`: the last call to it did not fail, `so_far_since_s`, and what gossip reads of a presence), and who is
    not in the table any more."""

    known: Mapping[str, Mapping[str, Any]]
    forgotten: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Others(Event):
    """The same of a simulated one. Learning: each one's round, part and tokens as it tells. Systems: of those it
    has read what gossip goes by, and when their rounds end."""

    known: Mapping[str, Sequence[Any]]
    forgotten: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Expects(Event):
    """Before the first pull: how long so many bytes would take, in seconds, as other transfers have shown."""

    num_bytes: int
    found: float | None


@dataclass(frozen=True, kw_only=True)
class Round(Event):
    """The trainer begins a round: `start` is what it is told, decided on `steps_of` (its speed, the others', in how
    many seconds those end), `everybodys_of` and `format_of` (others, seconds, and the sizes' rest)."""

    round: int
    run_tokens: int = 0
    start: Mapping[str, Any] | None = None
    steps_of: Sequence[Any] = ()
    everybodys_of: Sequence[Any] = ()
    format_of: Sequence[Any] = ()
    steps: int = 0
    """Of systems work: what was decided, with `every` and `shard`."""
    every: int = 0
    shard: int = -1


@dataclass(frozen=True, kw_only=True)
class Paces(Event):
    """Learning: what the next round's length is decided on."""

    round: int
    knows_speed: bool
    step_s: float
    ends_s: Sequence[float | None]
    speeds: Sequence[float]
    live: Sequence[str]
    bytes_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Published(Event):
    """The trainer has published: the mark of each fragment (round, part, tokens), after so many steps of its round."""

    found: Sequence[Any]
    done: int = 0


@dataclass(frozen=True, kw_only=True)
class Begins(Event):
    """The trainer's plans reach gossip: each with `round`, `began_s` of its `fragments`, `ends_s`, `gradient_format`
    and `is_sure`. They replace all those before."""

    round: int
    plans: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Format(Event):
    """The trainer asks in which format it publishes, beside so many others, in a round that lasts so long; `up` is
    what it sends at most, in bytes per second."""

    others: int
    round_s: float
    up: float | None


@dataclass(frozen=True, kw_only=True)
class Looks(Event):
    """The pulling loop looks whether a pull is due: at its first, when it is time, or since something has ended.
    Of simulated peers: of which fragment and section."""

    fragment: int | None = None
    section: str | None = None


@dataclass(frozen=True, kw_only=True)
class Starts(Event):
    """The driver begins with what was asked for."""

    ask: int


@dataclass(frozen=True, kw_only=True)
class Sources(Event):
    """Whom it can be had from, in order: the author, or hosts of one that nobody can dial."""

    ask: int
    found: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Replied(Event):
    """A source answered: with a manifest at `mark`, with nothing newer (None), busy, or that it is no host.
    Systems: `author`, `section`, and in `found` the mark, the words of a refusal, or None where nobody answered."""

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
    """It did not: which error of `swarmtrain.errors`, its words, and whether it is an incident."""

    ask: int
    error: str
    reason: str
    is_incident: bool


@dataclass(frozen=True, kw_only=True)
class Unanswered(Failure):
    """The question of what it has was not answered."""


@dataclass(frozen=True, kw_only=True)
class Broke(Failure):
    """Its bytes did not come."""


@dataclass(frozen=True, kw_only=True)
class Refused(Failure):
    """What came is no publication, or one that the run's rule lets not in."""


@dataclass(frozen=True, kw_only=True)
class Breaks(Event):
    """Learning: nothing comes of it, without any answer if `mute`."""

    ask: int
    reason: str
    mute: bool


@dataclass(frozen=True, kw_only=True)
class Transfers(Event):
    """Learning: so many bytes are asked for, for the last but `attempts` - 1 time."""

    ask: int
    left: int
    attempts: int


@dataclass(frozen=True, kw_only=True)
class Came(Event):
    """All bytes are here; `wrong`: what else its source has done. Systems: as `Replied`."""

    ask: int = -1
    num_bytes: int = 0
    wrong: Mapping[str, Any] | None = None
    mark: Mark | None = None
    author: str = ""
    section: str = ""
    found: Any = None


@dataclass(frozen=True, kw_only=True)
class Decoded(Event):
    """It may enter a merge, with so many tokens."""

    ask: int
    tokens: float


@dataclass(frozen=True, kw_only=True)
class Prepares(Event):
    """The driver looks whether a merge is to be prepared."""


@dataclass(frozen=True, kw_only=True)
class Prepared(Event):
    """A fragment's merge is prepared, or cannot be."""

    fragment: int
    is_good: bool


@dataclass(frozen=True, kw_only=True)
class Settled(Event):
    """The pull whose merge that was goes on to its end."""

    ask: int


@dataclass(frozen=True, kw_only=True)
class Due(Event):
    """A fragment is merged now."""

    fragment: int = -1
    round: int = -1


@dataclass(frozen=True, kw_only=True)
class Calls(Event):
    """That peer has called this one."""

    author: str


@dataclass(frozen=True, kw_only=True)
class Restarts(Event):
    """The trainer stops after so many steps of its round, and gives up what it trained since each fragment's merge."""

    done: int


@dataclass(frozen=True, kw_only=True)
class Shows(Event):
    """A state is offered, of the round after `round`: up to where each peer is in it goes with it."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Keeps(Event):
    """A checkpoint is written: the ledger goes with it."""


@dataclass(frozen=True, kw_only=True)
class Forgets(Event):
    """What was pulled is in the weights by now, or too old."""


@dataclass(frozen=True, kw_only=True)
class TookStates(Event):
    """This peer goes on in `round` from others' weights. `told`: up to where each peer is in each state, by fragments;
    `rounds`: in which their authors are; `heard`: in which everybody is."""

    round: int
    told: Sequence[Any] = ()
    rounds: Mapping[str, int] = field(default_factory=dict)
    heard: Mapping[str, int] = field(default_factory=dict)
    theta_sha256: str = ""
    momentum_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Stops(Event):
    """This peer rests, or is done."""


@dataclass(frozen=True, kw_only=True)
class Adopted(Event):
    """The trainer goes on with these weights (fp32 in base64) of others."""

    round: int
    run_tokens: int
    reason: str
    theta: str
    momentum: str


@dataclass(frozen=True, kw_only=True)
class Lives(Event):
    """A simulated machine comes, goes, stands still, or goes on; what of it is known then."""

    speed: float | None = None
    theta: float | None = None
    round: int | None = None
    author: str | None = None


# ---------------------------------------------------------------- what was decided


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Follows at once from the events of its block. `now` is written where it is used or of a simulated peer."""

    now: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StartsWith(Decision):
    """Learning: how the next round begins."""

    found: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plans(Decision):
    """What the trainer tells gossip of the next merges, after so many steps of its round, and all it goes by."""

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
    """When pulls are due: `inputs` are the number of others, when it began and when it ends; of these `fragments`."""

    inputs: Sequence[float]
    found: Mapping[str, Any]
    fragments: Sequence[int] = ()
    format: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Choice(Decision):
    """Whom to ask for that section, or None, with the reason; `view` is what it was chosen from."""

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
    """Somebody is asked: `ask` is what else is said of it in later lines."""

    ask: int
    section: str
    author: str
    fragment: int = 0
    round_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Requests(Decision):
    """A source is asked for what is newer than `known`: round and part, or None."""

    ask: int
    source: str
    known: Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class News(Decision):
    """What of a publication is new, measured from the median round `reference`: the name of its type and the tokens;
    learning: whether anything is. `is_own`: its author itself has just told; `is_here`: its bytes have come."""

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
    """Its bytes are pulled from that source."""

    ask: int
    source: str
    mark: Mark


@dataclass(frozen=True, kw_only=True)
class Decodes(Decision):
    """It is decoded: a gradient with what is new of it, and whether what that is the difference to is here."""

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
    """A pull has ended as one of `OpenPulls`' methods says: "end", "nothing_new" (in `found` for how long that one is
    not asked again), "fail" (what follows, in words) or "give_up"."""

    ask: int
    how: str
    found: Any


@dataclass(frozen=True, kw_only=True)
class Incident(Decision):
    """The person is told."""

    author: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class HostFailed(Decision):
    """A host is left alone; the next source is tried."""

    ask: int
    host: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Accepted(Decision):
    """The run's rule: tokens, or why it is refused."""

    author: str
    section: str
    mark: Mark
    found: Sequence[Any]
    fragment: int = 0


@dataclass(frozen=True, kw_only=True)
class Merges(Decision):
    """What enters the merge; None where nothing is ready. Systems: the weights after it, `theta` and `momentum`, in
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
    """The weights that came of it: a real peer's whole, a simulated one's fragment; `found`: tokens by author."""

    fragment: int
    theta_sha256: str
    momentum_sha256: str
    found: Sequence[Any] = ()


@dataclass(frozen=True, kw_only=True)
class CatchesUp(Decision):
    """Learning: it takes the others' weights, since it is too far behind."""

    found: bool


@dataclass(frozen=True, kw_only=True)
class PublishesAs(Decision):
    """In which format."""

    found: str


@dataclass(frozen=True, kw_only=True)
class Places(Decision):
    """Up to where each peer is in the weights, by fragments: round and part."""

    found: Sequence[Mapping[str, Sequence[int]]]


@dataclass(frozen=True, kw_only=True)
class Rows(Decision):
    """The ledger of each fragment, as a checkpoint has it."""

    found: Sequence[Sequence[Sequence[Any]]]


@dataclass(frozen=True, kw_only=True)
class Announces(Decision):
    """The others are told of this part of its round."""

    part: int
    tokens: int


NEWS = {"Full": "Whole", "Delta": "Difference", "WeightsOnly": "Theta", "Stale": "Nothing"}
"""The recordings' names of the classes of `protocol.gossip.partners`, from when they were recorded."""


def news_name(found: object) -> str:
    """The recordings' name of what is new in a publication."""
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
