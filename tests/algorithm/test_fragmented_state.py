"""State of the whole model made of its fragments' states, and moments and weights that are lent to other threads."""

from __future__ import annotations

import threading

import torch
from torch import nn

from swarmtrain.algorithm.fragments import FragmentedState, fragments_of, whole_of
from swarmtrain.algorithm.gossip import layout_of
from swarmtrain.algorithm.inner import InnerConstants, InnerOptimizer, LentMoments
from swarmtrain.algorithm.outer import OuterState
from swarmtrain.peer.merging.updates import LentWeights

LAYOUT = layout_of([(4, 5), (7,), (3, 3), (11,), (2, 6)])
FRAGMENTS = fragments_of(LAYOUT, 3)
CONSTANTS = InnerConstants(
    learning_rate=0.1,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.9,
    gradient_clip=1.0,
    warmup_fraction=0.0,
    floor_fraction=0.1,
)


def states_of(theta: torch.Tensor, momentum: torch.Tensor) -> list[OuterState]:
    return [OuterState(one.of(theta), one.of(momentum)) for one in FRAGMENTS]


def test_pieces_are_the_whole_and_no_copies() -> None:
    theta, momentum = torch.randn(LAYOUT.size), torch.randn(LAYOUT.size)
    states = states_of(theta, momentum)
    state = FragmentedState(FRAGMENTS, states)
    assert state.size == LAYOUT.size
    assert torch.equal(state.theta, theta) and torch.equal(state.momentum, momentum)
    for pieces, whole, name in zip(state.pieces(), (theta, momentum), ("theta", "momentum"), strict=True):
        assert torch.equal(torch.cat(pieces), whole)
        stored = {getattr(one, name).untyped_storage().data_ptr() for one in states}
        assert {piece.untyped_storage().data_ptr() for piece in pieces} == stored


def test_it_follows_merges_and_a_settled_one_does_not() -> None:
    zeros = torch.zeros(LAYOUT.size)
    states = states_of(zeros, zeros)
    state = FragmentedState(FRAGMENTS, states)
    frozen = state.frozen()
    states[1] = OuterState(torch.ones_like(states[1].theta), states[1].momentum)
    assert state.theta.sum() == FRAGMENTS[1].layout.size and not frozen.theta.any()
    assert torch.equal(state.theta, whole_of(FRAGMENTS, [one.theta for one in states]))


def optimizer_after(num_steps: int) -> tuple[InnerOptimizer, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = InnerOptimizer(model.named_parameters(), CONSTANTS)
    for _ in range(num_steps):
        step(optimizer, model)
    return optimizer, model


def step(optimizer: InnerOptimizer, model: nn.Linear) -> None:
    model(torch.ones(3, 6)).square().sum().backward()
    optimizer.step(0.5)


def read(lent: LentMoments) -> torch.Tensor:
    return torch.cat([piece.clone() for piece in lent.read()])


def test_lent_moments_are_those_of_when_they_were_lent_read_before_or_after_a_step() -> None:
    for late in (False, True):
        optimizer, model = optimizer_after(3)
        wanted = optimizer.copy_moments(torch.empty(2, 35))
        lent = optimizer.lend_moments()
        assert torch.equal(lent.steps, wanted.steps)
        if late:
            lent.give_back(limit_s=0.0)
            step(optimizer, model)
        assert torch.equal(read(lent), wanted.vectors.reshape(-1))
        step(optimizer, model)
        assert not torch.equal(optimizer.copy_moments(torch.empty(2, 35)).vectors, wanted.vectors)


def test_a_step_waits_for_who_is_reading_and_copies_nothing_then() -> None:
    lent = LentMoments([torch.full((3,), float(number)) for number in range(4)], torch.zeros(2))
    reader, half, go_on = lent.read(), threading.Event(), threading.Event()
    found: list[float] = []

    def read_slowly() -> None:
        for number, piece in enumerate(reader):
            found.append(float(piece[0]))
            if number == 1:
                half.set()
                go_on.wait(10)

    thread = threading.Thread(target=read_slowly)
    thread.start()
    half.wait(10)
    threading.Timer(0.01, go_on.set).start()
    lent.give_back(limit_s=10.0)
    assert not lent._left
    thread.join()
    assert found == [0, 1, 2, 3]


def test_nobody_waits_for_moments_that_are_not_read() -> None:
    optimizer, model = optimizer_after(1)
    optimizer.lend_moments().forget()
    step(optimizer, model)
    assert optimizer.waited_s < 0.2


def test_lent_weights_make_the_same_gradient_and_only_once() -> None:
    for size in (10, 1 << 19):
        parameters = [torch.randn(size), torch.randn(size // 2, 2)]
        theta = torch.randn(2 * size)
        wanted = theta - torch.cat([one.reshape(-1) for one in parameters])
        lent = LentWeights(theta, parameters)
        assert torch.equal(lent.gradient(), wanted)
        parameters[0].zero_()
        assert lent.gradient() is lent.gradient()
        assert torch.equal(lent.gradient(), wanted)
