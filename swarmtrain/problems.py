"""Problems of a TOML file, one line each that names the key and what is allowed.

A person who mistypes a key should not have to read a validator's report. Works on any pydantic model whose fields are
sections. Values are shortened and escaped, since the table may come from another peer.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from swarmtrain.errors import Problem, UserError
from swarmtrain.words import counted, one_line

_MAX_FILE_BYTES = 65_536
_MOST_S = 1e9
"""Longest duration, in seconds: thirty years. Sums of such are finite, and times stay within the range of calendars."""
_TOLD = 5


class Section(BaseModel):
    """Table of a file that a person writes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: object, info: ValidationInfo) -> object:
        """Read 3e5 as 300000 where a whole number is wanted: TOML has no other way to write it short."""
        assert info.field_name is not None
        if isinstance(value, float) and cls.model_fields[info.field_name].annotation in (int, int | None):
            return int(value) if value.is_integer() and abs(value) < 2**63 else value
        return value

    @field_validator("*")
    @classmethod
    def _bounded_duration(cls, value: object, info: ValidationInfo) -> object:
        is_duration = re.search("(?<!_per)_s$", str(info.field_name))
        if is_duration and isinstance(value, float) and value > _MOST_S:
            raise ValueError(
                Problem(f"{value:g} is refused; allowed: at most {_MOST_S:.0f} (thirty years)", "out-of-range")
            )
        return value

    @field_validator("*")
    @classmethod
    def _printable(cls, value: object) -> object:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and not text.isprintable():
                raise ValueError("contains a control character; allowed: printable text")
        return value


def read_small_file(path: Path, kind: str, example: str) -> dict[str, Any]:
    """Read the tables of a TOML file that a person writes. Raises as `read_small_text` and `read_toml` do."""
    return read_toml(read_small_text(path, kind, example), one_line(str(path)), UserError)


def read_small_text(path: Path, kind: str, example: str, most_bytes: int = _MAX_FILE_BYTES) -> str:
    """Read a file that a person writes. Raises `UserError`, one line that names the file, if it cannot be read.

    `kind` names such a file in messages, such as "a rehearsal file"; `example` is the path of one.
    """
    origin = one_line(str(path))
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{origin}: cannot be read ({error}); an example is {example}", code="file-unreadable"
        ) from None
    if len(data) > most_bytes:
        raise UserError(f"{origin}: {len(data)} bytes; allowed for {kind}: at most {most_bytes}", code="file-too-long")
    return text


_DEEP_KEY = re.compile(
    r"""(?:^|[\[{,])[ \t]*(?:(?:[\w-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*\.[ \t]*){16}""", re.MULTILINE | re.ASCII
)
"""Key with more parts than any file here has. The parser's time grows with their square: seconds for a key of 32 kB."""


def read_toml(text: str, origin: str, error_type: type[UserError]) -> dict[str, Any]:
    """Parse TOML. Raises `error_type`, one line that names `origin` and the place in it."""
    if deep := _DEEP_KEY.search(text):
        where = f"line {text.count(chr(10), 0, deep.end()) + 1}: "
        raise error_type(f"{origin}: {where}not TOML that a run file needs: a key of too many parts", code="not-toml")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise error_type(f"{origin}: not TOML that a run file needs: nested too deeply", code="not-toml") from None
    except ValueError as error:
        match = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error), re.DOTALL)
        what, line, column = match.groups() if match else (str(error), None, None)
        if match and line is None:
            line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
        where = f"line {line}, column {column}: " if line else ""
        raise error_type(f"{origin}: {where}not TOML: {one_line(what)}", code="not-toml") from None


def problems_in_words(error: ValidationError, model: type[BaseModel], text: str = "") -> list[Problem]:
    """List the first few problems of `error`, raised by validating `model`, as "key: what is wrong; allowed: ...".

    With the file's `text`, problems are in the file's order and begin with their line, where it is known.
    """
    lines = _lines_of_keys(text)
    found: list[tuple[float, int, str, Problem]] = []
    for detail in error.errors():
        at = _place(detail, model)
        sentence = _sentence(detail, at, model)
        names = sentence.partition(": ")[0].split(".") if detail["type"] == "value_error" else at.names
        line = None if detail["type"] == "missing" and not at.table else _line_of(names, lines)
        where = f"line {line}: " if line is not None else ""
        # An unknown key is most often the cause of whatever else is wrong, such as a missing one.
        found.append((line or math.inf, detail["type"] != "extra_forbidden", where, Problem(sentence, _code(detail))))
    found.sort(key=lambda one: one[:2])
    meant = {each.rpartition("did you mean ")[2].rstrip("?") for *_, each in found if "did you mean " in each}
    told = [
        Problem(where + each, each.code) for _, _, where, each in found if each.partition(": missing;")[0] not in meant
    ]
    if len(told) <= _TOLD:
        return told
    return [*told[:_TOLD], Problem(f"and {counted(len(told) - _TOLD, 'more problem')}", "")]


class _Place(NamedTuple):
    names: list[str]
    """Names of section and key; a table of a list is a number between them, from 1, as people count."""
    field: FieldInfo | None
    """Last field that these names lead to."""
    table: type[BaseModel] | None
    """Model of the tables of a list, if the place is in one."""


def _place(detail: ErrorDetails, model: type[BaseModel]) -> _Place:
    names: list[str] = []
    field, table = None, None
    kind: type[BaseModel] | None = model
    for part in detail["loc"]:
        if isinstance(part, int):
            table = kind
            names.append(str(part if table is None else part + 1))
        else:
            names.append(part)
            found = None if kind is None else kind.model_fields.get(part)
            field, kind = found or field, None if found is None else _model_of(found.annotation)
    return _Place(names, field, table)


def _line_of(names: list[str], lines: dict[tuple[str, ...], int]) -> int | None:
    """Return the line of a key, or of the section that it is in."""
    return next((lines[key] for end in range(len(names), 0, -1) if (key := tuple(names[:end])) in lines), None)


_KEY = r"(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')"
_KEYS = rf"{_KEY}(?:\s*\.\s*{_KEY})*"


def _lines_of_keys(text: str) -> dict[tuple[str, ...], int]:
    """Find the lines, from 1, on which sections and keys of a TOML file begin. Covers common style, not all of TOML.

    The tables of a list, `[[data.sources]]`, are sections with a number: ("data", "sources", "1").
    """
    found: dict[tuple[str, ...], int] = {}
    num_tables: Counter[tuple[str, ...]] = Counter()
    section: tuple[str, ...] = ()
    quote = ""
    for number, line in enumerate(text.split("\n"), 1):
        if quote:  # within a string of several lines
            quote = "" if quote in line else quote
            continue
        if header := re.match(rf"\s*\[(\[?)\s*({_KEYS})\s*\]", line):
            section = tuple(part.strip("\"'") for part in re.findall(_KEY, header[2]))
            if header[1]:
                num_tables[section] += 1
                section = (*section, str(num_tables[section]))
            key = section
        elif assigned := re.match(rf"\s*({_KEYS})\s*=", line):
            key = section + tuple(part.strip("\"'") for part in re.findall(_KEY, assigned[1]))
        else:
            continue
        for end in range(1, len(key) + 1):
            found.setdefault(key[:end], number)
        quote = next((each for each in ('"""', "'''") if line.count(each) % 2), "")
    return found


def allowed_values(field: FieldInfo) -> str:
    """Describe what a field accepts, for errors and for the reference. `json_schema_extra["allowed"]` overrides it."""
    if isinstance(field.json_schema_extra, dict) and "allowed" in field.json_schema_extra:
        return str(field.json_schema_extra["allowed"])
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = field.annotation
    if get_origin(kind) is Literal:
        return " or ".join(json.dumps(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        return "a list of strings" if _item(kind) is str else "a list of numbers"
    if kind is bool:
        return "true or false"
    limits = {
        name: getattr(item, name)
        for item in field.metadata
        for name in _LIMIT_WORDS
        if getattr(item, name, None) is not None
    }
    if kind in (int, float):
        noun = "an integer" if kind is int else "a number"
        if "ge" in limits and "le" in limits:
            return f"{noun} from {limits['ge']} to {limits['le']}"
        return f"{noun} " + " and ".join(f"{_LIMIT_WORDS[name]} {_number(limit)}" for name, limit in limits.items())
    if any(get_origin(each) is tuple for each in kinds):
        return "a list of numbers"
    assert kind is str or kinds
    pattern = next((item.pattern for item in field.metadata if getattr(item, "pattern", None)), None)
    return f"a string matching {pattern}" if pattern else "a string" if not _min_length(field) else "a non-empty string"


def with_values(sentence: str, meanings: Mapping[str, str]) -> str:
    """Describe a field that takes one of a few values: its sentence, then an item `- "value"`: meaning for each."""
    return "\n".join([sentence, *(f'- `"{value}"`: {meaning}' for value, meaning in meanings.items())])


def _item(kind: Any) -> Any:
    """Return the type of a list's items, without its limits."""
    item = get_args(kind)[0]
    return get_args(item)[0] if get_origin(item) is Annotated else item


_LIMIT_WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _number(limit: float) -> str:
    return "2^63" if limit == 2**63 else str(limit)


def _min_length(field: FieldInfo) -> int:
    return max((getattr(item, "min_length", None) or 0 for item in field.metadata), default=0)


def _code(detail: ErrorDetails) -> str:
    """Return the code of one problem, by the validator's name for it."""
    kind = detail["type"]
    if kind == "value_error":
        line = detail["ctx"]["error"].args[0]
        if isinstance(line, Problem):
            return line.code
        return "keys-disagree" if len(detail["loc"]) < 2 or _is_of_table(detail) else "bad-value"
    if kind in _CODES:
        return _CODES[kind]
    return "wrong-type" if kind.endswith(("_type", "_parsing", "_from_float")) else "bad-value"


def _is_of_table(detail: ErrorDetails) -> bool:
    """Return whether the problem is of a whole table of a list, and not of one of its keys."""
    return bool(detail["loc"]) and isinstance(detail["loc"][-1], int)


_CODES = {
    "extra_forbidden": "unknown-key",
    "missing": "missing-key",
    **dict.fromkeys(("greater_than", "greater_than_equal", "less_than", "less_than_equal"), "out-of-range"),
    **dict.fromkeys(("finite_number", "too_short", "too_long", "int_parsing_size"), "out-of-range"),
}
"""Codes by the validator's name of a problem, for names that decide it."""


def _sentence(detail: ErrorDetails, place: _Place, model: type[BaseModel]) -> str:
    """Describe one problem: the key, what is wrong, what is allowed."""
    names = place.names
    key = ".".join(one_line(name) for name in names)
    if detail["type"] == "extra_forbidden":
        return f"{key}: {_unknown_in_table(names, place.table, model) or _unknown(names, model)}"
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        if _is_of_table(detail):
            return f"{key}.{message}"
        return message if len(names) < 2 else f"{key}: {message}"
    if detail["type"] == "missing" and len(names) == 1:
        fields = section_fields(model.model_fields[names[0]].annotation)
        required = next(name for name, field in fields.items() if field.is_required())
        return f"{key}.{required}: missing; allowed: {allowed_values(fields[required])}"
    if len(names) == 1:
        return f"{key}: {shown(detail['input'])} is not a section; allowed: [{key}] with keys below it"
    assert place.field is not None
    problem = "missing" if detail["type"] == "missing" else f"{shown(detail['input'])} is refused"
    return f"{key}: {problem}; allowed: {allowed_values(place.field)}"


def section_fields(annotation: object) -> dict[str, FieldInfo]:
    """Return the fields of a section's annotation, which may be `Section | None`."""
    kind = _model_of(annotation)
    assert kind is not None, annotation
    return kind.model_fields


def table_fields(annotation: object) -> dict[str, FieldInfo]:
    """Return the fields of the tables of a list, `tuple[Section, ...]`; none if the annotation is of something else."""
    kind = _model_of(annotation) if get_origin(annotation) is tuple else None
    return {} if kind is None else kind.model_fields


def _model_of(annotation: object) -> type[BaseModel] | None:
    """Return the model of a section, of `Section | None` or of a list of tables; None if it is something else."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _sections(model: type[BaseModel]) -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    for name, field in model.model_fields.items():
        if name != "published":
            yield name, section_fields(field.annotation)


def _unknown_in_table(names: list[str], table: type[BaseModel] | None, model: type[BaseModel]) -> str:
    """Say what to write instead of an unknown key of a table of a list; empty if it is in none, or of a section."""
    *where, last = names
    if table is None:
        return ""
    if near := difflib.get_close_matches(last, table.model_fields, n=1):
        return f"unknown key; did you mean {'.'.join((*where, near[0]))}?"
    is_of_section = any(last in fields for _, fields in _sections(model))
    return "" if is_of_section else f"unknown key; allowed: {', '.join(table.model_fields)}"


def _unknown(names: list[str], model: type[BaseModel]) -> str:
    """Say what to write instead of an unknown section, or of an unknown key of a section."""
    sections = dict(_sections(model))
    *where, last = names
    if where and last in sections:
        return f"is a section of its own; write [{last}]"
    own = sections.get(where[0], {}) if len(where) == 1 else {}
    homes = [f"[{where[0]}.{key}]" for key, field in own.items() if last in table_fields(field.annotation)]
    homes = homes or [name for name, fields in sections.items() if last in fields and [name] != where]
    if homes:
        return "belongs in " + " or ".join(f"[{name}]" for name in homes)
    if where and (usual := _OTHER_PROJECTS.get(last, "")).partition(".")[0] in sections:
        return f"unknown key; did you mean {usual}?"
    near = [
        (ratio + (where == [name]) * 0.15, f"{name}.{key}")
        for name, fields in sections.items()
        for key in fields
        if where and (ratio := difflib.SequenceMatcher(None, last, key).ratio()) >= 0.6
    ]
    if near:
        return f"unknown key; did you mean {max(near)[1]}?"
    if where:
        return f"unknown key; allowed: {', '.join(sections.get(where[0], {}))}"
    if section := difflib.get_close_matches(last, sections, n=1):
        return f"unknown section; did you mean {section[0]}?"
    return f"unknown section; allowed: {', '.join(sections)}"


_OTHER_PROJECTS = {
    word: key
    for key, words in {
        "run.seed": "random_seed manual_seed",
        "run.total_tokens": "max_tokens num_tokens train_tokens max_steps max_iters total_steps train_steps num_steps "
        "training_steps num_train_epochs num_epochs epochs",
        "model.width": "hidden_size n_embd d_model dim embed_dim",
        "model.num_layers": "num_hidden_layers n_layer n_layers",
        "model.num_heads": "num_attention_heads n_head n_heads",
        "model.vocabulary_size": "vocab_size",
        "model.context_tokens": "max_seq_len block_size max_position_embeddings seq_len n_ctx n_positions "
        "context_length max_seq_length max_sequence_length sequence_length sequence_len seq_length",
        "model.feed_forward_ratio": "intermediate_size n_inner d_ff ffn_hidden_size",
        "data.dataset": "dataset_name",
        "data.subset": "dataset_config_name dataset_config",
        "data.split": "dataset_split train_split",
        "data.field": "dataset_text_field text_column text_column_name text_field",
        "data.paths": "data_files",
        "inner.batch_sequences": "batch_size global_batch_size total_batch_size train_batch_size",
        "inner.microbatch_sequences": "micro_batch_size micro_bs device_batch_size per_device_train_batch_size "
        "local_batch_size gradient_accumulation_steps grad_accum_steps gradient_accumulation accumulate_grad_batches",
        "inner.learning_rate": "lr max_lr peak_lr inner_lr inner_learning_rate",
        "inner.beta1": "adam_beta1 betas adam_betas",
        "inner.beta2": "adam_beta2",
        "inner.gradient_clip": "max_grad_norm grad_clip max_norm clip_grad gradient_clipping gradient_clip_val",
        "inner.warmup_fraction": "warmup_ratio warmup_steps warmup_iters lr_warmup_steps num_warmup_steps",
        "inner.floor_fraction": "min_lr min_lr_ratio min_lr_rate min_lr_factor cosine_min_lr_ratio final_lr_frac",
        "adapter.rank": "r lora_r lora_rank",
        "adapter.alpha": "lora_alpha",
        "adapter.dropout": "lora_dropout",
        "adapter.targets": "target_modules lora_target_modules",
        "merge.inner_steps": "h H local_steps num_inner_steps sync_every sync_steps",
        "merge.outer_learning_rate": "outer_lr",
        "merge.fragments": "num_fragments",
        "pipeline.stages": "num_stages pipeline_parallel_degree pp_size",
        "evaluation.every_rounds": "eval_steps eval_interval eval_every",
        "evaluation.batch_sequences": "eval_batch_size per_device_eval_batch_size",
    }.items()
    for word in words.split()
}
"""Map words of nanoGPT, transformers, litgpt, torchtitan and OpenDiLoCo to the key whose meaning is nearest."""


def shown(value: object) -> str:
    """Format a value on one line, shortened, without control characters."""
    text = one_line(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 60 else text[:57] + "..."
