"""A page in one file: styles, charts and modules of `static/` are inlined, and the browser asks nobody for anything.

Modules of a page import each other by their files, which a page that is opened from a disk cannot do. So they are put
after each other in one script, each in a function of its own that returns what it exports. The content security policy
names the digests of the page's scripts and styles: whatever else got into the page could neither run nor load anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarmtrain.web.markup import Markup, element

_STATIC = Path(__file__).parent / "static"
_CHARTS_SCRIPT, _CHARTS_STYLE = "vendor/uPlot.iife.min.js", "vendor/uPlot.min.css"
_IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async function|function|class|const) (\w+))", re.MULTILINE)
_ANY_OTHER = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)


def single_file(
    title: str, body: Sequence[str], data: Any, *, script: str, styles: Sequence[str] = ("page.css",)
) -> str:
    """Return a page as an HTML document.

    `script` is the name of a module of `static/`, without its ending. It finds `data`, which JSON can express, in the
    element `#data`. `styles` are names of style sheets there.
    """
    style = "\n".join(_read(name) for name in (_CHARTS_STYLE, *styles))
    charts, module = _read(_CHARTS_SCRIPT), bundled(script)
    scripts = " ".join(map(_digest, (charts, module)))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {_digest(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    icon = base64.b64encode(_read("icon.svg").encode()).decode()
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content="swarmtrain"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("link", rel="icon", href=f"data:image/svg+xml;base64,{icon}"),
        element("style", _raw(style, "style")),
    )
    page = element(
        "body",
        *body,
        element("script", _raw(_as_json(data), "script"), type="application/json", id="data"),
        element("script", _raw(charts, "script")),
        element("script", _raw(module, "script"), type="module"),
    )
    return "<!doctype html>\n" + element("html", head, "\n", page, lang="en") + "\n"


def bundled(name: str) -> str:
    """Return a module of `static/` and all that it imports as one script, without imports."""
    return "".join(_modules(name, []))


def _modules(name: str, before: list[str]) -> list[str]:
    """Return the texts of what a module imports, except those `before`, and then its own."""
    text, found = _read(f"{name}.js"), list[str]()
    for _, imported in _IMPORT.findall(text):
        if imported not in before:
            found += _modules(imported, before)
    before.append(name)
    names = ", ".join(_EXPORT.findall(text))
    text = _EXPORT.sub("", _IMPORT.sub(r"const { \1 } = module_\2;\n", text))
    if other := _ANY_OTHER.search(text):
        raise ValueError(f"{name}.js: `{other[0]}` is a form of import or export that cannot be put into one file")
    return [*found, f"const module_{name} = (() => {{\n{text}\nreturn {{ {names} }};\n}})();\n"]


def _read(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _raw(text: str, tag: str) -> Markup:
    """Return the text of a script or style, in which nothing is escaped. Raises ValueError if it would end it."""
    if re.search(rf"</{tag}|<!--", text, re.IGNORECASE):
        raise ValueError(f"the text of a <{tag}> would end it")
    return Markup(text)


def _as_json(data: Any) -> str:
    """Return JSON without a character that means something to HTML."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
