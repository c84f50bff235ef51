"""HTML as text: every string that is put into an element is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})


class Markup(str):
    """Text that is HTML already, in which nothing is escaped."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | bool) -> Markup:
    """Return an element. Children that are no `Markup` are escaped.

    An underscore in the name of an attribute is a hyphen, and one at its end is left out; a value of True is an
    attribute without one, False none.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(value)}"')
        for name, value in attributes.items()
        if value is not False
    )
    return Markup(f"<{tag}{written}>" + ("" if tag in _VOID else f"{joined(children)}</{tag}>"))


def joined(parts: Iterable[str]) -> Markup:
    """Return parts after each other; those that are no `Markup` are escaped."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))
