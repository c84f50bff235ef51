"""Gossip merge against plain references: delayed Nesterov, the variance correction written out in fp64."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swarmtrain.algorithm.gossip import (
    Layout,
    PartnerUpdate,
    PreparedMerge,
    gossip_merge,
    layout_of,
    prepare,
    variance_corrected_mean,
)
from swarmtrain.algorithm.outer import DelayedNesterov, OuterConstants, OuterState, outer_step, weighted_mean

_SHAPES = [(7, 5), (3,), (1, 1), (0, 4), (17, 31), (), (129,), (2, 3, 5), (300, 200)]  # the last takes two blocks
_LAYOUT = layout_of(_SHAPES)
_CONSTANTS = OuterConstants(learning_rate=0.7, momentum=0.8)
_RATE = _CONSTANTS.learning_rate


def _random(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _reference(vectors: Sequence[Tensor], layout: Layout, weights: Sequence[float]) -> tuple[Tensor, float]:
    """Section 6 of the paper's rule, word for word, in fp64."""
    shares = [weight / sum(weights) for weight in weights]
    mean = sum((w * v.double() for w, v in zip(shares, vectors, strict=True)), torch.zeros(layout.size).double())
    largest = 1.0
    for place, corrected in zip(layout.slices, layout.corrected, strict=True):
        w = mean[place].clone()
        if not corrected or not len(w) or w.var(correction=0) == 0:
            continue
        target = sum(s * v[place].double().var(correction=0).item() for s, v in zip(shares, vectors, strict=True))
        ratio = math.sqrt(target / w.var(correction=0).item())
        mean[place] = (w - w.mean()) * ratio + w.mean()
        largest = max(largest, ratio)
    return mean, largest


def test_layout_is_flattens_order() -> None:
    assert _LAYOUT.size == sum(math.prod(shape) for shape in _SHAPES)
    assert [s.stop - s.start for s in _LAYOUT.slices] == [math.prod(shape) for shape in _SHAPES]
    assert _LAYOUT.slices[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(_LAYOUT.slices))
    assert _LAYOUT.corrected == (True, False, True, True, True, False, False, True, True)
    assert layout_of([]).size == 0


@pytest.mark.parametrize("weights", [None, [1, 1, 1], [5, 0, 3], [0, 7, 1], [0, 2, 0]])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_corrected_mean_is_the_rule(weights: list[float] | None, offset: float) -> None:
    vectors = [offset + (1 + 0.3 * seed) * _random(_LAYOUT.size, seed) for seed in range(3)]
    expected, factor = _reference(vectors, _LAYOUT, weights or [1, 1, 1])
    found = variance_corrected_mean(vectors, _LAYOUT, weights)
    assert torch.allclose(found.mean.double(), expected, rtol=2e-7, atol=1e-6 if not offset else 2e-4)
    assert found.factor == pytest.approx(factor, rel=1e-9)


@given(
    seed=st.integers(0, 2**31),
    copies=st.integers(1, 7),
    exponent=st.integers(-44, 37),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e7]),
    weighted=st.booleans(),
)
@settings(max_examples=60)
def test_equal_inputs_come_back_to_the_bit(
    seed: int, copies: int, exponent: int, offset: float, weighted: bool
) -> None:
    layout = layout_of([(9, 7), (5,)])
    vector = (_random(layout.size, seed).double() * 10.0**exponent + offset * 10.0**exponent).float()
    vector = torch.where(torch.isfinite(vector), vector, 1.0)
    found = variance_corrected_mean(
        [vector.clone() for _ in range(copies)], layout, range(1, copies + 1) if weighted else None
    )
    assert torch.equal(found.mean, vector)
    assert found.mean.data_ptr() != vector.data_ptr()
    assert (found.factor, found.spread, found.displacement) == (1.0, 0.0, 0.0)


_FILLS = [0.0, -0.0, 1.0, -3.5, 1e-45, 1e-40, 1e-38, 1e-20, 1e30, -1e30, 3e38, -3e38]


@given(
    fills=st.lists(st.tuples(st.sampled_from(_FILLS), st.sampled_from(_FILLS)), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100)
def test_never_nan(fills: list[tuple[float, float]], seed: int) -> None:
    """Constant, zero, tiny and huge tensors, and such noise on such constants."""
    layout = layout_of([(6, 5), (4,), (1, 1)])
    vectors = [
        (constant + scale * (torch.rand(layout.size, generator=torch.Generator().manual_seed(seed + i)) - 0.5).double())
        .clamp(-3.4e38, 3.4e38)
        .float()
        for i, (constant, scale) in enumerate(fills)
    ]
    found = variance_corrected_mean(vectors, layout)
    assert not found.mean.isnan().any()
    assert max(abs(v) for fill in fills for v in fill) > 1e30 or found.mean.isfinite().all()
    assert 1.0 <= found.factor < 2**24
    assert 0 <= found.spread <= 1
    assert not math.isnan(found.displacement)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-15, 1.0, 1e15, 1e30])
def test_the_scale_does_not_matter(scale: float) -> None:
    layout = layout_of([(40, 30)])
    vectors = [(_random(1200, seed).double() * scale).float() for seed in range(4)]
    expected, factor = _reference(vectors, layout, [1] * 4)
    found = variance_corrected_mean(vectors, layout)
    assert found.factor == pytest.approx(factor, rel=1e-9)
    assert 1.8 < found.factor < 2.2
    assert torch.allclose(
        found.mean.double() / scale, expected / scale, rtol=1e-6, atol=1e-3 if scale < 1e-40 else 1e-6
    )


def test_a_mean_that_is_only_rounding_is_not_stretched() -> None:
    layout, x = layout_of([(40, 30)]), _random(1200, 0)
    for vectors in ([x, -x], [x, -x / 2, -x / 2], [1e6 + 0.1 * x, 1e6 - 0.1 * x]):
        assert variance_corrected_mean(vectors, layout).factor == 1


def test_there_is_no_upward_bias() -> None:
    """Peers that only average, pair by pair, 600 times, and when they have agreed."""
    layout = layout_of([(60, 50)])
    chance = random.Random(0)
    vectors = [_random(3000, seed) for seed in range(6)]
    target = sum(v.var(correction=0).item() for v in vectors) / 6
    largest = max(v.var(correction=0).item() for v in vectors)
    for merge in range(600):
        i, j = chance.sample(range(6), 2)
        vectors[i] = variance_corrected_mean([vectors[i], vectors[j]], layout).mean
        if merge % 100 == 0:
            assert max(v.double().var(correction=0).item() for v in vectors) <= largest * (1 + 1e-6)
    assert all(v.double().var(correction=0).item() == pytest.approx(target, rel=0.05) for v in vectors)
    settled = vectors[0].double().var(correction=0).item()
    assert all(torch.allclose(v, vectors[0], atol=1e-5) for v in vectors)  # and they have agreed
    for _ in range(200):  # what has agreed does not move any more
        vectors[0] = variance_corrected_mean([vectors[0], vectors[1]], layout).mean
    assert vectors[0].double().var(correction=0).item() == pytest.approx(settled, rel=1e-6)


def test_spread_and_displacement() -> None:
    layout = layout_of([(2, 2), (2,)])
    own, other = torch.tensor([3.0, 0, 0, 0, 0, 4]), torch.tensor([3.0, 0, 0, 3, 0, 8])
    found = variance_corrected_mean([own, other, own], layout)
    assert found.displacement == pytest.approx(1.0)  # |(0, 0, 0, 3, 0, 4)| = 5 = |own|
    inputs = torch.stack([own, other, own]).double()
    apart = ((inputs - inputs.mean(0)) ** 2).sum() / (inputs**2).sum()
    assert found.spread == pytest.approx(math.sqrt(apart.item()))
    zero = torch.zeros(6)
    assert variance_corrected_mean([zero, zero], layout).displacement == 0
    assert variance_corrected_mean([zero, own], layout).displacement == math.inf
    assert variance_corrected_mean([own, zero], layout).displacement == 1


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([], None), ([6, 5], None), ([5], None), ([6, 6], [1]), ([6], [0]), ([6, 6], [2, -1]), ([6], [math.nan])],
)
def test_corrected_mean_that_makes_no_sense(sizes: list[int], weights: list[float] | None) -> None:
    with pytest.raises(ValueError, match=r"weight|numbers"):
        variance_corrected_mean([torch.ones(n) for n in sizes], layout_of([(2, 2), (2,)]), weights)


def _arrivals(num: int, seed: int, scale: float = 1.0) -> list[PartnerUpdate]:
    P = _LAYOUT.size
    return [
        PartnerUpdate(scale * _random(P, seed + j), 0.1 * _random(P, 1000 + seed + j), 100.0 * (1 + (seed * 7 + j) % 9))
        for j in range(num)
    ]


def test_nothing_that_is_given_is_written_into() -> None:
    P = _LAYOUT.size
    state, gradient, arrivals = OuterState(_random(P, 0), _random(P, 1)), _random(P, 2), _arrivals(3, 3)
    tensors = [state.theta, state.momentum, gradient, *(t for a in arrivals for t in (a.theta, a.gradient))]
    copies = [t.clone() for t in tensors]
    for partners in (arrivals, []):
        prepared = prepare(state, partners, _LAYOUT, _RATE)
        new = gossip_merge(state, prepared, gradient, 50, _CONSTANTS)
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
        assert not {new.theta.data_ptr(), new.momentum.data_ptr()} & {t.data_ptr() for t in tensors}
        assert new.theta.data_ptr() != new.momentum.data_ptr()


@pytest.mark.parametrize("num_partners", [1, 2, 3, 6])
def test_gossip_is_delayed_nesterov_with_an_arrival_for_each(num_partners: int) -> None:
    """N = 1 + P arrivals weighted by tokens, from the averaged theta: the same to 1e-6, over several rounds."""
    state = OuterState(_random(_LAYOUT.size, 0), 0.1 * _random(_LAYOUT.size, 1))
    for round in range(5):
        constants = OuterConstants(learning_rate=0.7, momentum=0.2 * round)
        arrivals, own, tokens = _arrivals(num_partners, 50 * round), 0.1 * _random(_LAYOUT.size, 900 + round), 333
        theta = variance_corrected_mean([state.theta, *(a.theta for a in arrivals)], _LAYOUT).mean
        outer = DelayedNesterov(OuterState(theta, state.momentum), constants, 1 + num_partners)
        total = tokens + sum(a.tokens for a in arrivals)
        for arrival in arrivals:
            outer.arrive(arrival.gradient, arrival.tokens / total)
        outer.arrive(own, tokens / total)
        assert outer.buffer.arrivals == 0
        state = gossip_merge(state, prepare(state, arrivals, _LAYOUT, _RATE), own, tokens, constants)
        assert torch.allclose(state.theta, outer.state.theta, rtol=0, atol=1e-6)
        assert torch.allclose(state.momentum, outer.state.momentum, rtol=0, atol=1e-6)


def test_without_partners_it_is_an_outer_step_to_the_bit() -> None:
    P = _LAYOUT.size
    gossip = step = OuterState(_random(P, 0), torch.zeros(P))
    for seed in range(10):
        prepared = prepare(gossip, [], _LAYOUT, _RATE)
        assert prepared.theta_mean is gossip.theta
        assert (prepared.num_arrivals, prepared.tokens, prepared.variance_factor) == (0, 0, 1.0)
        gossip = gossip_merge(gossip, prepared, _random(P, seed), 7, _CONSTANTS)
        step = outer_step(step, _random(P, seed), _CONSTANTS)
        assert torch.equal(gossip.theta, step.theta)
        assert torch.equal(gossip.momentum, step.momentum)


def test_what_is_prepared() -> None:
    arrivals, theta = _arrivals(3, 5), _random(_LAYOUT.size, 0)
    prepared = prepare(OuterState(theta, torch.zeros_like(theta)), arrivals, _LAYOUT, _RATE)
    mean = variance_corrected_mean([theta, *(a.theta for a in arrivals)], _LAYOUT)
    assert torch.equal(prepared.theta_mean, mean.mean)
    assert prepared.variance_factor == mean.factor > 1.5
    assert (prepared.consensus_spread, prepared.displacement) == (mean.spread, mean.displacement)
    expected = sum((a.gradient.double() * a.tokens for a in arrivals), torch.zeros(_LAYOUT.size).double())
    assert torch.allclose(prepared.gradient_sum.double(), expected, rtol=1e-6, atol=1e-4)
    assert prepared.tokens == sum(a.tokens for a in arrivals)
    assert prepared.num_arrivals == 3


def test_weights_of_later_rounds_are_taken_back_by_as_much_as_the_momentum_goes() -> None:
    P = _LAYOUT.size
    state, arrivals = OuterState(_random(P, 0), _random(P, 1)), _arrivals(3, 5)
    as_they_are = prepare(state, arrivals, _LAYOUT, _RATE)
    later = [
        dataclasses.replace(one, ahead_rounds=rounds) for one, rounds in zip(arrivals, (0.25, 0.0, 1.0), strict=True)
    ]
    later.append(dataclasses.replace(arrivals[0], theta=None, ahead_rounds=0.5))  # there is nothing to take back
    prepared = prepare(state, later, _LAYOUT, _RATE)
    expected = as_they_are.theta_mean.double() + _RATE * 1.25 / 4 * state.momentum.double()
    assert torch.allclose(prepared.theta_mean.double(), expected, rtol=0, atol=1e-6)
    assert (prepared.consensus_spread, prepared.displacement) == (
        as_they_are.consensus_spread,
        as_they_are.displacement,
    )
    for rounds in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="rounds ahead"):
            prepare(state, [dataclasses.replace(arrivals[0], ahead_rounds=rounds)], _LAYOUT, _RATE)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.8])
def test_however_the_rounds_of_peers_lie_to_each_other_all_go_as_fast_as_one_alone(momentum: float) -> None:
    """Four who each bring the same in a round, and merge in turns: as it is taken back, nothing counts twice."""
    layout, constants = layout_of([(1,)]), OuterConstants(learning_rate=0.7, momentum=momentum)
    gradient, num_rounds, num = torch.tensor([1.0]), 60, 4

    def gone(step: Callable[[int, list[OuterState]], OuterState]) -> float:
        states = [OuterState(torch.zeros(1), torch.zeros(1)) for _ in range(num)]
        for turn in range(num_rounds * num):
            states[turn % num] = step(turn % num, states)
        return float(states[-1].theta)

    def merge(own: int, states: list[OuterState], *, counts_ahead: bool) -> OuterState:
        ages = [(own - other) % num / num for other in range(num)]  # of their rounds; this one's is a whole one
        arrivals = [
            PartnerUpdate(states[i].theta, gradient, 1, 1 - ages[i] if counts_ahead else 0.0)
            for i in range(num)
            if i != own
        ]
        return gossip_merge(states[own], prepare(states[own], arrivals, layout, 0.7), gradient, 1, constants)

    alone = gone(lambda own, states: outer_step(states[own], gradient, constants))
    aligned = gone(lambda own, states: merge(own, states, counts_ahead=True))
    as_they_are = gone(lambda own, states: merge(own, states, counts_ahead=False))
    assert aligned == pytest.approx(alone, rel=0.03)
    assert as_they_are < 1.4 * alone < 0  # how far it goes: too far


def test_who_has_no_tokens_gives_only_its_theta() -> None:
    """A later part of a round that was merged before, with no step since; its g does not enter, whatever it is."""
    P = _LAYOUT.size
    state, own = OuterState(_random(P, 0), _random(P, 1)), _random(P, 2)
    idle = PartnerUpdate(_random(P, 3), torch.full((P,), math.nan), 0)
    new = gossip_merge(state, prepare(state, [idle], _LAYOUT, _RATE), own, 50, _CONSTANTS)
    theta = variance_corrected_mean([state.theta, idle.theta], _LAYOUT).mean
    expected = outer_step(OuterState(theta, state.momentum), own, _CONSTANTS)
    assert torch.allclose(new.theta, expected.theta, rtol=0, atol=1e-6)
    busy = PartnerUpdate(state.theta, _random(P, 4), 10)
    new = gossip_merge(state, prepare(state, [busy], _LAYOUT, _RATE), own, 0, _CONSTANTS)
    expected = outer_step(state, busy.gradient, _CONSTANTS)
    assert torch.allclose(new.theta, expected.theta, rtol=0, atol=1e-6)


def test_weights_and_gradients_of_different_partners_enter_as_if_they_came_together() -> None:
    state, own, arrivals = OuterState(_random(_LAYOUT.size, 0), _random(_LAYOUT.size, 1)), _random(_LAYOUT.size, 2), []
    together = _arrivals(3, 7)
    for arrival in together:
        arrivals.append(dataclasses.replace(arrival, theta=None))
        arrivals.append(dataclasses.replace(arrival, tokens=0))
    new = gossip_merge(state, prepare(state, arrivals, _LAYOUT, _RATE), own, 50, _CONSTANTS)
    expected = gossip_merge(state, prepare(state, together, _LAYOUT, _RATE), own, 50, _CONSTANTS)
    assert torch.equal(new.theta, expected.theta) and torch.equal(new.momentum, expected.momentum)


def test_with_gradients_alone_theta_is_this_peers_own_and_stays_as_it_was() -> None:
    state, own = OuterState(_random(_LAYOUT.size, 0), _random(_LAYOUT.size, 1)), _random(_LAYOUT.size, 2)
    theta, arrivals = state.theta.clone(), [dataclasses.replace(one, theta=None) for one in _arrivals(2, 7)]
    prepared = prepare(state, arrivals, _LAYOUT, _RATE)
    assert (prepared.variance_factor, prepared.displacement, prepared.num_arrivals) == (1.0, None, 2)
    new = gossip_merge(state, prepared, own, 50, _CONSTANTS)
    assert torch.equal(state.theta, theta) and new.theta.data_ptr() != state.theta.data_ptr()
    mean = weighted_mean([own, *(one.gradient for one in arrivals)], [50, *(one.tokens for one in arrivals)])
    expected = outer_step(state, mean, _CONSTANTS)
    assert torch.allclose(new.theta, expected.theta, rtol=0, atol=1e-6)


def test_merge_that_makes_no_sense_changes_nothing() -> None:
    layout = layout_of([(3,)])
    state = OuterState(torch.ones(3), torch.ones(3))
    idle = PartnerUpdate(torch.ones(3), torch.ones(3), 0)
    prepared = prepare(state, [idle], layout, _RATE)
    with pytest.raises(ValueError, match="3 numbers"):
        gossip_merge(state, prepared, torch.ones(4), 1, _CONSTANTS)
    for tokens in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="tokens"):
            gossip_merge(state, prepared, torch.ones(3), tokens, _CONSTANTS)
        with pytest.raises(ValueError, match="tokens"):
            prepare(state, [dataclasses.replace(idle, tokens=tokens)], layout, _RATE)
    with pytest.raises(ValueError, match="3 numbers"):
        prepare(state, [dataclasses.replace(idle, gradient=torch.ones(4))], layout, _RATE)
    with pytest.raises(ValueError, match="3 numbers"):
        prepare(state, [dataclasses.replace(idle, theta=torch.ones(4))], layout, _RATE)
    gossip_merge(state, prepared, torch.ones(3), 1, _CONSTANTS)  # still good after all that, and once
    with pytest.raises(ValueError, match="merged before"):
        gossip_merge(state, prepared, torch.ones(3), 1, _CONSTANTS)


def test_what_nobody_trained_stays_to_the_bit_whatever_weights_came() -> None:
    layout = layout_of([(3,)])
    state = OuterState(torch.ones(3), torch.ones(3))
    for arrivals in ([], [PartnerUpdate(torch.zeros(3), torch.zeros(3), 0, ahead_rounds=0.5)]):
        prepared = prepare(state, arrivals, layout, _RATE)
        assert gossip_merge(state, prepared, torch.full((3,), math.nan), 0, _CONSTANTS) is state
        assert prepared.spent


def test_it_is_deterministic_to_the_bit() -> None:
    def run() -> OuterState:
        state = OuterState(_random(_LAYOUT.size, 0), torch.zeros(_LAYOUT.size))
        for round in range(5):
            prepared = prepare(state, _arrivals(3, 10 * round), _LAYOUT, _RATE)
            state = gossip_merge(state, prepared, _random(_LAYOUT.size, round), 70, _CONSTANTS)
        return state

    first, second = run(), run()
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(first.momentum, second.momentum)


_SMALL = layout_of([(16, 12), (12,)])


def test_peers_from_their_own_weights_agree_and_converge() -> None:
    """Nobody waits: each has its own pace, takes one random partner's last publication, and starts where it likes."""
    minimum, chance = _random(_SMALL.size, 99), random.Random(1)
    states = [OuterState(_random(_SMALL.size, peer), torch.zeros(_SMALL.size)) for peer in range(4)]
    published: list[PartnerUpdate | None] = [None] * 4
    last: PreparedMerge | None = None
    for tick in range(1, 300):
        for peer, period in enumerate((1, 1, 3, 5)):
            if tick % period:
                continue
            others = [a for other, a in enumerate(published) if a and other != peer]
            state = states[peer]
            gradient = 0.3 * (state.theta - minimum)
            last = prepare(state, chance.sample(others, 1) if others else [], _SMALL, _RATE)
            states[peer] = gossip_merge(state, last, gradient, 60 // period, _CONSTANTS)
            published[peer] = PartnerUpdate(state.theta, gradient, 60 // period)
    assert last is not None
    assert last.consensus_spread < 1e-3
    assert last.variance_factor == pytest.approx(1, abs=1e-5)
    assert all(torch.allclose(state.theta, minimum, rtol=0, atol=1e-2) for state in states)


def test_what_may_be_written_into_is_prepared_to_the_same_bits() -> None:
    """Whether each arrival has weights, a gradient or both, as they are made one after the other."""
    state = OuterState(_random(_LAYOUT.size, 0), _random(_LAYOUT.size, 1))
    arrivals = [dataclasses.replace(one, ahead_rounds=0.5) for one in _arrivals(4, 5)]
    arrivals[1] = dataclasses.replace(arrivals[1], theta=None)
    arrivals[2] = PartnerUpdate(arrivals[2].theta, arrivals[2].gradient, 0)
    wanted = prepare(state, arrivals, _LAYOUT, _RATE)
    made = (
        dataclasses.replace(one, gradient=one.gradient.clone(), theta=None if one.theta is None else one.theta.clone())
        for one in arrivals
    )
    found = prepare(state, made, _LAYOUT, _RATE, may_write=True)
    assert torch.equal(found.theta_mean, wanted.theta_mean) and torch.equal(found.gradient_sum, wanted.gradient_sum)
    assert (found.tokens, found.num_arrivals) == (wanted.tokens, 4)
