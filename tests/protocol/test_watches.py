"""Pauses by what is measured of the machine: other programs, battery, heat and memory."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.watches import (
    ASLEEP_S,
    AVERAGE_S,
    CARD_BUSY_SHARE,
    CARD_QUIET_SHARE,
    COOL_S,
    COOLER,
    HOT_S,
    MEMORY_PATIENCE_S,
    PLUGGED_S,
    QUIET_S,
    UNPLUGGED_S,
    BatteryWatch,
    CardMeasurement,
    CardWatch,
    HeatWatch,
    IdleWatch,
    MemoryWatch,
    SteadySwitch,
)

# ---------------------------------------------------------------- other programs

STEP_S = 3.0


class Machine:
    """Two processors; others use a share of them that the test says."""

    def __init__(self) -> None:
        self.watch = IdleWatch(num_processors=2)
        self.now_s, self.others_s = 100.0, 5000.0

    def run(self, share: float, seconds: float) -> list[str]:
        """Return what the watch says, each `STEP_S`."""
        said = []
        for _ in range(round(seconds / STEP_S)):
            self.now_s += STEP_S
            self.others_s += share * 2 * STEP_S
            said.append(self.watch.rest(self.now_s, self.others_s))
        return said


def first(said: Iterable[str], resting: bool) -> float | None:
    """Seconds to the first answer that rests, or that does not."""
    return next((STEP_S * (index + 1) for index, one in enumerate(said) if bool(one) == resting), None)


def test_an_idle_machine_is_used() -> None:
    assert first(Machine().run(0.05, 600), resting=True) is None


def test_a_busy_one_is_left_soon_and_comes_back_after_a_minute_of_quiet() -> None:
    machine = Machine()
    machine.run(0.02, 60)
    left_s = first(machine.run(0.6, 60), resting=True)
    assert left_s is not None and left_s <= AVERAGE_S
    assert machine.watch.resting.startswith("other programs use ")
    back_s = first(machine.run(0.02, 120), resting=False)
    assert back_s is not None and QUIET_S <= back_s <= QUIET_S + 2 * AVERAGE_S


def test_a_moment_of_work_is_no_use_of_the_machine() -> None:
    machine = Machine()
    machine.run(0.02, 60)
    assert first(machine.run(0.9, 3), resting=True) is None
    assert first(machine.run(0.02, 60), resting=True) is None


def test_one_who_works_now_and_then_keeps_it_away() -> None:
    machine = Machine()
    machine.run(0.8, 30)
    assert machine.watch.resting
    for _ in range(20):  # half a minute of work, half a minute of thought
        assert first(machine.run(0.02, 30), resting=False) is None
        assert first(machine.run(0.8, 30), resting=False) is None


def test_between_the_two_thresholds_it_stays_as_it_is() -> None:
    machine = Machine()
    assert first(machine.run(0.2, 300), resting=True) is None
    machine.run(0.6, 30)
    assert first(machine.run(0.2, 300), resting=False) is None


def test_a_night_asleep_is_neither_quiet_nor_use() -> None:
    machine = Machine()
    machine.run(0.6, 30)
    machine.now_s += 8 * 3600  # the machine was suspended
    assert first(machine.run(0.02, QUIET_S), resting=False) is None
    assert first(machine.run(0.02, 2 * AVERAGE_S), resting=False) is not None
    machine.now_s += ASLEEP_S + 1
    machine.others_s += 500.0  # what others did as it woke up says nothing of now
    assert first(machine.run(0.02, 60), resting=True) is None


def test_its_own_time_counted_a_moment_late_does_no_harm() -> None:
    machine = Machine()
    machine.run(0.0, 30)
    machine.others_s -= 1.0
    assert first(machine.run(0.0, 60), resting=True) is None


# ---------------------------------------------------------------- graphics cards


class Card:
    """Graphics card; other programs use a share of it that the test says."""

    def __init__(self) -> None:
        self.watch, self.now_s = CardWatch(), 100.0

    def measure(self, share: float | None, program: str = "") -> str:
        self.now_s += STEP_S
        return self.watch.rest(self.now_s, CardMeasurement(name="cuda:0", others_share=share, program=program))

    def run(self, share: float | None, seconds: float, program: str = "") -> list[str]:
        """Return what the watch says, each `STEP_S`."""
        return [self.measure(share, program) for _ in range(round(seconds / STEP_S))]


def pauses(said: Iterable[str]) -> list[tuple[float, float]]:
    """Return each pause as (when it began, how long it lasted), in seconds; the last may not be over."""
    found, begun = [], None
    for index, one in enumerate([*said, ""]):
        if one and begun is None:
            begun = index
        elif not one and begun is not None:
            found.append((begun * STEP_S, (index - begun) * STEP_S))
            begun = None
    return found


def test_a_game_has_the_card_to_itself_soon_and_the_peer_comes_back_after_a_quiet_minute() -> None:
    card = Card()
    card.run(0.02, 60)
    left_s = first(card.run(0.6, 60, "blender"), resting=True)
    assert left_s is not None and left_s <= AVERAGE_S
    assert card.watch.resting == "another program uses cuda:0 (blender); training resumes after a quiet minute"
    back_s = first(card.run(0.02, 120), resting=False)
    assert back_s is not None and QUIET_S <= back_s <= QUIET_S + 2 * AVERAGE_S


def test_a_desktop_with_windows_is_no_other_program() -> None:
    card = Card()
    for _ in range(60):
        assert first(card.run(0.04, 54), resting=True) is None
        assert first(card.run(0.4, 3), resting=True) is None, "somebody moves a window"


def test_a_card_half_of_which_a_program_gets_beside_training_counts_as_used() -> None:
    card = Card()
    assert first(card.run(CARD_BUSY_SHARE + 0.02, 60), resting=True) is not None


def test_between_the_thresholds_of_a_card_it_stays_as_it_is() -> None:
    between = (CARD_BUSY_SHARE + CARD_QUIET_SHARE) / 2
    card = Card()
    assert first(card.run(between, 300), resting=True) is None
    card.run(0.5, 30)
    assert first(card.run(between, 300), resting=False) is None


def test_an_evening_of_a_game_is_one_pause() -> None:
    """With loading screens, menus, and a look at something else; then a film, in which the card does little."""
    card, said = Card(), list[str]()
    for share, seconds in [
        (0.03, 600),
        *[(0.7, 240), (0.02, 24), (0.45, 300), (0.12, 45), (0.0, 30)] * 6,
        (0.06, 5400),
    ]:
        said += card.run(share, seconds)
    ((began_s, lasted_s),) = pauses(said)
    assert 600 <= began_s <= 600 + AVERAGE_S
    assert 6 * 639 - 60 <= lasted_s <= 6 * 639 + QUIET_S + 2 * AVERAGE_S


@given(st.lists(st.floats(0, 1) | st.none(), max_size=400))
def test_no_pause_is_short_whatever_is_measured(shares: list[float | None]) -> None:
    """A return costs the others a pull: a peer must not come and go."""
    card = Card()
    said = [card.measure(share) for share in shares]
    assert all(lasted_s >= QUIET_S - STEP_S for _, lasted_s in pauses(said)[: -1 if said and said[-1] else None])


def test_a_measurement_that_fails_changes_nothing_and_if_it_stays_away_the_peer_trains() -> None:
    card = Card()
    assert first(card.run(None, 300), resting=True) is None
    card.run(0.6, 60)
    assert all(card.run(None, ASLEEP_S)), "one that is missing for moments"
    assert not card.measure(None), "nobody knows any more"
    assert first(card.run(0.6, 60), resting=True) is not None, "it is measured again"


# ---------------------------------------------------------------- what lasts


def test_a_switch_turns_once_its_condition_has_lasted() -> None:
    switch = SteadySwitch(on_after_s=10.0, off_after_s=20.0)
    said = [switch.update(now_s, turns_on=True, turns_off=False) for now_s in (0.0, 5.0, 9.9, 10.0)]
    assert said == [False, False, False, True]
    said = [switch.update(now_s, turns_on=False, turns_off=now_s != 25.0) for now_s in (12.0, 25.0, 31.0, 50.0, 51.0)]
    assert said == [True, True, True, True, False], "at 25 s it did not hold"


def test_a_switch_does_not_count_the_time_that_the_machine_slept() -> None:
    switch = SteadySwitch(on_after_s=10.0, off_after_s=20.0)
    switch.update(0.0, turns_on=True, turns_off=False)
    assert not switch.update(ASLEEP_S + 1, turns_on=True, turns_off=False)
    assert switch.update(ASLEEP_S + 11, turns_on=True, turns_off=False)


# ---------------------------------------------------------------- battery


def test_on_battery_at_the_start_it_pauses_at_once() -> None:
    said = BatteryWatch().rest(0.0, True)
    assert said.startswith("this machine runs on battery; training resumes on mains power, or with `swarmtrain limits")
    assert not BatteryWatch().rest(0.0, False)


def test_a_laptop_carried_to_another_socket_trains_on_and_an_unplugged_one_pauses() -> None:
    watch = BatteryWatch()
    assert not any(watch.rest(now_s, False) for now_s in (0.0, 3.0))
    assert not any(watch.rest(now_s, True) for now_s in (6.0, 9.0, 12.0))
    assert not watch.rest(15.0, False)
    assert [bool(watch.rest(18.0 + after_s, True)) for after_s in (0.0, UNPLUGGED_S - 1, UNPLUGGED_S)] == [
        False,
        False,
        True,
    ]
    assert watch.rest(40.0, False), "a loose plug must not bring it back"
    assert watch.rest(43.0, True)
    assert watch.rest(46.0, False) and watch.rest(46.0 + PLUGGED_S - 7, False)
    assert not watch.rest(46.0 + PLUGGED_S, False)


# ---------------------------------------------------------------- heat


class Heated:
    """Card at a temperature that the test says, with a limit of 80 degrees."""

    def __init__(self, limit: float = 80.0) -> None:
        self.watch, self.now_s, self.limit = HeatWatch(), 100.0, limit

    def run(self, celsius: float | None, seconds: float) -> list[str]:
        said = []
        for _ in range(round(seconds / STEP_S)):
            self.now_s += STEP_S
            said.append(self.watch.rest(self.now_s, "cuda:0", celsius, self.limit))
        return said


def test_too_hot_it_pauses_soon_and_comes_back_once_it_has_stayed_cool() -> None:
    heated = Heated()
    assert not any(heated.run(79.0, 600))
    left_s = first(heated.run(81.0, 60), resting=True)
    assert left_s is not None and left_s <= HOT_S + STEP_S
    assert heated.watch.resting == (
        "cuda:0 has 81 °C, and may have 80; training resumes once it has stayed below 70 for 5 minutes"
    )
    assert all(heated.run(80.0 - COOLER + 1, 3600)), "not cool enough"
    back_s = first(heated.run(80.0 - COOLER, 3600), resting=False)
    assert back_s is not None and back_s == pytest.approx(COOL_S, abs=2 * STEP_S)


def test_a_fan_that_does_not_turn_makes_few_pauses() -> None:
    """Hot a minute after each return, cool soon after each pause."""
    heated, celsius, said = Heated(), 60.0, list[str]()
    for _ in range(3 * 1200):
        celsius += -0.8 * STEP_S if heated.watch.resting else 0.4 * STEP_S
        celsius = max(celsius, 45.0)
        said += heated.run(celsius, STEP_S)
    assert 0 < len(pauses(said)) <= 3 * 3600 / COOL_S


def test_a_moment_of_heat_is_no_reason() -> None:
    heated = Heated()
    for _ in range(20):
        assert not any(heated.run(85.0, 2 * STEP_S)) and not any(heated.run(75.0, STEP_S))


def test_a_limit_that_is_raised_or_lifted_counts_at_once() -> None:
    heated = Heated()
    assert heated.run(85.0, 30)[-1]
    heated.limit = 90.0
    assert not any(heated.run(85.0, 30))
    heated.limit = 70.0
    assert heated.run(85.0, 30)[-1].startswith("cuda:0 has 85 °C, and may have 70;")
    heated.limit = 0.0
    assert not any(heated.run(85.0, 30))


def test_a_temperature_that_is_not_told_any_more_lets_it_train() -> None:
    heated = Heated()
    assert heated.run(85.0, 30)[-1]
    assert all(heated.run(None, ASLEEP_S))
    assert not any(heated.run(None, 300))


# ---------------------------------------------------------------- memory

GB = 10**9


def test_without_a_limit_memory_is_nobodys_business() -> None:
    assert MemoryWatch().rest(0.0, 100 * GB, 0) == ("", "")


def test_above_its_memory_it_warns_once_and_then_rests_until_it_is_allowed_more() -> None:
    watch = MemoryWatch()
    assert watch.rest(0.0, 4 * GB, 4 * GB) == ("", "")
    rest, warning = watch.rest(3.0, 5 * GB, 4 * GB)
    assert (rest, warning) == ("", "it uses 5 GB of memory, and may use 4 GB; if that lasts for 30 s, training pauses")
    assert watch.rest(6.0, 5 * GB, 4 * GB) == ("", "")
    rest, warning = watch.rest(3.0 + MEMORY_PATIENCE_S, 5 * GB, 4 * GB)
    assert (
        rest
        == "it uses 5 GB of memory, and may use 4 GB; training resumes when `swarmtrain limits --memory` allows more"
    )
    assert warning == ""
    assert watch.rest(600.0, 1 * GB, 4 * GB) == (rest, ""), "it would need as much again"
    assert watch.rest(700.0, 1 * GB, 5 * GB) == (rest, ""), "no more than it used"
    assert watch.rest(800.0, 1 * GB, 6 * GB) == ("", "")


def test_a_peak_is_told_and_forgiven() -> None:
    watch = MemoryWatch()
    assert watch.rest(0.0, 5 * GB, 4 * GB)[1]
    assert watch.rest(20.0, int(3.9 * GB), 4 * GB) == ("", "")
    assert watch.rest(40.0, 5 * GB, 4 * GB) == ("", ""), "told already"
    assert watch.rest(60.0, 3 * GB, 4 * GB) == ("", "")
    assert watch.rest(80.0, 5 * GB, 4 * GB)[1], "told again, since it had kept to it"
    assert watch.rest(90.0, 5 * GB, 0) == ("", "")


def test_a_limit_that_is_lifted_lets_it_go_on() -> None:
    watch = MemoryWatch()
    watch.rest(0.0, 5 * GB, 4 * GB)
    assert watch.rest(50.0, 5 * GB, 4 * GB)[0]
    assert watch.rest(60.0, 5 * GB, 0) == ("", "")
