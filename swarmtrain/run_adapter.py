"""Section `[adapter]` of the run file: what is trained in place of a model's own weights."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from swarmtrain.errors import UserError
from swarmtrain.problems import Section, with_values

MOST_GROUPS = 16
"""Most groups of an adapter, as of a model's fragments."""
FILLED_ADAPTER_KEYS = ("modules", "num_parameters")
"""Keys that the bootstrap fills in, from the model of `model.base`."""
_DEFAULT_GROUPS = 4
_MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class AdapterSection(Section):
    """Adapter that is trained while the weights of `model.base` stay as they are."""

    method: Literal["none", "lora"] = Field(
        "none",
        description=with_values(
            "What is trained.",
            {
                "none": "All weights of the model.",
                "lora": "A product B A of low rank beside each of some matrices (LoRA, arXiv 2106.09685; needs the extra `finetune`). Only A and B are sent and merged.",
            },
        ),
    )
    rank: int = Field(16, ge=1, le=1024, description="Rank of each product, R: A has R rows and B has R columns.")
    alpha: float = Field(32.0, gt=0, le=65_536, description="The product is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of a product's inputs that are set to zero while training.")  # fmt: skip
    targets: tuple[str, ...] = Field((), strict=False, max_length=64, description='Names of the layers that get a product, as `peft` takes them, such as `q_proj`; or `["all-linear"]`. Empty: those that `peft` adapts in this family, or all linear layers of a family that it does not know.')  # fmt: skip
    group_rank: int = Field(0, ge=0, le=1024, description="The R components are cut into groups of this rank, which are merged apart. A weaker volunteer, or one with a slower link, trains only some of them in each round (`join --rank`). Divides `rank` into at most 16 groups. 0: a quarter of `rank`, or what divides it.")  # fmt: skip
    modules: tuple[str, ...] = Field((), strict=False, max_length=4096, description="Filled in by the bootstrap: names of the layers that get a product.")  # fmt: skip
    num_parameters: int = Field(0, ge=0, lt=2**63, description="Filled in by the bootstrap: numbers in all A and B.")

    @property
    def is_used(self) -> bool:
        """True if an adapter is trained."""
        return self.method != "none"

    @property
    def is_resolved(self) -> bool:
        """True if it is known which layers of the model are adapted."""
        return self.num_parameters > 0 and bool(self.modules)

    @property
    def rank_of_group(self) -> int:
        """Rank of each group."""
        return self.group_rank or self.rank // max(n for n in range(1, _DEFAULT_GROUPS + 1) if self.rank % n == 0)

    @property
    def num_groups(self) -> int:
        """Number of groups; 0 without an adapter."""
        return self.rank // self.rank_of_group if self.is_used else 0

    def groups_worth(self, rank: int) -> int:
        """Return how many whole groups a volunteer trains in a round that trains components worth `rank` (0: all).

        Raises UserError if there is no adapter, or not even one group has so few components.
        """
        if not rank:
            return self.num_groups
        if not self.is_used:
            raise UserError(
                f"--rank {rank}: this run trains all weights, and no adapter; leave --rank out",
                code="rank-not-possible",
            )
        if rank < self.rank_of_group:
            raise UserError(
                f"--rank {rank}: a volunteer trains whole groups, of {self.rank_of_group} components each "
                f"(adapter.group_rank); give at least {self.rank_of_group}",
                code="rank-not-possible",
            )
        return min(rank // self.rank_of_group, self.num_groups)

    @model_validator(mode="after")
    def _fits(self) -> AdapterSection:
        if not self.is_used:
            for key, field in type(self).model_fields.items():
                if getattr(self, key) != field.default:
                    raise ValueError(
                        f'adapter.{key}: has no meaning with adapter.method = "none"; allowed: with "lora"'
                    )
            return self
        if self.rank % self.rank_of_group or self.num_groups > MOST_GROUPS:
            raise ValueError(
                f"adapter.group_rank: {self.group_rank} with adapter.rank = {self.rank}; allowed: 0, or what divides "
                f"the rank into at most {MOST_GROUPS} groups"
            )
        if "all-linear" in self.targets and len(self.targets) > 1:
            raise ValueError('adapter.targets: "all-linear" and others; allowed: ["all-linear"] alone, or names')
        for key in ("targets", "modules"):
            for name in getattr(self, key):
                if name != "all-linear" and (len(name) > 200 or not _MODULE.fullmatch(name)):
                    raise ValueError(
                        f"adapter.{key}: {name!r} is no name of a layer; allowed: letters, digits and underscores, "
                        "with dots between, such as q_proj"
                    )
        return self
