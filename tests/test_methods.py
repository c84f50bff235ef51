"""The merge methods' objects fit the run file that they are named in."""

from __future__ import annotations

import typing

import pytest

from swarmtrain.methods import METHODS, MergeMethod, methods_of_keys
from swarmtrain.peer.exchange import SwarmExchange, exchange_of
from swarmtrain.peer.merge_costs import MergeCosts, costs_of
from swarmtrain.rehearsal import LinksSection
from swarmtrain.run import MergeSection, parse_run
from swarmtrain.simulate.living import Machines, lived


def test_each_is_found_by_its_own_name() -> None:
    allowed = typing.get_args(MergeSection.model_fields["method"].annotation)
    assert [method.name for method in METHODS.values()] == list(METHODS) == list(allowed)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_keys_and_defaults_are_those_of_the_run_file(method: MergeMethod) -> None:
    assert method.keys <= set(MergeSection.model_fields)
    section = MergeSection.model_validate({"method": method.name})
    assert {key: getattr(section, key) for key in method.defaults} == dict(method.defaults)
    assert section.kind is method
    others = {key for other in METHODS.values() if other is not method for key in other.defaults} - set(method.defaults)
    assert all(getattr(section, key) == MergeSection.model_fields[key].default for key in others)


def test_keys_of_some_methods_name_those_that_read_them() -> None:
    assert methods_of_keys()["theta_format"] == ("gossip", "server")
    assert methods_of_keys()["share_above"] == ("diloco",)
    assert "inner_steps" not in methods_of_keys()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_its_parts_are_there(method: MergeMethod) -> None:
    run = parse_run(f'run.total_tokens = 1_000_000\nmerge.method = "{method.name}"', "a test")
    assert issubclass(exchange_of(method), SwarmExchange)
    assert isinstance(costs_of(run), MergeCosts)
    found = lived(run, Machines(step_s=(0.5, 0.5)), LinksSection(), seed=0)
    assert len(found.round_s) == 2
