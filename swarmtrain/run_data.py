"""Section `[data]` of the run file: the text of a run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from swarmtrain.problems import Section, with_values

__all__ = ["DataSection"]

_KEYS_OF_SOURCES = {
    "paths": ("text", "jsonl", "parquet"),
    "field": ("jsonl", "parquet", "datasets"),
    "dataset": ("datasets",),
    "subset": ("datasets",),
    "split": ("datasets",),
    "streaming": ("datasets",),
}


class DataSection(Section):
    """Text that the model learns from, and text that it is judged by."""

    source: Literal["python-stdlib", "text", "jsonl", "parquet", "datasets"] = Field(
        "python-stdlib",
        description=with_values(
            "Where the text comes from.",
            {
                "python-stdlib": "The sources of Python's own standard library, which every machine has.",
                "text": "Text files.",
                "jsonl": "Files with one JSON object a line.",
                "parquet": "A column of Parquet files (needs the extra `parquet`).",
                "datasets": "A data set of the Hugging Face hub, or a folder of one (needs the extra `datasets`).",
            },
        ),
    )
    paths: tuple[str, ...] = Field((), strict=False, description='For "text", "jsonl" and "parquet": files or globs (`**` too) below the run file\'s folder; on a volunteer, below `--data`. Never absolute, never with `..`.')  # fmt: skip
    field: str = Field(
        "text",
        min_length=1,
        description='For "jsonl", "parquet" and "datasets": the field or column that holds the text.',
    )
    dataset: str = Field(
        "",
        description='For "datasets": `owner/name` of the hub, or a folder below the run file\'s; on a volunteer, below `--data`. The bootstrap fixes the commit; code of a data set is never run.',
    )
    subset: str = Field(
        "", max_length=200, description='For "datasets": the configuration\'s name; empty for the default one.'
    )
    split: str = Field("train", min_length=1, max_length=200, description='For "datasets": the split to train on.')
    streaming: bool = Field(False, description='For "datasets": read while training rather than download first.')
    shards: int = Field(64, ge=0, le=1024, description='With merge.method = "gossip": number of shards of the data, fewer if a round of merge.inner_steps would read one more than once; a peer takes each round from the shard that has been seen least. 0: from everywhere. Streamed data have none.')  # fmt: skip
    held_out_bytes: int = Field(65_536, ge=1024, le=4_194_304, description="Size of the held-out text, in bytes; the bootstrap cuts it once, and it travels with the run.")  # fmt: skip

    @model_validator(mode="after")
    def _fits_source(self) -> DataSection:
        for key, sources in _KEYS_OF_SOURCES.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.source not in sources:
                wanted = " or ".join(f'"{source}"' for source in sources)
                raise ValueError(
                    f'data.{key}: has no meaning with data.source = "{self.source}"; allowed: with {wanted}'
                )
        for key in ("paths", "dataset"):
            if self.source in _KEYS_OF_SOURCES[key] and not getattr(self, key):
                raise ValueError(f'data.{key}: missing; data.source = "{self.source}" needs it')
        for key in ("subset", "split"):
            if (name := getattr(self, key)) and not re.fullmatch(r"\w[^/\\<>|?*]*", name):
                raise ValueError(
                    f"data.{key}: {name!r} is no name; allowed: one that begins with a letter or digit, without / \\ < > "
                    "| ? *"
                )
        if "" in self.paths:
            raise ValueError("data.paths: contains an empty string; allowed: files or globs")
        return self
