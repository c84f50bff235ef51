"""Aliases for keys of a run file: the words of nanoGPT, transformers, litgpt, torchtitan and OpenDiLoCo.

A person's file may say `hidden_size = 256`; it is read as `width = 256`, and a line says so. A published run has our
keys only, so two files that mean the same give the same bytes. `ALIASES` is the one list; `docs/run-file.md` shows it.

A word is an alias only if it means the same as a key, or if the key's value follows exactly from the file. Otherwise,
as with steps counted over an unknown number of volunteers, the file is refused with what to write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from swarmtrain.errors import Problem, UserError
from swarmtrain.problems import Rewritten, one_line, shown

__all__ = ["ALIASES", "Alias", "Conversion", "Translation", "our_key", "translate"]

_Keys = Mapping[str, Mapping[str, Any]]
"""Map section to key to default value: all that a run file may hold."""


@dataclass(frozen=True)
class _Given:
    """Tables of a file during translation: our keys in what is translated already."""

    table: Mapping[str, Any]
    defaults: _Keys
    words: Mapping[str, Any]
    """Section of the word that is being read, as the person wrote it."""

    def written(self, key: str) -> Any:
        """Return the value of `SECTION.KEY` in the file; None if the file has no such key."""
        section, _, name = key.partition(".")
        keys = self.table.get(section)
        return keys.get(name) if isinstance(keys, dict) else None

    def value(self, key: str) -> Any:
        """Return the number in the file, or the default; None if it is not above 0, which the validation reports."""
        section, _, name = key.partition(".")
        value = self.written(key)
        number = _number(self.defaults[section][name] if value is None else value)
        return number if number is not None and 0 < number < _MOST else None


@dataclass(frozen=True)
class Alias:
    """Words of other projects that stand for a key of ours, or that are refused."""

    section: str
    """Section, or list of tables ("data.sources"), whose tables have the words that stand for a key of [data] too."""
    words: tuple[str, ...]
    keys: tuple[str, ...]
    """Our keys, in the same section: one, or two for `betas`. Empty for a word without a key."""
    read: Callable[[Any, _Given], dict[str, Any]] | None = None
    """Return the values of our keys, or raise ValueError with the rest of a sentence that begins with the word. None:
    the value stays as it is."""
    says: str = ""
    """Conversion, or reason of the refusal, in words for `docs/run-file.md`."""
    refused: bool = False
    """True if no file may have the word; the refusal says what to write."""
    uses: tuple[str, ...] = ()
    """`SECTION.KEY` of ours that `read` computes with, if its value is not 0."""


@dataclass(frozen=True)
class Conversion:
    """A word of a person's file whose value was converted."""

    word: str
    """`SECTION.WORD`."""
    found: Mapping[str, Any]
    """Map `SECTION.KEY` of ours to the value that was found."""
    used: tuple[str, ...]
    """`SECTION.KEY` of ours that the value was computed with."""


@dataclass(frozen=True)
class Translation:
    """A person's file with our keys."""

    table: dict[str, Any]
    said: tuple[str, ...]
    """Lines that say what was read as what, in the file's order."""
    rewritten: Rewritten
    conversions: tuple[Conversion, ...] = ()


_MOST = 2**63
_CODE = "other-projects-word"


def _number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _positive(value: Any, what: str = "a number above 0") -> int | float:
    number = _number(value)
    if number is None or not 0 < number < _MOST:
        raise ValueError(f"{shown(value)} is refused; allowed: {what}")
    return number


def _whole(value: Any) -> int:
    number = _positive(value, what := "an integer above 0")
    if number != int(number):
        raise ValueError(f"{shown(value)} is refused; allowed: {what}")
    return int(number)


def _quotient(one: int | float, other: int | float) -> float:
    """Divide the decimals that were written: 3e-4 by 3e-3 is 0.1, which floats would miss."""
    try:
        return float(Fraction(str(one)) / Fraction(str(other)))
    except OverflowError:
        return math.inf  # no key accepts it, so that the validation reports it


def _feed_forward(value: Any, given: _Given) -> dict[str, Any]:
    size, width = _whole(value), given.value("model.width")
    if width is None:
        raise ValueError("is a multiple of model.width, which must be correct first; allowed: an integer above 0")
    return {"feed_forward_ratio": _quotient(size, width)}


def _betas(value: Any, given: _Given) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{shown(value)} is refused; allowed: two numbers, such as [0.9, 0.95]")
    return {"beta1": value[0], "beta2": value[1]}


def _least_rate(value: Any, given: _Given) -> dict[str, Any]:
    peak = given.value("inner.learning_rate")
    number = _number(value)
    if number is None or not 0 <= number < _MOST:
        raise ValueError(f"{shown(value)} is refused; allowed: a number at least 0")
    if peak is None:
        raise ValueError("is a share of inner.learning_rate, which must be correct first; or write floor_fraction")
    return {"floor_fraction": _quotient(number, peak)}


def _rounds(value: Any, given: _Given) -> dict[str, Any]:
    inner_steps = given.value("merge.inner_steps")
    if _number(value) == 0:
        return {"every_rounds": 0}
    steps = _whole(value)
    if inner_steps is None or inner_steps < 1:
        raise ValueError(
            "counts steps of merge.inner_steps a round, which must be correct first; or write every_rounds"
        )
    if steps % inner_steps:
        raise ValueError(
            f"{steps} steps are not whole rounds of merge.inner_steps = {inner_steps}; write every_rounds = "
            f"{max(1, round(steps / inner_steps))}"
        )
    return {"every_rounds": int(steps // inner_steps)}


_ACCUMULATION = ("gradient_accumulation_steps", "grad_accum_steps", "gradient_accumulation", "accumulate_grad_batches")
_GLOBAL = ("global_batch_size", "total_batch_size", "train_batch_size")
_REFUSED_BATCHES = {"batch_size", *_GLOBAL}
"""Words for the batch that are refused beside gradient accumulation."""
_PER_DEVICE = ("per_device_train_batch_size", "local_batch_size")


def _accumulated(value: Any, given: _Given) -> dict[str, Any]:
    number = _whole(value)
    batch, at_once = (given.written(f"inner.{key}") for key in ("batch_sequences", "microbatch_sequences"))
    if at_once and not batch:
        return {"batch_sequences": number * _whole(at_once)}
    if batch and not at_once:
        if _whole(batch) % number:
            raise ValueError(
                f"{number} does not divide batch_sequences = {batch}; write microbatch_sequences, a divisor"
            )
        return {"microbatch_sequences": int(batch) // number}
    if batch and at_once and number * _whole(at_once) == batch:
        return {}
    if batch and at_once:
        raise ValueError(
            f"{number} times microbatch_sequences = {at_once} is not batch_sequences = {batch}; leave one of them out"
        )
    if set(given.words) & _REFUSED_BATCHES:
        return {}  # reported already
    raise ValueError(
        "does not say how large a batch is; write microbatch_sequences, the sequences computed at once, and "
        f"batch_sequences, {number} times as many"
    )


def _per_device(value: Any, given: _Given) -> dict[str, Any]:
    if given.written("inner.batch_sequences") is None and not set(given.words) & set(_ACCUMULATION):
        size = shown(value)
        raise ValueError(
            f"without gradient accumulation it is the batch of a step: write batch_sequences = {size}; or, to "
            f"compute so many at once of a larger batch, microbatch_sequences = {size}"
        )
    return {"microbatch_sequences": value}


def _batch(value: Any, given: _Given) -> dict[str, Any]:
    if accumulation := next((word for word in _ACCUMULATION if word in given.words), ""):
        raise ValueError(
            f"beside {accumulation} it may be the batch of a step or what is computed at once; write batch_sequences "
            "or microbatch_sequences"
        )
    return {"batch_sequences": value}


def _all_batches(value: Any, given: _Given) -> dict[str, Any]:
    raise ValueError(
        "may count tokens, or all workers' sequences; write batch_sequences: the sequences of one peer's inner step"
    )


def _step_tokens(given: _Given) -> int:
    """Return the tokens of one peer's step; 0 if the file's values are no numbers."""
    batch, context = given.value("inner.batch_sequences"), given.value("model.context_tokens")
    return int(batch * context) if batch is not None and context is not None else 0


def _all_steps(value: Any, given: _Given) -> dict[str, Any]:
    steps, tokens = _whole(value), _step_tokens(given)
    write = "write total_tokens"
    if tokens:
        product = "inner.batch_sequences x model.context_tokens"
        write += f" = {steps * tokens}, which are {steps} steps of {tokens} tokens ({product})"
    raise ValueError(f"counts steps, and a run ends by the tokens of all peers together; {write}")


def _epochs(value: Any, given: _Given) -> dict[str, Any]:
    raise ValueError("a run ends by its tokens; write total_tokens: those of the text times the epochs")


def _warmup_steps(value: Any, given: _Given) -> dict[str, Any]:
    number, tokens, total = _number(value), _step_tokens(given), given.value("run.total_tokens")
    if number == 0:
        return {"warmup_fraction": 0}
    write = "write warmup_fraction"
    if number is not None and 0 < number < _MOST and tokens and total is not None:
        share = float(f"{_quotient(number * tokens, total):.4g}")
        write += f" = {share:g} for {shown(value)} steps of one volunteer, N times that for N volunteers"
    raise ValueError(f"counts steps, and the learning rate rises over a share of the run's tokens; {write}")


def _fixed(what: str) -> Callable[[Any, _Given], dict[str, Any]]:
    def refuse(value: Any, given: _Given) -> dict[str, Any]:
        raise ValueError(f"is no key here: {what}; leave it out")

    return refuse


def _no_key(section: str, words: tuple[str, ...], what: str) -> Alias:
    return Alias(section, words, (), _fixed(what), what, refused=True)


_SHAPE = "the model has RMSNorm, rotary positions, SwiGLU and untied embeddings without biases or dropout"

# Words that a later one may need come first: `min_lr` is converted with `lr`.
ALIASES: tuple[Alias, ...] = (
    Alias("run", ("run_name", "experiment_name"), ("name",)),
    Alias("run", ("random_seed", "manual_seed"), ("seed",)),
    Alias("run", ("max_tokens", "num_tokens", "train_tokens"), ("total_tokens",)),
    Alias("model", ("hidden_size", "n_embd", "d_model", "dim", "embed_dim"), ("width",)),
    Alias("model", ("num_hidden_layers", "n_layer", "n_layers"), ("num_layers",)),
    Alias("model", ("num_attention_heads", "n_head", "n_heads"), ("num_heads",)),
    Alias("model", ("vocab_size",), ("vocabulary_size",)),
    Alias(
        "model",
        (
            *("max_seq_len", "block_size", "max_position_embeddings", "seq_len", "n_ctx", "n_positions"),
            *(
                "context_length",
                "max_seq_length",
                "max_sequence_length",
                "sequence_length",
                "sequence_len",
                "seq_length",
            ),
        ),
        ("context_tokens",),
    ),
    Alias("data", ("dataset_name",), ("dataset",)),
    Alias("data", ("dataset_config_name", "dataset_config"), ("subset",)),
    Alias("data", ("dataset_split", "train_split"), ("split",)),
    Alias("data", ("dataset_text_field", "text_column", "text_column_name", "text_field"), ("field",)),
    Alias("data", ("data_files",), ("paths",)),
    Alias(
        "data.sources",
        ("probability", "probabilities", "prob", "proportion", "ratio", "sampling_weight", "sampling_ratio"),
        ("weight",),
    ),
    Alias("inner", ("micro_batch_size", "micro_bs", "device_batch_size"), ("microbatch_sequences",)),
    Alias("inner", ("lr", "max_lr", "peak_lr", "inner_lr", "inner_learning_rate"), ("learning_rate",)),
    Alias("inner", ("adam_beta1",), ("beta1",)),
    Alias("inner", ("adam_beta2",), ("beta2",)),
    Alias(
        "inner",
        ("max_grad_norm", "grad_clip", "max_norm", "clip_grad", "gradient_clipping", "gradient_clip_val"),
        ("gradient_clip",),
    ),
    Alias("inner", ("warmup_ratio",), ("warmup_fraction",)),
    Alias(
        "inner",
        ("min_lr_ratio", "min_lr_rate", "min_lr_factor", "cosine_min_lr_ratio", "final_lr_frac"),
        ("floor_fraction",),
    ),
    Alias("adapter", ("r", "lora_r", "lora_rank"), ("rank",)),
    Alias("adapter", ("lora_alpha",), ("alpha",)),
    Alias("adapter", ("lora_dropout",), ("dropout",)),
    Alias("adapter", ("target_modules", "lora_target_modules"), ("targets",)),
    Alias("merge", ("h", "H", "local_steps", "num_inner_steps", "sync_every", "sync_steps"), ("inner_steps",)),
    Alias("merge", ("outer_lr",), ("outer_learning_rate",)),
    Alias("merge", ("num_fragments",), ("fragments",)),
    Alias("pipeline", ("num_stages", "pipeline_parallel_degree", "pp_size"), ("stages",)),
    Alias("evaluation", ("batch_size", "eval_batch_size", "per_device_eval_batch_size"), ("batch_sequences",)),
    # ---- converted
    Alias(
        "model",
        ("intermediate_size", "n_inner", "d_ff", "ffn_hidden_size"),
        ("feed_forward_ratio",),
        _feed_forward,
        "divided by `width`",
        uses=("model.width",),
    ),
    Alias("inner", ("betas", "adam_betas"), ("beta1", "beta2"), _betas, "a list of the two"),
    Alias(
        "inner",
        ("min_lr",),
        ("floor_fraction",),
        _least_rate,
        "divided by `learning_rate`",
        uses=("inner.learning_rate",),
    ),
    Alias(
        "inner",
        ("batch_size",),
        ("batch_sequences",),
        _batch,
        "refused beside `gradient_accumulation_steps`, where it may be either batch",
    ),
    Alias(
        "inner",
        _PER_DEVICE,
        ("microbatch_sequences",),
        _per_device,
        "refused without `batch_sequences` or `gradient_accumulation_steps`, since it is the batch of a step then",
    ),
    Alias(
        "inner",
        _ACCUMULATION,
        ("batch_sequences", "microbatch_sequences"),
        _accumulated,
        "a batch is so many microbatches, which gives the one of the two that is not there",
        uses=("inner.batch_sequences", "inner.microbatch_sequences"),
    ),
    Alias(
        "evaluation",
        ("eval_steps", "eval_interval", "eval_every"),
        ("every_rounds",),
        _rounds,
        "divided by `merge.inner_steps`, which must divide it",
        uses=("merge.inner_steps",),
    ),
    # ---- refused, with what to write
    Alias(
        "run",
        ("max_steps", "max_iters", "total_steps", "train_steps", "training_steps", "num_steps"),
        ("total_tokens",),
        _all_steps,
        "counts steps; a run ends by the tokens of all peers together",
        refused=True,
    ),
    Alias(
        "run",
        ("num_train_epochs", "num_epochs", "epochs"),
        ("total_tokens",),
        _epochs,
        "the tokens of the text times the epochs",
        refused=True,
    ),
    Alias(
        "inner",
        ("warmup_steps", "warmup_iters", "lr_warmup_steps", "num_warmup_steps"),
        ("warmup_fraction",),
        _warmup_steps,
        "counts steps; the learning rate rises over a share of the tokens of all peers; 0 is accepted",
        refused=True,
    ),
    Alias(
        "inner",
        _GLOBAL,
        ("batch_sequences",),
        _all_batches,
        "counts tokens, or sequences of all workers",
        refused=True,
    ),
    _no_key("inner", ("adam_epsilon", "adam_eps", "eps", "epsilon"), "AdamW's epsilon is 1e-8"),
    _no_key("inner", ("optimizer", "optim", "optimizer_type"), "the inner optimizer is AdamW"),
    _no_key(
        "inner",
        ("lr_scheduler", "lr_scheduler_type", "lr_schedule", "decay_lr", "lr_decay_iters", "lr_decay_steps"),
        "the learning rate rises over warmup_fraction of the run's tokens and ends its cosine at floor_fraction",
    ),
    _no_key(
        "model",
        ("dropout", "bias", "tie_word_embeddings", "hidden_act", "rope_theta", "rms_norm_eps", "norm_eps"),
        _SHAPE,
    ),
    _no_key(
        "model", ("num_key_value_heads", "n_kv_heads", "n_kv_head"), "each of num_heads has keys and values of its own"
    ),
    _no_key("model", ("head_dim",), "a head has width / num_heads numbers"),
    _no_key("merge", ("nesterov", "outer_nesterov", "outer_optimizer"), "the outer optimizer is Nesterov momentum"),
    _no_key(
        "evaluation",
        ("eval_iters", "eval_batches"),
        "the whole held-out text is measured, which has data.held_out_bytes",
    ),
)

_SECTIONS = {
    "training": "run, model and inner",
    "train": "run, model and inner",
    "optimizer": "inner",
    "optim": "inner",
    "lr_scheduler": "inner",
    "diloco": "merge",
    "outer": "merge",
    "eval": "evaluation",
    "validation": "evaluation",
    "parallelism": "pipeline",
    "dataset": "data",
    "datasets": "data",
}
"""Map a section of another project's files to our sections that have its keys."""


_LISTS = {"data.sources": "data"}
"""Map each list of tables to the section whose words its tables have too."""


class _Table(NamedTuple):
    place: tuple[str, ...]
    """Name of the section; for a table of a list its section, list and number, from 1."""
    keys: dict[str, Any]
    """Keys of the table, which are changed."""
    sections: tuple[str, ...]
    """Sections of `ALIASES` whose words it may have."""


@dataclass
class _Draft:
    table: dict[str, Any]
    said: dict[tuple[tuple[str, ...], str], str] = field(default_factory=dict)
    words: dict[tuple[str, str], str] = field(default_factory=dict)
    problems: list[tuple[tuple[str, ...], Problem]] = field(default_factory=list)
    meant: set[str] = field(default_factory=set)
    conversions: list[Conversion] = field(default_factory=list)

    def refuse(self, names: tuple[str, ...], problem: str, meant: tuple[str, ...] = (), code: str = _CODE) -> None:
        self.problems.append((names, Problem(f"{'.'.join(map(one_line, names))}: {problem}", code)))
        self.meant.update(meant)


def translate(table: Mapping[str, Any], defaults: _Keys) -> Translation:
    """Replace aliases by our keys in a person's `table`. What cannot be read is left out, and listed as a problem."""
    draft = _Draft({name: dict(keys) if isinstance(keys, dict) else keys for name, keys in table.items()})
    tables = list(_tables(draft.table))
    written = [(each.place, word) for each in tables for word in each.keys]
    for name in table:
        if name in _SECTIONS and name not in defaults:
            homes = " or ".join(f"[{home}]" for home in _SECTIONS[name].replace(" and ", ", ").split(", "))
            del draft.table[name]
            draft.refuse((name,), f"is not a section here; write its keys into {homes}")
    given = [(each, _Given(draft.table, defaults, dict(each.keys))) for each in tables]
    for alias in ALIASES:
        for each, words in given:
            for word in alias.words if alias.section in each.sections else ():
                if word in words.words:
                    _read(alias, word, words, each, draft)
    _move_home(draft, defaults)
    rewritten = Rewritten(draft.words, tuple(draft.problems), frozenset(draft.meant))
    said = tuple(draft.said[place] for place in written if place in draft.said)
    return Translation(draft.table, said, rewritten, tuple(draft.conversions))


def _tables(table: dict[str, Any]) -> Iterator[_Table]:
    """Yield the sections, and the tables of lists, in the file's order; those of lists are copied into `table`."""
    for name, keys in table.items():
        if not isinstance(keys, dict):
            continue
        yield _Table((name,), keys, (name,))
        for of_list, section in _LISTS.items():
            key = of_list.removeprefix(f"{name}.")
            if key == of_list or not isinstance(keys.get(key), list):
                continue
            keys[key] = [dict(each) if isinstance(each, dict) else each for each in keys[key]]
            for number, each in enumerate(keys[key], 1):
                if isinstance(each, dict):
                    yield _Table((name, key, str(number)), each, (of_list, section))


def _read(alias: Alias, word: str, given: _Given, table: _Table, draft: _Draft) -> None:
    """Replace one word by our key."""
    section, place, names = table.keys, ".".join(table.place), (*table.place, word)
    value = section.pop(word)
    meant = tuple(f"{place}.{key}" for key in alias.keys)
    try:
        found = {alias.keys[0]: value} if alias.read is None else alias.read(value, given)
    except ValueError as error:
        draft.refuse(names, str(error), meant)
        return
    for key in found:
        if key in section:
            other = draft.words.get((place, key), key)
            problem = f"means {place}.{key}, which {other} gives too; leave one of them out"
            draft.refuse(names, problem, code="key-given-twice")
            return
    section.update(found)
    draft.words.update({(place, key): word for key in found})
    if alias.read is not None:
        ours_found = {f"{place}.{key}": each for key, each in found.items()}
        used = tuple(key for key in alias.uses if key not in ours_found) if value else ()
        draft.conversions.append(Conversion(".".join(names), ours_found, used))
    ours = ", ".join(f"{key} = {shown(each)}" for key, each in found.items()) or "what the other keys say already"
    draft.said[table.place, word] = f"[{place}] {word} = {shown(value)} is read as {ours}"


def _move_home(draft: _Draft, defaults: _Keys) -> None:
    """Refuse words in a section without such a key, or outside all sections, and say where they belong."""
    top = {name: value for name, value in draft.table.items() if not isinstance(value, dict)}
    places = [((), top), *(((name,), keys) for name, keys in draft.table.items() if isinstance(keys, dict))]
    for where, keys in places:
        for word in list(keys):
            homes = list(_homes(word))
            if not homes or any(word in ours for ours in defaults.values()):
                continue
            del (draft.table[where[0]] if where else draft.table)[word]
            told = " or ".join(
                _shown_section(home.section) + (f", as {' and '.join(home.keys)}" * bool(home.keys)) for home in homes
            )
            meant = tuple(f"{home.section}.{key}" for home in homes for key in home.keys)
            draft.refuse((*where, word), f"belongs in {told}", meant)


def _shown_section(section: str) -> str:
    return f"[[{section}]]" if section in _LISTS else f"[{section}]"


def _homes(word: str) -> Iterator[Alias]:
    return (alias for alias in ALIASES if word in alias.words)


def our_key(key: str, beside: Collection[str] = ()) -> str:
    """Return `SECTION.KEY` with our key, if the person's is only another word for it.

    `beside` has the words that the file has already, as `SECTION.WORD`. Raises `UserError` for a word whose value would
    be converted or refused.
    """
    section, _, word = key.partition(".")
    for alias in _homes(word):
        if alias.section == section:
            is_batch = alias.read is _batch and not any(f"inner.{each}" in beside for each in _ACCUMULATION)
            if alias.read is None or is_batch:
                return f"{section}.{alias.keys[0]}"
            if not alias.keys:
                raise UserError(f"{one_line(key)}: is no key here: {alias.says}; leave it out", code=_CODE)
            raise UserError(
                f"{one_line(key)}: stands for {' and '.join(f'{section}.{name}' for name in alias.keys)}, whose value "
                "is written differently; use that key here",
                code=_CODE,
            )
    return key
