"""Model cut into stages: bit-identical to the whole, built by itself, balanced."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from stage_passes import there_and_back
from torch import Tensor

from swarmtrain.model.gpt import build_model
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.model.stages import (
    Costs,
    Stage,
    balanced_boundaries,
    build_stage,
    joined_weights,
    measured_costs,
    stage_shapes,
)
from swarmtrain.run_model import ModelSection

SECTION = ModelSection(context_tokens=16, num_layers=4, width=16, num_heads=2)
EVERY_CUT = [cut for n in range(6) for cut in itertools.combinations(range(5), n)]


def _stages(boundaries: tuple[int, ...], seed: int = 3) -> list[Stage]:
    return [build_stage(shape, seed) for shape in stage_shapes(SECTION, boundaries)]


def _batch() -> Tensor:
    return torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("boundaries", EVERY_CUT, ids=str)
def test_cut_anywhere_loss_and_gradients_are_those_of_the_whole_to_the_bit(boundaries: tuple[int, ...]) -> None:
    whole, batch = build_model(SECTION, 3), _batch()
    expected = whole.loss(batch)
    expected.backward()
    stages = _stages(boundaries)
    assert there_and_back(stages, batch) == float(expected.detach())
    gradients = joined_weights({name: p.grad for name, p in stage.named_parameters()} for stage in stages)
    assert gradients.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("boundaries", [(), (0,), (1, 3), (0, 1, 2, 3, 4)], ids=str)
def test_joined_stages_are_the_model_that_was_never_built(boundaries: tuple[int, ...]) -> None:
    whole = build_model(SECTION, 3).state_dict()
    joined = joined_weights(stage.state_dict() for stage in _stages(boundaries))
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


@pytest.mark.parametrize("boundaries", EVERY_CUT, ids=str)
def test_parameters_are_counted_without_building_them(boundaries: tuple[int, ...]) -> None:
    shapes = stage_shapes(SECTION, boundaries)
    for shape in shapes:
        assert shape.num_parameters == sum(p.numel() for p in Stage(shape).parameters())
    assert sum(shape.num_parameters for shape in shapes) == num_parameters(SECTION)


@pytest.mark.parametrize("boundaries", [(2, 1), (1, 1), (-1,), (5,)], ids=str)
def test_boundaries_that_are_none_are_refused(boundaries: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend from 0 to 4"):
        stage_shapes(SECTION, boundaries)


def test_two_stages_with_one_name_are_not_joined() -> None:
    first, _ = _stages((2,))
    with pytest.raises(ValueError, match=r"blocks\.0.* not stages of one model"):
        joined_weights([first.state_dict(), first.state_dict()])


def test_more_tokens_than_the_context_are_refused_by_every_stage() -> None:
    first, last = _stages((2,))
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        first(torch.zeros((1, 17), dtype=torch.int64))
    with pytest.raises(ValueError, match="17 tokens"):
        last(torch.zeros(1, 17, 16))


# ---------------------------------------------------------------- where to cut


def _loads(boundaries: tuple[int, ...], num_layers: int, costs: Costs) -> list[float]:
    places = [0, *boundaries, num_layers]
    loads = [costs.block * (b - a) for a, b in itertools.pairwise(places)]
    loads[0] += costs.embedding
    loads[-1] += costs.head
    return loads


def test_balanced_cuts_are_as_good_as_the_best_of_all() -> None:
    rng = random.Random(0)
    for _ in range(200):
        num_layers = rng.randint(1, 6)
        num_stages = rng.randint(1, num_layers + 2)
        costs = Costs(embedding=rng.choice([0, 0.1, 2]), block=1.0, head=rng.choice([0.3, 1, 2.5, 7]))
        chosen = balanced_boundaries(num_layers, num_stages, costs)
        assert len(stage_shapes(SECTION.model_copy(update={"num_layers": num_layers}), chosen)) == num_stages
        every = itertools.combinations(range(num_layers + 1), num_stages - 1)
        best = min(max(_loads(cut, num_layers, costs)) for cut in every)
        assert max(_loads(chosen, num_layers, costs)) == pytest.approx(best)


def test_of_equal_cuts_the_most_even_one_is_taken() -> None:
    assert balanced_boundaries(6, 3, Costs(embedding=0, block=1, head=0)) == (2, 4)
    assert balanced_boundaries(12, 3, Costs(embedding=0.1, block=1, head=2)) == (4, 9)
    assert balanced_boundaries(4, 3, Costs(embedding=0, block=1, head=9)) == (2, 4)  # the head alone, the rest even


@pytest.mark.parametrize("num_stages", [0, 7])
def test_more_stages_than_parts_are_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match=r"4 blocks can be cut into 1 to 6 stages, not \d"):
        balanced_boundaries(4, num_stages, Costs(embedding=1, block=1, head=1))


def test_what_parts_cost_is_measured() -> None:
    costs = measured_costs(SECTION, 2)
    assert 0 < costs.embedding < costs.block and costs.head > 0
