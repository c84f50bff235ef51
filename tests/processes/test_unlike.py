"""Volunteers of one swarm that compute unlike: in fp32, in bf16, one sequence at a time, and as two ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
from preloaded import Preloaded
from swarm import Child, Swarm, assert_same_states, write_run

from swarmtrain.events import DeviceEvent, DoneEvent, RefusedEvent, RoundEvent, WarningEvent, in_words
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.peer.estimate import activation_bytes, estimate
from swarmtrain.protocol.limits import exact_size
from swarmtrain.run import load_run

pytestmark = pytest.mark.processes

BATCH_SEQUENCES = 8
NUM_ROUNDS = 4
INNER_STEPS = 5
SEEDS = (1, 2, 3)
NUM_VOLUNTEERS = 4
TOTAL_TOKENS = NUM_VOLUNTEERS * 40 * 40 * BATCH_SEQUENCES * 64
"""Tokens of 40 rounds of four volunteers, 40 inner steps each: the loss then falls slowly."""
LOSSES_APART = 0.01
"""Relative difference allowed between the mean losses of unlike and of alike volunteers."""
STAGES_LEARNT = 0.9
"""Largest ratio to the loss of an untrained model, after twenty steps."""
LIMIT_S = 600.0
"""Time limit of a run that takes three minutes on two cores."""


def memory_for_one_sequence(run_file: Path) -> str:
    """Return a `--memory` that, by the estimate, has room for the activations of one sequence, and not of two."""
    run = load_run(run_file)
    cost = estimate(run, num_parameters(run.model), 2)
    one = activation_bytes(run, 1, run.model.num_layers, has_head=True)
    return exact_size(cost.memory_bytes - cost.memory_activations_bytes + 3 * one // 2)


def unlike(run_file: Path) -> dict[str, tuple[str, ...]]:
    """Return the options of each of four volunteers, by its name."""
    return {
        "full": ("--precision", "fp32"),
        "half": ("--precision", "bf16"),
        "small": ("--precision", "fp32", "--memory", memory_for_one_sequence(run_file)),
        "two": ("--precision", "fp32", "--device", "cpu,cpu"),
    }


MOST_UNLIKE = {
    "full": ("--precision", "fp32"),
    "half": ("--precision", "bf16", "--compile", "on"),
    "small": ("--precision", "fp32"),
    "two": ("--precision", "fp32", "--device", "cpu,cpu"),
}
"""Options of four volunteers that compute as unlike as a processor can; "small" by `RECOMPUTES`."""
RECOMPUTES = """
from swarmtrain.peer.devices import choice
choice.fitting_microbatch = lambda *given, **named: choice.FittingMicrobatch(1, True, "as this test has it")
"""
"""Code by which a volunteer computes one sequence at once and its blocks again. It would not do so by `--memory`: what
that imports is more than it saves with so small a model."""
ALIKE = {"anna": (), "ben": (), "carl": (), "dora": ()}


def join_all(
    swarm: Swarm,
    run_file: Path,
    options: Mapping[str, Sequence[str]],
    preludes: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Child, list[Child]]:
    """Start a bootstrap, whose run begins when all are there, and volunteers with these options, after some code."""
    bootstrap = swarm.bootstrap(run_file, "--wait-for", str(len(options)))
    invite = bootstrap.invite.invite
    return bootstrap, [
        swarm.join(name, invite, *words, prelude=preludes.get(name, "")) for name, words in options.items()
    ]


def computes_in(child: Child) -> tuple[str, str, int]:
    """Return its device, its precision and how many sequences it computes at once, as it says it."""
    (event,) = child.all(DeviceEvent)
    return event.device, event.precision, event.microbatch_sequences


def test_in_step_unlike_volunteers_hold_the_same_bits(swarm: Swarm) -> None:
    run_file = write_run(
        swarm.folder,
        run={"total_tokens": NUM_ROUNDS * NUM_VOLUNTEERS * INNER_STEPS * BATCH_SEQUENCES * 64},
        # Nobody is passed over, however slow this machine is, unless it begins a round when others are past half of it.
        merge={"inner_steps": INNER_STEPS, "silence_s": 60.0},
        evaluation={"batch_sequences": 4},  # a quarter of it is computed at once: not more than one sequence
    )
    bootstrap, children = join_all(swarm, run_file, unlike(run_file))
    for child in (*children, bootstrap):
        assert child.wait() == 0, child.story()

    assert {child.name: computes_in(child) for child in children} == {
        "full": ("cpu", "fp32", BATCH_SEQUENCES),
        "half": ("cpu", "bf16", BATCH_SEQUENCES),
        "small": ("cpu", "fp32", 1),
        "two": ("cpu,cpu", "fp32", BATCH_SEQUENCES // 2),
    }
    assert children[2].wait_event(DeviceEvent).why.endswith("as fit --memory")
    assert assert_same_states(children) >= NUM_ROUNDS
    everyone = tuple(sorted(child.id for child in children))
    rounds = [event for child in children for event in child.all(RoundEvent)]
    assert any(event.partners == everyone for event in rounds)
    whole = {(event.peer, event.round) for event in rounds if event.inner_steps == INNER_STEPS}
    assert not whole & {(peer, event.round) for event in rounds for peer in set(everyone).difference(event.partners)}
    told = [event for child in swarm.children for event in (*child.all(RefusedEvent), *child.all(WarningEvent))]
    assert not told
    models = {(child.folder / "model" / "model.safetensors").read_bytes() for child in swarm.children}
    assert len(models) == 1, "the archive too"
    swarm.assert_nothing_left()


def test_stages_in_bf16_and_in_fp32_are_trained_together(swarm: Swarm) -> None:
    run_file = write_run(
        swarm.folder,
        run={"total_tokens": 20 * BATCH_SEQUENCES * 64},
        inner={"batch_sequences": BATCH_SEQUENCES, "microbatch_sequences": 1, "learning_rate": 1e-2},
        pipeline={"stages": 2, "balance": "none"},
        # The run ends within two seconds, before anybody has told of more than the speed of its first, slow steps. What
        # two rounds count is believed at once.
        merge={"method": "gossip", "inner_steps": 10},
    )
    bootstrap = swarm.bootstrap(run_file, "--wait-for", "2")
    invite, options = bootstrap.invite.invite, [("half", "bf16"), ("full", "auto")]
    half, full = (
        swarm.join(name, invite, "--precision", precision, "--first-stages", str(stage))
        for stage, (name, precision) in enumerate(options)
    )
    for child in (half, full, bootstrap):
        assert child.wait() == 0, child.story()
    assert [computes_in(child) for child in (half, full)] == [("cpu", "bf16", 1), ("cpu", "fp32", 1)]
    assert [{event.stage for event in child.all(RoundEvent)} for child in (half, full)] == [{0}, {1}]
    loss = bootstrap.wait_event(DoneEvent).held_out_loss
    assert loss is not None and loss < STAGES_LEARNT * math.log(256)
    assert not [event for child in swarm.children for event in child.all(RefusedEvent)]


@pytest.mark.evidence
def test_by_gossip_unlike_volunteers_learn_as_alike_ones_do(tmp_path: Path, preloaded: Preloaded) -> None:
    """The held-out loss of the run's model, for three seeds."""
    losses: dict[str, list[float]] = {"alike": [], "unlike": []}
    for seed in SEEDS:
        for kind, found in losses.items():
            with Swarm(tmp_path / f"{kind}-{seed}", preloaded=preloaded) as swarm:
                run_file = write_run(
                    swarm.folder,
                    run={"seed": seed, "total_tokens": TOTAL_TOKENS},
                    merge={"method": "gossip", "inner_steps": 40, "min_peers": NUM_VOLUNTEERS},
                    evaluation={"batch_sequences": 4},
                )
                options = ALIKE if kind == "alike" else MOST_UNLIKE
                bootstrap, children = join_all(swarm, run_file, options, {"small": RECOMPUTES})
                for child in (*children, bootstrap):
                    assert child.wait(LIMIT_S) == 0, child.story()
                loss = bootstrap.wait_event(DoneEvent).held_out_loss
                assert loss is not None
                found.append(loss)
                own = {child.name: child.wait_event(DoneEvent) for child in children}
                told = {name: f"{event.tokens} tokens, own loss {event.own_loss}" for name, event in own.items()}
                print(f"seed {seed}, {kind}: loss {loss:.4f}; {told}")
                print({child.name: [in_words(event) for event in child.all(DeviceEvent)] for child in children})
    ratios = [unlike / alike for unlike, alike in zip(losses["unlike"], losses["alike"], strict=True)]
    ratio = statistics.mean(losses["unlike"]) / statistics.mean(losses["alike"])
    print(f"unlike over alike: {ratio:.4f} of the means; by seed {', '.join(f'{each:.4f}' for each in ratios)}")
    assert abs(ratio - 1) <= LOSSES_APART
