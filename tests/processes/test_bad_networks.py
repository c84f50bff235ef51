"""Rehearsals of bad networks: pulls that fail, and a whole swarm behind links of which no byte goes round them."""

from __future__ import annotations

import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from connections import between, connected_ports
from swarm import Swarm, exit_limit_s, wait_until, write_run

from swarmtrain.events import DoneEvent, RoundEvent, WarningEvent

pytestmark = pytest.mark.processes


def test_whoever_fails_all_pulls_is_merged_by_nobody_and_all_train_on(swarm: Swarm) -> None:
    merge = {"method": "gossip", "inner_steps": 20, "min_peers": 2}
    path = write_run(swarm.folder, merge=merge, network={"archive_every_s": 5.0})
    invite = swarm.bootstrap(path).invite.invite
    anna, ben = swarm.join("anna", invite, "--fail-pulls", "100"), swarm.join("ben", invite)
    anna.wait_event(RoundEvent, lambda event: ben.id in event.partners)
    ben.wait_round(4)  # anna may have merged a part of its first one, before it had ended any
    assert all(event.partners == () for event in ben.all(RoundEvent)), "its pulls broke off"
    anna.wait_event(RoundEvent, lambda event, after=anna.last_round: event.round > after and ben.id in event.partners)
    ben.wait_more_rounds(1)
    bootstrap = next(child for child in swarm.children if child.name == "bootstrap")
    swarm.interrupt_all([bootstrap, anna, ben])


def private_ports(swarm: Swarm) -> set[int]:
    """Return the ports at which the peers of `local` listen, from their command lines."""
    ports = set()
    for pid in swarm.leftovers():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "--only-announced" in words:
            ports.add(int(words[words.index("--listen") + 1].split(":")[1]))
    return ports


NAMES = ("volunteer-1", "volunteer-2", "volunteer-3")
DEEDS = ("parted from the others", "killed; started again", "all connections are reset")
FAULTS = """
[links]
rtt_ms = 20
jitter_ms = 5
loss_percent = 0.1

[[faults]]
at_s = 12
do = "partition"
who = ["volunteer-1"]
for_s = 12

[[faults]]
at_s = 20
do = "kill"
who = ["volunteer-2"]
for_s = 2

[[faults]]
at_s = 32
do = "reset"
who = ["volunteer-3"]
"""


@pytest.mark.long
def test_a_local_swarm_through_faults_comes_together_again_and_nothing_goes_round_its_links(swarm: Swarm) -> None:
    run_file = write_run(swarm.folder, merge={"method": "gossip", "inner_steps": 20})
    (swarm.folder / "faults.toml").write_text(FAULTS)
    given = ["--faults", str(swarm.folder / "faults.toml"), "--json", "--dir", str(swarm.folder / "trained")]
    words = ["local", str(run_file), "--peers", str(len(NAMES)), *given]
    local = swarm.start("local", words)
    told = [local.wait_event(WarningEvent, lambda event, word=word: word in event.message) for word in DEEDS]
    assert [each.message.partition(" ")[0] for each in told] == 3 * ["rehearsal:"]
    since = time.time()
    for name in NAMES:
        merged = local.wait_event(
            RoundEvent,
            lambda event, name=name: event.name == name and event.time > since and len(event.partners) == 2,
        )
        assert merged.run_tokens > 0
    parted_s = told[0].time
    alone = [
        event
        for event in local.all(RoundEvent)
        if event.name == "volunteer-1" and event.time - event.seconds > parted_s + 4 and event.time < parted_s + 12
    ]
    assert alone and not any(event.partners for event in alone), "it trained on, and merged nobody"
    ports = private_ports(swarm)
    assert len(ports) == 4, "the bootstrap, and each volunteer"
    # Each of six pairs of peers is connected, by two connections with two ends each.
    wait_until(lambda: sum(bool(ports & set(pair)) for pair in connected_ports()) >= 6 * 2 * 2, "all are connected")
    assert not between(ports), "whoever dials again, and who was started again, passes the links too"
    os.killpg(local.process.pid, signal.SIGINT)  # as a terminal does
    assert local.wait(2 * exit_limit_s()) == 0, local.story()
    assert [event.reason for event in local.all(DoneEvent)] == 4 * ["interrupted"], "each had its goodbye"
    assert f"\n  swarmtrain {shlex.join(words)}" in local.log.read_text()
    swarm.assert_nothing_left()
    assert "Traceback" not in local.log.read_text()
