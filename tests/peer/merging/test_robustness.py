"""`merge.robust` at work: what enters a merge, who is named, and what is kept over a restart."""

from __future__ import annotations

import json

import pytest
import torch
from codes import raises_code

from swarmtrain.algorithm.gossip import PartnerUpdate, layout_of
from swarmtrain.algorithm.robust import ClipIncident
from swarmtrain.errors import BadBytesError
from swarmtrain.peer.merging.robustness import Naming, Robustness, robust_mean

LAYOUT = layout_of([(4, 4), (4,)])
OWN = torch.ones(20)
USUAL = PartnerUpdate(OWN + 0.1, torch.full((20,), 0.1), 100)


def robustness(rule: str = "clip", *, met: bool = True, learnt: int = 40) -> tuple[Robustness, list[tuple[str, str]]]:
    told: list[tuple[str, str]] = []

    def tell(peer: str, incident: ClipIncident) -> None:
        told.append((peer, incident.rule))

    made = Robustness(rule, LAYOUT, Naming(tell), met=met)
    for _ in range(learnt):
        made.learn(USUAL.gradient, 100)
    return made, told


def test_what_is_usual_enters_as_it_is() -> None:
    clip, told = robustness()
    entered = clip.accept("ben", USUAL, OWN, 0)
    assert entered.theta is USUAL.theta and entered.gradient is USUAL.gradient and not told


def test_what_is_far_off_is_cut_and_named() -> None:
    clip, told = robustness()
    entered = clip.accept("ben", PartnerUpdate(OWN * 20, torch.full((20,), 20.0), 100), OWN, 0)
    assert not told, "not the first time"
    assert float((entered.theta - OWN).norm()) == pytest.approx(3 * float(USUAL.gradient.norm()), rel=1e-4)
    assert float(entered.gradient.abs().max()) == pytest.approx(0.3, rel=1e-4)
    for round in (0, 1, 2):
        assert not told
        clip.accept("ben", PartnerUpdate(OWN * 20, torch.full((20,), 20.0), 100), OWN, round)
    assert sorted(told) == [("ben", "displacement"), ("ben", "gradient")]


def test_who_comes_back_is_cut_and_not_named() -> None:
    clip, told = robustness()
    far, wild = OWN * 20, torch.full((20,), 20.0)
    for round in range(40):
        back = round % 4 < 2
        arrival = PartnerUpdate(far, wild, 100) if back else USUAL
        entered = clip.accept("ben", arrival, OWN, round)
        assert (entered.gradient is not arrival.gradient) is back
    assert not told


def test_who_spoils_its_gradients_alone_is_named_for_all_its_weights_are_usual() -> None:
    clip, told = robustness()
    for round in range(4):
        clip.accept("ben", PartnerUpdate(OWN + 0.1, OWN, 0), OWN, round)
        clip.accept("ben", PartnerUpdate(None, torch.full((20,), 20.0), 100), OWN, round)
    assert told == [("ben", "gradient")] * 2


def test_one_that_came_back_itself_names_nobody_before_it_has_published_enough() -> None:
    clip, told = robustness()
    wild = PartnerUpdate(None, torch.full((20,), 20.0), 100)
    for round in range(2):
        clip.accept("ben", wild, OWN, round)
    clip.comes_back()
    for _ in range(39):
        clip.learn(USUAL.gradient, 100)
    clip.accept("ben", wild, OWN, 2)
    clip.learn(USUAL.gradient, 100)
    for round in (3, 4):
        clip.accept("ben", wild, OWN, round)
    assert not told
    clip.accept("ben", wild, OWN, 5)
    assert told == [("ben", "gradient")]


def test_what_is_cut_in_the_first_rounds_is_not_told() -> None:
    clip, told = robustness(learnt=39)
    wild = PartnerUpdate(None, torch.full((20,), 20.0), 100)
    assert float(clip.accept("ben", wild, OWN, 0).gradient.abs().max()) == pytest.approx(0.3, rel=1e-4)
    clip.learn(USUAL.gradient, 100)
    for round in (1, 2):
        clip.accept("ben", wild, OWN, round)
    assert not told, "the first does not count"
    clip.accept("ben", wild, OWN, 3)
    assert told == [("ben", "gradient")]


@pytest.mark.parametrize("wild", [PartnerUpdate(OWN * 1e30, USUAL.gradient, 100), PartnerUpdate(OWN, OWN * -1e30, 100)])
def test_what_is_far_beyond_is_refused(wild: PartnerUpdate) -> None:
    for rule in ("clip", "direction", "trimmed", "flag"):
        clip, told = robustness(rule)
        with raises_code("far-from-usual", BadBytesError):
            clip.accept("ben", wild, OWN, 0)
        assert not told and clip.accept("ben", USUAL, OWN, 0).theta is USUAL.theta


def test_other_weights_are_taken_in_the_end_however_far_away_they_are() -> None:
    """The two sides of a partition that has healed: each refusal doubles the limit."""
    clip, _ = robustness()
    away = PartnerUpdate(OWN * 1e6, USUAL.gradient, 100)
    num_tries = 1
    while num_tries < 40:
        try:
            if clip.accept("ben", away, OWN, 0).theta is away.theta:
                break
        except BadBytesError:
            pass
        num_tries += 1
    assert 20 < num_tries < 25


def test_without_a_rule_nothing_is_cut() -> None:
    clip, told = robustness("none")
    wild = PartnerUpdate(OWN * 1e6, torch.full((20,), 1e6), 100)
    assert clip.accept("ben", wild, OWN, 0) is wild and not told


def test_weights_alone_bring_no_gradient_to_look_at() -> None:
    clip, told = robustness()
    entered = clip.accept("ben", PartnerUpdate(OWN + 0.1, OWN * 1e9, 0), OWN, 0)
    assert entered.tokens == 0 and not told


def test_with_weights_of_their_own_peers_meet_before_distances_count() -> None:
    clip, told = robustness(met=False)
    strange = PartnerUpdate(OWN * -10, USUAL.gradient, 100)
    assert clip.accept("ben", strange, OWN, 0).theta is strange.theta
    clip.merged(1.4)
    assert clip.accept("ben", strange, OWN, 0).theta is strange.theta
    clip.merged(0.1)
    assert clip.accept("ben", strange, OWN, 0).theta is not strange.theta and not told


def test_with_weights_of_their_own_peers_meet_before_directions_count() -> None:
    rule, _ = robustness("direction", met=False)
    rule.learn(USUAL.gradient, 100)
    turned = PartnerUpdate(None, -USUAL.gradient, 100)
    assert rule.accept("ben", turned, OWN, 0).tokens == 100
    rule.merged(0.1)
    for peer in ("carl", "dora"):
        rule.accept(peer, USUAL, OWN, 0)
    with raises_code("against-own", BadBytesError):
        rule.accept("ben", turned, OWN, 0)


def test_what_is_usual_is_kept_over_a_restart() -> None:
    clip, _ = robustness()
    clip.accept("ben", USUAL, OWN, 0)
    kept = json.loads(json.dumps({name: give() for name, give in clip.kept().items()}))
    again, told = robustness(learnt=0)
    again.restore(kept)
    entered = again.accept("ben", PartnerUpdate(OWN, torch.full((20,), 20.0), 100), OWN, 0)
    assert float(entered.gradient.abs().max()) == pytest.approx(0.3, rel=1e-4) and not told
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
    flipped = PartnerUpdate(USUAL.theta, -USUAL.gradient, 100)
    for rule in ("none", "clip", "trimmed", "flag"):
        clip, _ = robustness(rule)
        assert clip.accept("ben", USUAL, OWN, 0) and clip.accept("mallory", flipped, OWN, 0)
    gate, told = robustness("direction")
    gate.accept("ben", USUAL, OWN, 0)
    with raises_code("against-own", BadBytesError, "cosine -1"):
        gate.accept("mallory", flipped, OWN, 0)
    assert gate.accept("mallory", PartnerUpdate(USUAL.theta, -USUAL.gradient, 0), OWN, 0), (
        "weights alone have no direction"
    )
    assert gate.accept("carl", USUAL, OWN, 0) and not told


def test_a_gradient_that_comes_alone_is_clipped_and_says_nothing_of_distances() -> None:
    clip, told = robustness()
    before = list(clip.kept()["clipped_displacements"]())
    entered = clip.accept("ben", PartnerUpdate(None, torch.full((20,), 20.0), 100), OWN, 0)
    assert entered.theta is None and not told
    assert float(entered.gradient.abs().max()) == pytest.approx(0.3, rel=1e-4)
    assert list(clip.kept()["clipped_displacements"]()) == before


def test_what_entered_can_be_made_anew_of_what_came() -> None:
    """A short gradient is lengthened, which is said; one that is cut is not to be made anew."""
    rule = Robustness("direction", LAYOUT, Naming(lambda *_: None))
    for _ in range(3):
        rule.learn(torch.full((20,), 1.0), 100)
    short = PartnerUpdate(OWN, torch.full((20,), 0.3), 100)
    entered = rule.accept("ben", short, OWN, 0)
    assert entered.lengthened is not None and entered.lengthened > 2
    assert torch.equal(short.gradient * entered.lengthened, entered.gradient)
    assert rule.accept("ben", PartnerUpdate(OWN, torch.full((20,), 20.0), 100), OWN, 0).lengthened is None
    assert rule.accept("ben", USUAL, OWN, 0).lengthened is not None
