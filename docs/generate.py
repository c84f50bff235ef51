"""Generate `docs/run-file.md` and `docs/events.md` from the sentences of the fields: `make docs`.

A test fails when what is in the tree is not what this writes.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from swarmtrain.events import EVENT_CLASSES
from swarmtrain.problems import allowed_values
from swarmtrain.run import RunFile
from swarmtrain.run_aliases import ALIASES, Alias

DOCS = Path(__file__).resolve().parent

RUN_FILE_HEAD = """# The run file

A run file says what is trained, how, and until when. It is [TOML](https://toml.io); write only the keys that
differ from their defaults. `swarmtrain check RUN.toml` prints what would be trained, errors (what `bootstrap` would
refuse, with exit code 2) and warnings (what is allowed, but perhaps not meant, with exit code 0).

`swarmtrain bootstrap` writes every default out, adds the section `[published]` and hands out those exact bytes.
Their SHA-256 is the run's identity: volunteers fetch the run by it, and peers of different runs never mix.
Sizes are in bytes where a name ends in `_bytes`, durations in seconds where it ends in `_s`. A whole number may be
written `300_000` or `3e5`.

The smallest run file is two lines:

```toml
[run]
total_tokens = 3_000_000
```
"""

ALIASES_HEAD = """
## Words of the field

Other projects' words are read too where they mean the same: nanoGPT's, transformers', litgpt's, torchtitan's,
OpenDiLoCo's. Each is said back on standard error, such as `[model] hidden_size = 256 is read as width = 256`. Give a
key by one word only. The published run has the keys of the tables above: two files that mean the same are published
as the same bytes, and a published file with other words is refused. Scenarios' `[set]` and `[grid]`, and `--set` and
`--sweep`, take the words that stand for a key as they are.

| section | word | read as |
|---|---|---|
"""

REFUSED_HEAD = """
These are refused, with what to write instead:

| section | word | instead | why |
|---|---|---|---|
"""

EVENTS_HEAD = """# Events

With `--json` a command writes one JSON object a line on its standard output, and nothing else; everything for
people goes to standard error. Without it, the same events are one plain line each, or a live display on a
terminal. The schema is `swarmtrain/events.py`; fields are never left out, and numbers are always finite.

Every event has these fields:

| field | type | meaning |
|---|---|---|
| `event` | string | Which event it is: one of the headings below. |
"""


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "absent" if value is None else f"`{json.dumps(value)}`"


def section_of(field: FieldInfo) -> type[BaseModel]:
    return next(kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields"))


def codes(words: tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def aliases() -> str:
    def row(alias: Alias, *cells: str) -> str:
        return f"| `[{alias.section}]` | {codes(alias.words)} | {' | '.join(map(cell, cells))}. |\n"

    read = (alias for alias in ALIASES if not alias.refused)
    refused = (alias for alias in ALIASES if alias.refused)
    parts = [ALIASES_HEAD]
    parts += [row(alias, codes(alias.keys) + (f"; {alias.says}" if alias.says else "")) for alias in read]
    parts.append(REFUSED_HEAD)
    parts += [row(alias, codes(alias.keys) or "nothing", alias.says) for alias in refused]
    return "".join(parts)


def run_file() -> str:
    parts = [RUN_FILE_HEAD]
    for name, section_field in RunFile.model_fields.items():
        section = section_of(section_field)
        parts.append(
            f"\n## `[{name}]`\n\n{section.__doc__}\n\n| key | default | allowed | meaning |\n|---|---|---|---|\n"
        )
        for key, field in section.model_fields.items():
            allowed = allowed_values(field).replace("a string matching ", "")
            allowed = f"`{allowed}`" if allowed.startswith("^") else allowed
            parts.append(f"| `{key}` | {default_of(field)} | {cell(allowed)} | {cell(field.description or '')} |\n")
    parts.append(aliases())
    return "".join(parts)


def json_type(annotation: object) -> str:
    """The JSON type of a field, in a word or three."""
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(json_type(kind) for kind in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {json_type(get_args(annotation)[0])}s"
    return names[annotation]  # type: ignore[index]


def event_rows(fields: dict[str, FieldInfo]) -> str:
    return "".join(
        f"| `{name}` | {json_type(field.annotation)} | {cell(field.description or '')} |\n"
        for name, field in fields.items()
        if get_origin(field.annotation) is not Literal
    )


def events() -> str:
    common = EVENT_CLASSES[0].__mro__[1].model_fields  # type: ignore[attr-defined]
    parts = [EVENTS_HEAD, event_rows(common)]
    for kind in EVENT_CLASSES:
        own = {name: field for name, field in kind.model_fields.items() if name not in common}
        name = own.pop("event").default
        parts.append(f"\n## `{name}`\n\n{kind.__doc__}\n\n| field | type | meaning |\n|---|---|---|\n{event_rows(own)}")
    return "".join(parts)


PAGES = {"run-file.md": run_file, "events.md": events}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write(), encoding="utf-8")
