"""Peers of different runs never mix, whoever they dial and whatever DHT they share."""

from __future__ import annotations

import time

import pytest
from codes import codes_in
from swarm import Swarm, write_run

from swarmtrain.errors import RunTimeError
from swarmtrain.events import JoinedEvent, PeerJoinedEvent
from swarmtrain.network.discovery.invite import Invite, format_invite, parse_invite

pytestmark = [pytest.mark.processes, pytest.mark.long]

REFUSED_WITHIN_S = 20.0


def test_runs_do_not_mix(swarm: Swarm) -> None:
    of_a = swarm.bootstrap(write_run(swarm.folder, run={"name": "run-a"}), name="of-a")
    of_b = swarm.bootstrap(write_run(swarm.folder, run={"name": "run-b"}), name="of-b")
    invite_a, invite_b = parse_invite(of_a.invite.invite), parse_invite(of_b.invite.invite)
    assert invite_a.run_sha256 != invite_b.run_sha256

    # An honest volunteer of b; one of a that dials the bootstrap of b as well, and enters its DHT; and one that
    # looks for run a where only run b is.
    both = format_invite(Invite(invite_a.run_sha256, invite_a.peers + invite_b.peers))
    forged = format_invite(Invite(invite_a.run_sha256, invite_b.peers))
    began_s = time.monotonic()
    lost = swarm.join("lost", forged)
    anna = swarm.join("anna", both)
    ben = swarm.join("ben", of_b.invite.invite)

    assert lost.wait() == RunTimeError.exit_code, lost.story()
    assert time.monotonic() - began_s < REFUSED_WITHIN_S
    assert codes_in(lost.error_line()) == ["another-run"]
    assert not lost.all(JoinedEvent)

    for child in (anna, ben):
        assert child.wait_event(JoinedEvent).num_peers == 1
        child.wait_more_rounds(10)
    # The DHT is one by now: presence is read every three seconds, and both have trained for longer.
    assert {peer for event in anna.rounds().values() for peer in event.partners} == {anna.id}
    assert {peer for event in ben.rounds().values() for peer in event.partners} == {ben.id}
    seen = {child.name: {event.joined for event in child.all(PeerJoinedEvent)} for child in (of_a, of_b, anna, ben)}
    assert seen == {"of-a": {anna.id}, "of-b": {ben.id}, "anna": set(), "ben": set()}
    assert not set(parse_invite(ben.invite.invite).peers) & set(invite_a.peers)
    swarm.interrupt_all([of_a, of_b, anna, ben])
