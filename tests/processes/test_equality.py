"""Three real processes compute what one process computes that follows the same schedule, and what the simulator does.

The reference takes from the processes only what was decided (who took how many inner steps, who was on which roster)
and what names them (PeerIDs, the run's bytes). Averaging and the outer step are plain torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from replay import RecordedText, text_of
from swarm import Child, Swarm, assert_same_states, write_run
from torch import Tensor, nn

from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer
from swarmtrain.algorithm.outer import OuterState, flatten
from swarmtrain.data.batches import Batches
from swarmtrain.events import CaughtUpEvent, DoneEvent, EvalEvent, RoundEvent
from swarmtrain.model.export import load_exported
from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.run import RunFile
from swarmtrain.simulate.learning.setting import Setting
from swarmtrain.simulate.learning.synchronous import diloco_round

pytestmark = [pytest.mark.processes, pytest.mark.long]

TOLERANCE = 1e-5
NUM_ROUNDS = 5
INNER_STEPS = 20


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute in one thread, as the processes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Worker:
    """Peer of the reference: its model, optimizer and batches; nothing is shared."""

    model: GPT
    inner: InnerOptimizer
    batches: Batches
    losses: list[float] = field(default_factory=list)

    def pseudo_gradient(self, run: RunFile, theta: Tensor, event: RoundEvent, tokens_before: int) -> Tensor:
        """Take the inner steps of a round from `theta` (P,)."""
        nn.utils.vector_to_parameters(theta.clone(), self.model.parameters())
        losses = []
        for step in range(event.inner_steps):
            loss = self.model.loss(self.batches.next_batch())
            loss.backward()
            losses.append(float(loss.detach()))
            done = tokens_before + step * event.num_peers * run.tokens_per_step
            self.inner.step(done / run.run.total_tokens)
        self.losses.append(sum(losses) / len(losses))
        return theta - nn.utils.parameters_to_vector(self.model.parameters()).detach()


def reference(run: RunFile, workers: dict[str, Worker], rounds: Sequence[dict[str, RoundEvent]]) -> list[Tensor]:
    """Return the weights (P,) after each round."""
    start = build_model(run.model, run.run.seed)
    theta = nn.Parameter(nn.utils.parameters_to_vector(start.parameters()).detach())
    outer = torch.optim.SGD([theta], lr=run.merge.outer_learning_rate, momentum=run.merge.outer_momentum, nesterov=True)
    after = []
    tokens = 0
    for events in rounds:
        before = theta.detach().clone()
        gradients = {
            peer: workers[peer].pseudo_gradient(run, before, event, tokens) for peer, event in sorted(events.items())
        }
        roster = next(iter(events.values()))
        total = sum(roster.weights)
        theta.grad = sum(
            weight / total * gradients[peer] for peer, weight in zip(roster.partners, roster.weights, strict=True)
        )
        outer.step()
        tokens += total
        after.append(theta.detach().clone())
    return after


def simulated(text: RecordedText, rounds: Sequence[dict[str, RoundEvent]]) -> list[Tensor]:
    """Return the weights (P,) after each round, by the simulator."""
    setting = Setting(text=text, step_s=(1.0,) * len(text.peers))
    learners = {peer: setting.learner(number) for number, peer in enumerate(text.peers)}
    theta = learners[text.peers[0]].reached
    state, after, tokens = OuterState(theta, torch.zeros_like(theta)), [], 0
    for number, events in enumerate(rounds):
        roster = next(iter(events.values()))
        took_part = [(learners[peer], events[peer].inner_steps) for peer in roster.partners]
        state = diloco_round(state, took_part, roster.num_peers, tokens, setting.constants(number))
        tokens += sum(roster.weights)
        after.append(state.theta)
    return after


def make_workers(text: RecordedText) -> dict[str, Worker]:
    """Make a worker for each peer."""
    run = text.run
    section = run.inner
    constants = InnerConstants(
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        beta1=section.beta1,
        beta2=section.beta2,
        gradient_clip=section.gradient_clip,
        warmup_fraction=section.warmup_fraction,
        floor_fraction=section.floor_fraction,
    )
    workers = {}
    for number, peer in enumerate(text.peers):
        model = build_model(run.model, run.run.seed)
        batches = text.batches(number)
        assert isinstance(batches, Batches)
        workers[peer] = Worker(model, InnerOptimizer(model.named_parameters(), constants), batches)
    return workers


def exported(child: Child) -> Tensor:
    """Return the weights (P,) that a volunteer left in its folder, in the model's order."""
    return flatten(load_exported(child.folder / "model").model.parameters())


def test_three_processes_equal_one(swarm: Swarm, one_thread: None) -> None:
    names = ["anna", "ben", "carl"]
    tokens_per_round = len(names) * INNER_STEPS * 8 * 64
    run_file = write_run(
        swarm.folder,
        run={"total_tokens": NUM_ROUNDS * tokens_per_round},
        inner={"warmup_fraction": 0.1},
        # Nobody is passed over, however slow this machine is.
        merge={"inner_steps": INNER_STEPS, "silence_s": 60.0, "outer_momentum": 0.9, "momentum_ramp_rounds": 0},
    )
    bootstrap = swarm.bootstrap(run_file, "--wait-for", "3")
    children = [swarm.join(name, bootstrap.invite.invite) for name in names]
    for child in (bootstrap, *children):
        assert child.wait() == 0, child.story()
    assert not any(child.all(CaughtUpEvent) for child in children), "nobody is passed over in a minute"

    # A peer that a busy machine made late takes fewer steps in a round, and the run then has a round more.
    numbers = sorted(children[0].rounds())
    assert numbers == list(range(len(numbers))) and len(numbers) >= NUM_ROUNDS
    assert all(sorted(child.rounds()) == numbers for child in children)
    assert assert_same_states(children) == len(numbers)
    rounds = [{child.id: child.rounds()[number] for child in children} for number in numbers]
    peers = sorted(child.id for child in children)
    for events in rounds:
        (roster,) = {(event.partners, event.weights, event.signer) for event in events.values()}
        assert roster[0] == tuple(sorted(roster[0])) and set(roster[0]) <= set(peers), "in PeerID order"

    text = text_of(children[0].folder, swarm.folder, peers)
    run, workers = text.run, make_workers(text)
    states = reference(run, workers, rounds)
    weights = exported(children[0])
    difference = float((weights - states[-1]).abs().max())
    print(f"largest difference of a weight after {len(numbers)} rounds: {difference:.2g}")
    assert difference <= TOLERANCE
    in_simulation = float((weights - simulated(text, rounds)[-1]).abs().max())
    print(f"and of the simulator's: {in_simulation:.2g}")
    assert in_simulation <= TOLERANCE
    assert hashlib.sha256(weights.numpy().tobytes()).hexdigest() == rounds[-1][peers[0]].state_sha256
    for child in children:
        told = [child.rounds()[number].loss for number in numbers]
        assert told == pytest.approx(workers[child.id].losses, abs=TOLERANCE, rel=0)
        assert torch.equal(exported(child), weights)
    assert torch.equal(exported(bootstrap), weights), "the archive too"

    # Of the end: the bootstrap measures archived states too.
    told_last = [
        event for child in (bootstrap, *children) for event in child.all(EvalEvent) if event.round == numbers[-1]
    ]
    losses = {event.held_out_loss for event in told_last}
    assert max(losses) - min(losses) <= TOLERANCE
    for child in children:
        (done,) = child.all(DoneEvent)
        assert done.reason == "total_tokens" and done.held_out_loss in losses
        assert done.run_tokens == sum(sum(events[child.id].weights) for events in rounds) >= run.run.total_tokens
        assert done.tokens == sum(events[child.id].tokens for events in rounds)
    swarm.assert_nothing_left()
