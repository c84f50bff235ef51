"""Section `[pipeline]` of the run file: how a model is cut into stages, and who holds and passes on what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from swarmtrain.problems import Section, with_values

FORMATS = {
    "fp32": "4 bytes a number, exact.",
    "bf16": "2 bytes a number.",
    "int8": "1 byte a number, and a scale for each block.",
    "int4": "Half a byte a number, and a scale for each block.",
    "int2": "A quarter of a byte a number, and a scale for each block.",
}
"""Formats in which numbers travel, each with what it costs."""


class PipelineSection(Section):
    """Pipeline for a model that no volunteer holds alone: who holds which part, and what travels between them."""

    stages: int = Field(1, ge=1, le=512, description="Number of parts into which the model is cut; a volunteer holds one of them, or a few. 1: everybody holds the whole model.")  # fmt: skip
    boundaries: tuple[Annotated[int, Field(ge=0, le=512)], ...] = Field((), strict=False, description="Number of blocks before each cut, one fewer than stages, ascending; empty: the bootstrap measures where the parts cost most nearly the same.")  # fmt: skip
    activations: Literal["fp32", "bf16", "int8"] = Field(
        "bf16",
        description=with_values(
            "How activations and their gradients travel between stages.",
            {name: FORMATS[name] for name in ("fp32", "bf16", "int8")},
        ),
    )
    wiring: Literal["round-robin", "least-completion"] = Field(
        "round-robin",
        description=with_values(
            "How a driver chooses among the peers of a stage.",
            {
                "round-robin": "In turn, each as often as its measured speed allows.",
                "least-completion": "The peer that is expected to be done first.",
            },
        ),
    )
    in_flight: int = Field(0, ge=0, le=1024, description="Most microbatches that a driver has under way; 0: as many as keep the stages busy without their weights going too old.")  # fmt: skip
    balance: Literal["rates", "queues", "none"] = Field(
        "rates",
        description=with_values(
            "Which volunteer moves when one stage has become the slowest.",
            {
                "rates": "One whose move raises the rate of the slowest stage, by the speeds measured at each.",
                "queues": "One of the stage with the shortest queues goes to that with the longest, as in SWARM.",
                "none": "Nobody.",
            },
        ),
    )
    balance_every_s: float = Field(10.0, ge=1, le=3600, description="Seconds between two looks of a volunteer whether it should move.")  # fmt: skip

    @model_validator(mode="after")
    def _fits_stages(self) -> PipelineSection:
        if self.boundaries and len(self.boundaries) != self.stages - 1:
            raise ValueError(
                f"pipeline.boundaries: {len(self.boundaries)} with pipeline.stages = {self.stages}; allowed: "
                f"{self.stages - 1}, or none, and they are chosen by measurement"
            )
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"pipeline.boundaries: {list(self.boundaries)}; allowed: each larger than the one before")
        return self
