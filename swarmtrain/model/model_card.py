"""Write the model card of an exported model, README.md: what it is, who trained it on what, and how to go on with it.

The form is that of Hugging Face's hub: a YAML head that its pages read, then Markdown.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace

import tomli_w

from swarmtrain.model.base import base_in_words
from swarmtrain.model.evaluation import TextLoss
from swarmtrain.model.hub import HubModel
from swarmtrain.run import RunFile
from swarmtrain.run_adapter import FILLED_ADAPTER_KEYS, AdapterSection
from swarmtrain.run_data import DataSource
from swarmtrain.run_model import FILLED_MODEL_KEYS
from swarmtrain.words import count_in_words, counted, one_line

_MOST_CONTRIBUTORS = 1000
_MOST_LAYERS = 8
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_TEXT = 'tokens = tokenizer({}, return_tensors="pt")'
_HELLO = "Hello!"
_CHAT = (
    f'messages = [{{"role": "user", "content": "{_HELLO}"}}]',
    'given = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
    "tokens = tokenizer.apply_chat_template(messages, **given)",
)
"""How the tokens of a text, or of a conversation, are made."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Facts of a model card."""

    run: RunFile
    run_sha256: str
    num_parameters: int
    run_tokens: int
    peer_tokens: Mapping[str, int]
    """Tokens by the PeerID of who trained on them; empty if they were not counted."""
    loss: TextLoss | None = None
    """Held-out loss; None if it was not measured."""
    is_merged: bool = False
    """True if the run's adapter was merged into the model that it belongs to."""

    def text(self) -> str:
        """Return the card."""
        parts = [self._head(), self._what(), self._use(), self._data(), self._contributors(), self._again()]
        return "\n".join(part for part in parts if part)

    def as_merged(self, text: str) -> str:
        """Return the card of the model that an adapter with the card `text`, of this run, was merged into."""
        merged = replace(self, is_merged=True)
        pieces = (ModelCard._head, ModelCard._sentence, ModelCard._use)
        for piece in pieces:
            text = text.replace(piece(self), piece(merged))
        return text

    @property
    def _is_adapter(self) -> bool:
        return self.run.adapter.is_used and not self.is_merged

    @property
    def _is_chat(self) -> bool:
        return any(source.format == "chat" for source in self.run.data.mixture)

    @property
    def _prompt(self) -> str:
        """A prompt to begin with. None of the run's own text: a card is copied to shells and programs."""
        most = max(self.run.data.mixture, key=lambda source: source.weight)
        return _HELLO if self._is_chat else "def " if most.source == "python-stdlib" else "The "

    def _head(self) -> str:
        library = "peft" if self._is_adapter else "transformers"
        lines = [f"library_name: {library}", "pipeline_tag: text-generation", "tags:", "- swarmtrain"]
        if (base := HubModel.parse(self.run.model.base)) is not None:
            lines.append(f"base_model: {json.dumps(base.name)}")
        named = dict.fromkeys(source.dataset for source in self.run.data.mixture if source.source == "datasets")
        if on_hub := [name for name in named if _ON_THE_HUB.fullmatch(name)]:
            lines += ["datasets:", *(f"- {json.dumps(name)}" for name in on_hub)]
        return "\n".join(["---", *lines, "---", ""])

    def _what(self) -> str:
        run, model = self.run, self.run.model
        rows = {
            **({} if model.is_built_in else {"trained from": f"`{base_in_words(model)}`"}),
            **({"adapter": _adapter_in_words(run.adapter)} if run.adapter.is_used else {}),
            "parameters": f"{run.model.num_parameters if run.adapter.is_used else self.num_parameters:,}",
            "weights": "float32",
            "trained on": f"{self.run_tokens:,} tokens of {run.run.total_tokens:,}",
            "context": f"{model.context_tokens:,} tokens",
            "tokenizer": f"{model.tokenizer}, {model.vocabulary_size:,} tokens",
            "merging": run.merge.method,
            "held-out loss": self._loss(),
            "run": f"`{self.run_sha256}`",
        }
        return "\n".join(
            [
                f"# {run.run.name}",
                "",
                self._sentence(),
                "",
                "| | |",
                "|---|---|",
                *(f"| {name} | {value} |" for name, value in rows.items()),
                "",
            ]
        )

    def _sentence(self) -> str:
        if self._is_adapter:
            return (
                f"A LoRA adapter of rank {self.run.adapter.rank} for {base_in_words(self.run.model)}, trained by "
                "volunteers with swarmtrain."
            )
        number = self.run.model.num_parameters if self.is_merged else self.num_parameters
        merged = " It is its base with a LoRA adapter, merged." if self.is_merged else ""
        return (
            f"A language model of {count_in_words(number)} parameters, trained by volunteers with swarmtrain.{merged}"
        )

    def _loss(self) -> str:
        if self.loss is None:
            return "not measured yet: `swarmtrain eval` of this folder measures it"
        return f"{_loss_in_words(self.loss)}, on `held-out.txt`"

    def _use(self) -> str:
        loading = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")  # this folder, or owner/name of the hub',
        ]
        base = HubModel.parse(self.run.model.base)
        if self._is_adapter:
            of = f'"{self.run.model.base}"' if base is None else f'"{base.name}", revision="{base.revision}"'
            loading = [
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                f"base = AutoModelForCausalLM.from_pretrained({of})",
                'model = PeftModel.from_pretrained(base, "FOLDER")  # this folder, or owner/name of the hub',
            ]
        # A tokenizer of another model may have a chat template, by which nobody has trained.
        how = " --raw`" if self.run.model.tokenizer not in ("bytes", "bpe") else "`"
        how = "`, which asks it by its chat template (`--chat` goes on)" if self._is_chat else how
        return "\n".join(
            [
                "## Use",
                "",
                "```python",
                *loading,
                'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
                *(_CHAT if self._is_chat else [_TEXT.format(json.dumps(self._prompt))]),
                "print(tokenizer.decode(model.generate(**tokens)[0]))",
                "```",
                "",
                f"Or `swarmtrain generate FOLDER --prompt {shlex.quote(self._prompt)}{how}, and `swarmtrain eval "
                "FOLDER` for its loss.",
                *(["`swarmtrain export --dir FOLDER --merge --to MODEL` makes one model of both."] * self._is_adapter),
                "",
            ]
        )

    def _data(self) -> str:
        run, data = self.run, self.run.data
        sources = [
            _source_in_words(source, revision)
            for source, revision in zip(data.mixture, run.dataset_revisions, strict=True)
        ]
        lines = [f"Trained on {sources[0]}. Nobody trained on `held-out.txt`."]
        if data.sources:
            losses = {} if self.loss is None else self.loss.by_source
            rows = zip(data.sources, data.shares, sources, strict=True)
            lines = [
                "Nobody trained on `held-out.txt`. Sequences came from these sources:",
                "",
                "| source | share | text | held-out loss |",
                "|---|---|---|---|",
                *(
                    f"| {source.name} | {share:.2%} | {words} | {_loss_in_words(losses.get(source.name))} |"
                    for source, share, words in rows
                ),
            ]
        return "\n".join(["## Data", "", *lines, ""])

    def _contributors(self) -> str:
        if not self.peer_tokens:
            return ""
        total = sum(self.peer_tokens.values()) or 1
        ranked = sorted(self.peer_tokens.items(), key=lambda item: (-item[1], item[0]))
        shown, others = ranked[:_MOST_CONTRIBUTORS], ranked[_MOST_CONTRIBUTORS:]
        rows = [f"| `{peer}` | {tokens:,} | {tokens / total:.1%} |" for peer, tokens in shown]
        if others:
            tokens = sum(count for _, count in others)
            rows.append(f"| {counted(len(others), 'other')} | {tokens:,} | {tokens / total:.1%} |")
        return "\n".join(["## Contributors", "", "| PeerID | tokens | share |", "|---|---|---|", *rows, ""])

    def _again(self) -> str:
        run, published = self.run, self.run.published
        version = "" if published is None else f" by swarmtrain {published.swarmtrain}, {published.created}"
        written = run.model_dump(mode="json", exclude={"published"}, exclude_defaults=True, exclude_none=True)
        if not run.model.is_built_in:
            written["model"] = {key: value for key, value in written["model"].items() if key not in FILLED_MODEL_KEYS}
        if run.adapter.is_used:
            adapter = written["adapter"]
            written["adapter"] = {key: value for key, value in adapter.items() if key not in FILLED_ADAPTER_KEYS}
        return "\n".join(
            [
                "## Train it again",
                "",
                f"`run.toml` is the run as it was published{version}. As a person writes it, without the defaults:",
                "",
                "```toml",
                tomli_w.dumps(written).strip(),
                "```",
                "",
                "`swarmtrain bootstrap RUN.toml` publishes such a run anew, and `swarmtrain join` with the line that "
                "it prints trains it. The initial weights are the same bits; what follows depends on who takes part, "
                "and when.",
                "",
            ]
        )


def _loss_in_words(loss: TextLoss | None) -> str:
    if loss is None:
        return "not measured"
    if not loss.is_finite:
        return "not a finite number, since training diverged"
    return f"{loss.nats_per_byte:.4f} nats a byte ({loss.bits_per_byte:.4f} bits a byte)"


def _adapter_in_words(adapter: AdapterSection) -> str:
    layers = ", ".join(f"`{one_line(name)}`" for name in adapter.modules[:_MOST_LAYERS])
    more = ", ..." if len(adapter.modules) > _MOST_LAYERS else ""
    return (
        f"LoRA of rank {adapter.rank}, alpha {adapter.alpha:g}, on {layers}{more}: {adapter.num_parameters:,} numbers, "
        f"merged in {counted(adapter.num_groups, 'group')}"
    )


def _source_in_words(source: DataSource, revision: str) -> str:
    """Say where the text of a source is from; `revision` is the commit of a data set of the hub, if it was pinned."""
    match source.source:
        case "python-stdlib":
            return "the sources of Python's standard library"
        case "datasets":
            return f"`{one_line(source.dataset)}`" + (f", at commit `{revision}`" if revision else "")
        case _:
            named = ", ".join(f"`{one_line(path)}`" for path in source.paths)
            return f"{source.source} files of the volunteers' own: {named}"
