"""A small GPT whose tensors are divided into groups as those of an adapter are, for tests that need no adapter."""

from __future__ import annotations

from torch import nn

from swarmtrain.model.gpt import GPT, build_model
from swarmtrain.protocol.adapter_groups import tensor_name
from swarmtrain.run_model import ModelSection

NUM_GROUPS = 4


class GroupedGPT(GPT):
    """Each tensor in turn belongs to the next group."""

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        of = [(number % NUM_GROUPS, name, each) for number, (name, each) in enumerate(self.named_parameters())]
        return [(tensor_name(group, name), each) for group, name, each in sorted(of, key=lambda one: one[0])]


def grouped_model(section: ModelSection, seed: int) -> GPT:
    model = build_model(section, seed)
    model.__class__ = GroupedGPT
    return model
