"""Choice of the peer of a stage that gets the next microbatch, and what a driver measures of the peers.

- "round-robin" is interleaved and weighted: every peer has a virtual load in seconds. The least loaded one is chosen,
  and its load grows by the task's size divided by the peer's measured throughput.
- "least-completion" chooses the peer that would be done first, given what is in flight to it.

Both leave a failed peer alone for a while, and give a busy one a short pause.

A driver measures a peer by its own tasks: how long each took, counted from the end of the one before if that was later
than its own start, so that waiting behind one's own tasks is not held against the peer. The throughput is that of the
last few tasks together, with the longest cut short: one slow task changes little, and a peer that has become ten times
slower is recognised after a few.

A task's size is its work in tokens, a share of the microbatch's tokens (`WORK_SHARES`).

Everything here is pure: `now` and the random generator are arguments, and every answer carries its reason.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from swarmtrain.protocol.pipeline.balance import StagePeer
from swarmtrain.protocol.pipeline.ledger import Kind

VARIANTS = ("round-robin", "least-completion")
"""Ways to choose a peer; the first is the default."""
WORK_SHARES: Mapping[Kind, float] = {"forward": 1 / 3, "backward": 2 / 3, "tail": 1.0}
"""Share of a microbatch's work at a stage. The last stage does forward and backward in one, the tail."""

_NUM_SAMPLES = 6
"""Tasks from which a peer's throughput is computed."""
_CUT = 3.0
"""Limit of the longest sample, as a multiple of the second longest."""
_PATIENCE = 6.0
"""Time limit of a task, as a multiple of its expected duration or of the slowest recent answer."""
_PAUSE_TASKS = 2.0
"""Pause of a busy peer, in tasks of its own."""
_LEAST_IN_FLIGHT = 2
"""Fewest microbatches that a driver has under way."""
_BUSY, _MOST_OF_BATCH = 4.0, 0.25
"""Constants of `most_in_flight`."""
_MOST_OF_USUAL = 10.0
"""Limit of an advertised speed, as a multiple of the median."""
_MAX_KNOWN = 1024
"""Peers that are remembered after they left the stage. Identities cost nothing, so there is a limit."""


@dataclass
class _Peer:
    """Measurements and state of one peer."""

    samples: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_NUM_SAMPLES))
    """(seconds, tokens) of the last tasks."""
    answers_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_SAMPLES))
    """Durations of the last tasks, including the wait in the peer's queue."""
    in_flight_tokens: float = 0.0
    num_in_flight: int = 0
    ended_s: float = float("-inf")
    load_s: float = 0.0
    charged_s: float = 0.0
    """Seconds by which the last task given to the peer raised its load."""
    paused_until_s: float = float("-inf")
    banned_until_s: float = float("-inf")
    failures: int = 0
    """Failures in a row; failures during one ban count once."""
    away: bool = True
    """True while the peer cannot be chosen; afterwards it enters with the least load of the others."""

    tokens_per_s: float | None = None
    """Measured throughput; None before the first sample."""

    def sample(self, took_s: float, tokens: float) -> None:
        """Record a task's duration without the wait for the driver's own earlier tasks."""
        self.samples.append((max(took_s, 1e-6), tokens))
        paces = sorted(took_s / tokens for took_s, tokens in self.samples)
        most = _CUT * paces[-2] if len(paces) > 1 else paces[-1]
        time_s = sum(min(took_s, most * tokens) for took_s, tokens in self.samples)
        self.tokens_per_s = sum(tokens for _, tokens in self.samples) / time_s


@dataclass
class Router:
    """Chooses a peer of one stage for each task, and learns from the results.

    A peer without measurements is assumed to be as fast as the median of the others. A failure bans it for
    `first_ban_s`, the next one for twice as long, up to `most_ban_s`. After a ban it gets one task at a time until it
    answers. If every peer is banned, bans do not count.
    """

    rng: random.Random
    variant: str = VARIANTS[0]
    busy_s: float = 0.1
    """Shortest pause of a busy peer. Tasks may take milliseconds; with a second, a small model's peers were idle for
    most of it (decision 38)."""
    first_ban_s: float = 15.0
    most_ban_s: float = 600.0
    least_limit_s: float = 10.0
    most_limit_s: float = 300.0
    _peers: dict[str, _Peer] = field(default_factory=dict)
    """Peers of the stage."""
    _gone: dict[str, _Peer] = field(default_factory=dict)
    """Peers that have left the stage, the last one at the end. A view of the DHT may miss a peer for a moment."""
    _heap: list[tuple[float, float, str]] = field(default_factory=list)
    """(load, random number, peer); an entry is valid while its load is the peer's."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"no such choice of a stage's peer: {self.variant}; allowed: {', '.join(VARIANTS)}")

    # ------------------------------------------------------------------ the stage

    def set_peers(self, peers: Collection[str]) -> None:
        """Replace the set of the stage's peers."""
        among = set(peers)
        for peer in [peer for peer in self._peers if peer not in among]:
            self._gone[peer] = self._peers.pop(peer)
        for peer in sorted(among - self._peers.keys()):
            known = self._gone.pop(peer, None) or _Peer()
            known.away = True
            self._peers[peer] = known
        while len(self._gone) > _MAX_KNOWN:
            del self._gone[next(iter(self._gone))]

    @property
    def peers(self) -> tuple[str, ...]:
        """Peers of the stage."""
        return tuple(self._peers)

    def has(self, peer: str) -> bool:
        """Return whether `peer` is in the stage."""
        return peer in self._peers

    def tokens_per_s(self, peer: str) -> float:
        """Return the assumed throughput: measured, else the median of those measured, else 1."""
        known = self._peers.get(peer)
        measured = known.tokens_per_s if known is not None else None
        return measured if measured is not None else self._usual_tokens_per_s()

    def limit_s(self, peer: str, tokens: float) -> float:
        """Return how long to wait for a task of that size, including what is in flight to `peer` before it."""
        known = self._find(peer)
        if known is None or known.tokens_per_s is None or not known.answers_s:
            return self.most_limit_s
        expected_s = max((known.in_flight_tokens + tokens) / known.tokens_per_s, *known.answers_s)
        return min(max(self.least_limit_s, _PATIENCE * expected_s), self.most_limit_s)

    def _usual_tokens_per_s(self) -> float:
        rates = [rate for known in self._peers.values() if (rate := known.tokens_per_s) is not None]
        return statistics.median(rates) if rates else 1.0

    # ------------------------------------------------------------------ the choice

    def choose(self, now: float, tokens: float, exclude: Collection[str] = ()) -> tuple[str | None, str]:
        """Choose a peer for a task of `tokens`. Return (peer or None, reason). `exclude`: peers that have failed with
        this task."""
        ready, about = self._ready(now)
        free = ready - set(exclude)
        if not free:
            return None, about if not ready else "everyone that may be asked now was asked for this task"
        self._enter(ready)
        if self.variant == "round-robin":
            peer = self._least_loaded(free)
            reason = f"the least loaded of {len(free)}"
        else:
            peer = self._first_done(free, tokens)
            reason = f"the first of {len(free)} to be done"
        known = self._peers[peer]
        known.charged_s = tokens / self.tokens_per_s(peer)
        self._load(peer, known, known.load_s + known.charged_s)
        return peer, f"{reason}; {about}" if about else reason

    def next_s(self, now: float) -> float | None:
        """Return the time at which a peer can be chosen that cannot be now; None if time alone changes nothing."""
        ends = [end for known in self._peers.values() if (end := self._kept_until_s(known)) > now]
        return min(ends, default=None)

    def _ready(self, now: float) -> tuple[set[str], str]:
        """Return (the peers that may be chosen now, the reason if some are left out)."""
        if not self._peers:
            return set(), "the stage has no peer"
        banned = {peer for peer, known in self._peers.items() if self._is_banned(known, now)}
        ignored = len(banned) == len(self._peers)
        paused = {peer for peer, known in self._peers.items() if now < known.paused_until_s}
        away = paused if ignored else paused | banned
        for peer in away:
            self._peers[peer].away = True
        ready = self._peers.keys() - away
        if not ready:
            return set(), f"{len(paused)} are busy, {len(self._peers) - len(paused)} are left alone"
        if ignored:
            return set(ready), "everyone is banned, so that bans do not count"
        return set(ready), f"{len(away)} are left alone for now" if away else ""

    @staticmethod
    def _is_banned(known: _Peer, now: float) -> bool:
        # After a ban the peer is on trial: one task at a time until it answers.
        return now < known.banned_until_s or (known.failures > 0 and known.num_in_flight > 0)

    @staticmethod
    def _kept_until_s(known: _Peer) -> float:
        return max(known.paused_until_s, known.banned_until_s)

    def _enter(self, ready: set[str]) -> None:
        """Let peers that were unavailable start with the least load of the others, so that they do not get all tasks
        until they have caught up."""
        back = [peer for peer in sorted(ready) if self._peers[peer].away]
        if not back:
            return
        least_s = min((self._peers[peer].load_s for peer in ready if not self._peers[peer].away), default=None)
        for peer in back:
            known = self._peers[peer]
            known.away = False
            self._load(peer, known, known.load_s if least_s is None else max(known.load_s, least_s))

    def _load(self, peer: str, known: _Peer, load_s: float) -> None:
        known.load_s = load_s
        heapq.heappush(self._heap, (load_s, self.rng.random(), peer))
        if len(self._heap) > 64 + 4 * len(self._peers):
            self._heap = list(self._valid())
            heapq.heapify(self._heap)

    def _valid(self) -> Iterator[tuple[float, float, str]]:
        """Yield the newest entry of each peer."""
        seen = set()
        for entry in sorted(self._heap):
            known = self._peers.get(entry[2])
            if known is not None and known.load_s == entry[0] and entry[2] not in seen:
                seen.add(entry[2])
                yield entry

    def _least_loaded(self, free: set[str]) -> str:
        """Return the least loaded peer of `free`; outdated entries are dropped from the heap on the way."""
        aside = []
        while True:
            entry = heapq.heappop(self._heap)
            known = self._peers.get(entry[2])
            if known is None or known.load_s != entry[0]:
                continue  # its load has changed since
            if entry[2] in free:
                break
            aside.append(entry)
        for other in aside:
            heapq.heappush(self._heap, other)
        return entry[2]

    def _first_done(self, free: set[str], tokens: float) -> str:
        usual = self._usual_tokens_per_s()
        done = []
        for peer in sorted(free):
            known = self._peers[peer]
            rate = known.tokens_per_s or usual
            done.append(((known.in_flight_tokens + tokens) / rate, self.rng.random(), peer))
        return min(done)[2]

    # ------------------------------------------------------------------ what became of it

    def begun(self, peer: str, tokens: float) -> None:
        """Record that a task is on its way to `peer`. One of the following methods ends it."""
        known = self._find(peer)
        if known is not None:
            known.in_flight_tokens += tokens
            known.num_in_flight += 1

    def finished(self, peer: str, now: float, took_s: float, tokens: float) -> None:
        """Record that a task was done, `took_s` seconds after its start. All failures of the peer are cleared."""
        known = self._ended(peer, tokens)
        if known is not None:
            self._sample(known, min(took_s, now - known.ended_s), tokens)
            known.answers_s.append(took_s)
            known.ended_s = now
            known.failures = 0
            known.banned_until_s = float("-inf")

    def timed_out(self, peer: str, now: float, took_s: float, tokens: float) -> str:
        """Record that a task had no answer for `took_s`, as a long sample and a failure. Return the consequence in
        words, for the log."""
        known = self._ended(peer, tokens)
        if known is None:
            return "it is not in the stage any more"
        self._sample(known, took_s, tokens)
        lost_s = min(took_s, now - known.ended_s)  # several tasks under way at once are charged once
        known.ended_s = now
        self._load(peer, known, known.load_s + max(0.0, lost_s - known.charged_s))
        return self._ban(known, now, took_s, f"no answer in {took_s:.1f} s")

    def _sample(self, known: _Peer, took_s: float, tokens: float) -> None:
        """Record what one task took.

        Before the very first sample nobody knows what a task costs, and the peers chosen until then were charged with a
        guess. Those charges are cleared; otherwise these peers would wait until the others have caught up.
        """
        is_first = all(each.tokens_per_s is None for each in self._peers.values())
        known.sample(took_s, tokens)
        if is_first:
            for peer, each in self._peers.items():
                each.charged_s = 0.0
                self._load(peer, each, 0.0)

    def failed(self, peer: str, now: float, took_s: float, tokens: float, reason: str) -> str:
        """Record that a peer was unreachable or sent something wrong. Return the consequence in words, for the log."""
        known = self._ended(peer, tokens)
        return "it is not in the stage any more" if known is None else self._ban(known, now, took_s, reason)

    def refused_busy(self, peer: str, now: float, tokens: float) -> str:
        """Record that a peer's queue is full, which pauses the peer briefly and is no failure. Return the consequence
        in words, for the log."""
        known = self._ended(peer, tokens)
        if known is None:
            return "it is not in the stage any more"
        task_s = tokens / known.tokens_per_s if known.tokens_per_s is not None else 0.0
        pause_s = max(self.busy_s, _PAUSE_TASKS * task_s)
        self._load(peer, known, known.load_s - known.charged_s)  # it did not do that task
        known.paused_until_s = max(known.paused_until_s, now + pause_s)
        return f"busy: asked again after {pause_s:.1f} s"

    def given_up(self, peer: str, tokens: float) -> None:
        """Record the end of a task whose outcome says nothing about the peer."""
        self._ended(peer, tokens)

    def _ban(self, known: _Peer, now: float, took_s: float, reason: str) -> str:
        """Count a failure and ban the peer.

        A task that began before or during a ban does not lengthen it: several are under way at once, and where bans do
        not count each peer is tried again and again.
        """
        if now - took_s < known.banned_until_s:
            return f"{reason}: it was left alone for that already"
        known.failures += 1
        wait_s = min(self.first_ban_s * 2.0 ** min(known.failures - 1, 32), self.most_ban_s)
        known.banned_until_s = now + wait_s
        return f"{reason}: left alone for {wait_s:g} s"

    def _ended(self, peer: str, tokens: float) -> _Peer | None:
        known = self._find(peer)
        if known is not None:
            known.in_flight_tokens = max(0.0, known.in_flight_tokens - tokens)
            known.num_in_flight = max(0, known.num_in_flight - 1)
        return known

    def _find(self, peer: str) -> _Peer | None:
        return self._peers.get(peer) or self._gone.get(peer)


# ---------------------------------------------------------------- how many at once


def most_in_flight(
    me: str,
    holders: Sequence[Sequence[StagePeer]],
    quickest_s: float | None,
    microbatch_tokens: int,
    batch_microbatches: int,
) -> int:
    """Return how many microbatches a driver has under way: as few as keep the stages busy; 0 if some stage has no
    holder.

    `holders` are the peers of each stage; `quickest_s` is the shortest time of a microbatch so far, forward and back. A
    microbatch that is under way when a peer takes a step enters the next step with a gradient one step old, which costs
    loss. So all drivers together have at most (decision 30):

    - one for each peer while it computes, by Little's law: the slowest stage's peers always do, those of faster stages
      accordingly less; and three times as many that wait in front of them, because arrivals are uneven;
    - those that travel: the quickest one's time that its peers cannot have computed, times the throughput;
    - and in total a quarter of a batch for each peer of the smallest stage after the first.

    A driver has its share of that (`driver_share`), and at least two.
    """
    if not all(holders):
        return 0
    paces = [_told_rates(of) for of in holders]
    rates = [sum(of.values()) for of in paces]
    computing = sum(len(of) * min(rates) / rate for of, rate in zip(paces, rates, strict=True))
    computed_s = sum(microbatch_tokens / max(of.values()) for of in paces)
    travelling = max(0.0, (quickest_s or 0.0) - computed_s) * min(rates) / microbatch_tokens
    smallest = min((len(of) for of in holders[1:]), default=1)
    most = min(_BUSY * computing + travelling, _MOST_OF_BATCH * batch_microbatches * smallest)
    return max(_LEAST_IN_FLIGHT, min(batch_microbatches, round(most * driver_share(me, holders[0]))))


def driver_share(me: str, drivers: Iterable[StagePeer]) -> float:
    """Return the share of the first stage's tokens that `me` can do by what its peers advertise; at least half of an
    equal share.

    A peer that advertises no speed counts as the median, and none as more than ten times the median, so that a liar
    starves nobody.
    """
    rates = _told_rates(drivers)
    mine = rates.get(me) or statistics.median(rates.values() or [1.0])
    return max(mine / (sum(rates.values()) + (0.0 if me in rates else mine)), 0.5 / max(1, len(rates)))


def _told_rates(peers: Iterable[StagePeer]) -> dict[str, float]:
    """Return the tokens per second that each peer advertises, limited as in `driver_share`."""
    told = {one.peer: one.tokens_per_s for one in peers}
    usual = statistics.median([rate for rate in told.values() if rate > 0] or [1.0])
    return {peer: min(rate, _MOST_OF_USUAL * usual) or usual for peer, rate in told.items()}
