"""Section `[model]` of the run file: what is trained."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from swarmtrain.problems import Section, with_values

_COMMIT = "[0-9a-f]{40}"
_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
PUBLISHED_BASE = re.compile(rf"{_HUB_NAME}@{_COMMIT}|[A-Za-z0-9][A-Za-z0-9._-]{{0,95}}")
"""`model.base` of a published run: a model of the hub at a commit, or the last name of a folder."""
BOOTSTRAP_MODEL_KEYS = ("tied_embeddings", "num_parameters", "constants_sha256")
"""Keys of `[model]` that only a bootstrap writes."""
FILLED_MODEL_KEYS = ("vocabulary_size", "num_layers", "width", "num_heads", "feed_forward_ratio", *BOOTSTRAP_MODEL_KEYS)
"""Keys of `[model]` that are read from the configuration of `model.base`."""


_TOKENIZER = rf"^(bytes|bpe|model|{_HUB_NAME}(@[A-Za-z0-9][A-Za-z0-9._/-]{{0,95}})?|.*\.json)$"
_TOKENIZERS = '"bytes", "bpe", "model", "OWNER/NAME" of the hub (@REVISION too) or "PATH/tokenizer.json"'


class ModelSection(Section):
    """Model: the built-in GPT, of this shape, or one of Hugging Face, from whose configuration the shape is read."""

    source: Literal["built-in", "huggingface"] = Field(
        "built-in",
        description=with_values(
            "Where the model comes from.",
            {
                "built-in": "A GPT of the shape below, with RMSNorm, rotary positions and untied embeddings.",
                "huggingface": "The model in `base`, whose code the library `transformers` has (needs the extra `hf`).",
            },
        ),
    )
    base: str = Field("", max_length=1024, description='With "huggingface": `owner/name` of the hub, or `owner/name@revision`; or a folder with `config.json` and `*.safetensors`, such as an export, relative to the run file\'s. The bootstrap fixes the commit and the SHA-256 of each file; code of a model is never run.')  # fmt: skip
    from_scratch: bool = Field(False, description='With "huggingface": only the configuration of `base` is used, and the weights begin at random, by run.seed.')  # fmt: skip
    tokenizer: str = Field(
        "bytes",
        max_length=1024,
        pattern=_TOKENIZER,
        json_schema_extra={"allowed": _TOKENIZERS},
        description=with_values(
            'What a token is. With model.source = "huggingface" the default is "model".',
            {
                "bytes": "A byte: 256 tokens, nothing to learn or download.",
                "bpe": "A piece of text; the bootstrap learns the pieces on its corpus (needs the extra `bpe`).",
                "model": "What it is for the model in `base`.",
                "OWNER/NAME": "What it is for that model of the hub, or `OWNER/NAME@REVISION`; the bootstrap fixes the commit (needs the extra `hf`).",
                "PATH/tokenizer.json": "What that file says, relative to the run file's folder (needs the extra `bpe`).",
            },
        ),
    )
    vocabulary_size: int = Field(256, ge=256, le=1_000_000, description='Number of distinct tokens: 256 with "bytes", as many as are learnt with "bpe", at least as many as a named tokenizer has.')  # fmt: skip
    context_tokens: int = Field(128, ge=2, le=1_048_576, description="Length of a training sequence, in tokens.")
    num_layers: int = Field(4, ge=1, le=512, description="Number of transformer blocks.")
    width: int = Field(128, ge=8, le=65_536, description="Width of the residual stream, in numbers per token.")
    num_heads: int = Field(4, ge=1, le=1024, description="Number of attention heads; divides `width` into even parts.")
    feed_forward_ratio: float = Field(2.625, gt=0, le=32, description="Hidden width of the feed-forward layer, as a multiple of `width`.")  # fmt: skip
    tied_embeddings: bool = Field(False, description='With "huggingface", filled in by the bootstrap: whether embedding and head are one matrix.')  # fmt: skip
    constants_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="With from_scratch, filled in by the bootstrap: SHA-256 of the constants with which some parameters begin, where the installed transformers decides on them.")  # fmt: skip
    num_parameters: int = Field(0, ge=0, lt=2**63, description='With "huggingface", filled in by the bootstrap: number of parameters.')  # fmt: skip

    @property
    def is_built_in(self) -> bool:
        """True if the model is the built-in GPT."""
        return self.source == "built-in"

    @property
    def is_resolved(self) -> bool:
        """True if the shape is the model's: always, but for a model of Hugging Face whose configuration was not read
        yet."""
        return self.is_built_in or self.num_parameters > 0

    @property
    def tokenizer_kind(self) -> str:
        """Kind of the tokenizer, as the description of its key lists them."""
        if self.tokenizer in ("bytes", "bpe", "model"):
            return self.tokenizer
        return "PATH/tokenizer.json" if self.tokenizer.endswith(".json") else "OWNER/NAME"

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_base(cls, data: Any) -> Any:
        is_of_base = isinstance(data, dict) and data.get("source") == "huggingface"
        return {"tokenizer": "model", **data} if is_of_base else data

    @model_validator(mode="after")
    def _fits(self) -> ModelSection:
        if not self.is_built_in:
            self._check_base()
            return self
        for key in ("base", "from_scratch", *BOOTSTRAP_MODEL_KEYS):
            if getattr(self, key):
                raise ValueError(
                    f'model.{key}: has no meaning with model.source = "built-in"; allowed: with "huggingface"'
                )
        if self.tokenizer == "model":
            allowed = _TOKENIZERS.replace('"model", ', "")
            raise ValueError(
                f'model.tokenizer: "model" with model.source = "built-in", which has none; allowed: {allowed}'
            )
        if self.tokenizer == "bytes" and self.vocabulary_size != 256:
            raise ValueError(
                f'model.vocabulary_size: {self.vocabulary_size} with model.tokenizer = "bytes"; allowed: 256'
            )
        if self.tokenizer == "bpe" and self.vocabulary_size == 256:
            raise ValueError(
                'model.vocabulary_size: 256 with model.tokenizer = "bpe"; allowed: 257 or more, such as 4096'
            )
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"model.width: {self.width} does not give model.num_heads = {self.num_heads} heads of an even width "
                f"(rotary positions turn pairs); allowed: a multiple of {2 * self.num_heads}"
            )
        if self.width * self.feed_forward_ratio < 1:
            raise ValueError(
                f"model.feed_forward_ratio: too small; allowed: at least {1 / self.width} (1 / model.width)"
            )
        return self

    def _check_base(self) -> None:
        if not self.base:
            raise ValueError('model.base: missing; model.source = "huggingface" needs it')
        if self.is_resolved:
            return
        for key in FILLED_MODEL_KEYS:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f'model.{key}: is read from the configuration of model.base with model.source = "huggingface"; '
                    "leave it out"
                )
