"""Cutting a model into fragments, and joining them again."""

from __future__ import annotations

import pytest
import torch

from swarmtrain.algorithm.fragments import fragments_of, whole_of
from swarmtrain.algorithm.gossip import layout_of

LAYOUT = layout_of([(7, 3), (5,), (2, 2), (1,), (9, 4), (0,), (6, 2)])


@pytest.mark.parametrize("number", [1, 2, 3, 7, 50])
def test_each_number_is_in_one_fragment(number: int) -> None:
    fragments, vector = fragments_of(LAYOUT, number), torch.arange(float(LAYOUT.size))
    assert len(fragments) == min(number, 5), "of six one would have very few numbers"
    assert sorted(tensor for fragment in fragments for tensor in fragment.tensors) == list(range(len(LAYOUT.slices)))
    parts = [fragment.of(vector) for fragment in fragments]
    assert [part.numel() for part in parts] == [fragment.layout.size for fragment in fragments]
    assert torch.equal(whole_of(fragments, parts), vector)
    for fragment, part in zip(fragments, parts, strict=True):
        assert fragment.layout.corrected == tuple(LAYOUT.corrected[tensor] for tensor in fragment.tensors)
        for tensor, place in zip(fragment.tensors, fragment.layout.slices, strict=True):
            assert torch.equal(part[place], vector[LAYOUT.slices[tensor]])


def test_one_fragment_is_the_model_itself() -> None:
    (fragment,), vector = fragments_of(LAYOUT, 1), torch.zeros(LAYOUT.size)
    assert fragment.is_whole and fragment.of(vector) is vector and whole_of([fragment], [vector]) is vector


def test_they_are_about_equally_large_where_tensors_are() -> None:
    fragments = fragments_of(layout_of([(10, 10)] * 13), 4)
    assert sorted(fragment.layout.size for fragment in fragments) == [300, 300, 300, 400]
