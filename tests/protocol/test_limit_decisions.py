"""Pauses by limits: hours, other programs, memory; and how people write limits."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.limits import (
    ALWAYS,
    ASLEEP_S,
    AVERAGE_S,
    MEMORY_PATIENCE_S,
    QUIET_S,
    IdleWatch,
    Limits,
    MemoryWatch,
    exact_size,
    parse_hours,
    parse_size,
    size_of_limit,
)

# ---------------------------------------------------------------- hours


def rests(hours: str, clock: str) -> str:
    return parse_hours(hours).rest(datetime.datetime.fromisoformat(f"2026-11-25T{clock}"))


@pytest.mark.parametrize(
    ("hours", "trains", "stays_away"),
    [
        ("22-7", ["22:00", "23:59", "00:00", "06:59:59"], ["07:00", "12:00", "21:59:59"]),
        ("8-17", ["08:00", "16:59"], ["07:59", "17:00", "00:00"]),
        ("22:30-7:15", ["22:30", "07:14"], ["22:29", "07:15"]),
        ("12-13,18-8", ["12:30", "18:00", "07:59"], ["13:00", "17:59", "08:00"]),
        ("22-24", ["22:00", "23:59"], ["00:00", "21:59"]),
        ("0-6", ["00:00", "05:59"], ["06:00", "23:59"]),
        (" 22 - 7 , 12-13", ["23:00", "12:00"], ["13:00"]),
        ("0-24", ["00:00", "23:59"], []),
        ("any", ["00:00", "12:00"], []),
    ],
)
def test_hours(hours: str, trains: list[str], stays_away: list[str]) -> None:
    for clock in trains:
        assert rests(hours, clock) == "", clock
    for clock in stays_away:
        assert rests(hours, clock), clock


def test_why_it_rests_says_when_it_is_back() -> None:
    assert rests("22-7", "12:00") == "outside the hours 22-7; training resumes at 22:00"
    assert rests("12-13, 18:05-8", "13:30") == "outside the hours 12-13,18:05-8; training resumes at 18:05"
    assert rests("12-13,18:05-20", "21:00") == "outside the hours 12-13,18:05-20; training resumes at 12:00"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a range of hours; write 22-7"),
        ("night", "'night' is not a range"),
        ("22", "'22' is not a range"),
        ("22-7,", "'' is not a range"),
        ("25-7", "25 is not a time of day"),
        ("22:60-7", "22:60 is not a time of day"),
        ("24:01-7", "24:01 is not a time of day"),
        ("7-7", "'7-7' begins when it ends; write any"),
        ("24-0", "begins when it ends"),
        ("-1-7", "'-1-7' is not a range"),
    ],
)
def test_no_hours(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_hours(text)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("day", "minutes_trained"),
    [
        (datetime.date(2026, 3, 29), 8 * 60),  # 2:00 becomes 3:00: the night has an hour less
        (datetime.date(2026, 10, 25), 10 * 60),  # 3:00 becomes 2:00: an hour more
        (datetime.date(2026, 6, 1), 9 * 60),
    ],
)
def test_hours_are_the_wall_clocks_when_the_clocks_change(day: datetime.date, minutes_trained: int) -> None:
    zone, hours = ZoneInfo("Europe/Zurich"), parse_hours("22-7")
    noon = datetime.datetime.combine(day - datetime.timedelta(days=1), datetime.time(12), datetime.UTC)
    moments = (noon + datetime.timedelta(minutes=minute) for minute in range(24 * 60))
    trained = [moment.astimezone(zone) for moment in moments if not hours.rest(moment.astimezone(zone))]
    assert len(trained) == minutes_trained
    assert {moment.hour for moment in trained} <= {22, 23, 0, 1, 2, 3, 4, 5, 6}


# ---------------------------------------------------------------- sizes and the rest


@given(st.integers(0, 2**64 - 1) | st.integers(0, 2 * 10**12))
def test_a_size_is_written_and_read_back_to_the_byte(num_bytes: int) -> None:
    assert parse_size(exact_size(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4GB", 4_000_000_000),
        ("1.5GiB", 1_610_612_736),
        ("500 mb", 500_000_000),
        ("2g", 2_000_000_000),
        ("900k", 900_000),
        ("1TiB", 2**40),
        ("1.001kB", 1001),
        ("4.35kB", 4350),
        ("0.123456789012TB", 123_456_789_012),
        ("none", 0),
        ("0", 0),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "4", "4096", "GB", "-1GB", "4 GiBs", "1e9", "0GB", "4,5GB", "4EB", "4.GB", "0.0001kB"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write it like 4GB"):
        parse_size(text)


def test_a_limit_can_be_read_and_written_back() -> None:
    for num_bytes in (0, 4_000_000_000, 1_500_000_000):
        assert parse_size(size_of_limit(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    "wrong", [{"threads": -1}, {"threads": 5000}, {"nice": 20}, {"nice": -1}, {"memory_bytes": -1}]
)
def test_limits_say_what_is_allowed(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is refused; allowed: "):
        Limits().with_changes(**wrong)


def test_no_limits_are_the_default() -> None:
    assert Limits() == Limits(threads=0, memory_bytes=0, nice=None, only_when_idle=False, hours=ALWAYS)


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
