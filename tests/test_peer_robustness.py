"""`merge.robust` at work: what enters a merge, who is named, and what is kept over a restart."""

from __future__ import annotations

import json

import pytest
import torch

from swarmtrain.algorithm.gossip import Arrival, layout_of
from swarmtrain.algorithm.robust import Incident
from swarmtrain.errors import BadBytesError
from swarmtrain.peer.robustness import Robustness, robust_mean

LAYOUT = layout_of([(4, 4), (4,)])
OWN = torch.ones(20)
USUAL = Arrival(OWN + 0.1, torch.full((20,), 0.1), 100)


def robustness(rule: str = "clip", *, met: bool = True, learnt: int = 40) -> tuple[Robustness, list[tuple[str, str]]]:
    told: list[tuple[str, str]] = []

    def tell(peer: str, incident: Incident) -> None:
        told.append((peer, incident.rule))

    made = Robustness(rule, LAYOUT, tell, met=met)
    for _ in range(learnt):
        made.learn(USUAL.gradient, 100)
    return made, told


def test_what_is_usual_enters_as_it_is() -> None:
    clip, told = robustness()
    entered = clip.accept("ben", USUAL, OWN)
    assert entered.theta is USUAL.theta and entered.gradient is USUAL.gradient and not told


def test_what_is_far_off_is_cut_and_named() -> None:
    clip, told = robustness()
    entered = clip.accept("ben", Arrival(OWN * 20, torch.full((20,), 20.0), 100), OWN)
    assert told == [("ben", "displacement"), ("ben", "gradient")]
    assert float((entered.theta - OWN).norm()) == pytest.approx(3 * float(USUAL.gradient.norm()), rel=1e-4)
    assert float(entered.gradient.abs().max()) == pytest.approx(0.3, rel=1e-4)


def test_what_is_cut_in_the_first_rounds_is_not_told() -> None:
    clip, told = robustness(learnt=39)
    wild = Arrival(None, torch.full((20,), 20.0), 100)
    assert float(clip.accept("ben", wild, OWN).gradient.abs().max()) == pytest.approx(0.3, rel=1e-4) and not told
    clip.learn(USUAL.gradient, 100)
    clip.accept("ben", wild, OWN)
    assert told == [("ben", "gradient")]


@pytest.mark.parametrize("wild", [Arrival(OWN * 1e30, USUAL.gradient, 100), Arrival(OWN, OWN * -1e30, 100)])
def test_what_is_far_beyond_is_refused(wild: Arrival) -> None:
    for rule in ("clip", "direction", "trimmed", "flag"):
        clip, told = robustness(rule)
        with pytest.raises(BadBytesError, match="far beyond what is usual"):
            clip.accept("ben", wild, OWN)
        assert not told and clip.accept("ben", USUAL, OWN).theta is USUAL.theta


def test_other_weights_are_taken_in_the_end_however_far_away_they_are() -> None:
    """The two sides of a partition that has healed: each refusal doubles the limit."""
    clip, _ = robustness()
    away = Arrival(OWN * 1e6, USUAL.gradient, 100)
    num_tries = 1
    while num_tries < 40:
        try:
            if clip.accept("ben", away, OWN).theta is away.theta:
                break
        except BadBytesError:
            pass
        num_tries += 1
    assert 20 < num_tries < 25


def test_without_a_rule_nothing_is_cut() -> None:
    clip, told = robustness("none")
    wild = Arrival(OWN * 1e6, torch.full((20,), 1e6), 100)
    assert clip.accept("ben", wild, OWN) is wild and not told


def test_weights_alone_bring_no_gradient_to_look_at() -> None:
    clip, told = robustness()
    entered = clip.accept("ben", Arrival(OWN + 0.1, OWN * 1e9, 0), OWN)
    assert entered.tokens == 0 and not told


def test_with_weights_of_their_own_peers_meet_before_distances_count() -> None:
    clip, told = robustness(met=False)
    strange = Arrival(OWN * -10, USUAL.gradient, 100)
    assert clip.accept("ben", strange, OWN).theta is strange.theta
    clip.merged(1.4)
    assert clip.accept("ben", strange, OWN).theta is strange.theta
    clip.merged(0.1)
    assert clip.accept("ben", strange, OWN).theta is not strange.theta
    assert told == [("ben", "displacement")]


def test_with_weights_of_their_own_peers_meet_before_directions_count() -> None:
    rule, _ = robustness("direction", met=False)
    rule.learn(USUAL.gradient, 100)
    turned = Arrival(None, -USUAL.gradient, 100)
    assert rule.accept("ben", turned, OWN).tokens == 100
    rule.merged(0.1)
    for peer in ("carl", "dora"):
        rule.accept(peer, USUAL, OWN)
    with pytest.raises(BadBytesError, match="against the own one"):
        rule.accept("ben", turned, OWN)


def test_what_is_usual_is_kept_over_a_restart() -> None:
    clip, _ = robustness()
    clip.accept("ben", USUAL, OWN)
    kept = json.loads(json.dumps({name: give() for name, give in clip.kept().items()}))
    again, told = Robustness("clip", LAYOUT, lambda peer, incident: told.append(incident.rule)), list[str]()
    again.restore(kept)
    again.accept("ben", Arrival(OWN, torch.full((20,), 20.0), 100), OWN)
    assert told == ["gradient"]
    with pytest.raises(ValueError, match="history"):
        again.restore({name: [[1.0]] for name in kept})


def test_a_robust_mean_needs_four() -> None:
    gradients = [torch.full((20,), value) for value in (1.0, 1.0, 1.0, 100.0)]
    assert robust_mean("clip", gradients, [100] * 4) is None
    assert robust_mean("trimmed", gradients[:3], [100] * 3) is None
    mean = robust_mean("trimmed", gradients, [100] * 4)
    assert mean is not None and float(mean.max()) == 1.0
    assert robust_mean("flag", gradients, [100] * 4) is not None


@pytest.mark.parametrize("rule", ["trimmed", "flag"])
def test_parts_of_rounds_are_compared_by_their_tokens(rule: str) -> None:
    """Four that agree, after a whole round and parts of it: what comes of it is what the token-weighted mean is."""
    tokens = [400, 100, 200, 300]
    gradients = [torch.linspace(-1, 1, 20) * number / 400 for number in tokens]
    mean = robust_mean(rule, gradients, tokens)
    weighted = sum(number * gradient for number, gradient in zip(tokens, gradients, strict=True)) / sum(tokens)
    assert mean is not None and torch.allclose(mean, weighted, atol=1e-6)


def test_a_gradient_against_the_own_one_is_refused_by_direction_alone() -> None:
    flipped = Arrival(USUAL.theta, -USUAL.gradient, 100)
    for rule in ("none", "clip", "trimmed", "flag"):
        clip, _ = robustness(rule)
        assert clip.accept("ben", USUAL, OWN) and clip.accept("mallory", flipped, OWN)
    gate, told = robustness("direction")
    gate.accept("ben", USUAL, OWN)
    with pytest.raises(BadBytesError, match="against the own one: cosine -1"):
        gate.accept("mallory", flipped, OWN)
    assert gate.accept("mallory", Arrival(USUAL.theta, -USUAL.gradient, 0), OWN), "weights alone have no direction"
    assert gate.accept("carl", USUAL, OWN) and not told


def test_a_gradient_that_comes_alone_is_clipped_and_says_nothing_of_distances() -> None:
    clip, told = robustness()
    before = list(clip.kept()["clipped_displacements"]())
    entered = clip.accept("ben", Arrival(None, torch.full((20,), 20.0), 100), OWN)
    assert entered.theta is None and told == [("ben", "gradient")]
    assert float(entered.gradient.abs().max()) == pytest.approx(0.3, rel=1e-4)
    assert list(clip.kept()["clipped_displacements"]()) == before
