"""Chromium without a screen, for tests of what a person sees on a page.

Playwright drives the Chromium of this machine and downloads none. Whatever the pages ask for, and whatever goes wrong
in them, is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from swarm import PATIENCE_S

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
"""Chromium of this machine; "" if there is none."""
NO_CHROMIUM = "there is no Chromium here: `apt-get install chromium` (or your system's way) brings it"
FOREIGN = "foreign.example"
"""Name that leads to this machine, as one of a hostile site can: DNS rebinding."""
NOWHERE = "x.test"
"""Name that leads nowhere."""


@dataclass
class Browser:
    """Browser, and what its pages did."""

    engine: Any
    hosts: set[str] = field(default_factory=set)
    """Hosts and ports that were asked for anything."""
    errors: list[str] = field(default_factory=list)
    """Exceptions in the pages, and what a content security policy refused."""

    def open(self, url: str, *, width: int = 1280, key: str = "") -> Any:
        """Open a page in a window of its own, which has no part in what other windows know, or which has the key."""
        context = self.engine.new_context(viewport={"width": width, "height": 900}, locale="en-GB")
        context.set_default_timeout(1000 * PATIENCE_S)
        context.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        if key:
            context.add_init_script(f"sessionStorage.setItem('key', '{key}')")
        page = context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        page.on("console", self._heard)
        page.goto(url)
        return page

    def _heard(self, message: Any) -> None:
        if "Content Security Policy" in message.text or "Refused to" in message.text:
            self.errors.append(message.text)


@contextmanager
def browsing() -> Iterator[Browser]:
    """Provide a browser, for which `FOREIGN` leads to this machine."""
    from playwright.sync_api import sync_playwright

    rules = f"MAP {FOREIGN} 127.0.0.1, MAP *.test ~NOTFOUND"
    with sync_playwright() as playwright:
        engine = playwright.chromium.launch(executable_path=PROGRAM, args=[f"--host-resolver-rules={rules}"])
        try:
            yield Browser(engine)
        finally:
            engine.close()
