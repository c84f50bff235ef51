"""The page's server: what it answers, to whom, and what binds the browser."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from html.parser import HTMLParser
from queue import SimpleQueue
from typing import Any

import pytest
from patience import PATIENCE_S

from swarmtrain.errors import UserError
from swarmtrain.web.server import STATIC, PageServer, _is_this_machine

KEY = "k" * 32


class Page:
    """Server on a free port, and what it was ordered to do."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, Mapping[str, Any]]] = []
        self.readers: SimpleQueue[int] = SimpleQueue()
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self.server = PageServer(
            sock, self._order, KEY, names=("Anna.local",), on_readers=self.readers.put, every_s=0.01
        )

    def _order(self, name: str, given: Mapping[str, Any]) -> str:
        if name == "fly":
            raise KeyError(name)
        if name == "refuse":
            raise UserError("a bootstrap does not train", code="not-a-volunteer")
        self.orders.append((name, given))
        return "pausing: it finishes its step"

    def ask(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as connection:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            reply = connection.getresponse()
            return reply.status, reply.read().decode(), reply.headers

    def stream(self, **headers: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request("GET", "/state", headers=headers)
        return connection, connection.getresponse()


def message(response: http.client.HTTPResponse) -> Any:
    """The next object of a stream."""
    while True:
        line = response.readline().decode()
        assert line, "the stream has ended"
        if line.startswith("data: "):
            return json.loads(line.removeprefix("data: "))


@pytest.fixture
def page() -> Iterator[Page]:
    page = Page()
    page.server.start()
    try:
        yield page
    finally:
        page.server.stop()


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/static/vendor/uPlot.iife.min.js", "/nowhere"])
def test_every_answer_binds_the_browser(page: Page, path: str) -> None:
    status, _, headers = page.ask("GET", path)
    assert status == (404 if path == "/nowhere" else 200)
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin" and headers["server"] is None


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := given.get(name)) and not value.startswith("#")]
        self.inline += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)


def test_the_page_is_made_of_its_own_files_only(page: Page) -> None:
    """Nothing is asked of another host, nothing is inline, and no file is missing."""
    found = _Links()
    found.feed((STATIC / "index.html").read_text())
    assert found.links and not found.inline
    for path in found.links:
        assert page.ask("GET", f"/{path}")[0] == 200, path
    for source in STATIC.glob("*.js"):
        text = source.read_text()
        foreign = r"https?://(?!www[.]w3[.]org/2000/svg)|innerHTML|insertAdjacentHTML|document[.]write|eval[(]"
        assert not re.search(foreign, text), source
        for name in re.findall(r'from "\./([a-z-]+\.js)"', text):
            assert page.ask("GET", f"/static/{name}")[0] == 200


@pytest.mark.parametrize("path", ["/static/../server.py", "/static/%2e%2e/server.py", "/static//etc/passwd"])
def test_no_other_file_is_served(page: Page, path: str) -> None:
    assert page.ask("GET", path)[0] == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:7117"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "192.168.1.7:80"}, 200),
        ({"Host": "[::1]:7117"}, 200),
        ({"Host": "anna.local:7117"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:7117"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:7117", "Origin": "http://localhost:7117"}, 200),
        ({"Host": "localhost:7117", "Origin": "http://localhost:7118"}, 403),
        ({"Host": "localhost:7117", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:7117", "Origin": "null"}, 403),
        ({"Host": "localhost:7117", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Host": "localhost:7117", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
    ],
)
def test_foreign_names_and_foreign_pages_are_refused(page: Page, headers: dict[str, str], status: int) -> None:
    for path in ("/", "/static/page.js"):
        assert page.ask("GET", path, **headers)[0] == status
    assert page.ask("POST", "/order/pause", "{}", **headers, Authorization=f"Bearer {KEY}")[0] == status
    assert bool(page.orders) == (status == 200)


def test_orders_are_the_peers_own_users(page: Page) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    status, text, _ = page.ask("POST", "/order/limits", '{"threads": "2"}', **key)
    assert (status, json.loads(text)) == (200, {"message": "pausing: it finishes its step"})
    assert page.orders == [("limits", {"threads": "2"})]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer \xe9"}):
        status, text, _ = page.ask("POST", "/order/pause", "{}", **headers)
        assert status == 403 and "watch --web" in json.loads(text)["error"]
    for body in ("", "[]", "{", "x" * 5000, "[" * 4000):
        assert page.ask("POST", "/order/pause", body, **key)[0] == 400
    assert page.ask("POST", "/order/fly", "{}", **key)[0] == 404
    status, text, _ = page.ask("POST", "/order/refuse", "{}", **key)
    assert (status, json.loads(text)["code"]) == (409, "not-a-volunteer")
    assert page.ask("GET", "/order/pause", **key)[0] == 405
    assert len(page.orders) == 1


def test_a_code_is_exchanged_for_the_key_once(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    page.server.admit("a-code")
    page.server.admit("another", 60.0)
    assert page.ask("POST", "/key", "a-code", Origin="http://evil.example")[0] == 403, "and it is still good"
    status, text, _ = page.ask("POST", "/key", "a-code")
    assert (status, json.loads(text)) == (200, {"key": KEY})
    now_s = time.monotonic()
    monkeypatch.setattr("swarmtrain.web.server.time.monotonic", lambda: now_s + 61.0)
    for code in ("a-code", "another", "", "x" * 5000, KEY):
        status, text, _ = page.ask("POST", "/key", code)
        assert status == 403 and "`swarmtrain watch --web` gives a new one" in json.loads(text)["error"]
    assert page.ask("GET", "/key")[0] == 405


def test_over_the_network_the_page_is_read_only() -> None:
    """Whatever key is sent: a client of another machine gives no orders."""

    class Asked:
        def __init__(self, host: str | None) -> None:
            self.client = None if host is None else type("Client", (), {"host": host})()

    hosts = {"127.0.0.1": True, "127.8.8.8": True, "::1": True, "192.168.1.7": False, "2001:db8::1": False}
    for host, is_this in hosts.items():
        assert _is_this_machine(Asked(host)) == is_this  # type: ignore[arg-type]
    assert not _is_this_machine(Asked(None)) and not _is_this_machine(Asked("a-name"))  # type: ignore[arg-type]


def test_everybody_and_the_own_user_have_a_stream_each(page: Page) -> None:
    page.server.publish(({"head": "for all"}, {}), ({"head": "for me"}, {}))
    anybody, theirs = page.stream()
    owner, mine = page.stream(Authorization=f"Bearer {KEY}")
    with closing(anybody), closing(owner):
        assert theirs.headers["content-type"].startswith("text/event-stream")
        assert message(theirs) == {"all": True, "panels": {"head": "for all"}, "rows": {}, "gone": []}
        assert message(mine)["panels"] == {"head": "for me"}
        page.server.publish(({"head": "for all"}, {}), ({"head": "more for me"}, {}))
        assert message(mine) == {"all": False, "panels": {"head": "more for me"}, "rows": {}, "gone": []}
        assert [page.readers.get(timeout=PATIENCE_S) for _ in range(2)] == [1, 2]
        page.server.publish(({"head": "the end"}, {}), ({"head": "the end"}, {}))
        page.server.stop()
        assert message(theirs)["panels"] == message(mine)["panels"] == {"head": "the end"}, "before it ends"
        assert theirs.read() == mine.read() == b"\n", "and then the streams are over"


def test_a_reader_that_is_gone_is_not_counted(page: Page) -> None:
    page.server.publish(({"n": 0}, {}), ({}, {}))
    connection, response = page.stream()
    message(response)
    assert page.readers.get(timeout=PATIENCE_S) == 1
    response.close()
    connection.close()
    assert page.readers.get(timeout=PATIENCE_S) == 0


def test_too_many_readers_are_told_so(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarmtrain.web.server._MAX_READERS", 1)
    page.server.publish(({"n": 0}, {}), ({}, {}))
    connection, response = page.stream()
    with closing(connection):
        message(response)
        status, text, _ = page.ask("GET", "/state")
        assert status == 503 and "close one" in text
