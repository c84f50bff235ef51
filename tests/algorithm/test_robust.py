"""Robustness rules against plain references, at their limits, and with one bad peer of eight in a descent."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from swarmtrain.algorithm.robust import (
    DirectionTrust,
    DisplacementClip,
    GradientClip,
    Trusted,
    flag_mean,
    per_tensor,
    trimmed_mean,
)

LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149


def _vectors(num: int, size: int = 300, seed: int = 0) -> list[Tensor]:
    """Gradients that agree in part: a common direction and noise, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator)
    return [(common + torch.randn(size, generator=generator)) * (1 + 0.2 * index) for index in range(num)]


# --- GradientClip ---


def test_groups_are_tensors() -> None:
    assert per_tensor([3, 0, 2]) == (((0, 3),), ((3, 5),))


def test_a_gradient_is_clipped_to_three_times_the_median_a_step() -> None:
    clip = GradientClip(per_tensor([4, 5]))
    norms = torch.tensor([[1.0, 7.0], [2.0, 5.0], [3.0, 6.0]])  # medians 2 and 6
    for first, second in norms.tolist():
        vector = torch.cat([torch.full((4,), first / 2), torch.full((5,), second / math.sqrt(5))])
        clipped = clip.clip(10 * vector, tokens=10)
        assert clipped.vector.equal(10 * vector) and clipped.incident is None
    wide = torch.cat([torch.full((4,), 100.0), torch.ones(5)])
    clipped = clip.clip(wide, tokens=20)
    limit = 3 * 2 * 20
    assert clipped.factors == pytest.approx((limit / 200, 1.0))
    assert float(clipped.vector[:4].norm()) == pytest.approx(limit, rel=1e-6)
    assert clipped.vector[4:].equal(wide[4:]) and wide[0] == 100, "what was given must stay as it is"
    assert torch.allclose(clipped.vector[:4] / clipped.vector[:4].norm(), wide[:4] / wide[:4].norm())
    assert clipped.incident is not None
    assert (clipped.incident.rule, clipped.incident.detail) == (
        "gradient",
        "gradient cut in 1 of 2 groups; group 0 most, its norm 200 in 20 tokens to 120",
    )


def test_a_group_may_be_several_slices() -> None:
    clip = GradientClip([((0, 2), (4, 6))])
    for _ in range(3):
        clip.learn(torch.tensor([1.0, 1, 9, 9, 1, 1, 9]), 1)
    clipped = clip.clip(torch.full((7,), 100.0), 1)
    assert torch.allclose(clipped.vector, torch.tensor([3.0, 3, 100, 100, 3, 3, 100]))


def _pseudo_gradient(x: Tensor, inner_steps: int, generator: torch.Generator) -> Tensor:
    """Return how far a round of Adam's steps moves on a quadratic, with gradient noise as large as the slope."""
    curvature = torch.logspace(0, -2, len(x))
    weights, first, second = x, torch.zeros(len(x)), torch.zeros(len(x))
    for step in range(1, inner_steps + 1):
        gradient = curvature * weights + 0.3 * curvature.sqrt() * torch.randn(len(x), generator=generator)
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient.square()
        weights = weights - 0.01 * (first / (1 - 0.9**step)) / (second / (1 - 0.95**step)).sqrt()
    return x - weights


def test_honest_peers_of_any_pace_are_not_cut() -> None:
    """Peers of 6 to 100 steps, and parts of their rounds; the norm per step differs more than threefold."""
    generator = torch.Generator().manual_seed(0)
    clip = GradientClip(per_tensor([60, 140]))
    x = torch.randn(200, generator=generator)
    per_step: dict[int, list[float]] = {}
    for _ in range(10):
        own = _pseudo_gradient(x, 100, generator)
        clip.learn(own, 100)
        for inner_steps in (100, 6, 50, 25, 3):
            gradient = _pseudo_gradient(x, inner_steps, generator)
            per_step.setdefault(inner_steps, []).append(float(gradient.norm()) / inner_steps)
            clipped = clip.clip(gradient, inner_steps)
            assert clipped.incident is None, clipped.incident
        x = x - own
    medians = {inner_steps: float(np.median(norms)) for inner_steps, norms in per_step.items()}
    assert medians[3] > 3 * medians[100], "the rule by norm per step alone would do: simplify it"


def test_fewer_claimed_steps_never_raise_the_limit() -> None:
    clip = GradientClip(per_tensor([300]))
    for vector, inner_steps in zip(_vectors(6), (25, 100, 7, 50, 100, 25), strict=True):
        clip.learn(vector, inner_steps)
    allowed = []
    for inner_steps in (1, 5, 25, 60, 100):
        again = GradientClip(per_tensor([300]), clip.history)
        allowed.append(float(again.clip(torch.full((300,), 1e6), inner_steps).vector.norm()))
    assert allowed == sorted(allowed)


def test_the_median_follows_all_and_not_one() -> None:
    usual = torch.ones(100)
    clip = GradientClip(per_tensor([100]))
    for _ in range(40):
        clip.learn(usual, 1)
        clip.clip(1e9 * usual, 1)  # as many bad values as own ones
    assert float(clip.clip(1e9 * usual, 1).vector[0]) == pytest.approx(3, rel=1e-6)
    cut = [clip.clip(10 * usual, 1).incident is not None for _ in range(200)]  # now everyone's are ten times as large
    assert cut[0] and not cut[-1]


def test_tensors_nobody_moves_do_not_count() -> None:
    clip = GradientClip(per_tensor([2, 2]))
    for _ in range(10):
        clip.learn(torch.tensor([1.0, 1, 0, 0]), 1)
    assert clip.clip(torch.tensor([1.0, 1, 5, 5]), 1).incident is None


@pytest.mark.parametrize("value", [LARGEST, -LARGEST, SMALLEST, 0.0])
def test_extremes_stay_finite(value: float) -> None:
    for usual in (SMALLEST, 1.0, LARGEST):
        clip = GradientClip(per_tensor([100, 1]))
        displacement = DisplacementClip()
        for _ in range(3):
            clip.learn(torch.full((101,), usual), 1)
            displacement.clip(torch.zeros(101), torch.full((101,), usual))
        clipped = clip.clip(torch.full((101,), value), 1).vector
        assert torch.isfinite(clipped).all()
        assert float(clipped.double().norm()) <= 3 * usual * math.sqrt(101) * 1.000001
        for _ in range(5):
            drawn = displacement.clip(torch.full((101,), -value), torch.full((101,), value))
            assert torch.isfinite(drawn.vector).all()
        for history in (clip.history, displacement.history):
            json.dumps(history, allow_nan=False)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_and_not_remembered(poison: float) -> None:
    bad = torch.tensor([1.0, poison, 1.0, 1.0])
    good = torch.ones(4)
    gradient, displacement, directions = GradientClip(per_tensor([4])), DisplacementClip(), DirectionTrust()
    directions.learn(good, 1)
    for call in (
        lambda: gradient.learn(bad, 1),
        lambda: gradient.clip(bad, 1),
        lambda: gradient.norms(bad),
        lambda: GradientClip([((2, 4),)]).clip(bad, 1),
        lambda: displacement.learn(bad),
        lambda: displacement.clip(good, bad),
        lambda: directions.learn(bad, 1),
        lambda: directions.judge("a", bad, 1),
        lambda: trimmed_mean([good, good, good, bad]),
        lambda: flag_mean([good, good, good, bad]),
    ):
        with pytest.raises(ValueError, match="not finite"):
            call()
    assert gradient.history == [] and displacement.history == [0.0]


def test_norms_that_are_known_teach_the_same_to_the_bit() -> None:
    sizes = [100_000, 3, 65_537]
    own, theirs = (torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    found = []
    for are_known in (False, True):
        gradient, displacement, directions = GradientClip(per_tensor(sizes)), DisplacementClip(), DirectionTrust()
        norms = gradient.norms(own) if are_known else None
        gradient.learn(own, 7, norms)
        displacement.learn(own, norms)
        directions.learn(own, 7, norms)
        clipped = displacement.clip(own, own + 100 * theirs)
        judged = directions.judge("a", own + 0.1 * theirs, 1)
        found.append((gradient.history, clipped.factors, judged, clipped.vector))
    *one, vector = found[0]
    *other, same = found[1]
    assert one == other and torch.equal(vector, same) and one[1][0] < 1
    assert norms is not None and math.isclose(norms.whole, math.hypot(*norms.groups), rel_tol=1e-12)


def test_arguments_that_make_no_sense() -> None:
    clip = GradientClip(per_tensor([4]))
    with pytest.raises(ValueError, match="at least 4 numbers"):
        clip.clip(torch.ones(3), 1)
    for tokens in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="tokens must be above 0"):
            clip.clip(torch.ones(4), tokens)
        with pytest.raises(ValueError, match="tokens must be above 0"):
            clip.learn(torch.ones(4), tokens)
    assert clip.history == []
    for groups in ([((0, 2), (1, 3))], [((2, 2),)], [((-1, 2),)]):
        with pytest.raises(ValueError, match="overlap"):
            GradientClip(groups)
    for row in ([1.0], [0.0, 1.0], [1.0, math.nan], [1.0, -1.0]):
        with pytest.raises(ValueError, match="without a history"):
            GradientClip(per_tensor([4]), [row])
    for history in ([0.5], [-1.0], [0.0, math.inf], [1e9]):
        with pytest.raises(ValueError, match="without a history"):
            DisplacementClip(history=history)
    with pytest.raises(ValueError, match="one size"):
        DisplacementClip().clip(torch.ones(3), torch.ones(4))


def test_clips_go_on_from_a_checkpoint_and_repeat_to_the_bit() -> None:
    vectors = [vector * (50 if index % 7 == 5 else 1) for index, vector in enumerate(_vectors(150))]
    whole, halves = GradientClip(per_tensor([100, 200])), GradientClip(per_tensor([100, 200]))
    near, parted = DisplacementClip(), DisplacementClip()
    for index, vector in enumerate(vectors):
        if index == 75:
            halves = GradientClip(per_tensor([100, 200]), json.loads(json.dumps(halves.history)))
            parted = DisplacementClip(history=json.loads(json.dumps(parted.history)))
        one, other = whole.clip(vector, 1 + index % 5), halves.clip(vector, 1 + index % 5)
        assert torch.equal(one.vector, other.vector) and one.factors == other.factors
        one, other = near.clip(vectors[0], vector), parted.clip(vectors[0], vector)
        assert torch.equal(one.vector, other.vector) and one.incident == other.incident
    assert len(whole.history) == 64 and len(near.history) <= 65


# --- DisplacementClip ---


def _away(distance: float) -> tuple[Tensor, Tensor]:
    own = torch.linspace(-1, 1, 100)
    return own, own + distance / 10  # a hundred numbers, each a tenth of the distance away


def test_weights_far_away_are_drawn_in() -> None:
    clip = DisplacementClip()
    for distance in (1.0, 2.0, 3.0):
        own, theirs = _away(distance)
        assert clip.clip(own, theirs).vector is theirs
    own, theirs = _away(100)
    clipped = clip.clip(own, theirs)
    assert float((clipped.vector - own).norm()) == pytest.approx(6, rel=1e-5)
    assert torch.allclose(clipped.vector, own + 0.06 * (theirs - own))
    assert clipped.incident is not None and clipped.incident.rule == "displacement"
    assert clipped.incident.detail == "weights 100 away from the own ones, drawn in to 6"


def test_a_healed_partition_comes_back_and_stays() -> None:
    clip = DisplacementClip()
    for _ in range(20):
        clip.clip(*_away(1))
    cut = [clip.clip(*_away(100)).incident is not None for _ in range(30)]
    assert cut == [True] * 6 + [False] * 24  # 3, 6, 12, .. 96, then 192


def test_one_bad_peer_among_good_ones_gains_a_doubling_at_most() -> None:
    clip = DisplacementClip()
    reached = []
    for _ in range(100):
        for _ in range(3):
            assert clip.clip(*_away(1)).incident is None
        own, theirs = _away(1e6)
        reached.append(float((clip.clip(own, theirs).vector - own).norm()))
    assert max(reached) == pytest.approx(3, rel=1e-4)
    assert clip.clip(*_away(1)).incident is None
    assert clip.history[0] == 0


def test_nothing_is_cut_or_remembered_before_peers_have_met() -> None:
    clip = DisplacementClip(enabled=False)
    for _ in range(10):
        own, theirs = _away(1e6)
        assert clip.clip(own, theirs).vector is theirs
    clip.enabled = True
    for _ in range(5):
        clip.clip(*_away(1))
    assert clip.clip(*_away(1e6)).incident is not None


def test_equal_weights_say_nothing() -> None:
    clip = DisplacementClip()
    for _ in range(100):
        assert clip.clip(*_away(0)).incident is None
    assert clip.clip(*_away(1)).incident is None


# --- trimmed mean and Flag mean ---


@pytest.mark.parametrize("num", [4, 5, 8, 16])
def test_trimmed_mean_equals_a_plain_loop(num: int) -> None:
    vectors = _vectors(num, size=77)
    expected = [
        math.fsum(sorted(column)[1:-1]) / (num - 2) for column in zip(*(v.tolist() for v in vectors), strict=True)
    ]
    assert torch.allclose(trimmed_mean(vectors), torch.tensor(expected), rtol=1e-6, atol=0)


def _plain_flag(vectors: Sequence[Tensor], rank: int) -> Tensor:
    """Compute the paper's formula with a singular value decomposition of the P x K matrix itself."""
    G = np.stack([vector.double().numpy() for vector in vectors], axis=1)
    norms = np.linalg.norm(G, axis=0)
    X = G[:, norms > 0] / norms[norms > 0]
    weights = np.ones(X.shape[1])
    for _ in range(10):
        left, values, _ = np.linalg.svd(X * weights, full_matrices=False)
        Y = left[:, :rank][:, values[:rank] > 1e-6 * values[0]]
        weights = (np.abs(1 - np.square(Y.T @ X).sum(axis=0)) + 1e-7) ** -0.25
    direction = (Y @ (Y.T @ X)).sum(axis=1) / rank
    direction /= np.linalg.norm(direction)
    return torch.from_numpy(direction * max(0, np.median(direction @ G)))


@pytest.mark.parametrize("num", [4, 5, 8, 16])
def test_flag_mean_equals_a_plain_decomposition(num: int) -> None:
    vectors = _vectors(num)
    default = -(-(num + 1) // 2)
    for rank in (None, 1, 2, num):
        expected = _plain_flag(vectors, default if rank is None else rank)
        assert torch.allclose(flag_mean(vectors, rank=rank).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mean", [trimmed_mean, flag_mean])
class TestMeans:
    def test_equal_gradients_are_their_mean(self, mean: Callable[..., Tensor]) -> None:
        vector = _vectors(1)[0]
        for num in (4, 5, 16):
            assert torch.allclose(mean([vector] * num), vector, rtol=1e-6, atol=0)

    def test_the_order_does_not_matter(self, mean: Callable[..., Tensor]) -> None:
        vectors = _vectors(4)
        first = mean(vectors)
        for order in itertools.permutations(vectors):
            assert torch.allclose(mean(list(order)), first, rtol=1e-5, atol=1e-6)

    def test_the_same_bits_again_and_nothing_written(self, mean: Callable[..., Tensor]) -> None:
        vectors = _vectors(7, size=(1 << 18) + 5)
        copies = [vector.clone() for vector in vectors]
        assert torch.equal(mean(vectors), mean(copies))
        assert all(torch.equal(vector, copy) for vector, copy in zip(vectors, copies, strict=True))

    @pytest.mark.parametrize("scale", [0.0, SMALLEST, 1e-30, 1e37])
    def test_zero_tiny_and_huge(self, mean: Callable[..., Tensor], scale: float) -> None:
        vectors = [scale * vector.sign() for vector in _vectors(5)]
        result = mean(vectors)
        assert torch.isfinite(result).all()
        if scale in (0.0, SMALLEST):
            assert float(result.abs().max()) <= scale
        for num_zero in (1, 2, 3, 4):
            some = [torch.zeros(300)] * num_zero + vectors
            assert torch.isfinite(mean(some)).all()
        one_huge = [*_vectors(4), torch.full((300,), LARGEST)]
        assert float(mean(one_huge).abs().max()) < 100

    def test_cancelling_gradients_give_nothing(self, mean: Callable[..., Tensor]) -> None:
        first, second = _vectors(2)
        assert float(mean([first, -first, second, -second]).norm()) < 1e-4 * float(first.norm())

    def test_three_are_too_few(self, mean: Callable[..., Tensor]) -> None:
        with pytest.raises(ValueError, match="at least 4"):
            mean(_vectors(3))
        with pytest.raises(ValueError, match="one size"):
            mean([*_vectors(3), torch.ones(2)])


def test_order_does_not_matter_to_the_bit_for_the_trimmed_mean() -> None:
    vectors = _vectors(8)
    assert torch.equal(trimmed_mean(vectors), trimmed_mean(vectors[::-1]))
    with pytest.raises(ValueError, match="rank"):
        flag_mean(vectors, rank=9)


# --- one bad peer of eight ---


def test_the_own_way_is_a_displacement_that_is_always_let_through() -> None:
    """From a cold start displacements grow from round to round; a huge one is cut from the first on."""
    own = torch.zeros(8)
    clip = DisplacementClip()
    clip.learn(torch.full((8,), 2.0))
    for growing in (0.01, 0.02, 0.05, 1.0, 4.0, 5.9):
        theirs = torch.full((8,), growing)
        assert clip.clip(own, theirs).vector is theirs
    early = DisplacementClip()
    early.learn(torch.full((8,), 2.0))
    clipped = early.clip(own, torch.full((8,), 1e20))
    assert clipped.incident is not None
    assert torch.allclose(clipped.vector, torch.full((8,), 6.0))


# --- DirectionTrust ---


def _trust(*peers: tuple[str, Tensor], own: Tensor) -> DirectionTrust:
    trust = DirectionTrust()
    trust.learn(own, 10)
    for peer, vector in peers:
        trust.judge(peer, vector, 10)
    return trust


@pytest.mark.parametrize("factor", [-1.0, -1e-20, -1e20])
def test_a_flipped_sign_of_any_size_is_refused(factor: float) -> None:
    own, ben, carl = _vectors(3)
    trust = _trust(("ben", ben), ("carl", carl), own=own)
    refusal = trust.judge("mallory", factor * ben, 10).refusal
    assert refusal is not None and refusal.rule == "direction" and "cosine -0." in refusal.detail
    assert trust.judge("mallory", ben, 10) == Trusted(), "it does as it should now"


def test_honest_gradients_count_as_they_are() -> None:
    own, *others = _vectors(8)
    trust = _trust(own=own)
    assert all(trust.judge(f"peer {n}", other, 10) == Trusted() for n, other in enumerate(others) for _ in range(3))


def test_what_goes_another_way_counts_less_the_farther_it_is_off() -> None:
    own, *others = _vectors(6)
    trust = _trust(*((f"peer {index}", other) for index, other in enumerate(others)), own=own)
    usual = statistics.median_low([1.0, *trust._cosines.values()])
    aside = torch.randn(300, generator=torch.Generator().manual_seed(5))
    aside -= own * (aside @ own) / (own @ own)
    aside *= own.norm() / aside.norm()
    parts = [part * usual for part in (1.0, 0.6, 0.25, 0.1, 0.0, -0.2)]
    weights = [trust.judge("mallory", aside + part * own, 10).weight for part in parts]
    assert weights == pytest.approx([1.0, 1.0, 0.5, 0.2, 0.0, 0.0], abs=0.05)


@pytest.mark.parametrize(("own_steps", "steps", "least"), [(10, 10, 1.0), (10, 40, 2.0), (40, 10, 0.25)])
def test_what_is_too_short_for_its_steps_is_lengthened_and_told_where_it_is_much(
    own_steps: float, steps: float, least: float
) -> None:
    own = _vectors(1)[0]
    trust = DirectionTrust()
    trust.learn(own, own_steps)
    assert trust.judge("ben", own * least * 1.01, steps) == Trusted()
    assert trust.judge("ben", own * least / 2, steps) == Trusted(factor=pytest.approx(2.0))
    short = trust.judge("mallory", own * least / 8, steps)
    assert short.factor == pytest.approx(8.0) and short.incident is not None and short.incident.rule == "length"


def test_one_peer_has_one_voice_and_of_two_that_differ_the_own_gradient_decides() -> None:
    own, ben = _vectors(2)
    trust = _trust(*[("mallory", -ben)] * 50, ("ben", ben), own=own)
    assert trust.judge("ben", ben, 10).refusal is None and trust.judge("mallory", -ben, 10).refusal is not None
    alone = _trust(own=own)
    assert all(alone.judge("mallory", -ben, 10) == Trusted() for _ in range(50)), "one against one: who is right?"


def test_where_most_go_the_other_way_the_own_gradient_is_no_guide() -> None:
    own, *others = _vectors(6)
    trust = _trust(*((f"peer {index}", -other) for index, other in enumerate(others)), own=own)
    assert all(trust.judge(f"peer {index}", -other, 10) == Trusted() for index, other in enumerate(others))


def test_what_has_little_in_common_counts_as_it_is() -> None:
    """Noise alone: half of the cosines are below zero. Nor is anything known without an own gradient."""
    generator = torch.Generator().manual_seed(0)
    trust = _trust(own=torch.randn(3000, generator=generator))
    noise = [torch.randn(3000, generator=generator) for _ in range(100)]
    assert all(trust.judge(f"peer {n % 7}", vector, 10) == Trusted() for n, vector in enumerate(noise))
    assert DirectionTrust().judge("ben", noise[0], 10) == Trusted()
    assert _trust(own=torch.zeros(3)).judge("ben", torch.ones(3), 10) == Trusted()


def test_the_voices_are_bounded_and_what_is_not_finite_has_none() -> None:
    own, ben = _vectors(2)
    trust = _trust(*((f"stranger {number}", ben) for number in range(500)), own=own)
    assert len(trust._cosines) == 64
    with pytest.raises(ValueError, match="not finite"):
        trust.judge("mallory", torch.full_like(ben, math.inf), 10)
    assert "mallory" not in trust._cosines
