"""What one hostile peer of eight costs the others, by what it does and by the rule that meets it, in virtual time.

    python benchmarks/hostile.py examples/stdlib-gpt.toml --set run.total_tokens=1_433_600 --seeds 0,1,2

Seven honest volunteers of equal speed and a hostile one merge by gossip from a cold start, with the functions a real
volunteer uses (`swarmtrain/simulate/learning`). `run.total_tokens` are those of the seven; what the eighth claims does
not count, so that in every run each honest volunteer takes as many inner steps, on the same batches, by the same
schedule. What is measured is the held-out loss of the honest seven's consensus. It is compared with that of the same
seven without an eighth, same seed: with the same rule (what the attack costs), and with the rule "none" (what attack
and rule cost together). A swarm of eight honest ones is no baseline: the hostile one's work is gone whatever a rule
does.

The hostile volunteer trains and merges as the others do, so that what it publishes is as good as theirs before it is
spoilt. Attacks:

- flip: its pseudo-gradient with the sign turned, at the usual size; flip3: three times as large;
- x10, x1000: its pseudo-gradient times that;
- noise: random numbers in place of its pseudo-gradient, tensor by tensor of the same norm;
- drag: an honest pseudo-gradient, and weights three of it back on the way: what passes, by one who knows the rules;
- huge: every number 1e30; nan: not a number, which costs it its place when it is decoded;
- tokens: a slow peer's few inner steps, claimed to be a whole round's tokens, the most that is not refused;
- speed: it claims a speed of a billion steps a second.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cold_start import read_run
from torch import Tensor

from swarmtrain.algorithm.gossip import variance_corrected_mean
from swarmtrain.algorithm.pacing import fewest_inner_steps, paced_inner_steps, reference_speed, steps_of_everybody
from swarmtrain.algorithm.robust import Incident
from swarmtrain.membership.partners import Mark
from swarmtrain.membership.pulls import Section
from swarmtrain.simulate.learning.gossip import Peer, Published, World
from swarmtrain.simulate.learning.learner import Text
from swarmtrain.simulate.learning.setting import Setting

NUM_HONEST = 7
HOSTILE = NUM_HONEST
STEP_S = 0.02
HONEST = "honest"
ATTACKS = ("flip", "flip3", "x10", "x1000", "noise", "drag", "huge", "nan", "tokens", "speed")
RULES = ("none", "clip", "direction", "trimmed", "flag")


@dataclass(frozen=True, kw_only=True)
class Swarm(Setting):
    """Seven honest volunteers, and one that does `attack`; `HONEST`: none."""

    attack: str

    def speed(self, number: int) -> float:
        """What a volunteer says that it does, in steps per second."""
        return 1e9 if number == HOSTILE and self.attack == "speed" else 1 / self.step_s[number]

    def steps_of_round(self, number: int) -> int:
        """H_i, by what the others claim."""
        speeds = [1 / step_s if n == number else self.speed(n) for n, step_s in enumerate(self.step_s)]
        return paced_inner_steps(speeds[number], reference_speed(speeds), self.run.merge.inner_steps)

    def steps_of_everybody(self, number: int) -> float:
        """As a volunteer reckons it, of those whose tokens count here, and of one that lies about it."""
        counted = range(NUM_HONEST + (self.attack == "speed"))
        others = [self.speed(other) for other in counted if other != number]
        return steps_of_everybody(1 / self.step_s[number], others)


class Hostile(Peer):
    """Trains and merges as the others do, and publishes something else."""

    gradient: Tensor | None = None
    """Its own of the round before."""

    def begin(self) -> None:
        """See `Peer`."""
        super().begin()
        assert self.weights is not None
        self.weights = Published(self.weights.mark, self.spoilt_weights(self.weights.vector))

    def train_to(self, moment: int) -> None:
        """See `Peer`. What it trains does not count."""
        before = self.world.tokens
        super().train_to(moment)
        self.world.tokens = before
        assert self.newest is not None
        self.gradient = self.newest.vector
        self.newest = self.spoilt(self.newest)

    def serve(self, section: Section, published: Published) -> None:
        """See `Peer`; a hostile peer makes bytes that no encoder makes."""
        if bool(torch.isfinite(published.vector).all()):
            super().serve(section, published)
        else:
            published.sent = published.vector

    @property
    def attack(self) -> str:
        """What it does."""
        assert isinstance(self.world.setting, Swarm)
        return self.world.setting.attack

    def spoilt_weights(self, theta: Tensor) -> Tensor:
        """What it publishes in place of its weights."""
        if self.attack == "huge":
            return torch.full_like(theta, 1e30)
        return theta + 3 * self.gradient if self.attack == "drag" and self.gradient is not None else theta

    def spoilt(self, honest: Published) -> Published:
        """What it publishes in place of its gradient."""
        g, mark, run = honest.vector, honest.mark, self.world.setting.run
        most = run.merge.inner_steps * run.tokens_per_step
        made = {
            "flip": lambda: Published(mark, -g),
            "flip3": lambda: Published(mark, -3 * g),
            "x10": lambda: Published(mark, 10 * g),
            "x1000": lambda: Published(mark, 1000 * g),
            "noise": lambda: Published(mark, self.noise(g)),
            "huge": lambda: Published(mark, torch.full_like(g, 1e30)),
            "nan": lambda: Published(mark, torch.full_like(g, math.nan)),
            "tokens": lambda: Published(Mark(mark.round, mark.part, most - self.start.num_parts + mark.part), g),
        }
        return made.get(self.attack, lambda: honest)()

    def noise(self, like: Tensor) -> Tensor:
        """Random numbers of the same norm in each tensor."""
        generator = torch.Generator().manual_seed(1000 * self.round + self.start.part_after(self.done))
        made = torch.randn(like.shape, generator=generator)
        for place in self.world.layout.slices:
            made[place] *= like[place].norm() / made[place].norm()
        return made


@dataclass
class HostileWorld(World):
    """Counts what was named: of the hostile peer by rule, of honest ones under "honest"."""

    named: Counter[str] = field(default_factory=Counter)

    def peer(self, number: int) -> Peer:
        """See `World`."""
        return Hostile(self, number) if number == HOSTILE else Peer(self, number)

    def told(self, peer: str, incident: Incident) -> None:
        """See `World`."""
        self.named[incident.rule if peer == f"p{HOSTILE}" else HONEST] += 1


def trained(setting: Swarm) -> tuple[float, Counter[str]]:
    """The held-out loss of the honest peers' consensus, in nats per byte, and who was named how often."""
    world = HostileWorld(setting)
    round_s = setting.run.merge.inner_steps * STEP_S
    for number, peer in enumerate(world.peers):  # their rounds end one after the other, not all at one moment
        world.clock.call_at(number * round_s / (NUM_HONEST + 1), peer.begin)
    while world.clock.step():
        pass
    honest = world.peers[:NUM_HONEST]
    theta = variance_corrected_mean([peer.trainer.state.theta for peer in honest], world.layout).mean
    if not bool(torch.isfinite(theta).all()):
        return math.inf, world.named
    return setting.text.held_out_loss(theta), world.named


# ---------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the run file")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help=f"comma-separated; default {','.join(ATTACKS)}")
    parser.add_argument("--rules", default=",".join(RULES), help=f"comma-separated; default {','.join(RULES)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    attacks, rules = [HONEST, *options.attacks.split(",")], options.rules.split(",")
    losses: dict[tuple[str, str], list[float]] = {}
    for seed in map(int, options.seeds.split(",")):
        for attack in attacks:
            for rule in dict.fromkeys(["none", *rules]) if attack == HONEST else rules:
                loss, named = trained(_swarm(options.run_file, options.set, seed, attack, rule))
                losses.setdefault((attack, rule), []).append(loss)
                named_in_words = ", ".join(f"{rule} {number}" for rule, number in sorted(named.items())) or "nobody"
                print(f"seed {seed}  {attack:6}  {rule:9}  {loss:.4f} nats/byte  named: {named_in_words}", flush=True)
    show(losses)


def _swarm(run_file: Path, changes: list[str], seed: int, attack: str, rule: str) -> Swarm:
    given = [*changes, 'merge.method="gossip"', "merge.pacing=false", f'merge.robust="{rule}"']
    run = read_run(run_file, given, seed)
    full = run.merge.inner_steps
    slower = full / fewest_inner_steps(full) if attack == "tokens" else 1.0
    return Swarm(
        text=Text.of(run, run_file.parent),
        step_s=(STEP_S,) * NUM_HONEST + (STEP_S * slower,) * (attack != HONEST),
        attack=attack,
    )


def show(losses: dict[tuple[str, str], list[float]]) -> None:
    """Each attack under each rule against the same seven alone: means over the seeds of ratios within seeds."""
    print("\nattack  rule      nats/byte  to the seven alone, same rule   to them with no rule")
    for (attack, rule), each in losses.items():
        with_rule, without = _ratio(each, losses[HONEST, rule]), _ratio(each, losses[HONEST, "none"])
        print(f"{attack:6}  {rule:9}  {statistics.mean(each):9.4f}  {with_rule:29}  {without}")


def _ratio(losses: list[float], reference: list[float]) -> str:
    """Mean and standard error of the ratios."""
    ratios = [one / other for one, other in zip(losses, reference, strict=True)]
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    return f"{statistics.mean(ratios):.4f} +- {error:.4f}"


if __name__ == "__main__":
    main()
