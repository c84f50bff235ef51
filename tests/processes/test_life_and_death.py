"""Volunteers come, are killed, stopped and interrupted, as real processes; those who are left go on training."""

from __future__ import annotations

import os
import signal
import time

import pytest
from swarm import Child, Swarm, assert_same_states, exit_limit_s, wait_until, write_run

from swarmtrain.errors import RunTimeError
from swarmtrain.events import ErrorEvent, JoinedEvent, PeerLostEvent, RoundEvent

pytestmark = pytest.mark.processes

DEATH_COSTS_S = 20.0
"""A refused call is noticed after a second, silence after two (`write_run`); the rest is for a busy machine."""

NAP_S = 12.0


def go_on(survivors: list[Child], num_rounds: int = 3, limit_s: float = DEATH_COSTS_S) -> None:
    """The next rounds of all of them, without anybody else."""
    peers = {child.id for child in survivors}
    for child in survivors:
        child.wait_more_rounds(num_rounds, limit_s)
        event = child.rounds()[child.last_round]
        assert set(event.partners) <= peers, "someone who is gone is on a roster"
    assert_same_states(survivors)


def assert_lost(survivors: list[Child], victim: Child) -> None:
    for child in survivors:
        child.wait_event(PeerLostEvent, lambda event: event.lost == victim.id)


def together(children: list[Child]) -> None:
    """Wait for a round with all of them on its roster."""
    peers = {child.id for child in children}
    for child in children:
        after = child.last_round
        child.wait_event(RoundEvent, lambda event, after=after: event.round > after and set(event.partners) == peers)


def test_a_third_joins_one_is_killed_and_the_rest_leave(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    invite = bootstrap.invite.invite
    anna, ben = swarm.join_all(["anna", "ben"], invite)
    for child in (anna, ben):
        child.wait_round(2)

    (carl,) = swarm.join_all(["carl"], invite)
    joined = carl.wait_event(JoinedEvent)
    assert joined.state_from in {anna.id, ben.id, bootstrap.id} and joined.round >= 3 and joined.run_tokens > 0
    first = carl.wait_round(0)
    for other in (anna, ben):
        same = other.wait_round(first.round)
        assert same.round == first.round and same.state_sha256 == first.state_sha256
        assert abs(first.loss - same.loss) < 0.3 and abs(first.first_loss - same.loss) < 0.3
    together([anna, ben, carl])

    ben.kill()
    go_on([anna, carl])
    assert_lost([anna, carl], ben)
    swarm.interrupt_all([bootstrap, anna, carl])
    assert assert_same_states([anna, ben, carl]) > 5


def test_the_swarm_outlives_its_bootstrap(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    anna, ben = swarm.join_all(["anna", "ben"], bootstrap.invite.invite)
    together([anna, ben])

    bootstrap.kill()
    go_on([anna, ben])
    printed = swarm.run("invite", "--dir", str(anna.folder))
    assert printed.code == 0, printed.stderr
    command, join, invite = printed.stdout.split()
    assert (command, join) == ("swarmtrain", "join")
    (carl,) = swarm.join_all(["carl"], invite)
    assert carl.wait_event(JoinedEvent).state_from in {anna.id, ben.id}
    together([anna, ben, carl])
    swarm.interrupt_all([anna, ben, carl])


def test_the_signer_is_killed_and_then_everyone(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    volunteers = swarm.join_all(["anna", "ben", "carl"], bootstrap.invite.invite)
    together(volunteers)
    volunteers.sort(key=lambda child: child.id)
    signer, *others = volunteers
    for child in others:
        child.wait_event(RoundEvent, lambda event: event.signer == signer.id and len(event.partners) == 3)

    signer.kill()
    go_on(others)
    assert_lost(others, signer)
    for child in others:
        child.wait_event(RoundEvent, lambda event: event.signer == others[0].id and len(event.partners) == 2)

    for child in (bootstrap, *others):
        child.process.kill()
    swarm.assert_nothing_left()


@pytest.mark.long
def test_a_peer_whose_daemon_is_killed_says_so_and_the_others_go_on(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    anna, ben, carl = swarm.join_all(["anna", "ben", "carl"], bootstrap.invite.invite)
    together([anna, ben, carl])

    os.kill(anna.daemon(), signal.SIGKILL)
    assert anna.wait() == RunTimeError.exit_code, anna.story()
    (error,) = anna.all(ErrorEvent)
    assert "network daemon" in error.message and "start this peer again" in error.message
    assert "was ended by SIGKILL" in error.message and error.peer == anna.id
    assert anna.error_line() == f"error: {error.message}"
    assert "Traceback" not in anna.log.read_text()
    go_on([ben, carl])
    assert_lost([ben, carl], anna)

    again = swarm.join("anna", bootstrap.invite.invite)
    together([again, ben, carl])
    swarm.interrupt_all([bootstrap, again, ben, carl])


@pytest.mark.long
@pytest.mark.parametrize("with_its_daemon", [False, True])
def test_a_stopped_volunteer_is_not_waited_for_and_comes_back(swarm: Swarm, with_its_daemon: bool) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    anna, ben, carl = swarm.join_all(["anna", "ben", "carl"], bootstrap.invite.invite)
    together([anna, ben, carl])

    asleep = [ben.process.pid, ben.daemon()] if with_its_daemon else [ben.process.pid]
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    began_s = time.monotonic()
    go_on([anna, carl])
    wait_until(lambda: time.monotonic() - began_s > NAP_S, "twelve seconds")

    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    together([anna, ben, carl])
    assert_same_states([anna, ben, carl])
    swarm.interrupt_all([bootstrap, anna, ben, carl])


def test_an_interrupt_ends_a_peer_whose_daemon_hangs_and_a_second_one_at_once(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    anna, ben = swarm.join_all(["anna", "ben"], bootstrap.invite.invite)
    together([anna, ben])

    for child in (anna, ben):
        os.kill(child.daemon(), signal.SIGSTOP)  # its goodbyes will take their time
        child.interrupt()
    # Again and again: Python makes one of two interrupts that come in the same moment.
    wait_until(lambda: ben.process.poll() is not None or ben.interrupt(), "ben ends", exit_limit_s() / 2)
    assert ben.wait() == 130, ben.story()
    assert anna.wait(exit_limit_s()) == 0, anna.story()
    assert "Event loop is closed" not in anna.log.read_text()
    bootstrap.kill()
    swarm.assert_nothing_left()
