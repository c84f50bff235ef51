"""Run file: what is trained, how, and until when.

A frozen pydantic model that the whole package reads. A person writes TOML with the keys that differ from the defaults;
the bootstrap writes out every default, adds `[published]`, and hands out those exact bytes. Their SHA-256 is the run's
identity: peers of different runs never mix.

Each field carries a sentence with its unit; `docs/run-file.md` is generated from them. Every problem is one line that
names the file, the key and the allowed values. Published bytes come from another peer: they are hashed before they are
read, and nothing in them reaches a terminal unescaped.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from swarmtrain import __version__
from swarmtrain.compatibility import PROTOCOL, UPDATE, protocol_mismatch
from swarmtrain.errors import BadBytesError, NewerRunError, RunFileError
from swarmtrain.methods import METHOD_NAME, METHODS, GradientFormat, MergeMethod, method_named, methods_of_keys
from swarmtrain.packages import NAME
from swarmtrain.problems import Section, problems_in_words, read_toml, with_values
from swarmtrain.run_adapter import FILLED_ADAPTER_KEYS, AdapterSection
from swarmtrain.run_batch import TARGETS, BatchTarget, TargetTokens
from swarmtrain.run_data import DataSection, SourceKeys
from swarmtrain.run_model import BOOTSTRAP_MODEL_KEYS, PUBLISHED_BASE, ModelSection
from swarmtrain.run_pipeline import FORMATS, PipelineSection
from swarmtrain.words import one_line

MAX_RUN_FILE_BYTES = 65_536
MAX_TOKENIZER_BYTES = 67_108_864
"""Largest tokenizer that a run pins: the largest public ones have a third of it."""
_MOST_STEP_BATCHES = 4
"""Most batches in one step of a stage: two, and what was in flight when they were full."""
_MOST_IN_STEP = 1.5
"""Same bound as `algorithm.pacing.most_inner_steps`, which this layer may not import."""
EXAMPLE = "examples/stdlib-gpt.toml"
CHUNK_BYTES = 256 * 1024
"""Bytes in one message of a transfer: the fastest size measured over hivemind's streams."""


_NAME = r"^[a-z0-9][a-z0-9-]*$"
_NAMES = "up to 64 lower-case letters a to z, digits and hyphens, the first no hyphen"


class RunSection(Section):
    """Name of the run, and when it ends."""

    name: str = Field("stdlib-gpt", min_length=1, max_length=64, pattern=_NAME, json_schema_extra={"allowed": _NAMES}, description="A short name people recognise: lower-case letters, digits and hyphens.")  # fmt: skip
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the initial weights and of every random choice of the run.")  # fmt: skip
    total_tokens: int = Field(description="The run ends when its peers together have trained on this many tokens; of samples those count that are to be learnt.", gt=0, lt=2**63)  # fmt: skip

    show_invite: bool = Field(False, description="Show the invite to everyone who sees a page of the swarm (`--web`), as text and QR code; without it only the peer's own user sees it there.")  # fmt: skip

    @field_validator("name", mode="before")
    @classmethod
    def _named(cls, name: object) -> object:
        if not isinstance(name, str) or (re.fullmatch(_NAME, name) and len(name) <= 64):
            return name
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        near = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:64]
        shown = json.dumps(name if len(name) <= 60 else name[:57] + "...", ensure_ascii=False)
        raise ValueError(f"{one_line(shown)} is refused; allowed: {_NAMES}" + (f", such as {near}" if near else ""))


class InnerSection(Section):
    """Inner optimizer, AdamW, and its schedule by the run's tokens."""

    batch_sequences: int = Field(16, ge=1, le=1_048_576, description="Sequences in the batch of one inner step.")
    microbatch_sequences: int = Field(0, ge=0, description="Sequences computed at once; gradients are accumulated to the batch. 0: all at once. Lower it when memory is short; a peer short of memory takes fewer by itself.")  # fmt: skip
    learning_rate: float = Field(3e-3, gt=0, le=10, description="Peak learning rate.")
    weight_decay: float = Field(0.1, ge=0, le=10, description="Decoupled weight decay of the matrices; norms have none.")  # fmt: skip
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment, per step.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of AdamW's second moment, per step.")
    gradient_clip: float = Field(1.0, gt=0, description="The gradient's norm is clipped to this.")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of the run's tokens over which the learning rate rises.")  # fmt: skip
    floor_fraction: float = Field(0.1, ge=0, le=1, description="The cosine ends at this share of the peak.")
    precision: Literal["any", "fp32", "bf16", "fp16"] = Field(
        "any",
        description=with_values(
            "Precision in which products are computed; weights, optimizer and all that peers exchange are fp32.",
            {
                "any": "Each machine takes what is fastest on it (`--precision`).",
                "fp32": "32 bits on every machine.",
                "bf16": "16 bits with the range of fp32, on every machine.",
                "fp16": "16 bits with a smaller range and a scaled loss, on every machine; whole models only.",
            },
        ),
    )

    @model_validator(mode="after")
    def _divides(self) -> InnerSection:
        if self.microbatch_sequences and self.batch_sequences % self.microbatch_sequences:
            raise ValueError(
                f"inner.microbatch_sequences: {self.microbatch_sequences} does not divide inner.batch_sequences = "
                f"{self.batch_sequences}; allowed: 0 or a divisor of it"
            )
        return self


_OTHER_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {("init", "own"): {"robust": "clip", "num_weights": 3}}
"""Defaults of other keys that a key's value replaces, as a method replaces them (`MergeMethod`); published like those."""

METHODS_OF_KEYS = methods_of_keys()
"""Map a key of `[merge]` that not every method has to the methods that do. Other methods publish without it."""

_OUR_RULES = ("none", "clip", "direction", "trimmed", "flag")
_MERGE_RULES = ", ".join(f'"{rule}"' for rule in _OUR_RULES) + ' or "PACKAGE:RULE" of an installed package'
_MERGE_RULE = rf"^({'|'.join(_OUR_RULES)}|{NAME})$"
_METHODS = " or ".join(f'"{name}"' for name in METHODS) + ' or "PACKAGE:METHOD" of an installed package'
_Format = Literal["fp32", "bf16", "int8", "int4"]
_FormatOrAuto = Literal["auto", "fp32", "bf16", "int8", "int4", "int2"]


def _kind_of(merge: dict[str, Any]) -> MergeMethod | None:
    """Return the merge method that the table names; None if it names none, or one that is not installed."""
    try:
        return method_named(merge["method"])
    except (KeyError, TypeError, RunFileError):
        return None


class MergeSection(Section):
    """How peers merge their work into one model."""

    method: str = Field(
        "gossip",
        pattern=METHOD_NAME,
        json_schema_extra={"allowed": _METHODS},
        description=with_values(
            "How peers merge.",
            {
                **{method.name: method.says for method in METHODS.values()},
                "PACKAGE:METHOD": "The method that an installed package brings (docs/simulating.md).",
            },
        ),
    )
    inner_steps: int = Field(25, ge=1, le=1_000_000, description='Inner steps of one round (H). With "batch": the batches of inner.batch_sequences that make the large batch, whoever computes them; it follows from merge.target_tokens if that is a number, and is the first and smallest batch if that is "auto".')  # fmt: skip
    outer_learning_rate: float = Field(0.7, gt=0, le=10, description="Learning rate of the outer Nesterov step.")
    outer_momentum: float = Field(0.8, ge=0, lt=1, description='Momentum of the outer Nesterov step; with "diloco" the default is 0.9.')  # fmt: skip
    momentum_ramp_rounds: int = Field(0, ge=0, description="Rounds over which the outer momentum rises linearly from 0; 0: no rise.")  # fmt: skip
    pacing: bool = Field(True, description='Give slower peers fewer inner steps, so that rounds take equally long; with "gossip" they also end at the same moment, for which a peer takes up to half as many steps more. With "diloco" the default is false.')  # fmt: skip
    share_above: int = Field(5, ge=1, description='With "diloco" and "batch": if a roster has more peers than this, each averages one share of the parameters, and the others pull the result.')  # fmt: skip
    min_peers: int = Field(1, ge=1, le=10_000, description="Round 0 begins when this many volunteers are present.")
    round_limit_s: float = Field(600.0, gt=0, description='Longest time of a round, in seconds; with "diloco" the round is closed then, and with "batch" the step is taken then with what is there.')  # fmt: skip
    silence_s: float = Field(5.0, gt=0, description='With "diloco" and "batch": a signer that is silent for this long after a round\'s end is passed over, in seconds.')  # fmt: skip
    init: Literal["common", "own"] = Field(
        "common",
        description=with_values(
            'With "gossip": which weights a peer begins with.',
            {
                "common": "The same random weights everywhere.",
                "own": "Random weights of each peer's own, which variance-corrected averaging brings together.",
            },
        ),
    )
    num_partners: int = Field(8, ge=1, le=64, description='With "gossip": number of partners whose pseudo-gradients a peer pulls in a round; fewer where the link carries no more (P).')  # fmt: skip
    num_weights: int = Field(1, ge=1, le=64, description='With "gossip": number of partners whose weights, which are larger, a peer pulls in a round; with merge.init = "own" the default is 3.')  # fmt: skip
    publications_per_round: int = Field(32, ge=1, le=64, description='With "gossip": number of parts of a round; a peer publishes after each of them, from the middle of the way from one fragment\'s merge to the next\'s on. It publishes after each second, fourth or eighth part if that would be more than once a second or cost training time, but at least eight times a round (F).')  # fmt: skip
    fragments: int = Field(4, ge=1, le=16, description='With "gossip": number of fragments of the model, each merged once a round, one after the other, so that less of what partners train is lost while it is pulled (N).')  # fmt: skip
    partners: Literal["uniform", "freshest", "longest-unmerged", "random-permutation"] = Field(
        "uniform",
        description=with_values(
            'With "gossip": how a peer chooses its partners among those present.',
            {
                "uniform": "At random, each as likely as the others.",
                "freshest": "First the peer that advertises the most tokens not merged yet.",
                "longest-unmerged": "First the peer whose last merge was longest ago, and before it peers never merged.",
                "random-permutation": "Each peer once, in random order, before any of them again.",
            },
        ),
    )
    theta_format: _Format = Field(
        "int8",
        description=with_values(
            'With "gossip" and "server": how weights travel.',
            {name: FORMATS[name] for name in get_args(_Format)},
        ),
    )
    gradient_format: _FormatOrAuto = Field(
        "auto",
        description=with_values(
            'With "gossip" and "server": how pseudo-gradients travel. With "batch": how gradients travel, "fp32" (the default), "bf16" or "int8"; what rounding loses is added to the next one.',
            {
                "auto": 'The format int2; with "gossip" int4 where a round then brings no more bytes than in a large swarm, and takes at most a fifth of the round.',
                **{name: FORMATS[name] for name in get_args(_FormatOrAuto)[1:]},
            },
        ),
    )
    robust: str = Field(
        "direction",
        pattern=_MERGE_RULE,
        json_schema_extra={"allowed": _MERGE_RULES},
        description=with_values(
            'With "gossip" and "server": what limits the harm that one bad partner can do. With "server", and with merge.init = "own", the default is "clip".',
            {
                "none": "Nothing beyond the checks of sizes, hashes and finite numbers.",
                "clip": "Cut pseudo-gradients and distances between weights at three times what is usual.",
                "direction": 'Clip, and count a pseudo-gradient as far as it goes the way of the peer\'s own; one with a turned sign is refused. Only with "gossip".',
                "trimmed": 'Clip, and take the trimmed mean of four or more pseudo-gradients, number by number. Only with "gossip".',
                "flag": 'Clip, and take the Flag mean of four or more pseudo-gradients, which outvotes outliers. Only with "gossip".',
                "PACKAGE:RULE": "Clip, and take the mean that an installed package brings (docs/simulating.md).",
            },
        ),
    )
    max_staleness_rounds: int = Field(8, ge=1, le=1_000_000, description='With "gossip": a publication that is further behind the median round is not merged, and a peer that is further behind takes the others\' weights. With "server": a pseudo-gradient that began from weights further behind is not taken in.')  # fmt: skip
    buffer_arrivals: int = Field(0, ge=0, le=10_000, description='With "server": number of arrivals after which the outer momentum is refreshed (N); 0: as many as there are volunteers.')  # fmt: skip
    momentum_share: float = Field(0.0, ge=0, le=1, description='With "server": share of the momentum that each arrival applies (c), at most 1 / N; 0: the momentum is applied only when it is refreshed.')  # fmt: skip
    target_tokens: TargetTokens = Field(
        0,
        json_schema_extra={"allowed": TARGETS},
        description=with_values(
            'With "batch": tokens of the large batch; the step is taken once all volunteers together have read about so many, learnt or not. 0: what merge.inner_steps inner steps read.',
            {
                "auto": "The first batches have what merge.inner_steps inner steps read, and later ones a fiftieth of the run's tokens so far."
            },
        ),
    )
    max_wait_s: float = Field(10.0, gt=0, le=3600, description='With "batch": once the batch is there, how long the step waits for volunteers that have not delivered their gradient, in seconds; then it is taken without them, and what they computed for it does not count.')  # fmt: skip
    delay_steps: int = Field(0, ge=0, le=1, description='With "batch": 1 has volunteers compute gradients for the next batch, at the old weights, while the mean of this one is made and travels.')  # fmt: skip
    optimizer: Literal["adamw", "lamb"] = Field(
        "adamw",
        description=with_values(
            'With "batch": the step that all volunteers take, with the constants of [inner].',
            {
                "adamw": "AdamW.",
                "lamb": "LAMB, whose step in each matrix is as long as the matrix's weights; for very large batches, and not for an adapter.",
            },
        ),
    )

    @property
    def kind(self) -> MergeMethod:
        """Description of the merge method."""
        return method_named(self.method)

    @property
    def gradient_formats(self) -> tuple[GradientFormat, ...]:
        """Formats that a pseudo-gradient may have, the coarsest first."""
        return self.kind.auto_formats if self.gradient_format == "auto" else (self.gradient_format,)

    @property
    def roster_format(self) -> GradientFormat:
        """Format of what a roster names: with synchronous rounds of pseudo-gradients always fp32."""
        return self.gradient_formats[0] if self.kind.common_step else "fp32"

    @property
    def num_fragments(self) -> int:
        """Number of fragments in which the model is merged."""
        return self.fragments if self.kind.reads("fragments") else 1

    @model_validator(mode="before")
    @classmethod
    def _other_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kind = _kind_of(data)
        found: dict[str, Any] = {} if kind is None else dict(kind.defaults)
        for (key, value), defaults in _OTHER_DEFAULTS.items():
            found |= defaults if data.get(key) == value else {}
        return found | data

    @field_validator("method")
    @classmethod
    def _is_here(cls, name: str) -> str:
        try:
            method_named(name)
        except RunFileError as error:
            raise ValueError(*error.problems) from None
        return name

    @model_validator(mode="after")
    def _fits_method(self) -> MergeSection:
        unread = {key: methods for key, methods in METHODS_OF_KEYS.items() if not self.kind.reads(key)}
        for key in sorted(self.kind.unread):
            unread[key] = tuple(name for name, method in METHODS.items() if key not in method.unread)
        for key, methods in unread.items():
            if getattr(self, key) != self.kind.defaults.get(key, type(self).model_fields[key].default):
                allowed = " or ".join(f'"{method}"' for method in methods)
                raise ValueError(
                    f'merge.{key}: has no meaning with merge.method = "{self.method}"; allowed: with {allowed}'
                )
        if self.kind.formats and self.gradient_format not in self.kind.formats:
            allowed = ", ".join(f'"{name}"' for name in self.kind.formats)
            raise ValueError(
                f'merge.gradient_format: "{self.gradient_format}" with merge.method = "{self.method}"; allowed: {allowed}'
            )
        if self.kind.has_server and self.robust not in ("none", "clip"):
            raise ValueError(
                f'merge.robust: "{self.robust}" compares several gradients, and with merge.method = "{self.method}" they '
                'arrive one by one; allowed: "none" or "clip"'
            )
        if self.momentum_share and not self.momentum_share * self.buffer_arrivals <= 1 <= self.buffer_arrivals:
            raise ValueError(
                f"merge.momentum_share: {self.momentum_share:g} with merge.buffer_arrivals = {self.buffer_arrivals}; "
                "allowed: at most 1 / merge.buffer_arrivals, which must be given then"
            )
        return self


class EvaluationSection(Section):
    """Measurement of the held-out loss while training."""

    every_rounds: int = Field(0, ge=0, description="Each volunteer measures the held-out loss after every so many rounds; 0 for only at the end, and one volunteer now and then while no bootstrap does.")  # fmt: skip
    batch_sequences: int = Field(16, ge=1, le=1_048_576, description="Sequences evaluated at once.")


class NetworkSection(Section):
    """Limits that keep one peer from burdening another."""

    max_readers: int = Field(4, ge=1, le=32, description="Pulls of snapshots served at once, and four times as many of what a synchronous round averages; the next reader is told BUSY.")  # fmt: skip
    presence_ttl_s: float = Field(30.0, ge=3, le=3600, description="A presence record expires after this, in seconds; it is renewed three times as often.")  # fmt: skip
    call_limit_s: float = Field(5.0, gt=0, le=600, description="A small call to another peer may take this long, in seconds.")  # fmt: skip
    stall_limit_s: float = Field(10.0, gt=0, le=600, description="A transfer that brings nothing for this long is given up, in seconds.")  # fmt: skip
    min_pull_bytes_per_s: float = Field(32_768, ge=0, description="A source of a transfer that delivers less, averaged over 30 s and more of waiting for it, is given up, in bytes per second; slower uplinks, shared by `max_readers`, cannot take part.")  # fmt: skip
    archive_every_s: float = Field(60.0, ge=1, description="The bootstrap archives the run's state this often, in seconds; that of a small model in a short run up to 12 times as often, so that its held-out loss becomes a curve.")  # fmt: skip
    up_mbit: float = Field(0.0, ge=0, le=100_000, description="What a peer sends at most, in Mbit/s, unless it is started with `--up`; 0 for no limit. With little, it serves fewer readers at once.")  # fmt: skip
    down_mbit: float = Field(0.0, ge=0, le=100_000, description="What a peer receives from others at most, in Mbit/s, unless it is started with `--down`; 0 for no limit. Models and data sets of the Hugging Face hub come unlimited.")  # fmt: skip

    @property
    def least_bytes_per_s(self) -> float:
        """Bytes per second below which a transfer is given up, on average or because one chunk takes too long."""
        return max(self.min_pull_bytes_per_s, CHUNK_BYTES / self.stall_limit_s)

    @property
    def least_mbit(self) -> float:
        """Smallest limit of a link that a peer accepts: twice `least_bytes_per_s`, in Mbit/s."""
        return math.ceil(min(16e-6 * self.least_bytes_per_s, 1e9) * 100) / 100

    @model_validator(mode="after")
    def _keeps_transfers(self) -> NetworkSection:
        for key in ("up_mbit", "down_mbit"):
            if 0 < getattr(self, key) < self.least_mbit:
                raise ValueError(
                    f"network.{key}: {getattr(self, key):g} is too little for network.min_pull_bytes_per_s = "
                    f"{self.min_pull_bytes_per_s:g} and network.stall_limit_s = {self.stall_limit_s:g}; allowed: 0 (no "
                    f"limit), or at least {self.least_mbit:g}"
                )
        return self


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PublishedSection(Section):
    """Facts that the bootstrap adds when it publishes the run; nobody writes this section by hand."""

    created: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)$", description="When the run was published, ISO 8601, UTC: the same run file published twice is two runs.")  # fmt: skip
    swarmtrain: str = Field(
        pattern=r"^[0-9A-Za-z.+-]{1,32}$", description="The version of swarmtrain that published it."
    )
    held_out_sha256: _Sha256 = Field(description="SHA-256 of the held-out text.")
    held_out_bytes: int = Field(gt=0, le=4_194_304, description="Its size in bytes.")
    tokenizer_sha256: _Sha256 | None = Field(None, description="SHA-256 of the tokenizer; absent with bytes.")
    tokenizer_bytes: int = Field(0, ge=0, le=MAX_TOKENIZER_BYTES, description="Its size in bytes.")
    boundaries: tuple[int, ...] | None = Field(None, strict=False, description="With pipeline.stages: where the model is cut, the number of blocks before each cut.")  # fmt: skip
    stage_costs: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(None, strict=False, description="With pipeline.stages: the part of the model's computing that each stage is, as measured by the bootstrap.")  # fmt: skip
    protocol: int = Field(PROTOCOL, ge=1, le=65_535, description="The protocol that a peer must speak to take part.")
    dataset_revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$", description='With data.source = "datasets" of the hub: the commit of the data set; absent otherwise.')  # fmt: skip
    dataset_revisions: tuple[Annotated[str, Field(pattern=r"^([0-9a-f]{40})?$")], ...] | None = Field(None, strict=False, description="With data.sources: the commit of each source's data set of the hub, empty for other sources; absent without a data set of the hub.")  # fmt: skip
    held_out_source_bytes: tuple[Annotated[int, Field(gt=0)], ...] | None = Field(None, strict=False, description="With data.sources: the bytes of the held-out text that are of each source, one after the other.")  # fmt: skip
    model_files_sha256: _Sha256 | None = Field(None, description="SHA-256 of the list of the model's files, each with its own SHA-256; absent for a built-in model.")  # fmt: skip
    model_files_bytes: int = Field(0, ge=0, le=1_048_576, description="Size of that list, in bytes.")
    server: str | None = Field(None, pattern=r"^[1-9A-HJ-NP-Za-km-z]{40,64}$", description='With merge.method = "server": the PeerID of the bootstrap, which is the server; absent otherwise.')  # fmt: skip


class RunFile(Section):
    """Whole run file."""

    run: RunSection
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    inner: InnerSection = InnerSection()
    merge: MergeSection = MergeSection()
    adapter: AdapterSection = AdapterSection()
    pipeline: PipelineSection = PipelineSection()
    evaluation: EvaluationSection = EvaluationSection()
    network: NetworkSection = NetworkSection()
    published: PublishedSection | None = None

    @property
    def dataset_revisions(self) -> tuple[str, ...]:
        """Commit of each source's Hugging Face data set that the bootstrap pinned; empty where it pinned none."""
        published, num_sources = self.published, len(self.data.mixture)
        if published is None:
            return ("",) * num_sources
        if self.data.sources:
            return published.dataset_revisions or ("",) * num_sources
        return (published.dataset_revision or "",)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the batch of one inner step."""
        return self.inner.batch_sequences * self.model.context_tokens

    @property
    def round_tokens(self) -> int:
        """Tokens that a whole round of one peer reads, at most."""
        return max(self.merge.inner_steps * self.tokens_per_step, self.batch_target.most_tokens)

    @property
    def batch_target(self) -> BatchTarget:
        """Size of the large batches that all volunteers make together, where the method makes any."""
        given, first = self.merge.target_tokens, self.merge.inner_steps * self.tokens_per_step
        if given == "auto":
            return BatchTarget(first, self.run.total_tokens, grows=True)
        return BatchTarget(given or first, self.run.total_tokens)

    @property
    def max_round_tokens(self) -> int:
        """Most tokens that one peer's round counts. With gossip a round may be longer, to end when the others' rounds do.
        A stage's steps differ in size (`protocol/pipeline/ledger.py`), and so do those for one large batch
        (`protocol/rounds/batch_end.py`); a round ends after the step that fills it."""
        in_step = self.merge.kind.in_step and self.merge.pacing
        steps = math.ceil((_MOST_IN_STEP if in_step else 1.0) * self.round_tokens / self.tokens_per_step)
        more_steps = int(self.merge.kind.common_step) if self.pipeline.stages == 1 else _MOST_STEP_BATCHES
        return (steps + more_steps) * self.tokens_per_step

    @property
    def microbatch_sequences(self) -> int:
        """Sequences computed at once. A pipeline without `inner.microbatch_sequences` takes a 32nd of a batch, so that all
        stages have work and little of it uses old weights."""
        batch = self.inner.batch_sequences
        return self.inner.microbatch_sequences or (batch if self.pipeline.stages == 1 else max(1, batch // 32))

    @property
    def batch_rows(self) -> int:
        """Rows of a sequence of training (`algorithm/batch.py`): tokens, with samples labels too, and positions where
        documents are kept apart."""
        if self.data.packing == "documents":
            return 3
        return 2 if any(source.has_samples for source in self.data.mixture) else 1

    @property
    def batch_microbatches(self) -> int:
        """Microbatches of a batch; the last one may be smaller."""
        return -(-self.inner.batch_sequences // self.microbatch_sequences)

    def num_shards(self, *corpus_tokens: int) -> tuple[int, ...]:
        """Return the number of shards of each source, given the tokens of its corpus (0 if it is streamed); 0 for none.

        Each shard has at least the tokens that a round of `merge.inner_steps` reads of its source. The data have as many
        shards as the source that has most of them; shard s is shard s modulo n of a source that has n.
        """
        if not self.merge.kind.shards:
            return (0,) * len(corpus_tokens)
        least = 2 * self.model.context_tokens
        of_round = (max(math.ceil(self.round_tokens * share), least) for share in self.data.shares)
        fitting = [tokens // needed for tokens, needed in zip(corpus_tokens, of_round, strict=True)]
        return tuple(min(self.data.shards, fits) if fits > 1 else 0 for fits in fitting)

    @model_validator(mode="before")
    @classmethod
    def _fragments_of_adapter(cls, data: Any) -> Any:
        """Set `merge.fragments` to the number of an adapter's groups, which are its fragments."""
        if not isinstance(data, dict):
            return data
        adapter, merge = data.get("adapter"), data.get("merge", {})
        if not isinstance(adapter, dict | AdapterSection) or not isinstance(merge, dict) or "fragments" in merge:
            return data
        try:
            section = AdapterSection.model_validate(adapter)
        except ValidationError:
            return data
        kind = _kind_of({"method": MergeSection.model_fields["method"].default, **merge})
        if not section.is_used or kind is None or not kind.reads("fragments"):
            return data
        return {**data, "merge": {**merge, "fragments": section.num_groups}}

    @model_validator(mode="after")
    def _batch_of_steps(self) -> RunFile:
        """Set `merge.inner_steps` to the inner steps that make up `merge.target_tokens`."""
        merge = self.merge
        if not merge.target_tokens or merge.target_tokens == "auto":
            return self
        steps = -(-merge.target_tokens // self.tokens_per_step)
        if "inner_steps" in merge.model_fields_set and merge.inner_steps != steps:
            raise ValueError(
                f"merge.inner_steps: {merge.inner_steps} with merge.target_tokens = {merge.target_tokens}, which are "
                f"{steps} inner steps of {self.tokens_per_step} tokens; allowed: {steps}, or leave one of the two out"
            )
        if steps > 1_000_000:
            raise ValueError(
                f"merge.target_tokens: {merge.target_tokens} are {steps} inner steps; allowed: at most 1000000 of them"
            )
        object.__setattr__(self, "merge", merge.model_copy(update={"inner_steps": steps}))
        return self

    @model_validator(mode="after")
    def _possible(self) -> RunFile:
        if self.run.total_tokens < self.tokens_per_step:
            raise ValueError(
                f"run.total_tokens: {self.run.total_tokens} is less than one inner step; allowed: at least "
                f"{self.tokens_per_step} (inner.batch_sequences x model.context_tokens)"
            )
        if self.data.held_out_bytes <= self.model.context_tokens:
            raise ValueError(
                f"data.held_out_bytes: {self.data.held_out_bytes} holds no training sequence; allowed: more than "
                f"model.context_tokens = {self.model.context_tokens}"
            )
        self._check_pipeline()
        self._check_adapter()
        if self.merge.init == "own" and not (self.model.is_built_in or self.model.from_scratch):
            raise ValueError(
                'merge.init: "own" with the weights of model.base, which are the same for every peer; allowed: '
                '"common", or "own" with model.from_scratch = true'
            )
        if self.published is not None:
            self._check_published_model(self.published)
            learnt = self.published.tokenizer_sha256 is not None
            if learnt == (self.model.tokenizer == "bytes") or learnt != (self.published.tokenizer_bytes > 0):
                raise ValueError(f'published.tokenizer_sha256: does not fit model.tokenizer = "{self.model.tokenizer}"')
            if (self.published.model_files_sha256 is not None) != (self.published.model_files_bytes > 0):
                raise ValueError(
                    f"published.model_files_sha256: does not fit published.model_files_bytes = "
                    f"{self.published.model_files_bytes}"
                )
            if (self.published.server is not None) != self.merge.kind.has_server:
                raise ValueError(f'published.server: does not fit merge.method = "{self.merge.method}"')
            self._check_published_sources(self.published)
            self._check_published_stages(self.published)
        return self

    def _check_published_model(self, published: PublishedSection) -> None:
        if not self.model.is_built_in and not (self.model.is_resolved and PUBLISHED_BASE.fullmatch(self.model.base)):
            raise ValueError("model.base: is not as a bootstrap publishes it; allowed: owner/name@commit, or a name")
        if (published.model_files_sha256 is None) != self.model.is_built_in:
            raise ValueError(f'published.model_files_sha256: does not fit model.source = "{self.model.source}"')

    def _check_pipeline(self) -> None:
        stages, most = self.pipeline.stages, self.model.num_layers + 2
        if stages == 1 or not self.model.is_resolved:
            return
        if stages > most:
            raise ValueError(
                f"pipeline.stages: {stages} with model.num_layers = {self.model.num_layers}; allowed: at most {most} "
                "(only the first and the last stage can be without a block)"
            )
        if any(place > self.model.num_layers for place in self.pipeline.boundaries):
            raise ValueError(
                f"pipeline.boundaries: {list(self.pipeline.boundaries)}; allowed: at most model.num_layers = "
                f"{self.model.num_layers}"
            )
        if self.inner.precision == "fp16":
            raise ValueError(
                f'inner.precision: "fp16" with pipeline.stages = {stages}; allowed: "any", "fp32" or "bf16", since '
                "stages do not scale their losses"
            )
        if not self.merge.kind.stages:
            allowed = " or ".join(f'"{method.name}"' for method in METHODS.values() if method.stages)
            raise ValueError(
                f'pipeline.stages: {stages} with merge.method = "{self.merge.method}"; allowed: with {allowed}'
            )
        if self.data.packing != "stream":
            raise ValueError(f'data.packing: "{self.data.packing}" with pipeline.stages = {stages}; allowed: "stream"')
        if any(source.has_samples for source in self.data.mixture):
            raise ValueError(f'data.format: not "text" with pipeline.stages = {stages}; allowed: "text"')
        if self.evaluation.every_rounds:
            raise ValueError(
                f"evaluation.every_rounds: {self.evaluation.every_rounds} with pipeline.stages = {stages}; allowed: 0, "
                "since no volunteer has the whole model (the bootstrap measures it at the end)"
            )

    def _check_published_sources(self, published: PublishedSection) -> None:
        sources, sizes, revisions = self.data.sources, published.held_out_source_bytes, published.dataset_revisions
        if published.dataset_revision is not None and (sources or self.data.source != "datasets"):
            raise ValueError(f'published.dataset_revision: does not fit data.source = "{self.data.source}"')
        if len(sizes or ()) != len(sources) or (sizes is not None and sum(sizes) != published.held_out_bytes):
            raise ValueError(f"published.held_out_source_bytes: does not fit {len(sources)} data.sources")
        if revisions is not None and (
            len(revisions) != len(sources)
            or any(commit and source.source != "datasets" for commit, source in zip(revisions, sources, strict=True))
        ):
            raise ValueError(f"published.dataset_revisions: does not fit {len(sources)} data.sources")

    def _check_adapter(self) -> None:
        merge, adapter = self.merge, self.adapter
        if not adapter.is_used:
            return
        method = f'adapter.method: "{adapter.method}"'
        if self.model.is_built_in:
            raise ValueError(f'{method} with model.source = "built-in"; allowed: with "huggingface"')
        if self.model.from_scratch:
            raise ValueError(f"{method} with model.from_scratch = true, which leaves nothing to adapt; allowed: false")
        if not merge.kind.adapters:
            allowed = " or ".join(f'"{name}"' for name, kind in METHODS.items() if kind.adapters)
            raise ValueError(f'{method} with merge.method = "{merge.method}"; allowed: with {allowed}')
        if self.pipeline.stages > 1:
            raise ValueError(f"{method} with pipeline.stages = {self.pipeline.stages}; allowed: with 1")
        if merge.kind.common_step and merge.roster_format != "fp32":
            raise ValueError(
                f'merge.gradient_format: "{merge.gradient_format}" with an adapter, of which volunteers publish groups; '
                'allowed: "fp32"'
            )
        if merge.kind.common_step and merge.optimizer == "lamb":
            raise ValueError(
                'merge.optimizer: "lamb" with an adapter, whose B begins with zeros and would stay as short as its first '
                'step; allowed: "adamw"'
            )
        if merge.init != "common":
            raise ValueError(
                f'merge.init: "{merge.init}" with an adapter, whose B begins with zeros; allowed: "common"'
            )
        if merge.kind.reads("fragments") and merge.fragments != adapter.num_groups:
            raise ValueError(
                f"merge.fragments: {merge.fragments} with an adapter of {adapter.num_groups} groups, which are its "
                f"fragments; allowed: {adapter.num_groups}, or leave it out"
            )
        if self.published is not None and not adapter.is_resolved:
            raise ValueError("adapter.modules: is missing, which a bootstrap publishes")

    def _check_published_stages(self, published: PublishedSection) -> None:
        stages, boundaries, costs = self.pipeline.stages, published.boundaries, published.stage_costs
        if stages == 1:
            if boundaries is not None or costs is not None:
                raise ValueError("published.boundaries: does not fit pipeline.stages = 1")
            return
        places = (0, *(boundaries or ()), self.model.num_layers)
        if boundaries is None or len(boundaries) != stages - 1 or len(set(boundaries)) < len(boundaries):
            raise ValueError(f"published.boundaries: does not fit pipeline.stages = {stages}")
        if list(places) != sorted(places):
            raise ValueError(
                f"published.boundaries: do not ascend from 0 to model.num_layers = {self.model.num_layers}"
            )
        if costs is None or len(costs) != stages:
            raise ValueError(f"published.stage_costs: does not fit pipeline.stages = {stages}")


def load_run(path: str | Path) -> RunFile:
    """Read a run file that a person wrote. Raises `RunFileError`, one line that names the file and the key."""
    path = Path(path)
    origin = one_line(str(path))
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunFileError(
            f"{origin}: no such run file; the smallest example is {EXAMPLE}", code="no-run-file"
        ) from None
    except IsADirectoryError:
        raise RunFileError(
            f"{origin}: is a folder; give the run file in it, such as {EXAMPLE}", code="path-is-folder"
        ) from None
    except OSError as error:
        raise RunFileError(
            f"{origin}: cannot be read: {error.strerror}; correct its permissions, or give another",
            code="file-unreadable",
        ) from None
    if len(data) > MAX_RUN_FILE_BYTES:
        raise RunFileError(
            f"{origin}: {len(data)} bytes; allowed for a run file: at most {MAX_RUN_FILE_BYTES}", code="file-too-long"
        )
    try:
        return parse_run(data.decode("utf-8-sig"), origin)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RunFileError(f"{origin}: line {line}: not UTF-8; save the file as UTF-8 text", code="not-utf8") from None


def parse_run(text: str, origin: str, *, has_lines: bool = True) -> RunFile:
    """Parse a run file as a person writes it. Raises `RunFileError`.

    Errors name `origin`, and the line if `text` `has_lines` that the person can look at.
    """
    table = read_toml(text, origin, RunFileError)
    if "published" in table:
        raise RunFileError(
            f"{origin}: published: only `swarmtrain bootstrap` writes this section; leave it out",
            code="published-section",
        )
    for section, keys in (("model", BOOTSTRAP_MODEL_KEYS), ("adapter", FILLED_ADAPTER_KEYS)):
        written = table.get(section)
        for key in keys:
            if isinstance(written, dict) and key in written:
                raise RunFileError(
                    f"{origin}: {section}.{key}: only `swarmtrain bootstrap` writes this key; leave it out",
                    code="published-section",
                )
    return _validated(table, origin, text if has_lines else "")


def with_model(run: RunFile, values: dict[str, Any], adapter: dict[str, Any] | None = None) -> RunFile:
    """Return `run` with these values of `[model]` and `[adapter]`, checked as a whole. Raises `RunFileError`."""
    table = run.model_dump(mode="json", exclude_none=True)
    changed = {"model": {**table["model"], **values}, "adapter": {**table["adapter"], **(adapter or {})}}
    return _validated({**table, **changed}, "model.base")


def published_bytes(run: RunFile) -> bytes:
    """Return the exact bytes that a bootstrap hands out: TOML with every default written out, without absent values.

    Raises `RunFileError` if they are more than `MAX_RUN_FILE_BYTES`.
    """
    data = tomli_w.dumps(_written_table(run)).encode()
    if len(data) > MAX_RUN_FILE_BYTES:
        limit = MAX_RUN_FILE_BYTES
        raise RunFileError(
            f"data.paths: the published run would have {len(data)} bytes; allowed: {limit}; use globs",
            code="file-too-long",
        )
    return data


def _written_table(run: RunFile) -> dict[str, Any]:
    """Return the tables to publish: every default, but of keys without a meaning in this run."""
    table = _of_its_method(run.model_dump(mode="json", exclude_none=True))
    if run.data.sources:  # which the keys of one source have no meaning beside
        table["data"] = {key: value for key, value in table["data"].items() if key not in SourceKeys.model_fields}
    return table


def _of_its_method(table: dict[str, Any]) -> dict[str, Any]:
    """Drop keys of `[merge]` that its method does not have."""
    merge = table.get("merge")
    if not isinstance(merge, dict):
        return table
    kind = _kind_of({"method": MergeSection.model_fields["method"].default, **merge})
    reads = frozenset() if kind is None else kind.keys
    kept = {key: value for key, value in merge.items() if key not in METHODS_OF_KEYS or key in reads}
    return {**table, "merge": kept}


def run_sha256(data: bytes) -> str:
    """Return the identity of the run published as `data`: its SHA-256, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def parse_published_untrusted(data: bytes, expected_sha256: str) -> RunFile:
    """Parse the published run that another peer sent.

    Raises `BadBytesError` if the bytes are too many, do not match the hash or are no strict run file; `NewerRunError` if
    the run needs a newer swarmtrain, or has keys or values that this version does not know; `RunFileError` if its method
    is of a package that is not installed.
    """
    if len(data) > MAX_RUN_FILE_BYTES:
        raise BadBytesError(
            f"the run file has {len(data)} bytes; at most {MAX_RUN_FILE_BYTES} are accepted", code="bad-size"
        )
    if (found := run_sha256(data)) != expected_sha256:
        raise BadBytesError(
            f"the run file does not match its hash: expected {expected_sha256[:16]}, got {found[:16]}", code="bad-hash"
        )
    try:
        table = read_toml(data.decode(), "the published run", RunFileError)
        if not isinstance(table.get("published"), dict):
            raise RunFileError("the published run: section [published] is missing", code="published-section")
    except UnicodeDecodeError:
        raise BadBytesError("the published run: not UTF-8", code="bad-format") from None
    except RunFileError as error:
        raise BadBytesError(*error.problems) from None
    told = table["published"]
    if refusal := protocol_mismatch("this run", told.get("protocol"), told.get("swarmtrain")):
        raise NewerRunError(refusal)
    _ask_for_package(table)
    try:
        return _validated(table, "the published run")
    except RunFileError as error:
        publisher = table["published"].get("swarmtrain")
        if isinstance(publisher, str) and _version(publisher) > _version(__version__):
            versions = f"published by swarmtrain {one_line(publisher[:32])}, you have {__version__}"
            raise NewerRunError(f"this run was {versions}: {UPDATE} ({error})") from None
        raise BadBytesError(*error.problems) from None


def _ask_for_package(table: dict[str, Any]) -> None:
    """Load the merge method if it is of a package. Raises RunFileError: a missing package is no fault of the sender."""
    merge = table.get("merge")
    name = merge.get("method") if isinstance(merge, dict) else None
    if isinstance(name, str) and re.fullmatch(NAME, name):
        method_named(name)


def _validated(table: dict[str, Any], origin: str, text: str = "") -> RunFile:
    try:
        return RunFile.model_validate(table)
    except ValidationError as error:
        raise RunFileError(*(each.found_in(origin) for each in problems_in_words(error, RunFile, text))) from None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:4])
