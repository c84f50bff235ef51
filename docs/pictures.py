"""Take the pictures of the page that the documentation shows, in Chromium, of a small real swarm.

    apt-get install chromium
    python docs/pictures.py                 # the pictures of the documentation: docs/pictures/
    python docs/pictures.py --all --to DIR  # each width, by day and by night, of both pages: to look at

A bootstrap and five volunteers of unlike speed train `stdlib-gpt` on this machine for some minutes, with little
held-out text, whose loss they measure every other round. One of them is killed, one leaves, one comes late. Pictures
are of a volunteer's page as its own user sees it, and as others do. All folders of the peers are below a temporary
home folder, and they listen at 127.0.0.1, so that no picture shows a path, a name or an address of this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (390, 800, 1440)
SCHEMES = ("light", "dark")
SPEEDS = {"anna": "1", "bert": "1.5", "cleo": "2", "dora": "3"}
SHOWN = (("page-desk-light", 1440, "light", 1000), ("page-phone-dark", 390, "dark", 844))
"""Pictures of the documentation: name, width and scheme, and the height of the window."""
LIMIT_S = 120.0


class Peer:
    """Process of a peer, which writes what it says into a file."""

    def __init__(self, home: Path, name: str, *arguments: str) -> None:
        self.log = home / f"{name}.log"
        own = {"HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "XDG_CACHE_HOME": str(home / "cache")}
        command = [sys.executable, "-m", "swarmtrain.cli", *arguments, "--name", name, "--dir", str(home / name)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--listen", "127.0.0.1:0"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home,
                env={**os.environ, "OMP_NUM_THREADS": "1", "SWARMTRAIN_JOIN_ON_BATTERY": "1", **own},
            )

    def said(self, pattern: str) -> str:
        """Wait until it has written something, and return the pattern's first group."""
        give_up_s = time.monotonic() + LIMIT_S
        while not (found := re.search(pattern, self.log.read_text())):
            if time.monotonic() > give_up_s or self.process.poll() is not None:
                sys.exit(f"not said: {pattern}\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)
        return found[1]

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LIMIT_S)
            return
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def swarm(home: Path, minutes: float) -> Iterator[tuple[str, str]]:
    """Provide the addresses of a page, for its own user and for others, after some minutes of a swarm's life."""
    text = (ROOT / "examples" / "stdlib-gpt.toml").read_text()
    run = home / "stdlib-gpt.toml"
    text = text.replace("total_tokens = 1_536_000", "total_tokens = 3_000_000\nshow_invite = true")
    text = text.replace('source = "python-stdlib"', 'source = "python-stdlib"\nheld_out_bytes = 16_384')
    run.write_text(f"{text}\n[evaluation]\nevery_rounds = 2\n")
    peers = [Peer(home, "bootstrap", "bootstrap", str(run), "--json")]
    try:
        invite = peers[0].said(r'"invite": ?"([^"]+)"')

        def join(name: str, *extra: str) -> Peer:
            slowdown = () if SPEEDS.get(name, "1") == "1" else ("--slowdown", SPEEDS[name])
            peers.append(Peer(home, name, "join", invite, "--threads", "1", *slowdown, *extra))
            return peers[-1]

        first = join("anna", "--web", "0.0.0.0:0", "--memory", "3GB", "--hours", "any")
        others = {name: join(name) for name in ("bert", "cleo", "dora")}
        part_s = 60 * minutes / 4
        time.sleep(part_s)
        others["dora"].end(signal.SIGKILL)
        time.sleep(part_s)
        join("emil")
        time.sleep(part_s)
        others["cleo"].end()
        time.sleep(part_s)
        yield first.said(r"its page: (\S+)"), re.sub(r"#.*", "", first.said(r"its page: (\S+)"))
    finally:
        for peer in reversed(peers):
            if peer.process.poll() is None:
                peer.end()


def take(engine: Any, url: str, path: Path, *, width: int, scheme: str, height: int = 0) -> None:
    """Take a picture of a page, of all of it unless a height is given."""
    window = {"width": width, "height": height or 900}
    context = engine.new_context(viewport=window, color_scheme=scheme, locale="en-GB", reduced_motion="reduce")
    page = context.new_page()
    page.goto(url)
    page.locator("#chart-held-out canvas").wait_for()
    page.wait_for_timeout(3000)
    words = page.locator("body").inner_text()
    for secret in (str(Path.home()), os.uname().nodename, tempfile.gettempdir()):
        assert secret not in words, f"the page shows {secret}"
    page.screenshot(path=path, full_page=not height)
    context.close()


def main() -> None:
    """Run the swarm, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="take all widths and schemes, whole pages")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "pictures", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=6.0, help="how long the swarm trains before")
    given = parser.parse_args()
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("there is no Chromium here: apt-get install chromium")
    given.to.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as home,
        swarm(Path(home), given.minutes) as (own, for_others),
        sync_playwright() as playwright,
    ):
        engine = playwright.chromium.launch(executable_path=program)
        if given.all:
            for name, url in (("own", own), ("others", for_others)):
                for width in WIDTHS:
                    for scheme in SCHEMES:
                        take(engine, url, given.to / f"{name}-{width}-{scheme}.png", width=width, scheme=scheme)
        else:
            for name, width, scheme, height in SHOWN:
                take(engine, own, given.to / f"{name}.png", width=width, scheme=scheme, height=height)
        engine.close()


if __name__ == "__main__":
    main()
