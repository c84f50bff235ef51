"""What a simulated run is made of, and what comes of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from swarmtrain.algorithm import pacing
from swarmtrain.algorithm.outer import OuterConstants, momentum_at
from swarmtrain.network.links.impairments import Lateness
from swarmtrain.run import RunFile
from swarmtrain.simulate.learning.learner import Learner, Text
from swarmtrain.simulate.learning.pace import Pace
from swarmtrain.simulate.links import rates
from swarmtrain.simulate.scenario import Away, Hang, HostileSection, Scenario

__all__ = ["GROUP", "CurvePoint", "Recorder", "RunOutcome", "Setting", "setting_of"]

GROUP = 4
"""So many volunteers are in a sample of MoDeST and so many updates in a buffer of FedBuff, or as many as there are."""
_MOST_OWN = 8
_SAID_SPEED = 1e9
_EVEN = Pace()
_MOST_LONGER = 30
"""Who comes and goes by chance is drawn for so many times as long as a run takes in which nobody waits or goes."""

CurvePoint = tuple[int, float, float]
"""(tokens of the whole run, virtual seconds, held-out loss in nats per byte)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run with its peers and links: seconds of an inner step of each volunteer, and what the wire takes."""

    text: Text
    step_s: tuple[float, ...]
    pace: Pace = field(default_factory=Pace)
    """How these differ from time to time."""
    up_bytes_per_s: float = float("inf")
    down_bytes_per_s: float = float("inf")
    """Of everybody that has no other,"""
    own_links: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """and these, up and down, of volunteers that do, by name."""
    rtt_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    """Of packets, each way."""
    failing: float = 0.0
    """The share of pulls that bring nothing."""
    hangs: tuple[Hang, ...] = ()
    away: tuple[Away, ...] = ()
    """None of one volunteer overlap."""
    churn_until_s: float = math.inf
    """Until then it is known who comes and goes by chance."""
    hostile: HostileSection = field(default_factory=HostileSection)
    num_hostile: int = 0
    """The last ones."""
    warm: Tensor | None = None
    """All begin with these weights, (P,), and not with random ones."""
    corrected: bool = True
    """With the variance correction."""
    curve_points: int = 0

    @property
    def run(self) -> RunFile:
        """The run file."""
        return self.text.run

    @property
    def own_weights(self) -> bool:
        """Whether each begins with random weights of its own."""
        return self.run.merge.init == "own"

    @property
    def total_tokens(self) -> int:
        """At which the run ends."""
        return self.run.run.total_tokens

    @property
    def num_peers(self) -> int:
        """How many volunteers there are."""
        return len(self.step_s)

    @property
    def num_honest(self) -> int:
        """How many of them do as they say: the first ones."""
        return self.num_peers - self.num_hostile

    @property
    def bytes_per_s(self) -> float:
        """From one to another, on the slowest of the volunteers' links."""
        if not self.own_links:
            return min(self.up_bytes_per_s, self.down_bytes_per_s)
        return min(rate for number in range(self.num_peers) for rate in self.link_of(f"p{number}"))

    def link_of(self, name: str) -> tuple[float, float]:
        """Bytes per second up and down, of a volunteer or a server."""
        return self.own_links.get(name, (self.up_bytes_per_s, self.down_bytes_per_s))

    def learner(self, number: int) -> Learner:
        """A new volunteer."""
        seed = 1000 * (1 + self.run.run.seed) + number if self.own_weights else None
        return Learner(self.text, number, seed, self.warm)

    def own_loss(self, thetas: Sequence[Tensor]) -> float:
        """The mean held-out loss of peers' own weights, each (P,): of the first `_MOST_OWN` of them."""
        losses = [self.text.held_out_loss(theta) for theta in thetas[:_MOST_OWN]]
        return sum(losses) / len(losses)

    def constants(self, round: int) -> OuterConstants:
        """Of the outer step."""
        section = self.run.merge
        momentum = momentum_at(round, section.outer_momentum, section.momentum_ramp_rounds)
        return OuterConstants(learning_rate=section.outer_learning_rate, momentum=momentum)

    @property
    def speeds(self) -> list[float]:
        """Everybody's own, in inner steps per second."""
        return [1 / each for each in self.step_s]

    def steps_of_round(
        self, number: int, others_end_in_s: Sequence[float | None] = (), speeds: Sequence[float] | None = None
    ) -> int:
        """H_i, of all `speeds` as measured; in step with the others, in the order of their numbers, of whom it is known
        in how many seconds their rounds end."""
        section, speeds = self.run.merge, speeds or self.speeds
        return pacing.round_inner_steps(
            speeds[number],
            self._said_by_others(number, speeds),
            section.inner_steps,
            paced=section.pacing,
            limit_s=section.round_limit_s,
            others_end_in_s=others_end_in_s,
        )

    def steps_of_everybody(self, number: int, speeds: Sequence[float] | None = None) -> float:
        """Inner steps that all take together while volunteer `number` takes one: how fast the schedule advances, as it
        reckons that."""
        speeds = speeds or self.speeds
        return pacing.steps_of_everybody(speeds[number], self._said_by_others(number, speeds[: self.num_counted]))

    @property
    def num_counted(self) -> int:
        """By how many it is reckoned how fast the schedule advances, the first ones: those whose tokens count, and
        those who lie about their speed."""
        return self.num_peers if self.hostile.kind == "speed" else self.num_honest

    def said_speed(self, number: int, speed: float) -> float:
        """What volunteer `number` says that it does, in inner steps per second."""
        lies = number >= self.num_honest and self.hostile.kind == "speed"
        return _SAID_SPEED if lies else speed

    def _said_by_others(self, number: int, speeds: Sequence[float]) -> list[float]:
        """Of those with these speeds, the first ones, what others than volunteer `number` say."""
        return [self.said_speed(other, speed) for other, speed in enumerate(speeds) if other != number]

    def all_reduce_s(self, num_peers: int, size_bytes: int, rng: random.Random) -> float:
        """Of a mean over so many: shares of everybody's to their hosts, then the means back; all wait for the last."""
        sent_bytes = (num_peers - 1) * size_bytes // num_peers
        takes_s = self.rtt_s + sent_bytes / self.bytes_per_s
        late_s = [max(self.lost_s(rng) + self.late_s(sent_bytes, rng) for _ in range(num_peers)) for _ in "01"]
        return 2 * takes_s + sum(late_s)

    def lost_s(self, rng: random.Random) -> float:
        """What a transfer loses by breaking off midway, as often as it does: to ask for the rest."""
        lost_s = 0.0
        while self.failing and rng.random() < self.failing:
            lost_s += self.rtt_s
        return lost_s

    def late_s(self, size_bytes: int, rng: random.Random) -> float:
        """By how much a transfer's end is late: its pieces are, one by one, and those behind wait, as in TCP."""
        lateness = Lateness(jitter_s=self.jitter_s, loss=self.loss, rtt_s=self.rtt_s, rng=rng)
        return lateness.of_transfer(size_bytes, self.bytes_per_s)

    def done_s(self, number: int, since_s: float, work_s: float) -> float:
        """When volunteer `number` has done what takes it so long at its own speed, from `since_s` on: it does nothing
        while it hangs."""
        return self._over_s(number, since_s, work_s, self.pace)

    def takes_s(self, number: int, since_s: float, steps: int) -> float:
        """How long volunteer `number` works for so many inner steps, from `since_s` on."""
        work_s = steps * self.step_s[number]
        return self.pace.done_s(number, since_s, work_s) - since_s if self.pace.deviation else work_s

    def due_s(self, number: int, since_s: float, wait_s: float) -> float:
        """When it does what it would do in so long, if it did not hang meanwhile."""
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
        """Whether that volunteer stands still now."""
        return any(hang.is_on(number, now_s) for hang in self.hangs)

    def is_away(self, number: int, now_s: float) -> bool:
        """Whether that volunteer is not there now."""
        return any(each.is_on(number, now_s) for each in self.away)

    def is_gone(self, number: int, now_s: float) -> bool:
        """Whether its presence has lapsed since it hangs."""
        lapsed_s = now_s - self.run.network.presence_ttl_s
        return any(hang.is_on(number, now_s) and hang.at_s <= lapsed_s for hang in self.hangs)

    def is_stuck(self, number: int, now_s: float) -> bool:
        """Whether that volunteer hangs, and will have been given up before it goes on."""
        return any(hang.is_on(number, now_s) and hang.for_s > self.run.network.presence_ttl_s for hang in self.hangs)

    def awake_s(self, number: int, since_s: float, until_s: float) -> float:
        """How long volunteer `number` does not hang in that time."""
        return self._spent_s(number, since_s, until_s, _EVEN)

    def steps_between(self, number: int, since_s: float, until_s: float) -> int:
        """Inner steps that volunteer `number` takes in that time: until it goes, and none while it hangs."""
        goes_s = (each.at_s for each in self.away if each.peer == number and each.at_s > since_s)
        worked_s = self._spent_s(number, since_s, min(until_s, *goes_s, math.inf), self.pace)
        return math.floor(worked_s / self.step_s[number] + 1e-9)

    def _spent_s(self, number: int, since_s: float, until_s: float, pace: Pace) -> float:
        hung_s = (
            pace.worked_s(number, max(since_s, hang.at_s), min(until_s, hang.at_s + hang.for_s))
            for hang in self.hangs
            if hang.peer == number
        )
        return max(0.0, pace.worked_s(number, since_s, until_s) - sum(hung_s))

    def speaks_again_s(self, now_s: float) -> float:
        """When the first of those that are silent now is not any more."""
        silences = [each for each in (*self.hangs, *self.away) if each.is_on(each.peer, now_s)]
        return min((each.at_s + each.for_s for each in silences), default=now_s)

    def goes_within(self, number: int, now_s: float, work_s: float) -> bool:
        """Whether that volunteer crashes or leaves before it has worked so long."""
        end_s = self.done_s(number, now_s, work_s)
        return any(each.peer == number and now_s < each.at_s < end_s for each in self.away)

    def meets(self, now_s: float, work_s: Mapping[int, float]) -> tuple[list[int], float]:
        """Those that work so long each from now on and then wait for each other: who is there when they go on, and when
        that is. Who hangs is waited for no longer than `merge.silence_s`, unless all do; who crashes or leaves is
        missed as soon as that, and its work is lost: nobody may be left."""
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
    """A run of a scenario; its seed and constants are in the run file of `text`."""
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
        curve_points=scenario.scenario.curve_points,
    )


def _own_links(scenario: Scenario) -> dict[str, tuple[float, float]]:
    """Up and down, of the volunteers whose trace says some."""
    told = {name: scenario.figures.get(name, {}) for name in ("up_mbit", "down_mbit")}
    links = {
        number: scenario.links.model_copy(update={name: of[number] for name, of in told.items() if number in of})
        for number in sorted({number for of in told.values() for number in of})
    }
    return {f"p{number}": rates(own) for number, own in links.items()}


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """What came of a run. Losses in nats per byte; `own_loss` is the mean of the peers' own weights, where each has
    some."""

    held_out_loss: float
    own_loss: float | None = None
    virtual_time_s: float
    tokens: int
    inner_steps: int
    sent_bytes: int = 0
    """By all."""
    stall_share: float = 0.0
    """Of the volunteers' time: waiting for others or for the wire."""
    tokens_lost: int = 0
    """Trained by those who were passed over, crashed or left, and not merged."""
    fresh_share: float | None = None
    """Of the rounds of gossip: those that merged somebody's pseudo-gradient."""
    throughput_share: float | None = None
    """Of systems work: of the inner steps that those who were there could have taken,"""
    staleness_rounds: float | None = None
    """how old the oldest merged gradient of a round was, in the mean,"""
    spread: float | None = None
    """how far apart the weights still are, of what they were at first,"""
    received_bytes_a_round: float | None = None
    """what a volunteer received in a round,"""
    rounds: int | None = None
    """and how many rounds all had together."""
    assignment_share: float | None = None
    """Of pipeline work, where `throughput_share` is of the most that any holding of stages could do: what the slowest
    stage could have done as they were held,"""
    moves: int | None = None
    """and how often somebody moved."""
    named_hostile: int | None = None
    """How often a rule named a hostile volunteer,"""
    named_honest: int | None = None
    """and an honest one."""
    curve: tuple[CurvePoint, ...] = ()


@dataclass
class Recorder:
    """Measures the held-out loss on the way, `curve_points` times at most, at equal distances of tokens: at the first
    occasion after each."""

    setting: Setting
    points: list[CurvePoint] = field(default_factory=list)
    _num_seen: int = 0

    def see(self, tokens: int, now_s: float, theta: Callable[[], Tensor]) -> None:
        """After some training; `theta` gives the weights to measure, if it is time."""
        number = self.setting.curve_points
        due = min(number, tokens * number // self.setting.total_tokens)
        if due > self._num_seen:
            self._num_seen = due  # a round may pass several at once: it is one point
            self.points.append((tokens, now_s, self.setting.text.held_out_loss(theta())))
