"""Hours in which a peer trains, and how people write limits."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmtrain.protocol.limits import (
    ALWAYS,
    AUTO_TEMPERATURE,
    Limits,
    exact_size,
    highest_celsius,
    parse_hours,
    parse_size,
    parse_temperature,
    size_of_limit,
    temperature_of_limit,
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
    "wrong",
    [
        *({"threads": -1}, {"threads": 5000}, {"nice": 20}, {"nice": -1}, {"memory_bytes": -1}),
        *({"gpu_share": 0}, {"gpu_share": 101}, {"max_temperature": 29}, {"max_temperature": 121}),
        *({"max_temperature": -2}, {"max_temperature": float("nan")}),
    ],
)
def test_limits_say_what_is_allowed(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is refused; allowed: "):
        Limits().with_changes(**wrong)


def test_no_limits_are_the_default() -> None:
    assert Limits() == Limits(threads=0, memory_bytes=0, nice=None, only_when_idle=False, hours=ALWAYS)


@pytest.mark.parametrize(
    ("text", "celsius"),
    [
        ("80", 80.0),
        (" 82.5 C", 82.5),
        ("75°C", 75.0),
        ("30", 30.0),
        ("none", 0.0),
        ("0", 0.0),
        ("Auto", AUTO_TEMPERATURE),
    ],
)
def test_temperatures(text: str, celsius: float) -> None:
    assert parse_temperature(text) == celsius
    assert parse_temperature(temperature_of_limit(celsius)) == celsius


@pytest.mark.parametrize("text", ["", "hot", "29", "121", "-80", "80F", "nan", "1e2", "180"])
def test_no_temperatures(text: str) -> None:
    with pytest.raises(ValueError, match="is not a temperature; write degrees Celsius from 30 to 120, such as 80, or"):
        parse_temperature(text)


def test_the_highest_temperature_is_the_given_one_or_shortly_below_where_the_card_slows_down() -> None:
    assert highest_celsius(80.0, 93.0) == 80.0
    assert highest_celsius(AUTO_TEMPERATURE, 93.0) == 88.0
    assert highest_celsius(AUTO_TEMPERATURE, None) == 0.0, "a processor, or a driver that does not tell"
    assert highest_celsius(0.0, 93.0) == 0.0
