"""A page of a peer that lives, ends, dies and comes back; and its user's orders."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from codes import raises_code
from fake_peer import FakePeer, living
from patience import PATIENCE_S

from swarmtrain.cli import main, page_service
from swarmtrain.cli.follow import Signal
from swarmtrain.cli.page_address import PageAddress, keep_page
from swarmtrain.cli.page_service import PageService, carry_out
from swarmtrain.cli.peers import LocalPeer, RefusedError
from swarmtrain.errors import UserError
from swarmtrain.v1 import control_pb2 as wire

pytestmark = pytest.mark.slow  # they wait by the real clock, as who looks does

KEY = "k" * 32


class Browser:
    """One that reads the page's stream in a thread; what it has seen is waited for."""

    def __init__(self, port: int, key: str = "") -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        self._connection.request("GET", "/state", headers=headers)
        self._response = self._connection.getresponse()
        self.panels: dict[str, Any] = {}
        self.rows: dict[str, Any] = {}
        self.ended = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
            for line in self._response:
                if line.startswith(b"data: "):
                    told = json.loads(line.removeprefix(b"data: "))
                    with self._news:
                        self.panels |= told["panels"]
                        self.rows |= told["rows"]
                        self._news.notify_all()
        with self._news:
            self.ended = True
            self._news.notify_all()

    def wait(self, condition: Any) -> None:
        with self._news:
            assert self._news.wait_for(lambda: condition(self), PATIENCE_S), self.panels

    def state(self) -> str:
        return str(self.panels.get("head", {}).get("state", ""))

    def close(self) -> None:
        with suppress(OSError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self._connection.close()


def exchanged(port: int, code: str) -> str | None:
    """Return the key that the page gives for a code."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("POST", "/key", code)
        return json.loads(connection.getresponse().read()).get("key")  # type: ignore[no-any-return]


class Served:
    """Service of a peer's page, in a thread."""

    def __init__(self, peer: FakePeer) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        address = PageAddress(host="127.0.0.1", port=self.port)
        self.service = PageService(LocalPeer(folder=peer.folder), sock, address, KEY)
        self._thread = threading.Thread(target=self.service.run)
        self._thread.start()

    def order(self, name: str, key: str = KEY, **given: str) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as connection:
            connection.request("POST", f"/order/{name}", json.dumps(given), {"Authorization": f"Bearer {key}"})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

    def end(self) -> None:
        self.service.news.put(Signal.DETACH)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@pytest.fixture
def served(peer: FakePeer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(page_service, "_EVERY_S", 0.02)
    monkeypatch.setattr(page_service, "_LOOK_AGAIN_S", 0.05)
    served = Served(peer)
    try:
        yield served
    finally:
        served.end()


def test_news_arrive_without_a_reload_and_nobody_is_followed_for_nobody(peer: FakePeer, served: Served) -> None:
    assert peer.watches == 0
    with closing(Browser(served.port)) as one, closing(Browser(served.port)) as other:
        for browser in (one, other):
            browser.wait(lambda seen: seen.state() == "training")
        peer.tell(doing="training round 13: 1 of 25 steps", round=13)
        for browser in (one, other):
            browser.wait(lambda seen: seen.panels["head"]["sentence"].startswith("training round 13"))
        assert {row["name"] for row in one.rows.values()} == {"anna", "bert", "cleo", "bootstrap"}
        assert peer.watches == 1, "however many look"
        assert not peer.asked


def test_orders_go_to_the_control_service(peer: FakePeer, served: Served) -> None:
    with closing(Browser(served.port, KEY)) as browser:
        browser.wait(lambda seen: seen.panels.get("machine"))
        assert served.order("pause") == (200, {"message": "pausing: it finishes its step\\x1b[2J"})
        assert peer.asked == [wire.PauseRequest()]
        status, told = served.order("resume")
        assert status == 409 and "a bootstrap does not train" in told["error"]
        assert served.order("limits", threads="3", hours="22-7", memory="2GB")[0] == 200
        assert peer.asked[-1] == wire.Limits(threads=3, hours="22-7", memory_bytes=2 * 10**9)
        asked = len(peer.asked)
        assert served.order("pause", key="another")[0] == 403
        assert served.order("explode")[0] == 404
        assert served.order("limits", threads="-1")[1]["code"] == "bad-limit"
        assert len(peer.asked) == asked


def test_the_end_is_told_and_the_page_goes_on_when_the_peer_is_back(peer: FakePeer, served: Served) -> None:
    with closing(Browser(served.port, KEY)) as browser:
        browser.wait(lambda seen: seen.state() == "training")
        peer.end()
        browser.wait(lambda seen: seen.state() == "ended")
        assert browser.panels["head"]["sentence"].startswith("ended ") and browser.panels["head"]["over"]
        assert browser.rows, "what was known stays"
        with living(FakePeer(peer.folder).start()) as back:
            browser.wait(lambda seen: seen.state() == "training" and not seen.panels["head"]["over"])
            back.tell(round=77, doing="training round 77")
            browser.wait(lambda seen: seen.panels["head"]["sentence"] == "training round 77")


def test_a_death_is_told(peer: FakePeer, served: Served) -> None:
    with closing(Browser(served.port, KEY)) as browser:
        browser.wait(lambda seen: seen.state() == "training")
        peer.die()
        browser.wait(lambda seen: seen.state() == "died")
        assert "start it again with" in browser.panels["head"]["sentence"]


def test_streams_end_with_the_last_state(peer: FakePeer, served: Served) -> None:
    with closing(Browser(served.port)) as browser:
        browser.wait(lambda seen: seen.state() == "training")
        peer.end()
        served.service.news.put(Signal.DETACH)
        browser.wait(lambda seen: seen.ended)
        assert browser.state() == "ended"


def test_a_child_process_serves_until_its_peer_is_gone(peer: FakePeer) -> None:
    keep_page(peer.folder, 7117, KEY)
    sock = socket.create_server(("127.0.0.1", 0))
    with sock:
        port = sock.getsockname()[1]
        words = [sys.executable, "-m", "swarmtrain.cli", "watch", "--dir", str(peer.folder)]
        words += ["--page-socket", str(sock.fileno())]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=(sock.fileno(),))
    assert child.stdin is not None
    child.stdin.write(b"a-code\n")
    child.stdin.flush()
    try:
        with closing(Browser(port, KEY)) as browser:
            browser.wait(lambda seen: seen.panels.get("machine"))
            assert exchanged(port, "a-code") == KEY
            peer.die()
            child.stdin.close()
            browser.wait(lambda seen: seen.ended)
            assert browser.state() == "died"
        assert child.wait(PATIENCE_S) == 0
    finally:
        child.kill()
        child.wait()


def test_the_key_is_neither_opened_nor_printed(
    peer: FakePeer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`watch --web`: command lines of a browser are everybody's to read."""
    keep_page(peer.folder, 7117, KEY)
    found: list[str | None] = []
    opened: list[str] = []

    def open_there(url: str) -> None:
        opened.append(url)

    def run(service: PageService) -> None:
        port = int(opened[0].split(":")[2].split("/")[0])
        service._server.start()
        for url in (opened[0], capsys.readouterr().out.split()[2]):
            assert KEY not in url
            found.extend(exchanged(port, url.partition("#code=")[2]) for _ in range(2))
        service._server.stop()

    monkeypatch.setattr(page_service, "open_in_browser", open_there)
    monkeypatch.setattr(PageService, "run", run)
    assert main.run(["watch", "--dir", str(peer.folder), "--web"]) == 0
    assert found == [KEY, None, KEY, None], "each address once"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"threads": "x"}, "'x' is not a whole number"),
        ({"threads": "\u0665" * 12}, "is not a whole number"),
        ({"memory": "4 apples"}, "is not a size"),
        ({"hours": "25-3"}, "0:00 to 24:00"),
        ({"up": "nan"}, "is not a limit"),
        ({"colour": "red"}, "there are threads"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_here(given: dict[str, str], says: str, tmp_path: Path) -> None:
    with raises_code("bad-limit", UserError, says):
        carry_out(LocalPeer(folder=tmp_path), "limits", given)


def test_refusals_of_the_peer_are_its_words(peer: FakePeer) -> None:
    with pytest.raises(RefusedError, match="nothing to resume"):
        carry_out(LocalPeer(folder=peer.folder), "resume", {})
