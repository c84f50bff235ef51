"""`swarmtrain status`, `watch` and `leave` beside a live swarm, as a person uses them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pseudo_terminal import PseudoTerminal
from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.events import DoneEvent

pytestmark = pytest.mark.processes


@contextmanager
def watching(swarm: Swarm, child: Child) -> Iterator[PseudoTerminal]:
    command = [sys.executable, "-m", "swarmtrain.cli", "watch", child.name, "--dir", str(swarm.folder)]
    with PseudoTerminal(command, environment=swarm.environment) as terminal:
        yield terminal


def status_of(swarm: Swarm, child: Child) -> dict[str, Any]:
    done = swarm.run("status", child.name, "--dir", str(swarm.folder), "--json")
    assert done.code == 0, done.stderr
    (line,) = done.lines
    told: dict[str, Any] = json.loads(line)
    return told


def adds_up(told: dict[str, Any]) -> bool:
    return told["run_tokens"] > 0 and sum(peer["tokens"] for peer in told["peers"]) == told["run_tokens"]


def wait_for_sum(swarm: Swarm, child: Child, contributors: set[str]) -> dict[str, Any]:
    """Wait for the status in which the tokens of all peers add up to the run's: one peer's may arrive later."""

    def complete() -> dict[str, Any] | None:
        nonlocal told
        told = status_of(swarm, child)
        complete = {peer["peer"] for peer in told["peers"] if peer["tokens"]} == contributors
        return told if complete and adds_up(told) else None

    told: dict[str, Any] = {}
    found: dict[str, Any] = wait_until(complete, lambda: f"contributions that add up: {told}")
    return found


def test_a_swarm_is_watched_and_told_what_to_do(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    anna, bert = swarm.join_all(["anna", "bert"], bootstrap.invite.invite)

    with watching(swarm, anna) as terminal:
        rounds: set[int] = set()

        def advances(text: str) -> bool:
            rounds.update(int(found) for found in re.findall(r"(?:training|merging) round (\d+)", text))
            return len(rounds) >= 3 and "│" in text

        text = terminal.wait_for(advances, "third round on the screen")
        assert text.startswith(f"anna ({anna.id[-6:]}), volunteer in run tiny")
        terminal.wait_text("2 of 2 volunteers here, and a bootstrap")
        terminal.press(b"q")
        assert terminal.wait() == 0
    anna.wait_more_rounds(2)

    for child in (anna, bert):  # a bootstrap reads what they tell, later
        told = wait_for_sum(swarm, child, {anna.id, bert.id})
        assert (told["process"], told["peer"], told["run_name"]) == ("running", child.id, "tiny")

    with watching(swarm, anna) as terminal:
        terminal.wait_for(lambda text: re.search(r"(training|merging) round \d+", text), "round")
        anna.kill()
        said = (
            "died about",
            "waiting for it to",
            "swarmtrain join ",
            f"--name anna --listen 127.0.0.1:0 --dir {anna.folder}",
        )

        def waits(text: str) -> bool:
            """Wherever lines break, which depends on how long the folder's name is, and once all of them are drawn."""
            return all(each in " ".join(text.split()) for each in said)

        terminal.wait_for(waits, "how to start it again")
        terminal.press(b"q")
        assert terminal.wait() == 0
    told = status_of(swarm, anna)
    assert (told["process"], told["state"], told["name"]) == ("died", "training", "anna")
    page = swarm.folder / "killed.html"
    made = swarm.run("report", "anna", "--dir", str(swarm.folder), "--to", str(page), "--json")
    figures = json.loads(made.stdout)["figures"]
    assert figures == {name: told[name] for name in figures}
    assert all(peer["peer"] in page.read_text() for peer in told["peers"]) and len(told["peers"]) == 3

    with watching(swarm, bert) as terminal:
        terminal.wait_for(lambda text: re.search(r"(training|merging) round \d+", text), "round")
        left = swarm.run("leave", "bert", "--dir", str(swarm.folder))
        assert (left.code, left.stderr) == (0, "")
        ended, goes_on = left.stdout.splitlines()
        assert re.fullmatch(r"bert: ended (just now|\d+ s ago): it was asked to leave", ended)
        assert re.fullmatch(rf"`swarmtrain join --dir {bert.folder}` continues from round \d+", goes_on)
        assert bert.wait() == 0
        assert bert.all(DoneEvent)[0].reason == "asked"
        assert terminal.wait() == 0
        terminal.wait_text("it was asked to leave")
    assert swarm.run("leave", "--dir", str(bootstrap.folder)).code == 0
    assert bootstrap.wait() == 0
    swarm.assert_nothing_left()
    assert status_of(swarm, bootstrap)["process"] == "ended"


def test_the_end_of_a_run_is_watched_and_all_contributions_add_up_to_it(swarm: Swarm) -> None:
    run = write_run(swarm.folder, run={"name": "tiny", "seed": 5, "total_tokens": 150_000})
    bootstrap = swarm.bootstrap(run, "--wait-for", "2")
    anna, bert = swarm.join_all(["anna", "bert"], bootstrap.invite.invite)
    with watching(swarm, anna) as terminal:
        terminal.wait_text("% of 150 k tokens")
        assert terminal.wait() == 0
        text = terminal.wait_text("total_tokens: the run has trained all of them")
        assert re.search(r"progress +100% of 150 k tokens", text)
    assert [child.wait() for child in (anna, bert, bootstrap)] == [0, 0, 0]
    tokens = {}
    for child in (anna, bert, bootstrap):
        told = status_of(swarm, child)
        assert (told["process"], told["end_reason"]) == ("ended", "total_tokens")
        assert adds_up(told), told
        tokens[child.name] = {peer["peer"]: peer["tokens"] for peer in told["peers"] if peer["tokens"]}
    assert tokens["anna"] == tokens["bert"] == tokens["bootstrap"]
    assert set(tokens["anna"]) == {anna.id, bert.id}
