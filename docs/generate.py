"""Generate the reference pages of docs/ from the code: `make docs`.

- run-file.md, events.md: the fields of the run file and of the events, and their descriptions.
- commands.md: the commands, their help and options.
- decisions/README.md: the decisions' titles and status.
- troubleshooting.md: the tables of codes in it; the rest of that page is written by hand.

A test fails when a page in the tree is not what this writes.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from swarmtrain.cli.main import ALIASES as COMMAND_ALIASES
from swarmtrain.cli.main import COMMANDS, cli
from swarmtrain.error_codes import CODES
from swarmtrain.events import EVENT_CLASSES
from swarmtrain.problems import allowed_values, table_fields
from swarmtrain.run import RunFile

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

EVENTS_HEAD = """# Events

With `--json` a command writes one JSON object a line on its standard output, and nothing else; everything for
people goes to standard error. Without it, the same events are one plain line each, or a live display on a
terminal. The schema is `swarmtrain/events.py`; fields are never left out, and numbers are always finite.

Every event has these fields:

| field | type | meaning |
|---|---|---|
| `event` | string | Which event it is: one of the headings below. |
"""

COMMANDS_HEAD = """# Commands

Every command with its options, as `swarmtrain COMMAND --help` prints them. Each option can also come from an
environment variable: `SWARMTRAIN_JOIN_UP=20` is `swarmtrain join --up 20`; an option on the command line goes first.

Exit codes: 0 means that all is well, 2 that what was typed or written has to be changed, 1 any other error, 130 that
Ctrl-C interrupted. Errors are one line on standard error.

| command | what it does |
|---|---|
"""

DECISIONS_HEAD = """# Decisions

Choices that are not obvious from the code, each with what was measured. A decision that no longer holds is not
deleted: its status names the one that replaced it. Modules have the names that they had on the day, or have now.
0012 is not used.

| number | decision | status |
|---|---|---|
"""

STATUS = re.compile(r"^Status: (holds|replaced (?:in part )?by \[\d{4}\]\(.*)$", re.MULTILINE)
DEFAULT = re.compile(r"\s*\[default: (.*?)\]")


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


def heading(section: str) -> str:
    """How a section is written in a file: `[data]`, and `[[data.sources]]` for the tables of a list."""
    return f"[[{section}]]" if "." in section else f"[{section}]"


def section_page(name: str, section: type[BaseModel], titles: dict[str, str]) -> str:
    """The table of a section's keys, the lists of values, and the tables of its lists of tables.

    `titles` has the titles of lists of values by key, also of the sections before: a link leads to one of them.
    """
    parts = [
        f"\n## `{heading(name)}`\n\n{section.__doc__}\n\n| key | default | allowed | meaning |\n|---|---|---|---|\n"
    ]
    lists, tables = [], []
    for key, field in section.model_fields.items():
        meaning, *values = (field.description or "").split("\n")
        allowed = allowed_values(field).replace("a string matching ", "")
        allowed = f"`{allowed}`" if allowed.startswith("^") else allowed
        if values:
            if "." not in name:  # a table of a list has the values of the section that it is in
                titles[key] = f"{name}.{key}" if key in titles else key
                lists.append(f"\n### `{titles[key]}`\n\n{meaning}\n\n" + "".join(f"{value}\n" for value in values))
            place = f"#{titles[key].replace('.', '')}"
            named = isinstance(field.default, str) or field.is_required() or field.default is None
            allowed = f"one of [{len(values)} values]({place})" if named else f"[{allowed}]({place})"
        parts.append(f"| `{key}` | {default_of(field)} | {cell(allowed)} | {cell(meaning)} |\n")
        if table_fields(field.annotation):
            tables.append(section_page(f"{name}.{key}", get_args(field.annotation)[0], titles))
    return "".join(parts + lists + tables)


def run_file() -> str:
    parts, titles = [RUN_FILE_HEAD], dict[str, str]()
    parts += [section_page(name, section_of(field), titles) for name, field in RunFile.model_fields.items()]
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


def help_of(command: click.Command) -> str:
    """A command's help as Markdown: paragraphs without the line breaks of the source."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def examples_of(command: click.Command) -> str:
    """The blocks of a command's epilog: its first line as a sentence, the indented rest as code."""
    blocks = [block.strip("\n") for block in (command.epilog or "").split("\b") if block.strip()]
    parts = []
    for block in blocks:
        title, *lines = block.split("\n")
        code = inspect.cleandoc("\n".join(lines))
        parts.append(f"{title}\n\n```sh\n{code}\n```\n" if code.startswith("swarmtrain") else f"{title} {code}\n")
    return "\n".join(parts)


def option_row(option: click.Option) -> str:
    """One row: how the option is written, its default, its environment variable, and what it does."""
    written = ", ".join([*option.opts, *option.secondary_opts])
    if not option.is_flag and not isinstance(option.type, click.Choice):
        written += f" {option.metavar or option.type.name.upper()}"
    text = option.help or ""
    said = DEFAULT.search(text)
    default = said[1] if said else str(option.default) if option.show_default else "off" if option.is_flag else ""
    meaning = DEFAULT.sub("", text)
    if isinstance(option.type, click.Choice):
        meaning += f" One of {codes(tuple(map(str, option.type.choices)))}."
    elif isinstance(option.type, click.IntRange | click.FloatRange):
        meaning += f" Allowed: {range_of(option.type)}."
    return f"| `{written}` | {cell(default)} | `{option.envvar}` | {cell(meaning)} |\n"


def range_of(kind: click.IntRange | click.FloatRange) -> str:
    if kind.max is None:
        return f"{kind.min:g} or more"
    return f"{kind.min:g} to {kind.max:g}" if kind.max < 1e6 else f"{kind.min:g} to {kind.max:,}"


def command_section(level: str, name: str, command: click.Command) -> str:
    """A command's heading, usage, help, options and examples."""
    usage = " ".join(command.collect_usage_pieces(click.Context(command)))
    parts = [f"\n{level} `{name}`\n\n```text\nswarmtrain {name} {usage}\n```\n\n{help_of(command)}\n"]
    if rows := [option_row(o) for o in command.params if isinstance(o, click.Option) and not o.hidden]:
        parts.append("\n| option | default | variable | meaning |\n|---|---|---|---|\n" + "".join(rows))
    return "".join([*parts, f"\n{examples_of(command)}"])


def commands() -> str:
    loaded = {name: cli.get_command(click.Context(cli), name) for name in COMMANDS}
    parts = [COMMANDS_HEAD]
    sections = []
    for name, command in loaded.items():
        assert command is not None
        first, _, _ = help_of(command).partition("\n")
        parts.append(f"| [`{name}`](#{name}) | {cell(first)} |\n")
        sections.append(command_section("##", name, command))
        if isinstance(command, click.Group):
            sections += [command_section("###", f"{name} {each}", inner) for each, inner in command.commands.items()]
    parts.append("\nOther words for some of them:\n\n| typed | runs |\n|---|---|\n")
    parts += [f"| `{alias}` | `{' '.join(words)}`. |\n" for alias, words in COMMAND_ALIASES.items()]
    return "".join(parts + sections)


def decisions() -> str:
    parts = [DECISIONS_HEAD]
    for page in sorted((DOCS / "decisions").glob("0*.md")):
        text = page.read_text(encoding="utf-8")
        number, _, title = text.partition("\n")[0].removeprefix("# ").partition(": ")
        status = STATUS.search(text)
        parts.append(f"| [{number}]({page.name}) | {cell(title)} | {status[1] if status else ''} |\n")
    return "".join(parts)


def code_rows(topic: str) -> str:
    """The table of the codes of a topic: each with an anchor, so that a link may lead to it."""
    found = {code: each for code, each in CODES.items() if each.topic == topic}
    if not any(each.says for each in found.values()):
        return "| code | what it means |\n|---|---|\n" + "".join(
            f'| <a id="{code}"></a>`{code}` | {cell(each.do)} |\n' for code, each in found.items()
        )
    return "| code | it says | what to do |\n|---|---|---|\n" + "".join(
        f'| <a id="{code}"></a>`{code}` | {" · ".join(f"`{cell(text)}`" for text in each.says)} | {cell(each.do)} |\n'
        for code, each in found.items()
    )


def troubleshooting() -> str:
    """The page as it is, which is written by hand, with the tables of codes between its marks."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.sub(
        r"(<!-- codes: ([a-z-]+) -->\n).*?(<!-- end -->\n)",
        lambda found: f"{found[1]}\n{code_rows(found[2])}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


PAGES = {
    "run-file.md": run_file,
    "events.md": events,
    "commands.md": commands,
    "decisions/README.md": decisions,
    "troubleshooting.md": troubleshooting,
}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write(), encoding="utf-8")
