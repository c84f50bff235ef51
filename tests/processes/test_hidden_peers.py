"""Swarm of real processes on separate machines, of which half are hidden peers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import PORT, machines, why_not
from swarm import Child, Swarm, wait_until, write_run

from swarmtrain.events import JoinedEvent, RoundEvent, WarningEvent

pytestmark = [pytest.mark.processes, pytest.mark.long]

REASON = why_not()
HIDDEN = ("carl", "dora")
HIDDEN_CODE, NOBODY = "nobody-can-dial", "nobody can dial this computer"


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """Machines of which some are hidden; all processes have ended when the test has, and then the machines go."""
    with machines(["bootstrap", "anna", "ben", *HIDDEN], hidden=HIDDEN) as inside, Swarm(tmp_path) as swarm:
        swarm.inside, swarm.listen = inside, f"0.0.0.0:{PORT}"
        yield swarm


def hosts_of(child: Child, children: list[Child]) -> list[Child]:
    """Return the hosts that it reported last."""
    told = [event.message for event in child.all(WarningEvent) if event.code == HIDDEN_CODE]
    told = [message for message in told if " through " in message]
    names = told[-1].split(" through ")[1].split(" and ") if told else []
    return [host for host in children if host.name in names]


def status(swarm: Swarm, child: Child) -> dict[str, Any]:
    done = swarm.run("status", "--dir", str(child.folder), "--json")
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.lines[0])
    return found


def meets(child: Child, other: Child) -> None:
    """Wait until it has merged something of `other` with tokens, from now on."""
    after = child.last_round

    def has(event: RoundEvent) -> bool:
        return event.round > after and dict(zip(event.partners, event.weights, strict=True)).get(other.id, 0) > 0

    child.wait_event(RoundEvent, has)


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_half_of_the_volunteers_cannot_be_dialled_and_a_host_dies(swarm: Swarm) -> None:
    path = write_run(
        swarm.folder,
        merge={"method": "gossip", "inner_steps": 40, "min_peers": 4},
        network={"presence_ttl_s": 15.0},
    )
    bootstrap = swarm.bootstrap(path)
    invite = bootstrap.invite.invite
    anna, ben, carl, dora = (swarm.join(name, invite) for name in ("anna", "ben", *HIDDEN))
    for child in (anna, ben, carl, dora):
        child.wait_event(JoinedEvent)
    dialable = [bootstrap, anna, ben]
    for child in (carl, dora):
        wait_until(lambda child=child: len(hosts_of(child, dialable)) == 2, child.story)
    meets(dora, carl)  # which cannot call each other
    meets(carl, dora)
    meets(anna, dora)
    for child in (anna, ben):
        assert not [event for event in child.all(WarningEvent) if event.code == HIDDEN_CODE]

    shown = status(swarm, carl)
    names = {host.name for host in hosts_of(carl, dialable)}
    assert shown["reach"].startswith(f"{NOBODY}; its work goes through ")
    assert all(name in shown["reach"] for name in names)

    host = next(host for host in hosts_of(carl, dialable) if host is not bootstrap)

    def all_count() -> bool:
        shown = status(swarm, host)
        assert re.fullmatch(r"serving the work of [12] peers? that nobody can dial", shown["reach"])
        counted = {peer["peer"]: peer["tokens"] for peer in shown["peers"]}
        return all(counted.get(child.id, 0) > 0 for child in (carl, dora))

    wait_until(all_count, "tokens of the hidden that their host counts")

    host.kill()
    rest = [child for child in dialable if child is not host]
    wait_until(lambda: len(hosts_of(carl, rest)) == 2, carl.story)
    meets(dora, carl)
    swarm.interrupt_all([child for child in (bootstrap, anna, ben, carl, dora) if child is not host])
