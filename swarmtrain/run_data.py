"""Section `[data]` of the run file: the text of a run."""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from swarmtrain.problems import Section, with_values

LEAST_HELD_OUT_BYTES = 4096
"""Least held-out text of each of several sources: a loss on less says little."""

_KEYS_OF_SOURCES = {
    "paths": ("text", "jsonl", "parquet"),
    "format": ("jsonl", "parquet", "datasets"),
    "field": ("jsonl", "parquet", "datasets"),
    "dataset": ("datasets",),
    "subset": ("datasets",),
    "split": ("datasets",),
    "streaming": ("datasets",),
}


class SourceKeys(Section):
    """Keys that say where text comes from."""

    place: ClassVar[str] = ""
    """Section of these keys and a dot, for messages; empty in a table of a list, which messages name by its number."""

    source: Literal["python-stdlib", "text", "jsonl", "parquet", "datasets"] = Field(
        "python-stdlib",
        description=with_values(
            "Where the text comes from.",
            {
                "python-stdlib": "The sources of Python's own standard library, which every machine has.",
                "text": "Text files. Those that end with `.gz` or `.zst` (needs the extra `zstd`) are decompressed as they are read.",
                "jsonl": "Files with one JSON object a line; compressed ones as with `text`.",
                "parquet": "A column of Parquet files (needs the extra `parquet`).",
                "datasets": "A data set of the Hugging Face hub, or a folder of one (needs the extra `datasets`).",
            },
        ),
    )
    paths: tuple[str, ...] = Field((), strict=False, description='For "text", "jsonl" and "parquet": files or globs (`**` too) below the run file\'s folder; on a volunteer, below `--data`. Never absolute, never with `..`.')  # fmt: skip
    format: Literal["text", "chat", "prompt-completion"] = Field(
        "text",
        description=with_values(
            'For "jsonl", "parquet" and "datasets": what a row holds, and what of it is learnt.',
            {
                "text": "A text, all of which is learnt.",
                "chat": "A conversation, a list of `{role, content}`, written by the tokenizer's chat template with the row's `tools`, if it has some; the assistant's turns are learnt.",
                "prompt-completion": "A `prompt` and a `completion`, of which the completion is learnt.",
            },
        ),
    )
    field: str = Field(
        "text",
        min_length=1,
        description='For "jsonl", "parquet" and "datasets": the field or column that holds the text; with data.format = "chat" the conversation, and the default is `messages`.',
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

    @property
    def has_samples(self) -> bool:
        """True if a row is a sample, of which only a part is learnt, and not a text."""
        return self.format != "text"

    @property
    def is_streamed(self) -> bool:
        """True if the text is read while training, so that its length is not known."""
        return self.streaming and self.source == "datasets"

    @model_validator(mode="before")
    @classmethod
    def _field_of_conversations(cls, data: Any) -> Any:
        is_chat = isinstance(data, dict) and data.get("format") == "chat"
        return {"field": "messages", **data} if is_chat else data

    def _check_source(self) -> None:
        """Raise ValueError unless each key fits the source."""
        place = self.place
        if self.format == "prompt-completion" and self.field != type(self).model_fields["field"].default:
            raise ValueError(
                f'{place}field: has no meaning with {place}format = "prompt-completion", whose fields are prompt and '
                "completion; allowed: with other formats"
            )
        for key, sources in _KEYS_OF_SOURCES.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.source not in sources:
                wanted = " or ".join(f'"{source}"' for source in sources)
                raise ValueError(
                    f'{place}{key}: has no meaning with {place}source = "{self.source}"; allowed: with {wanted}'
                )
        for key in ("paths", "dataset"):
            if self.source in _KEYS_OF_SOURCES[key] and not getattr(self, key):
                raise ValueError(f'{place}{key}: missing; {place}source = "{self.source}" needs it')
        for key in ("subset", "split"):
            if (name := getattr(self, key)) and not re.fullmatch(r"\w[^/\\<>|?*]*", name):
                raise ValueError(
                    f"{place}{key}: {name!r} is no name; allowed: one that begins with a letter or digit, without / \\ < > "
                    "| ? *"
                )
        if "" in self.paths:
            raise ValueError(f"{place}paths: contains an empty string; allowed: files or globs")


class _NamedPart(Section):
    name: str = Field(min_length=1, max_length=32, pattern=r"^[a-z0-9][a-z0-9-]*$", json_schema_extra={"allowed": "up to 32 lower-case letters a to z, digits and hyphens, the first no hyphen"}, description="A short name, by which the held-out loss on this source is shown.")  # fmt: skip
    weight: float = Field(1.0, gt=0, le=1_000_000, description="Share of the sequences that come from this source, relative to the other sources' weights.")  # fmt: skip


class DataSource(SourceKeys, _NamedPart):
    """One of several sources of text, of which each batch takes sequences by weight."""

    @model_validator(mode="after")
    def _fits(self) -> DataSource:
        self._check_source()
        return self


class DataSection(SourceKeys):
    """Text that the model learns from, and text that it is judged by."""

    place = "data."

    shards: int = Field(64, ge=0, le=1024, description='With merge.method = "gossip": number of shards of the data, fewer if a round of merge.inner_steps would read one more than once; a peer takes each round from the shard that has been seen least, of each source. 0: from everywhere. Streamed data have none.')  # fmt: skip
    held_out_bytes: int = Field(65_536, ge=1024, le=4_194_304, description="Size of the held-out text, in bytes, but at most an eighth of the data; the bootstrap cuts it once, and it travels with the run. Of several sources each gives a part in proportion to its weight, but at least 4,096 bytes.")  # fmt: skip
    packing: Literal["stream", "documents"] = Field(
        "stream",
        description=with_values(
            "What the sequences of training are cut from.",
            {
                "stream": "The text as it runs on, from document to document.",
                "documents": "Documents that know nothing of each other: a sequence begins with one, and attention stays inside each. Long ones are cut into pieces. Not for pipelines.",
            },
        ),
    )
    sources: tuple[DataSource, ...] = Field((), strict=False, max_length=64, json_schema_extra={"allowed": "tables `[[data.sources]]`"}, description="Several sources of text instead of the one that the keys above describe; each has a name, a weight and keys of its own.")  # fmt: skip

    @property
    def mixture(self) -> tuple[DataSource, ...]:
        """Sources of the text; without `sources`, the one that the section's own keys describe, which has no name."""
        if self.sources:
            return self.sources
        own = {key: getattr(self, key) for key in SourceKeys.model_fields}
        return (DataSource.model_construct(name="", weight=1.0, **own),)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the sequences that each source gives; together 1."""
        total = math.fsum(source.weight for source in self.mixture)
        return tuple(source.weight / total for source in self.mixture)

    @property
    def held_out_limits(self) -> tuple[int, ...]:
        """Bytes of held-out text that each source gives at most: in proportion to the weights, and
        `LEAST_HELD_OUT_BYTES` or more where there are several."""
        sources = self.mixture
        if len(sources) == 1:
            return (self.held_out_bytes,)
        limits = dict.fromkeys(range(len(sources)), 0)
        while True:  # raising one to the least lowers what is left for the others
            others = [number for number, limit in limits.items() if limit != LEAST_HELD_OUT_BYTES]
            left = self.held_out_bytes - LEAST_HELD_OUT_BYTES * (len(limits) - len(others))
            total = math.fsum(sources[number].weight for number in others)
            limits |= {number: int(left * (sources[number].weight / total)) for number in others}
            small = [number for number in others if limits[number] < LEAST_HELD_OUT_BYTES]
            if not small:
                return tuple(limits.values())
            limits |= dict.fromkeys(small, LEAST_HELD_OUT_BYTES)

    @model_validator(mode="after")
    def _fits(self) -> DataSection:
        if not self.sources:
            self._check_source()
            return self
        for key in SourceKeys.model_fields:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"data.{key}: has no meaning beside [[data.sources]]; allowed: in each [[data.sources]]"
                )
        names = [source.name for source in self.sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"data.sources: two are called {twice}; allowed: a name of its own for each")
        if self.held_out_bytes < (least := LEAST_HELD_OUT_BYTES * len(names)) and len(names) > 1:
            raise ValueError(
                f"data.held_out_bytes: {self.held_out_bytes} with {len(names)} sources; allowed: at least {least} "
                f"({LEAST_HELD_OUT_BYTES} for each)"
            )
        return self
