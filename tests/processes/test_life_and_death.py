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
"""Time limit of a death: a refused call is noticed after a second, silence after two (`write_run`)."""

NAP_S = 12.0
"""Longer than silence and every call's time limit together, so that who wakes has missed whole rounds. It is
waited for, since no event says that a nap was long enough."""
LOSS_APART = 0.3
"""Nats per token between the losses of peers with the same weights on other batches; they begin at 5.5."""


def go_on(survivors: list[Child], num_rounds: int = 3, limit_s: float = DEATH_COSTS_S) -> None:
    """Wait for the next rounds of all of them, without anybody else."""
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


def test_a_third_joins_the_bootstrap_dies_then_the_signer_and_then_everyone(swarm: Swarm) -> None:
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
        assert abs(first.loss - same.loss) < LOSS_APART and abs(first.first_loss - same.loss) < LOSS_APART
    together([anna, ben, carl])

    bootstrap.kill()
    go_on([anna, ben, carl])
    printed = swarm.run("invite", "--dir", str(anna.folder))
    assert printed.code == 0, printed.stderr
    command, join, invite = printed.stdout.split()
    assert (command, join) == ("swarmtrain", "join")
    (dora,) = swarm.join_all(["dora"], invite)
    assert dora.wait_event(JoinedEvent).state_from in {anna.id, ben.id, carl.id}
    together([anna, ben, carl, dora])

    signer, *others = sorted([anna, ben, carl, dora], key=lambda child: child.id)
    for child in others:
        child.wait_event(RoundEvent, lambda event: event.signer == signer.id and len(event.partners) == 4)
    signer.kill()
    go_on(others)
    assert_lost(others, signer)
    for child in others:
        child.wait_event(RoundEvent, lambda event: event.signer == others[0].id and len(event.partners) == 3)

    leaves, *killed = others
    swarm.interrupt_some([leaves])
    assert assert_same_states([leaves, *killed]) > 5
    for child in killed:
        child.process.kill()
    swarm.assert_nothing_left()


@pytest.mark.long
def test_who_joins_a_swarm_reads_at_most_five_lines_before_its_first_round(swarm: Swarm) -> None:
    """Seen: a line for each peer that was there already, and so as many lines as peers."""
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    for child in swarm.join_all(["anna", "ben", "carl"], bootstrap.invite.invite):
        child.wait_round(1)
    own = ["--dir", str(swarm.folder / "eve"), "--listen", swarm.listen, "--data", str(swarm.folder), "--threads", "1"]
    eve = swarm.start("eve", ["join", bootstrap.invite.invite, *own])
    wait_until(lambda: any(b": loss " in line for line in eve.noise), eve.log.read_text)
    said = eve.log.read_bytes().splitlines() + eve.noise
    first = [line for line in said[: next(n for n, line in enumerate(said) if b": loss " in line)] if line.strip()]
    assert len(first) <= 5 and any(b"peers present" in line for line in first), first


@pytest.mark.long
def test_a_daemon_is_killed_and_then_a_volunteer_stopped_twice_and_all_come_together_again(swarm: Swarm) -> None:
    bootstrap = swarm.bootstrap(write_run(swarm.folder))
    anna, ben, carl = swarm.join_all(["anna", "ben", "carl"], bootstrap.invite.invite)
    together([anna, ben, carl])

    os.kill(anna.daemon(), signal.SIGKILL)
    assert anna.wait() == RunTimeError.exit_code, anna.story()
    (error,) = anna.all(ErrorEvent)
    assert error.code == "daemon-died" and "SIGKILL" in error.message and error.peer == anna.id
    assert anna.error_line() == f"error: {error.message} [{error.code}]"
    assert "Traceback" not in anna.log.read_text()
    go_on([ben, carl])
    assert_lost([ben, carl], anna)

    anna = swarm.join("anna", bootstrap.invite.invite)
    together([anna, ben, carl])

    # Both, as when a machine sleeps; then the process alone, whose daemon answers for it all the while.
    for asleep in ([ben.process.pid, ben.daemon()], [ben.process.pid]):
        for pid in asleep:
            os.kill(pid, signal.SIGSTOP)
        began_s = time.monotonic()
        go_on([anna, carl])
        wait_until(lambda since_s=began_s: time.monotonic() - since_s > NAP_S, "the end of the nap")
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
