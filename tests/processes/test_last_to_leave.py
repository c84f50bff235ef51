"""Leaving before the end: what nobody else has is in the archive, for whoever comes next."""

from __future__ import annotations

import pytest
from swarm import Swarm, write_run

from swarmtrain.events import ArchivedEvent, DoneEvent, JoinedEvent, RoundEvent

pytestmark = pytest.mark.processes

NEVER_S = 3600.0
"""Between archives: the one of a leaver is made because it leaves."""


def test_the_last_volunteer_leaves_with_all_it_has_archived(swarm: Swarm) -> None:
    """In rounds; by gossip, `test_lives.py` has it."""
    bootstrap = swarm.bootstrap(write_run(swarm.folder, network={"archive_every_s": NEVER_S}))
    anna = swarm.join("anna", bootstrap.invite.invite)
    bootstrap.wait_event(ArchivedEvent)
    anna.wait_more_rounds(5)
    swarm.interrupt_some([anna])
    (left,) = anna.all(DoneEvent)
    *_, last = bootstrap.all(ArchivedEvent)
    assert last.run_tokens == left.run_tokens > 0

    ben = swarm.join("ben", bootstrap.invite.invite)
    joined = ben.wait_event(JoinedEvent)
    assert joined.state_from == bootstrap.id and joined.round == last.round > 5
    ben.wait_event(RoundEvent, lambda event: event.run_tokens > left.run_tokens)
