"""Volunteers of unlike speed that make one large batch after the other compute what one process computes.

The reference takes from the processes only what was decided: how many batches each computed for a step, of how many
sequences, and who was on the roster. One goes by the product's own arithmetic and must have the same bits after every
step; the other is one loss over all of a step's sequences and torch.optim.AdamW.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pytest
import torch
from replay import RecordedText, text_of
from swarm import Child, Swarm, assert_same_states, write_run
from torch import Tensor, nn

from swarmtrain.algorithm.common_step import CommonOptimizer, CommonStep
from swarmtrain.algorithm.gradient_sum import GradientSum
from swarmtrain.algorithm.inner import learning_rate_at
from swarmtrain.algorithm.outer import OuterState, flatten, unflatten_into, weighted_mean
from swarmtrain.algorithm.quantize import FedBackSum, decode_pieces
from swarmtrain.data.batches import Batches
from swarmtrain.events import CaughtUpEvent, RoundEvent
from swarmtrain.model.export import load_exported
from swarmtrain.model.gpt import build_model
from swarmtrain.peer.training.loop import inner_constants

pytestmark = [pytest.mark.processes, pytest.mark.long]

TOLERANCE = 1e-6
TARGET_TOKENS = 16 * 8 * 64
NUM_STEPS = 18


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread, as the processes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches_of(source: Batches, event: RoundEvent, context: int) -> list[Tensor]:
    """Return the batches that a volunteer computed for a step: all with as many sequences."""
    sequences = event.tokens // (event.inner_steps * context)
    assert sequences * event.inner_steps * context == event.tokens
    return [source.next_batch()[:sequences] for _ in range(event.inner_steps)]


def replayed(
    text: RecordedText, steps: Sequence[dict[str, RoundEvent]], drawn: dict[str, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights (P,) after each step, by the product's arithmetic and by that of one process.

    `drawn` has the batches that a volunteer had computed before its first of these steps.
    """
    run, constants = text.run, inner_constants(text.run)
    model, alone = (build_model(run.model, run.run.seed) for _ in "01")
    optimizer = CommonOptimizer([tuple(each.shape) for each in model.parameters()], constants)
    decayed = [each for each in alone.parameters() if each.dim() >= 2]
    others = [each for each in alone.parameters() if each.dim() < 2]
    torchs = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": constants.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(constants.beta1, constants.beta2),
    )
    sources = {peer: text.batches(number) for number, peer in enumerate(text.peers)}
    for peer, number in drawn.items():
        for _ in range(number):
            sources[peer].next_batch()
    encoders = {peer: FedBackSum(run.merge.roster_format) for peer in text.peers}
    theta = flatten(model.parameters())
    state, tokens = OuterState(theta, torch.zeros(2 * len(theta))), 0
    by_product, by_one = list[Tensor](), list[Tensor]()
    for number, events in enumerate(steps):
        unflatten_into(state.theta, model.parameters())
        (roster,) = {(event.partners, event.weights) for event in events.values()}
        means, counted = dict[str, Tensor](), list[Tensor]()
        for peer, event in events.items():
            source = sources[peer]
            assert isinstance(source, Batches)
            summed = GradientSum(model.named_parameters(), constants)
            computed = batches_of(source, event, run.model.context_tokens)
            for batch in computed:
                model.loss(batch).backward()  # type: ignore[no-untyped-call]
                summed.targets = event.tokens // event.inner_steps
                summed.step(0.0)
            means[peer], _ = summed.take_mean()
            if run.merge.roster_format != "fp32":
                pieces, has_counted = encoders[peer].encode(means[peer], event.tokens)
                means[peer] = torch.cat([decode_pieces(piece, run.merge.roster_format) for piece in pieces])
                if peer in roster[0]:
                    has_counted()
            counted += computed if peer in roster[0] else []
        mean = weighted_mean([means[peer] for peer in roster[0]], roster[1])
        progress = tokens / run.run.total_tokens
        state = optimizer.step(state, mean, CommonStep(number + 1, progress))
        by_product.append(state.theta)

        alone.loss(torch.cat(counted)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(alone.parameters(), constants.gradient_clip)
        for group in torchs.param_groups:
            group["lr"] = learning_rate_at(constants, progress)
        torchs.step()
        torchs.zero_grad()
        by_one.append(flatten(alone.parameters()))
        tokens += sum(roster[1])
    return by_product, by_one


def story(child: Child) -> str:
    """Describe a volunteer's rounds, for a failed assertion."""
    rounds = [
        f"{event.round}: {event.inner_steps} steps, {event.tokens} tokens, {event.seconds:.1f} s, "
        f"merged in {event.merge_s:.1f} s, roster of {len(event.partners)}, itself {child.id in event.partners}"
        for event in child.rounds().values()
    ]
    return "\n  ".join([child.name, *rounds])


def sha256(weights: Tensor) -> str:
    """Return the hash that volunteers tell of their weights."""
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()


def exported(child: Child) -> Tensor:
    """Return the weights (P,) that a volunteer left in its folder."""
    return flatten(load_exported(child.folder / "model").model.parameters())


@pytest.mark.parametrize("format", ["fp32", pytest.param("int8", marks=pytest.mark.evidence)])
def test_a_late_one_and_a_killed_one_leave_the_weights_of_one_process(
    swarm: Swarm, one_thread: None, format: str
) -> None:
    run_file = write_run(
        swarm.folder,
        run={"total_tokens": NUM_STEPS * TARGET_TOKENS},
        # The first moments' signs alone make AdamW's first steps: without a warm-up they multiply what was rounded.
        inner={"warmup_fraction": 0.3},
        merge={
            "method": "batch",
            "inner_steps": 16,
            "target_tokens": TARGET_TOKENS,
            "max_wait_s": 3.0,
            "gradient_format": format,
            "outer_momentum": 0.8,
        },
        network={"presence_ttl_s": 6.0},
    )
    bootstrap = swarm.bootstrap(run_file, "--wait-for", "2")
    invite = bootstrap.invite.invite
    quick, slow = swarm.join("quick", invite, "--slowdown", "3"), swarm.join("slow", invite, "--slowdown", "8")
    quick.wait_round(1)
    late = swarm.join("late", invite, "--slowdown", "5")
    late.wait_event(RoundEvent, lambda event: len(event.partners) == 3)
    slow.kill()
    for child in (quick, late, bootstrap):
        assert child.wait() == 0, child.story()
    assert not quick.all(CaughtUpEvent)
    first = late.rounds()[min(late.rounds())]
    assert all(event.time < first.time for event in late.all(CaughtUpEvent)), "it was late for its first step at most"

    children = [quick, slow, late]
    assert assert_same_states(children) >= 8
    numbers = sorted(quick.rounds())
    assert numbers == list(range(len(numbers)))
    steps = [{child.id: child.rounds()[n] for child in children if n in child.rounds()} for n in numbers]
    partners = [set(next(iter(events.values())).partners) for events in steps]
    counted = [sum(next(iter(events.values())).weights) for events in steps]
    print("tokens of each step:", counted, "peers:", [len(each) for each in partners])
    assert any(len(each) == 3 for each in partners), "\n".join(map(story, children))
    assert slow.id in partners[0] and slow.id not in partners[-1] and late.id in partners[-1]
    last = slow.rounds()[max(slow.rounds())]
    others = next(iter(steps[last.round + 1].values()))
    if slow.id in others.partners:  # killed between its publication and its event
        tokens = others.weights[others.partners.index(slow.id)]
        inner_steps = tokens * last.inner_steps // last.tokens
        told = {"tokens": tokens, "inner_steps": inner_steps, "state_sha256": others.state_sha256}
        steps[last.round + 1][slow.id] = others.model_copy(update=told)
    text = text_of(quick.folder, swarm.folder, sorted(child.id for child in children))
    # Of a gradient that did not count at all no event says how many batches it had.
    number = next(number for number, events in enumerate(steps) if late.id in events)
    state = steps[number][quick.id].state_sha256
    tries = range(40) if late.all(CaughtUpEvent) else range(1)
    drawn = next(each for each in tries if sha256(replayed(text, steps[: number + 1], {late.id: each})[0][-1]) == state)
    by_product, by_one = replayed(text, steps, {late.id: drawn})
    for number, (ours, ones) in enumerate(zip(by_product, by_one, strict=True)):
        told = {event.state_sha256 for event in steps[number].values()}
        assert told == {sha256(ours)}, f"step {number}"
        if format == "fp32":
            assert float((ours - ones).abs().max()) <= TOLERANCE, f"step {number}"
    assert torch.equal(exported(quick), by_product[-1]) and torch.equal(exported(late), by_product[-1])
    assert torch.equal(exported(bootstrap), by_product[-1]), "the archive too"
    differences = [float((ours - ones).abs().max()) for ours, ones in zip(by_product, by_one, strict=True)]
    print("largest difference to one process:", max(differences))
    swarm.assert_nothing_left()
