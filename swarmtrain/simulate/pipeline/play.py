"""A pipeline through hours of virtual time: machines come, go and hang as a scenario says, and microbatches pass.

Nobody learns; stages, moves, queues and throughput follow from the decisions of real peers. Measurements begin after
`WARM_UP_S`, by when all have taken their stages.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from swarmtrain.errors import UserError
from swarmtrain.peer.estimate import activation_wire_bytes
from swarmtrain.protocol.pipeline.router import Router
from swarmtrain.run import RunFile
from swarmtrain.simulate.learning.setting import RunOutcome
from swarmtrain.simulate.links import rates
from swarmtrain.simulate.pipeline.settings import PipelineMachine
from swarmtrain.simulate.pipeline.world import PipelineWorld, place, settings_of, stage_bytes
from swarmtrain.simulate.scenario import Scenario
from swarmtrain.words import counted

WARM_UP_S = 600.0


def check(scenario: Scenario, run: RunFile) -> None:
    """Raise UserError if the scenario cannot be played."""
    stages, number = run.pipeline.stages, scenario.peers.number
    if stages < 2:
        raise UserError(
            'pipeline.stages: 1, but scenario.work = "pipeline" needs a model cut into stages; set it to 2 or more, as '
            "in examples/pipeline.toml",
            code="keys-disagree",
        )
    if number < stages:
        raise UserError(
            f"peers.number: {counted(number, 'volunteer')} cannot hold {stages} stages (pipeline.stages); "
            f"allowed: {stages} or more",
            code="too-few-peers",
        )


def play_pipeline(scenario: Scenario, run: RunFile) -> RunOutcome:
    """Play the scenario's machines with the run file's stages, and return the throughput."""
    world = lived(scenario, run)
    lasts_s = scenario.scenario.lasts_s
    tokens = round(world.tokens_per_s * lasts_s)
    microbatches = tokens / world.settings.microbatch_tokens
    activations = 2 * (run.pipeline.stages - 1) * activation_wire_bytes(run) * microbatches
    return RunOutcome(
        held_out_loss=math.nan,
        virtual_time_s=lasts_s,
        tokens=tokens,
        inner_steps=tokens // run.tokens_per_step,
        sent_bytes=round(activations),
        throughput_share=world.share,
        assignment_share=world.share_of_assignment,
        moves=world.num_moves,
    )


def lived(scenario: Scenario, run: RunFile) -> PipelineWorld:
    """Play the whole scenario and return the world.

    SWARM's own rule gets the choice of peers that does better with queues, which are what it looks at.
    """
    settings, seed, lasts_s = settings_of(run, scenario.links), run.run.seed, scenario.scenario.lasts_s
    if settings.balance == "queues":
        settings = replace(settings, router=partial(Router, variant="least-completion"))
    world = PipelineWorld(settings, seed=seed)
    machines = _machines(scenario, run, random.Random(f"pipeline {seed}"))
    _befall(world, machines, scenario, WARM_UP_S + lasts_s, seed)
    world.run_until(WARM_UP_S)
    world.measure_from_here()
    world.run_until(WARM_UP_S + lasts_s)
    return world


def _machines(scenario: Scenario, run: RunFile, rng: random.Random) -> list[PipelineMachine]:
    """Draw the machines: speeds and rates are lognormal around the scenario's; names are random."""
    peers, links, state_bytes = scenario.peers, scenario.links, stage_bytes(run)
    downs = scenario.figures.get("down_mbit", {})
    machines = []
    for number, step_s in enumerate(scenario.step_s):
        own = links.model_copy(update={"down_mbit": downs.get(number, links.down_mbit)})
        speed = run.tokens_per_step / step_s * rng.lognormvariate(0.0, peers.spread)
        down = rates(own)[1] * rng.lognormvariate(0.0, links.spread)
        name, fetch_s = f"p{rng.getrandbits(48):012x}", state_bytes / down
        machines.append(PipelineMachine(name=name, tokens_per_s=speed, fetch_s=fetch_s, most_stages=peers.most_stages))
    return machines


def _befall(
    world: PipelineWorld, machines: Sequence[PipelineMachine], scenario: Scenario, until_s: float, seed: int
) -> None:
    """Schedule the arrivals, departures and hangs of these machines, as the scenario says.

    Those present at first serve at once, placed one after the other. One that crashes breaks its connections, or in
    half of the cases falls silent.
    """
    churn, rng = scenario.churn, random.Random(f"lives {seed}")
    away = [*scenario.away, *churn.away(len(machines), seed, until_s)]
    late = {each.peer for each in away if each.at_s == 0}
    for number, machine in enumerate(machines):
        if number not in late:
            world.join(machine, place(world, machine))
    for each in sorted(away, key=lambda one: (one.at_s, one.peer)):
        machine, crashes, silent = machines[each.peer], rng.random() < churn.crash_share, rng.random() < 0.5
        if each.at_s > 0:
            how = partial(world.kill, silent=silent) if crashes else world.leave
            world.clock.call_at(each.at_s, how, machine.name)
        if each.at_s + each.for_s < until_s:
            world.clock.call_at(each.at_s + each.for_s, world.join, machine)
    for hang in [*scenario.hangs, *churn.hangs(len(machines), seed, until_s)]:
        name = machines[hang.peer].name
        world.clock.call_at(hang.at_s, world.freeze, name)
        world.clock.call_at(hang.at_s + hang.for_s, world.thaw, name)
