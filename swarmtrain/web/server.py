"""HTTP server of a swarm's page.

It serves the front end in `static/`, the state in two feeds, one for everybody and one for the peer's own user, and
takes that user's orders. It knows no peer: whoever starts it fills the feeds and carries the orders out.

    GET  /               the page; `/static/...`: its parts
    GET  /state          server-sent events; each has a JSON object, see `Feed.since`
    POST /key            the key, for a one-time code
    POST /order/NAME     an order with a JSON object; only with the key, and only from this machine

Whoever has the key (`Authorization: Bearer KEY`) is the peer's own user. The address that is printed or opened has a
one-time code after a `#`, so that no browser sends it anywhere else; the page exchanges the code for the key. Over the
network the page is read only.

A browser is anybody's program: a foreign page must neither read the state nor give orders. So requests are refused
whose `Host` is not a name of this server (a foreign name that leads here: DNS rebinding), or whose `Origin` is another
one, and no foreign page may embed this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarmtrain.errors import SwarmtrainError
from swarmtrain.network.reachability.listen import is_own_host
from swarmtrain.web.feed import Feed

_log = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
_MAX_READERS = 64
_MAX_ORDER_BYTES = 4096
_STILL_HERE_S = 15.0
"""Seconds between two lines of a stream in which nothing happens: the page takes a longer silence for a lost server."""
_GRACE_S = 2
_STOP_S = 5.0
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}

State = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Panels and rows of a page, each by its name; see `Feed`."""

Order = Callable[[str, Mapping[str, Any]], str]
"""Carries out an order, by its name and its JSON object, and returns a sentence for a person. It may take some seconds.

Raises SwarmtrainError if the order is refused, KeyError if there is no such order."""


@dataclass(frozen=True, kw_only=True)
class _Site:
    """What is served, and to whom."""

    everybody: Feed
    owner: Feed
    order: Order
    key: str
    codes: dict[str, float]
    """Codes that may be exchanged for the key once, each with the monotonic time of its end."""
    every_s: float
    """Shortest time between two messages to one reader."""
    on_readers: Callable[[int], None]
    """Called with the number of readers whenever it changes."""
    ending: Callable[[], bool]
    """Returns whether the streams must end."""


class PageServer:
    """Serves one page on a socket that listens already, from `start` to `stop`, in a thread of its own.

    `names` are names of this machine by which the page may be asked for, besides its addresses. A reader gets a message
    every `every_s` seconds at most. `on_readers` is called in the server's thread with the number of readers, whenever
    it changes.
    """

    def __init__(
        self,
        sock: socket.socket,
        order: Order,
        key: str,
        *,
        names: Collection[str] = (),
        on_readers: Callable[[int], None] = lambda number: None,
        every_s: float = 1.0,
    ) -> None:
        self._everybody, self._owner, self._ending = Feed(), Feed(), False
        self._codes: dict[str, float] = {}
        self._loop = asyncio.new_event_loop()
        site = _Site(
            everybody=self._everybody,
            owner=self._owner,
            order=order,
            key=key,
            codes=self._codes,
            every_s=every_s,
            on_readers=on_readers,
            ending=lambda: self._ending,
        )
        config = uvicorn.Config(
            _Guard(_application(site), frozenset({"localhost", *(name.lower() for name in names)})),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,  # a client's address is what the connection says
            timeout_graceful_shutdown=_GRACE_S,
            limit_concurrency=4 * _MAX_READERS,
        )
        self._server, self._socket = uvicorn.Server(config), sock
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)

    def admit(self, code: str, for_s: float = 600.0) -> None:
        """Give the key for `code` once, in the next `for_s` seconds. Thread-safe."""
        self._codes[code] = time.monotonic() + for_s

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def _run(self) -> None:
        with contextlib.closing(self._loop), self._socket:
            self._loop.run_until_complete(self._server.serve(sockets=[self._socket]))

    def publish(self, everybody: State, owner: State) -> None:
        """Replace what is shown to everybody and to the peer's own user, each as (panels, rows). Thread-safe."""

        def update() -> None:
            self._everybody.update(*everybody)
            self._owner.update(*owner)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(update)

    def stop(self) -> None:
        """Send the readers what they have not got yet, end their streams, and stop listening. May be called again."""

        def end() -> None:
            self._ending = self._server.should_exit = True
            self._everybody.wake()
            self._owner.wake()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(end)
        self._thread.join(_STOP_S)


# ---------------------------------------------------------------- what is answered


def _application(site: _Site) -> Starlette:
    answers = _Answers(site)
    return Starlette(
        routes=[
            Route("/", answers.page),
            Route("/state", answers.state),
            Route("/key", answers.give_key, methods=["POST"]),
            Route("/order/{name}", answers.take_order, methods=["POST"]),
            Mount("/static", _Files(directory=STATIC)),
        ],
    )


class _Files(StaticFiles):
    """Files that a browser asks for again each time, and gets only if they have changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


@dataclass
class _Answers:
    site: _Site
    _num_readers: int = field(default=0, init=False)

    async def page(self, request: Request) -> Response:
        """Return the page itself, which is the same for everybody."""
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def state(self, request: Request) -> Response:
        """Return a stream of the state, of the owner's if the key is right."""
        if self._num_readers >= _MAX_READERS:
            return PlainTextResponse(f"{_MAX_READERS} browsers show this page already; close one\n", 503)
        feed = self.site.owner if self._has_key(request) else self.site.everybody
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(feed), media_type="text/event-stream", headers=headers)

    async def _events(self, feed: Feed) -> AsyncIterator[str]:
        seen = 0
        self._count(1)
        try:
            while True:
                ends = self.site.ending()
                if feed.revision != seen:
                    text, seen = feed.since(seen), feed.revision
                    yield f"data: {text}\n\n"
                    await asyncio.sleep(self.site.every_s)
                elif ends:
                    return
                elif not await feed.wait(_STILL_HERE_S):
                    yield ": still here\n\n"
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._num_readers += change
        self.site.on_readers(self._num_readers)

    async def give_key(self, request: Request) -> Response:
        """Exchange a one-time code for the key."""
        code = ""
        with contextlib.suppress(ValueError, ClientDisconnect):
            code = (await _body(request)).decode()
        if self.site.codes.pop(code, -math.inf) < time.monotonic():
            return _refusal(
                "this address was used before, or is too old; `swarmtrain watch --web` gives a new one", 403
            )
        return JSONResponse({"key": self.site.key})

    async def take_order(self, request: Request) -> Response:
        """Carry out an order of the peer's own user."""
        if not _is_this_machine(request):
            return _refusal("this page is read only over the network; use it on the peer's own machine", 403)
        if not self._has_key(request):
            return _refusal("only the peer's own user may do that; `swarmtrain watch --web` opens the page for it", 403)
        try:
            given = json.loads(await _body(request))
            if not isinstance(given, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError, ClientDisconnect):
            return _refusal(f"an order is a JSON object of at most {_MAX_ORDER_BYTES} bytes", 400)
        name = request.path_params["name"]
        try:
            message = await run_in_threadpool(self.site.order, name, given)
        except KeyError:
            return _refusal("there is no such order", 404)
        except SwarmtrainError as error:
            return JSONResponse({"error": str(error), "code": error.code}, 409)
        return JSONResponse({"message": message})

    def _has_key(self, request: Request) -> bool:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.site.key.encode())


def _refusal(words: str, status: int) -> Response:
    return JSONResponse({"error": words, "code": ""}, status)


def _is_this_machine(request: Request) -> bool:
    """Return whether a request comes over the loopback interface."""
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


async def _body(request: Request) -> bytes:
    """Return the body of a request. Raises ValueError if it is too long."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > _MAX_ORDER_BYTES:
            raise ValueError("too long")
    return data


# ---------------------------------------------------------------- who is answered


class _Guard:
    """Refuses requests of foreign pages, and puts the headers that bind the browser on every answer."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["type"] != "http":
            return
        refusal = self._refused(Headers(scope=scope))
        answer: Callable[[Scope, Receive, Send], Awaitable[None]] = self._app
        if refusal:
            answer = PlainTextResponse(f"{refusal}\n", 403)
        await answer(scope, receive, guarded)

    def _refused(self, headers: Headers) -> str:
        """Return why a request is refused; "" if it is not."""
        host = headers.get("host", "")
        if not is_own_host(host, self._names):
            return "refused: this page is not served under that name; open it by the address that was printed"
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return "refused: a foreign page asked for it"
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "refused: a foreign page asked for it"
        return ""
