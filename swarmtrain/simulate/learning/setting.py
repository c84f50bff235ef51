"""Setting of a simulated run (text, peers, links, faults), its results, and when volunteers work or wait."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from swarmtrain.algorithm import pacing
from swarmtrain.algorithm.outer import OuterConstants, momentum_at
from swarmtrain.network.links.impairments import Lateness
from swarmtrain.protocol.adapter_groups import trained_groups
from swarmtrain.run import RunFile
from swarmtrain.simulate.learning.learner import Learner, Text
from swarmtrain.simulate.learning.pace import Pace
from swarmtrain.simulate.links import rates
from swarmtrain.simulate.scenario import Away, Hang, HostileSection, Scenario

GROUP = 4
"""Number of volunteers in a sample of MoDeST, and of updates in a buffer of FedBuff; fewer if there are not so many
volunteers."""
_MOST_OWN = 8
_SAID_SPEED = 1e9
_EVEN = Pace()
_MOST_LONGER = 30
"""Limit of the time for which random churn is drawn, as a multiple of the length of a run in which no volunteer waits
or leaves."""

CurvePoint = tuple[int, float, float]
"""(tokens of the whole run, virtual seconds, held-out loss in nats per byte)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Simulated run with its peers and links: the seconds of an inner step of each volunteer, and the properties of
    links."""

    text: Text
    step_s: tuple[float, ...]
    pace: Pace = field(default_factory=Pace)
    """How the volunteers' speeds vary over time."""
    up_bytes_per_s: float = float("inf")
    down_bytes_per_s: float = float("inf")
    """Rates up and down, in bytes per second, of each volunteer without a link of its own."""
    own_links: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Rates up and down of volunteers with links of their own, by name."""
    rtt_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    """Share of packets lost, each way."""
    failing: float = 0.0
    """Share of pulls that fail."""
    hangs: tuple[Hang, ...] = ()
    away: tuple[Away, ...] = ()
    """Absences of volunteers. Absences of the same volunteer do not overlap."""
    churn_until_s: float = math.inf
    """Time until which random churn is drawn."""
    hostile: HostileSection = field(default_factory=HostileSection)
    num_hostile: int = 0
    """Number of hostile volunteers. They have the highest numbers."""
    warm: Tensor | None = None
    """Weights (P,) that all volunteers begin with, in place of random ones."""
    corrected: bool = True
    """True to average weights with the variance correction."""
    adapter_groups: tuple[int, ...] = ()
    """Groups of an adapter that each volunteer trains in a round, by number; empty: all of them train everything."""
    curve_points: int = 0

    @property
    def run(self) -> RunFile:
        """Run file of the simulated run."""
        return self.text.run

    @property
    def own_weights(self) -> bool:
        """True if each volunteer begins with random weights of its own."""
        return self.run.merge.init == "own"

    @property
    def total_tokens(self) -> int:
        """Tokens at which the run ends."""
        return self.run.run.total_tokens

    @property
    def num_peers(self) -> int:
        """Number of volunteers."""
        return len(self.step_s)

    @property
    def num_honest(self) -> int:
        """Number of honest volunteers. They have the lowest numbers."""
        return self.num_peers - self.num_hostile

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second from one volunteer to another, on the slowest link of all."""
        if not self.own_links:
            return min(self.up_bytes_per_s, self.down_bytes_per_s)
        return min(rate for number in range(self.num_peers) for rate in self.link_of(f"p{number}"))

    def link_of(self, name: str) -> tuple[float, float]:
        """Return (up, down): the bytes per second of a volunteer's or a server's link."""
        return self.own_links.get(name, (self.up_bytes_per_s, self.down_bytes_per_s))

    def groups_of_round(self, number: int, round: int, num_groups: int) -> frozenset[int] | None:
        """Return which of an adapter's groups volunteer `number` trains in a round; None: everything."""
        if not self.adapter_groups:
            return None
        return trained_groups(f"p{number}", round, num_groups, self.adapter_groups[number])

    def learner(self, number: int) -> Learner:
        """Return a new volunteer."""
        seed = 1000 * (1 + self.run.run.seed) + number if self.own_weights else None
        return Learner(self.text, number, seed, self.warm)

    def own_loss(self, thetas: Sequence[Tensor]) -> float:
        """Return the mean held-out loss of the first `_MOST_OWN` peers' own weights, each (P,)."""
        losses = [self.text.held_out_loss(theta) for theta in thetas[:_MOST_OWN]]
        return sum(losses) / len(losses)

    def constants(self, round: int) -> OuterConstants:
        """Return the constants of the outer step in a round."""
        section = self.run.merge
        momentum = momentum_at(round, section.outer_momentum, section.momentum_ramp_rounds)
        return OuterConstants(learning_rate=section.outer_learning_rate, momentum=momentum)

    @property
    def speeds(self) -> list[float]:
        """Speeds of all volunteers, in inner steps per second."""
        return [1 / each for each in self.step_s]

    def steps_of_round(
        self, number: int, others_end_in_s: Sequence[float | None] = (), speeds: Sequence[float] | None = None
    ) -> int:
        """Return H_i, the inner steps of one volunteer's round.

        `speeds` are the measured speeds of all volunteers. `others_end_in_s` are the seconds until the others' rounds
        end, by number, None where unknown: rounds keep in step with them.
        """
        section, speeds = self.run.merge, speeds or self.speeds
        return pacing.round_inner_steps(
            speeds[number],
            self._said_by_others(number, speeds),
            section.inner_steps,
            paced=section.pacing,
            limit_s=section.round_limit_s,
            others_end_in_s=others_end_in_s,
        )

    def small_batch_round(self, number: int, speeds: Sequence[float]) -> tuple[int, int] | None:
        """Return the inner steps of a round, and the sequences in each, of a volunteer that is too slow for the run's
        batch; None if it is not."""
        section = self.run.merge
        if not section.pacing:
            return None
        others, batch = self._said_by_others(number, speeds), self.run.inner.batch_sequences
        return pacing.small_batch_round(speeds[number], others, section.inner_steps, batch, section.round_limit_s)

    def steps_of_everybody(self, number: int, speeds: Sequence[float] | None = None) -> float:
        """Return the inner steps that all volunteers take together while volunteer `number` takes one.

        The learning-rate schedule advances by this number, as that volunteer computes it.
        """
        speeds = speeds or self.speeds
        return pacing.steps_of_everybody(speeds[number], self._said_by_others(number, speeds[: self.num_counted]))

    @property
    def num_counted(self) -> int:
        """Number of volunteers, the first ones, that count in the speed of the schedule.

        These are the honest ones, whose tokens count, and those that lie about their speed.
        """
        return self.num_peers if self.hostile.kind == "speed" else self.num_honest

    def said_speed(self, number: int, speed: float) -> float:
        """Return the inner steps per second that volunteer `number` claims."""
        lies = number >= self.num_honest and self.hostile.kind == "speed"
        return _SAID_SPEED if lies else speed

    def _said_by_others(self, number: int, speeds: Sequence[float]) -> list[float]:
        """Return the speeds that all volunteers except `number` claim, given their measured `speeds`."""
        return [self.said_speed(other, speed) for other, speed in enumerate(speeds) if other != number]

    def all_reduce_s(self, num_peers: int, size_bytes: int, rng: random.Random) -> float:
        """Return the seconds that an all-reduce among `num_peers` takes: shares go to the peers that average them, then
        the means come back.

        All wait for the last one.
        """
        sent_bytes = (num_peers - 1) * size_bytes // num_peers
        takes_s = self.rtt_s + sent_bytes / self.bytes_per_s
        late_s = [max(self.lost_s(rng) + self.late_s(sent_bytes, rng) for _ in range(num_peers)) for _ in "01"]
        return 2 * takes_s + sum(late_s)

    def lost_s(self, rng: random.Random) -> float:
        """Draw the seconds that a transfer loses by breaking off midway; after each break the rest is asked for."""
        lost_s = 0.0
        while self.failing and rng.random() < self.failing:
            lost_s += self.rtt_s
        return lost_s

    def late_s(self, size_bytes: int, rng: random.Random) -> float:
        """Draw the seconds by which a transfer ends late: each piece may be late, and delays those behind it, as in
        TCP."""
        lateness = Lateness(jitter_s=self.jitter_s, loss=self.loss, rtt_s=self.rtt_s, rng=rng)
        return lateness.of_transfer(size_bytes, self.bytes_per_s)

    def done_s(self, number: int, since_s: float, work_s: float) -> float:
        """Return the time at which volunteer `number` has done work that takes `work_s` seconds at its own speed. It
        does nothing while it hangs."""
        return self._over_s(number, since_s, work_s, self.pace)

    def takes_s(self, number: int, since_s: float, steps: int) -> float:
        """Return the seconds that volunteer `number` takes for `steps` inner steps, from `since_s` on."""
        work_s = steps * self.step_s[number]
        return self.pace.done_s(number, since_s, work_s) - since_s if self.pace.deviation else work_s

    def due_s(self, number: int, since_s: float, wait_s: float) -> float:
        """Return the time at which a wait of `wait_s` seconds is over, extended by the time in which the volunteer
        hangs."""
        return self._over_s(number, since_s, wait_s, _EVEN)

    def _over_s(self, number: int, since_s: float, work_s: float, pace: Pace) -> float:
        for hang in sorted((each for each in self.hangs if each.peer == number), key=lambda each: each.at_s):
            if hang.at_s >= pace.done_s(number, since_s, work_s):
                break
            if (over_s := hang.at_s + hang.for_s) > since_s:
                work_s -= pace.worked_s(number, since_s, hang.at_s)
                since_s = over_s
        return pace.done_s(number, since_s, work_s)

    def is_hanging(self, number: int, now_s: float) -> bool:
        """Return whether volunteer `number` hangs at `now_s`."""
        return any(hang.is_on(number, now_s) for hang in self.hangs)

    def is_away(self, number: int, now_s: float) -> bool:
        """Return whether volunteer `number` is away at `now_s`."""
        return any(each.is_on(number, now_s) for each in self.away)

    def is_gone(self, number: int, now_s: float) -> bool:
        """Return whether the volunteer hangs and its presence has expired."""
        lapsed_s = now_s - self.run.network.presence_ttl_s
        return any(hang.is_on(number, now_s) and hang.at_s <= lapsed_s for hang in self.hangs)

    def is_stuck(self, number: int, now_s: float) -> bool:
        """Return whether the volunteer hangs for longer than its presence lives, so that others give it up before it
        continues."""
        return any(hang.is_on(number, now_s) and hang.for_s > self.run.network.presence_ttl_s for hang in self.hangs)

    def awake_s(self, number: int, since_s: float, until_s: float) -> float:
        """Return the seconds between `since_s` and `until_s` in which volunteer `number` does not hang."""
        return self._spent_s(number, since_s, until_s, _EVEN)

    def steps_between(self, number: int, since_s: float, until_s: float, step_share: float = 1.0) -> int:
        """Return the inner steps that volunteer `number` takes between `since_s` and `until_s`: until it leaves, and
        none while it hangs. A step has `step_share` of the run's batch."""
        goes_s = (each.at_s for each in self.away if each.peer == number and each.at_s > since_s)
        worked_s = self._spent_s(number, since_s, min(until_s, *goes_s, math.inf), self.pace)
        # 1e-9: a step that ends at this very moment is done, whatever the rounding of its time.
        return math.floor(worked_s / (self.step_s[number] * step_share) + 1e-9)

    def _spent_s(self, number: int, since_s: float, until_s: float, pace: Pace) -> float:
        hung_s = (
            pace.worked_s(number, max(since_s, hang.at_s), min(until_s, hang.at_s + hang.for_s))
            for hang in self.hangs
            if hang.peer == number
        )
        return max(0.0, pace.worked_s(number, since_s, until_s) - sum(hung_s))

    def speaks_again_s(self, now_s: float) -> float:
        """Return the time at which the first of the volunteers that do not answer at `now_s` answers again."""
        silences = [each for each in (*self.hangs, *self.away) if each.is_on(each.peer, now_s)]
        return min((each.at_s + each.for_s for each in silences), default=now_s)

    def goes_within(self, number: int, now_s: float, work_s: float) -> bool:
        """Return whether volunteer `number` crashes or leaves before it has worked for `work_s` seconds."""
        end_s = self.done_s(number, now_s, work_s)
        return any(each.peer == number and now_s < each.at_s < end_s for each in self.away)

    def meets(self, now_s: float, work_s: Mapping[int, float]) -> tuple[list[int], float]:
        """Let each volunteer work for its `work_s` seconds, then wait for the others. Return (the volunteers present,
        the time at which they continue).

        The others wait for one that hangs for `merge.silence_s` at most, unless all hang. One that crashes or leaves is
        noticed at once and its work is lost, so the list may be empty.
        """
        gone = [number for number, each in work_s.items() if self.goes_within(number, now_s, each)]
        ends_s = {number: self.done_s(number, now_s, each) for number, each in work_s.items() if number not in gone}
        expected_s = max(self.pace.done_s(number, now_s, each) for number, each in work_s.items())
        late = [number for number, end_s in ends_s.items() if end_s > expected_s + self.run.merge.silence_s]
        if not ends_s:
            return [], expected_s
        if len(late) == len(ends_s):
            first = min(ends_s, key=lambda number: ends_s[number])
            return [first], ends_s[first]
        here = [number for number in ends_s if number not in late]
        met_s = max(ends_s[number] for number in here)
        return here, max(met_s, expected_s + self.run.merge.silence_s) if late else met_s


def setting_of(scenario: Scenario, text: Text) -> Setting:
    """Return the setting of a scenario; the seed and constants are in the run file of `text`."""
    links, step_s = scenario.links, scenario.step_s
    num_hostile = scenario.hostile.number(len(step_s))
    honest_s, hostile_s = step_s[: len(step_s) - num_hostile], step_s[len(step_s) - num_hostile :]
    if scenario.hostile.kind == "absent":
        hostile_s = ()
    if scenario.hostile.kind == "tokens":
        steps = text.run.merge.inner_steps
        hostile_s = tuple(each * steps / pacing.fewest_inner_steps(steps) for each in hostile_s)
    up, down = rates(links)
    least_s = text.run.run.total_tokens / text.run.tokens_per_step / sum(1 / one for one in step_s)
    churn_until_s = _MOST_LONGER * least_s if scenario.churn.stays_s else math.inf
    away = (*scenario.away, *scenario.churn.away(scenario.peers.number, text.run.run.seed, churn_until_s))
    return Setting(
        text=text,
        step_s=honest_s + hostile_s,
        pace=Pace(scenario.peers.noise, scenario.peers.noise_lasts_s, text.run.run.seed),
        up_bytes_per_s=up,
        down_bytes_per_s=down,
        own_links=_own_links(scenario),
        rtt_s=links.rtt_ms / 1000,
        jitter_s=links.jitter_ms / 1000,
        loss=links.loss_percent / 100,
        failing=links.failing_percent / 100,
        hangs=scenario.hangs,
        away=tuple(each for each in away if each.peer < len(honest_s + hostile_s)),
        churn_until_s=churn_until_s,
        hostile=scenario.hostile,
        num_hostile=len(hostile_s),
        adapter_groups=_adapter_groups(scenario, text.run, len(honest_s + hostile_s)),
        curve_points=scenario.scenario.curve_points,
    )


def _adapter_groups(scenario: Scenario, run: RunFile, num_peers: int) -> tuple[int, ...]:
    """Return how many groups of an adapter each volunteer trains in a round; empty if all train everything."""
    ranks = itertools.islice(itertools.cycle(scenario.peers.ranks), num_peers)
    return tuple(run.adapter.groups_worth(rank) for rank in ranks)


def _own_links(scenario: Scenario) -> dict[str, tuple[float, float]]:
    """Return the rates (up, down) of the volunteers whose links the trace describes."""
    told = {name: scenario.figures.get(name, {}) for name in ("up_mbit", "down_mbit")}
    links = {
        number: scenario.links.model_copy(update={name: of[number] for name, of in told.items() if number in of})
        for number in sorted({number for of in told.values() for number in of})
    }
    return {f"p{number}": rates(own) for number, own in links.items()}


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """Results of a run. Losses are in nats per byte; `own_loss` is the mean over the peers' own weights, if each has
    some."""

    held_out_loss: float
    own_loss: float | None = None
    virtual_time_s: float
    tokens: int
    inner_steps: int
    sent_bytes: int = 0
    """Bytes that all volunteers sent."""
    stall_share: float = 0.0
    """Share of the volunteers' time that they spent waiting for others or for transfers."""
    tokens_lost: int = 0
    """Tokens of volunteers that were left out of a round, crashed or left, and that no other volunteer merged."""
    fresh_share: float | None = None
    """Share of gossip rounds that merged somebody's pseudo-gradient."""
    throughput_share: float | None = None
    """Share of the possible work that was done.

    - work "systems": of the inner steps that the volunteers present could have taken;
    - work "pipeline": of the most that any assignment of stages could do.
    """
    staleness_rounds: float | None = None
    """Work "systems": mean over the rounds of the age, in rounds, of the oldest gradient merged."""
    spread: float | None = None
    """Work "systems": deviation of the volunteers' weights at the end, relative to the beginning."""
    received_bytes_a_round: float | None = None
    """Work "systems": bytes that a volunteer received in a round."""
    rounds: int | None = None
    """Work "systems": rounds of all volunteers together."""
    assignment_share: float | None = None
    """Work "pipeline": what the slowest stage could do, as the stages were held, relative to the most that any
    assignment of stages could do."""
    moves: int | None = None
    """Work "pipeline": number of moves between stages."""
    named_hostile: int | None = None
    """Number of times that a rule named a hostile volunteer."""
    named_honest: int | None = None
    """Number of times that a rule named an honest volunteer."""
    curve: tuple[CurvePoint, ...] = ()
    peer_tokens: tuple[int, ...] = ()
    """Work "learning": how many of `tokens` each volunteer trained, by its number; empty in results that were kept
    before this was counted."""


@dataclass
class Recorder:
    """Recorder of the held-out loss along the run, and of who trained how much.

    It measures at most `curve_points` times, at equal distances of tokens, at the first occasion after each.
    """

    setting: Setting
    points: list[CurvePoint] = field(default_factory=list)
    _num_seen: int = 0
    _peer_tokens: Counter[int] = field(default_factory=Counter)

    def count(self, number: int, tokens: int) -> None:
        """Count tokens that volunteer `number` trained; a negative number takes counted ones back."""
        self._peer_tokens[number] += tokens

    @property
    def peer_tokens(self) -> tuple[int, ...]:
        """Tokens that each volunteer trained, by its number."""
        return tuple(self._peer_tokens[number] for number in range(self.setting.num_peers))

    def see(self, tokens: int, now_s: float, theta: Callable[[], Tensor]) -> None:
        """Measure the held-out loss of the weights that `theta` returns, if a measurement is due. Called after some
        training."""
        number = self.setting.curve_points
        due = min(number, tokens * number // self.setting.total_tokens)
        if due > self._num_seen:
            self._num_seen = due  # a round may pass several at once: it is one point
            self.points.append((tokens, now_s, self.setting.text.held_out_loss(theta())))
