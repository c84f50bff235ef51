"""Newest state of a page, and what of it has changed since a reader last looked.

The state is made of panels and of rows. Each has the number of the revision in which it last changed, so that nothing
is kept for a reader but the revision that it has seen: a slow reader misses states and gets no old ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

_as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_MAX_GONE = 10_000
"""Rows whose end is remembered; a reader that has missed more gets everything anew."""


class Feed:
    """State that one event loop's readers follow. Call it from that loop only."""

    def __init__(self) -> None:
        self.revision = 0
        self._panels: dict[str, tuple[int, str]] = {}
        self._rows: dict[str, tuple[int, str]] = {}
        self._gone: dict[str, int] = {}
        self._oldest = 0
        """Revision from which on all changes are known."""
        self._news = asyncio.Event()
        self._made: tuple[int, int, str] = (-1, -1, "")

    def update(self, panels: Mapping[str, Any], rows: Mapping[str, Any]) -> bool:
        """Replace the state; return whether anything has changed. Panels that are not given stay."""
        revision = self.revision + 1
        lost = [name for name in self._rows if name not in rows]
        changed = [_changed(self._panels, panels, revision), _changed(self._rows, rows, revision)]
        if not any(changed) and not lost:
            return False
        for name in lost:
            del self._rows[name]
            self._gone[name] = revision
        for name in [name for name in self._gone if name in rows]:
            del self._gone[name]
        while len(self._gone) > _MAX_GONE:
            self._oldest = self._gone.pop(next(iter(self._gone)))
        self.revision = revision
        self.wake()
        return True

    def since(self, revision: int) -> str:
        """Return what has changed since `revision`, as a JSON object on one line; everything if it is 0 or too old.

        It has `all` (true: this is the whole state), `panels` by name, `rows` by name, and `gone` (names of rows).
        """
        if self._made[:2] == (revision, self.revision):  # most readers have seen the same
            return self._made[2]
        begin = revision if self._oldest <= revision <= self.revision else 0
        panels = ",".join(f"{json.dumps(name)}:{text}" for name, (at, text) in self._panels.items() if at > begin)
        rows = ",".join(f"{json.dumps(name)}:{text}" for name, (at, text) in self._rows.items() if at > begin)
        gone = json.dumps([name for name, at in self._gone.items() if at > begin] if begin else [])
        whole = json.dumps(begin == 0)
        made = f'{{"all":{whole},"panels":{{{panels}}},"rows":{{{rows}}},"gone":{gone}}}'
        self._made = (revision, self.revision, made)
        return made

    async def wait(self, limit_s: float) -> bool:
        """Wait for the next change, or `wake`; return False if there is neither within `limit_s`."""
        try:
            await asyncio.wait_for(self._news.wait(), limit_s)
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Wake whoever waits, although nothing has changed."""
        self._news.set()
        self._news = asyncio.Event()


def _changed(kept: dict[str, tuple[int, str]], given: Mapping[str, Any], revision: int) -> bool:
    """Put what is new of `given` into `kept`; return whether anything was."""
    is_new = False
    for name, value in given.items():
        text = _as_json(value)
        if name not in kept or kept[name][1] != text:
            kept[name] = (revision, text)
            is_new = True
    return is_new
