"""The run file: what is trained, how, and until when.

One frozen model, read by everything, importing nothing of ours but the errors. A person writes TOML with
the keys that differ from the defaults; the bootstrap writes every default out, adds `[published]`, and hands
out those exact bytes. Their SHA-256 is the run's identity: peers of different runs never mix.

Each field carries a sentence with its unit; `docs/run-file.md` is generated from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "DataSection",
    "EvaluationSection",
    "InnerSection",
    "MergeSection",
    "ModelSection",
    "NetworkSection",
    "PublishedSection",
    "RunFile",
    "RunSection",
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class RunSection(_Section):
    """What the run is called and when it ends."""

    name: str = Field("stdlib-gpt", min_length=1, max_length=64, pattern=r"^[a-z0-9][a-z0-9-]*$", description="A short name people recognise: lower-case letters, digits and hyphens.")  # fmt: skip
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the initial weights and of every random choice of the run.")  # fmt: skip
    total_tokens: int = Field(description="The run ends when its peers together have trained on this many tokens.", gt=0)  # fmt: skip


class ModelSection(_Section):
    """The model's shape: a GPT with RMSNorm, rotary positions and untied embeddings."""

    tokenizer: Literal["bytes", "bpe"] = Field("bytes", description='What a token is: "bytes" (256 of them) or "bpe" (learnt by the bootstrap on its corpus; needs the extra `bpe`).')  # fmt: skip
    vocabulary_size: int = Field(256, ge=256, le=1_000_000, description='Number of distinct tokens; 256 with "bytes".')
    context_tokens: int = Field(128, ge=2, le=1_048_576, description="Length of a training sequence, in tokens.")
    num_layers: int = Field(4, ge=1, le=512, description="Number of transformer blocks.")
    width: int = Field(128, ge=8, le=65_536, description="Width of the residual stream, in numbers per token.")
    num_heads: int = Field(4, ge=1, le=1024, description="Number of attention heads; divides `width` into even parts.")
    feed_forward_ratio: float = Field(4.0, gt=0, le=32, description="Hidden width of the feed-forward layer, as a multiple of `width`.")  # fmt: skip


class DataSection(_Section):
    """The text it learns from, and the text it is judged by."""

    source: Literal["python-stdlib", "text", "jsonl", "datasets"] = Field("python-stdlib", description='Where the text comes from: "python-stdlib" (the standard library\'s own sources, on every machine), "text" (files), "jsonl" (one JSON object a line) or "datasets" (Hugging Face; needs the extra `datasets`).')  # fmt: skip
    paths: tuple[str, ...] = Field((), description='For "text" and "jsonl": files or globs (`**` too), relative to the run file; on a volunteer, relative to the folder it is started in or to `--data`.')  # fmt: skip
    field: str = Field("text", min_length=1, description='For "jsonl" and "datasets": the field that holds the text.')
    dataset: str = Field("", description='For "datasets": a name on the hub or a local folder.')
    subset: str = Field("", description='For "datasets": the configuration\'s name; empty for the default one.')
    split: str = Field("train", min_length=1, description='For "datasets": the split to train on.')
    streaming: bool = Field(False, description='For "datasets": read while training rather than download first.')
    held_out_bytes: int = Field(65_536, ge=1024, le=4_194_304, description="Size of the held-out text that the bootstrap cuts once and that travels with the run, in bytes.")  # fmt: skip


class InnerSection(_Section):
    """The inner optimizer, AdamW, and its schedule by the run's tokens."""

    batch_sequences: int = Field(16, ge=1, le=1_048_576, description="Sequences in the batch of one inner step.")
    microbatch_sequences: int = Field(0, ge=0, description="Sequences computed at once, gradients being accumulated to the batch; 0 for all at once. Lower it when memory is short.")  # fmt: skip
    learning_rate: float = Field(3e-3, gt=0, le=10, description="Peak learning rate.")
    weight_decay: float = Field(0.1, ge=0, le=10, description="Decoupled weight decay of the matrices; norms have none.")  # fmt: skip
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment, per step.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of AdamW's second moment, per step.")
    gradient_clip: float = Field(1.0, gt=0, description="The gradient's norm is clipped to this.")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of the run's tokens over which the learning rate rises.")  # fmt: skip
    floor_fraction: float = Field(0.1, ge=0, le=1, description="The cosine ends at this share of the peak.")


class MergeSection(_Section):
    """How peers become one model."""

    method: Literal["diloco"] = Field("diloco", description='"diloco": synchronous rounds; everyone\'s pseudo-gradients are averaged by a signed roster.')  # fmt: skip
    inner_steps: int = Field(25, ge=1, le=1_000_000, description="Inner steps of one round (H).")
    outer_learning_rate: float = Field(0.7, gt=0, le=10, description="Learning rate of the outer Nesterov step.")
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of the outer Nesterov step.")
    momentum_ramp_rounds: int = Field(0, ge=0, description="Rounds over which the outer momentum rises linearly from 0; 0 for none.")  # fmt: skip
    pacing: bool = Field(False, description="Slower peers take fewer inner steps, so that all end a round together.")
    share_above: int = Field(5, ge=1, description="With more peers than this on a roster, each averages one share of the parameters and the others pull the result.")  # fmt: skip
    min_peers: int = Field(1, ge=1, le=10_000, description="Round 0 begins when this many volunteers are present.")
    round_limit_s: float = Field(600.0, gt=0, description="A round is closed at the latest this long after its start, in seconds.")  # fmt: skip
    silence_s: float = Field(5.0, gt=0, description="A signer that is silent for this long after a round's end is passed over, in seconds.")  # fmt: skip


class EvaluationSection(_Section):
    """Measuring the held-out loss while training."""

    every_rounds: int = Field(0, ge=0, description="Measure the held-out loss after every so many rounds; 0 for only at the end.")  # fmt: skip
    batch_sequences: int = Field(16, ge=1, le=1_048_576, description="Sequences evaluated at once.")


class NetworkSection(_Section):
    """Limits that keep one peer from burdening another."""

    max_readers: int = Field(4, ge=1, le=32, description="Pulls of snapshots served at once; the next reader is told BUSY.")  # fmt: skip
    presence_ttl_s: float = Field(30.0, ge=3, le=3600, description="A presence record expires after this, in seconds; it is renewed three times as often.")  # fmt: skip
    call_limit_s: float = Field(5.0, gt=0, le=600, description="A small call to another peer may take this long, in seconds.")  # fmt: skip
    stall_limit_s: float = Field(10.0, gt=0, le=600, description="A transfer that brings nothing for this long is given up, in seconds.")  # fmt: skip
    archive_every_s: float = Field(60.0, ge=1, description="The bootstrap archives the run's state this often, in seconds.")  # fmt: skip


_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PublishedSection(_Section):
    """What the bootstrap adds when it publishes the run; nobody writes this by hand."""

    created: str = Field(description="When the run was published, ISO 8601, UTC: the same run file published twice is two runs.")  # fmt: skip
    swarmtrain: str = Field(description="The version of swarmtrain that published it.")
    held_out_sha256: _Sha256 = Field(description="SHA-256 of the held-out text.")
    held_out_bytes: int = Field(gt=0, le=4_194_304, description="Its size in bytes.")
    tokenizer_sha256: _Sha256 | None = Field(None, description="SHA-256 of the learnt tokenizer; absent with bytes.")
    tokenizer_bytes: int = Field(0, ge=0, le=16_777_216, description="Its size in bytes.")


class RunFile(_Section):
    """A whole run file."""

    run: RunSection
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    inner: InnerSection = InnerSection()
    merge: MergeSection = MergeSection()
    evaluation: EvaluationSection = EvaluationSection()
    network: NetworkSection = NetworkSection()
    published: PublishedSection | None = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the batch of one inner step."""
        return self.inner.batch_sequences * self.model.context_tokens
