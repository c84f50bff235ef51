"""Parts of a page in one file, which a report of a run and a comparison of methods have in common. Pure.

They have the classes and ids of the page of a swarm (`web/static/index.html`), so that its styles and modules fit.
"""

from __future__ import annotations

import base64
import datetime
from collections.abc import Iterable, Sequence

from swarmtrain.web.markup import Markup, element, joined
from swarmtrain.words import printable

_NO_SCRIPT = "The curves need JavaScript; everything else is here without it."


def top(title: str, state: Markup, about: str, sentence: str) -> Markup:
    """Return the head of a page: what it is of, its state, and one sentence."""
    heading = element("h1", title, id="run")
    bar = element("div", heading, state, element("p", about, id="seen-by", class_="quiet"), class_="bar")
    notice = element("noscript", element("p", _NO_SCRIPT, class_="notice"))
    return element("header", bar, element("p", sentence, class_="sentence"), notice)


def section(name: str, title: str, *children: str, about: str = "") -> Markup:
    """Return a section with a heading; `about` stands beside it."""
    beside = [element("span", about, class_="quiet")] if about else []
    heading = element("h2", f"{title} " if about else title, *beside, id=f"{name}-title")
    return element("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def axis_choice(axes: Sequence[tuple[str, str]]) -> Markup:
    """Return the choice of the charts' axis, each as (value, words); the first is chosen."""
    choices = [
        element(
            "label", element("input", type="radio", name="axis", value=value, checked=not place), element("span", words)
        )
        for place, (value, words) in enumerate(axes)
    ]
    legend = element("legend", "Axis of the charts", class_="unseen")
    return element("fieldset", legend, *choices, class_="choice", id="axis")


def answers_list(answers: Iterable[tuple[str, str, str]]) -> Markup:
    """Return the first answers, each as (question, answer, more)."""
    cells = [
        element("div", element("dt", name), element("dd", answer), element("dd", more, class_="quiet"))
        for name, answer, more in answers
    ]
    return element("dl", *cells, class_="answers")


def facts_list(facts: Iterable[tuple[str, str]]) -> Markup:
    """Return named facts; those without a word are left out."""
    pairs = [joined([element("dt", name), element("dd", fact)]) for name, fact in facts if fact]
    return element("dl", *pairs, class_="facts")


def titled_table(title: str, heads: Sequence[tuple[str, str]], rows: Iterable[Markup], kind: str = "") -> Markup:
    """Return a table that scrolls by itself; `heads` are (words, class)."""
    line = element("tr", *(element("th", words, scope="col", class_=name) for words, name in heads))
    caption = element("caption", title, class_="unseen")
    table = element("table", caption, element("thead", line), element("tbody", *rows), class_=kind)
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=title)


def numbered(items: Iterable[str]) -> Markup:
    """Return an ordered list."""
    return element("ol", *(element("li", item) for item in items), class_="steps")


def text_file(name: str, text: str) -> Markup:
    """Return a text, with a link that saves it as a file."""
    packed = base64.b64encode(text.encode()).decode()
    link = element("a", f"Save it as {name}", href=f"data:text/plain;charset=utf-8;base64,{packed}", download=name)
    return joined([element("p", link), element("pre", printable(text), tabindex="0")])


def moment(time: float) -> Markup:
    """Return a moment, in Unix seconds; a script writes it in the reader's time, without one it is UTC."""
    try:
        then = datetime.datetime.fromtimestamp(time, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return element("time", "an unknown time")
    return element("time", f"{then:%Y-%m-%d %H:%M} UTC", datetime=f"{then:%Y-%m-%dT%H:%M:%S}Z")
