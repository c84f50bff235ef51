"""What of a page's state a reader gets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from swarmtrain.web.feed import Feed


def since(feed: Feed, revision: int) -> Any:
    return json.loads(feed.since(revision))


def test_a_reader_gets_what_has_changed_since_it_looked() -> None:
    feed = Feed()
    assert feed.update({"head": {"run": "a"}, "progress": 1}, {"anna": [1], "bert": [2]})
    first = feed.revision
    assert since(feed, 0) == {
        "all": True,
        "panels": {"head": {"run": "a"}, "progress": 1},
        "rows": {"anna": [1], "bert": [2]},
        "gone": [],
    }
    assert not feed.update({"head": {"run": "a"}, "progress": 1}, {"anna": [1], "bert": [2]}), "nothing has changed"
    assert feed.revision == first
    assert feed.update({"progress": 2}, {"anna": [1], "cleo": [3]})
    assert since(feed, first) == {"all": False, "panels": {"progress": 2}, "rows": {"cleo": [3]}, "gone": ["bert"]}
    assert since(feed, 0)["panels"] == {"head": {"run": "a"}, "progress": 2}, "a section that is not given stays"
    feed.update({}, {"bert": [2]})
    assert since(feed, first)["gone"] == ["anna", "cleo"], "who is back is not gone"
    assert since(feed, feed.revision) == {"all": False, "panels": {}, "rows": {}, "gone": []}


def test_a_reader_of_another_server_gets_everything() -> None:
    feed = Feed()
    feed.update({"head": 1}, {})
    assert since(feed, 99)["all"]


def test_readers_that_missed_too_many_ends_get_everything(monkeypatch: Any) -> None:
    monkeypatch.setattr("swarmtrain.web.feed._MAX_GONE", 3)
    feed = Feed()
    feed.update({}, {str(number): number for number in range(6)})
    seen = feed.revision
    for left in range(5, 0, -1):
        feed.update({}, {str(number): number for number in range(left)})
    assert since(feed, seen)["all"] and since(feed, seen)["rows"] == {"0": 0}
    assert since(feed, feed.revision - 1) == {"all": False, "panels": {}, "rows": {}, "gone": ["1"]}


def test_waiting_ends_with_a_change_or_a_wake() -> None:
    async def play() -> list[bool]:
        feed, found = Feed(), []
        for work in (lambda: feed.update({"a": 1}, {}), feed.wake):
            waiting = asyncio.create_task(feed.wait(30.0))
            await asyncio.sleep(0)
            work()
            found.append(await waiting)
        return [*found, await feed.wait(0.001)]

    assert asyncio.run(play()) == [True, True, False]
