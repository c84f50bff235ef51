"""Search for faults: finds nothing in the product, every broken rule, and the shortest schedule that shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

import fault_search.__main__ as command
from fault_search import FaultSchedule, ScheduledFault, Violation, as_test, draw, play, shrink
from fault_search.broken_rules import (
    BEGIN_AT,
    BROKEN,
    NEEDS,
    ledger_takes_everything,
    nobody_asks_archives,
    nobody_refetches,
)

pytestmark = pytest.mark.slow


MOST_SCHEDULES = 200
"""Within so many a broken rule shows."""
AT_ONCE = 20
"""Schedules of a test: about a second of a core."""
NUM_SCHEDULES = 160
"""Schedules of the search that continuous integration plays; `make search` runs until stopped."""
NUM_IN_EVIDENCE = 2000
"""Schedules that `make evidence` plays, by the command that a person types."""


@pytest.mark.parametrize("first", range(0, NUM_SCHEDULES, AT_ONCE))
def test_the_rules_hold_in_the_first_schedules(first: int) -> None:
    for seed in range(first, first + AT_ONCE):
        assert not play(draw(seed)), as_test(draw(seed))


def test_of_two_one_that_stood_still_for_long_is_merged_again() -> None:
    """All that it published was too old for the other, and one other alone had no majority to say so."""
    freeze = ScheduledFault(kind="freeze", peer=1, at_s=10.0, lasts_s=30.0)
    assert not play(FaultSchedule(world="gossip", speeds=(6.0, 6.0), faults=(freeze,)))


def test_a_newcomer_comes_while_two_of_three_hang() -> None:
    """What it then does is in `test_gossip_swarm.py`; here all that must hold in every schedule holds."""
    freezes = tuple(ScheduledFault(kind="freeze", peer=peer, at_s=10.0, lasts_s=30.0) for peer in (1, 2))
    join = ScheduledFault(kind="join", at_s=15.0)
    schedule = FaultSchedule(world="gossip", speeds=(10.0, 10.0, 10.0), faults=(*freezes, join))
    assert not play(schedule), as_test(schedule)


@pytest.mark.parametrize("number", [24, pytest.param(NUM_IN_EVIDENCE, marks=pytest.mark.evidence)])
def test_schedules_by_the_command(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = command.main(["--schedules", str(number), "--seed", "0"])
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_found(rule: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    rule(monkeypatch)
    world, invariant = BROKEN[rule]
    first = BEGIN_AT.get(rule, 0)
    schedules = (draw(seed, world) for seed in range(first, first + MOST_SCHEDULES))
    shown = (schedule for schedule in schedules if rule not in NEEDS or schedule.has(*NEEDS[rule]))
    found = (violation.invariant for schedule in shown for violation in play(schedule))
    assert invariant in found, f"the search sees nothing against: {invariant}"


def test_a_schedule_is_shortened_to_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_refetches(monkeypatch)
    faults = (
        ScheduledFault(kind="delay", peer=2, at_s=3.7, lasts_s=4.1, detail=3),
        ScheduledFault(kind="join", peer=0, at_s=5.3, detail=17),
        ScheduledFault(kind="twice", peer=1, at_s=6.2, lasts_s=2.9),
    )
    schedule = FaultSchedule(world="rounds", speeds=(8.0, 10.0, 16.0), faults=faults, seed=5)
    shortest = shrink(schedule, "one model")
    assert [fault.kind for fault in shortest.faults] == ["join"] and len(shortest.speeds) == 1
    assert shortest.seed == 0 and shortest.faults[0].at_s == int(shortest.faults[0].at_s)


def test_every_invariant_that_is_new_is_told_by_a_schedule_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shrunk: list[str] = []

    def noted(schedule: FaultSchedule, invariant: str) -> FaultSchedule:
        shrunk.append(invariant)
        return schedule

    again = next(seed for seed in range(1, 100) if draw(seed).world == draw(0).world)
    found = [(0, [Violation("one", ""), Violation("two", ""), Violation("one", "")]), (again, [Violation("two", "")])]
    monkeypatch.setattr(command, "broken", lambda seeds, jobs, world: found)
    monkeypatch.setattr(command, "shrink", noted)
    assert command.main(["--schedules", "2", "--seed", "0"]) == 1
    printed = capsys.readouterr().out
    assert shrunk == ["one", "two"]
    assert printed.count("def test_") == 2 and "def test_rounds_one()" in printed and "def test_rounds_two()" in printed


def test_what_is_found_is_written_as_a_test_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger_takes_everything(monkeypatch)
    schedule = FaultSchedule(
        world="gossip", speeds=(4.0, 10.0), faults=(ScheduledFault(kind="freeze", at_s=3.0, lasts_s=2.0),)
    )
    found, names = as_test(schedule), dict[str, object]()
    exec(found, names)
    test = names["test_gossip_of_a_searched_schedule"]
    assert callable(test)
    with pytest.raises(AssertionError):
        test()
    monkeypatch.undo()
    test()


def test_schedules_play_the_same_in_a_process_that_hashes_otherwise() -> None:
    said = "from fault_search import draw, replay\nprint([replay(draw(seed)).fingerprint for seed in range(12)])"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", said],
            env=os.environ | path | {"PYTHONHASHSEED": hashed},
            capture_output=True,
            check=True,
        ).stdout
        for hashed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 40


# ---------------------------------------------------------------- what it has found


def test_who_is_just_too_far_behind_to_be_merged_takes_the_others_weights() -> None:
    schedule = FaultSchedule(
        world="gossip",
        speeds=(10.0, 10.0, 10.0),
        options=(("max_staleness_rounds", 2.0),),
        faults=(ScheduledFault(kind="restart", peer=2, at_s=11.0, lasts_s=11.0),),
    )
    assert not play(schedule)


def test_an_outage_of_seconds_leaves_nobody_alone_for_minutes() -> None:
    schedule = FaultSchedule(
        world="gossip",
        speeds=(16.0, 16.0),
        options=(("hidden", 1.0),),
        faults=(ScheduledFault(kind="restart", peer=1, at_s=25.0), ScheduledFault(kind="join", at_s=27.0)),
    )
    assert not play(schedule)


def test_a_newcomer_merges_nothing_twice_of_one_that_had_fallen_behind_and_caught_up_a_moment_ago() -> None:
    """What it tells of its round is older than what others have merged of it."""
    schedule = FaultSchedule(
        world="gossip",
        speeds=(4.0, 0.7, 10.0, 12.0, 6.0),
        options=(("pacing", 0.0),),
        seed=60327,
        faults=(
            ScheduledFault(kind="leave", peer=2),
            ScheduledFault(kind="restart", peer=1, at_s=20.0),
            ScheduledFault(kind="join", at_s=29.7, detail=1),
        ),
    )
    assert not play(schedule)


def test_a_host_that_changes_what_it_serves_on_costs_its_guest_nothing() -> None:
    """Its author has signed it, so that the host is left alone, and not the author."""
    schedule = FaultSchedule(
        world="gossip",
        speeds=(12.0,) * 5,
        options=(("hidden", 1.0),),
        seed=64938,
        faults=(ScheduledFault(kind="lie: no numbers", at_s=8.0, lasts_s=50.0),),
    )
    assert not play(schedule)


def test_who_stood_still_asks_those_too_who_came_while_it_did() -> None:
    """The other one was started anew just before, and is a late joiner: it has gone on alone."""
    schedule = FaultSchedule(
        world="rounds",
        speeds=(16.0, 16.0),
        faults=(ScheduledFault(kind="restart", peer=1), ScheduledFault(kind="freeze at", lasts_s=17.0, detail=86)),
    )
    assert not play(schedule)


def test_who_slept_until_its_rounds_time_limit_was_over_asks_before_it_signs() -> None:
    """Two peers have one each on their side, so that the lower signer's holds, however far the other is by then."""
    schedule = FaultSchedule(
        world="rounds",
        speeds=(10.0, 10.0),
        faults=(ScheduledFault(kind="freeze", lasts_s=11.0), ScheduledFault(kind="idle", at_s=10.0)),
    )
    assert not play(schedule)


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param((ScheduledFault(kind="everybody", at_s=25.0),), id="all leave, and somebody new comes"),
        pytest.param(
            (ScheduledFault(kind="bootstrap crash", at_s=20.0, lasts_s=10.0), ScheduledFault(kind="kill", at_s=25.0)),
            id="all die",
        ),
        pytest.param(
            (ScheduledFault(kind="everybody", peer=1, at_s=10.0, detail=1),), id="one leaves beside one that was killed"
        ),
        pytest.param(
            (ScheduledFault(kind="everybody", peer=1, at_s=15.0, detail=7),), id="and the bootstrap has crashed"
        ),
        pytest.param(
            (ScheduledFault(kind="everybody", at_s=25.1, detail=2),), id="the last two leave at nearly one time"
        ),
        pytest.param(
            (
                ScheduledFault(kind="kill", at_s=30.0),
                ScheduledFault(kind="kill", peer=1, at_s=30.0),
                ScheduledFault(kind="visits", at_s=36.0, detail=3),
            ),
            id="lives of seconds, one after another",
        ),
        pytest.param(
            (ScheduledFault(kind="old folder", at_s=20.0, lasts_s=8.0), ScheduledFault(kind="old folder", at_s=39.0)),
            id="an old folder is put back twice",
        ),
        pytest.param(
            (
                ScheduledFault(kind="bootstrap old folder", at_s=10.0, lasts_s=30.0),
                ScheduledFault(kind="bootstrap moves", at_s=50.0),
            ),
            id="the bootstrap's old folder, and another machine",
        ),
        pytest.param(
            (
                ScheduledFault(kind="liar joins", peer=1, at_s=36.7, lasts_s=2.7),
                ScheduledFault(kind="everybody", at_s=39.0, lasts_s=3.0),
            ),
            id="the last one to leave has lied",
        ),
    ],
)
@pytest.mark.parametrize("method", ["gossip", "server", "rounds"])
def test_a_run_outlives_its_peers(faults: tuple[ScheduledFault, ...], method: str) -> None:
    options = () if method == "gossip" else ((method, 1.0),)
    schedule = FaultSchedule(world="lives", speeds=(8.0, 8.0), faults=faults, options=options)
    assert not play(schedule), as_test(schedule)


ALONE_AFTER_A_SLEEP = FaultSchedule(
    world="lives",
    speeds=(8.0, 8.0, 8.0),
    options=(("rounds", 1.0),),
    faults=(
        ScheduledFault(kind="freeze", at_s=8.0, lasts_s=40.0),
        ScheduledFault(kind="kill", peer=1, at_s=47.0),
        ScheduledFault(kind="kill", peer=2, at_s=47.0),
        ScheduledFault(kind="freeze", peer=1, at_s=125.0),
    ),
)
ALONE_WITH_AN_OLD_FOLDER = FaultSchedule(
    world="lives",
    speeds=(8.0, 8.0),
    options=(("rounds", 1.0),),
    faults=(
        ScheduledFault(kind="old folder", peer=1, at_s=8.0, lasts_s=30.0, detail=1),
        ScheduledFault(kind="bootstrap crash", at_s=38.0, lasts_s=25.0),
        ScheduledFault(kind="kill", at_s=39.0),
        ScheduledFault(kind="freeze", at_s=140.0),
    ),
)


each_alone = pytest.mark.parametrize("schedule", [ALONE_WITH_AN_OLD_FOLDER, ALONE_AFTER_A_SLEEP])


@each_alone
def test_who_is_alone_goes_on_from_the_archive_if_its_chain_holds(schedule: FaultSchedule) -> None:
    """In rounds the archive's chain holds, which more have gone on with: what one trained alone beside it was in no
    archive, and was all taken back in the end."""
    assert not play(schedule)


@each_alone
def test_the_search_sees_who_never_asks_an_archive(schedule: FaultSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody_asks_archives(monkeypatch)
    assert [violation.invariant for violation in play(schedule)] == ["acknowledged work is archived"]


def batches(
    speeds: tuple[float, ...],
    batch_s: float,
    *faults: ScheduledFault,
    wait_s: float = 3.0,
    shares: bool = False,
    seed: int,
) -> FaultSchedule:
    options = ((("share_above", 2.0),) if shares else ()) + (("batch_s", batch_s), ("max_wait_s", wait_s))
    return FaultSchedule(world="batches", speeds=speeds, faults=faults, options=options, seed=seed)


def lie(kind: str, peer: int) -> ScheduledFault:
    return ScheduledFault(kind=f"lie: {kind}", peer=peer, at_s=4.0, lasts_s=42.0)


def gone(at_s: float, victims: set[int], num_peers: int) -> tuple[ScheduledFault, ...]:
    """Kill these at one moment, and halve the others' links."""
    kinds = ("kill" if peer in victims else "narrow" for peer in range(num_peers))
    return tuple(ScheduledFault(kind=kind, peer=peer, at_s=at_s, lasts_s=20.0) for peer, kind in enumerate(kinds))


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(
            batches((2.0, 0.7, 2.0, 10.0, 0.7, 5.0, 5.0), 3.0, lie("never ends", 0), seed=55363),
            id="whose turn comes at the limit has asked nobody",
        ),
        pytest.param(
            batches(
                (2.0, 10.0, 2.0, 5.0, 2.0, 2.0), 3.0, *gone(7.7, {0, 3}, 6),
                shares=True, seed=58888,
            ),
            id="the next roster is told once it is applied",
        ),
        pytest.param(
            batches(
                (2.0, 0.7, 10.0, 2.0, 2.0), 6.0,
                ScheduledFault(kind="partition", peer=3, at_s=0.8, lasts_s=1.4, detail=124),
                ScheduledFault(kind="partition", peer=1, at_s=13.6, lasts_s=13.7, detail=93),
                wait_s=8.0, shares=True, seed=1000,
            ),
            id="one that was parted computes on in vain",
        ),
        pytest.param(batches((5.0, 10.0, 10.0), 6.0, lie("tokens", 2), seed=1), id="two stop counting each other"),
        pytest.param(
            batches((2.0, 0.7, 10.0, 0.7, 0.7), 6.0, lie("ends at once", 0), shares=True, seed=1),
            id="slow ones end a moment too late, again and again",
        ),
        pytest.param(
            batches(
                (10.0, 2.0, 2.0, 2.0), 3.0,
                ScheduledFault(kind="freeze at", peer=3, at_s=17.3, lasts_s=1.1, detail=10),
                ScheduledFault(kind="freeze at", at_s=0.0, lasts_s=14.1, detail=121),
                seed=1,
            ),
            id="a fast one that slept is followed by nobody and runs away",
        ),
        pytest.param(
            batches(
                (10.0, 2.0, 0.7, 2.0), 6.0,
                ScheduledFault(kind="kill", at_s=11.3), ScheduledFault(kind="kill", peer=1, at_s=19.6),
                shares=True, seed=1,
            ),
            id="batches that end at the time limit are of one peer each",
        ),
        pytest.param(
            batches(
                (0.7, 0.7, 5.0), 3.0,
                ScheduledFault(kind="freeze", peer=2, at_s=10.4, lasts_s=8.3, detail=78),
                ScheduledFault(kind="freeze at", at_s=14.2, lasts_s=5.0, detail=91),
                wait_s=8.0, shares=True, seed=61131,
            ),
            id="two hang and come back, and a third signs alone",
        ),
        pytest.param(
            batches(
                (10.0, 5.0, 10.0, 2.0), 3.0,
                ScheduledFault(kind="freeze", peer=2, at_s=0.4, lasts_s=8.4, detail=125),
                ScheduledFault(kind="freeze at", lasts_s=12.5, detail=121),
                wait_s=8.0, seed=61380,
            ),
            id="one that is there again and one that does not know it sign at one moment",
        ),
        pytest.param(
            batches(
                (5.0, 10.0, 2.0, 10.0, 10.0, 2.0, 5.0), 3.0,
                ScheduledFault(kind="freeze at", at_s=18.0, lasts_s=7.0, detail=91),
                ScheduledFault(kind="idle", peer=2, at_s=18.1, lasts_s=34.6, detail=104),
                wait_s=8.0, shares=True, seed=33131,
            ),
            id="those that lack the bytes of one that hung do not ask it",
        ),
        pytest.param(
            FaultSchedule(
                world="batches",
                speeds=(5.0, 0.7, 2.0, 2.0, 5.0, 0.7),
                faults=(ScheduledFault(kind="freeze at", peer=3, at_s=17.0, lasts_s=9.0, detail=144),),
            ),
            id="one goes on with a roster that its signer has given up",
        ),
        pytest.param(
            FaultSchedule(
                world="batches",
                speeds=(10.0, 10.0, 10.0),
                options=(("batch_s", 6.0),),
                faults=(
                    ScheduledFault(kind="freeze at", peer=2, lasts_s=6.0, detail=86),
                    ScheduledFault(kind="freeze", peer=1, at_s=5.0, lasts_s=12.5),
                    ScheduledFault(kind="lie: own chain", at_s=17.0, lasts_s=1.0),
                ),
            ),
            id="beside one that has hung until this moment nobody stands",
        ),
        pytest.param(
            batches(
                (5.0, 0.7, 2.0), 3.0,
                ScheduledFault(kind="join", at_s=10.9, lasts_s=12.0, detail=122),
                ScheduledFault(kind="cut", peer=1, at_s=16.4, lasts_s=12.2, detail=109),
                seed=46695,
            ),
            id="one that was cut off calls nobody, and computes alone",
        ),
        pytest.param(
            FaultSchedule(
                world="batches",
                speeds=(5.0, 0.7, 0.7),
                options=(("batch_s", 6.0),),
                faults=(
                    ScheduledFault(kind="partition", peer=1, lasts_s=6.0, detail=113),
                    ScheduledFault(kind="kill", peer=1, at_s=10.0),
                ),
            ),
            id="one that knows slow ones alone ends after a fast one for ever",
        ),
    ],
)  # fmt: skip
def test_large_batches_fell_apart(schedule: FaultSchedule) -> None:
    assert not play(schedule), as_test(schedule)
