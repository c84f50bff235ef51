"""Rehearsal files: what a person may write, and that the same file means the same mishaps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from codes import raises_code

from swarmtrain.errors import UserError
from swarmtrain.rehearsal import (
    FaultEvent,
    FaultSection,
    RehearsalChurn,
    RehearsalFile,
    SeedSection,
    fault_events,
    load_rehearsal,
)

NAMES = [f"volunteer-{number}" for number in range(1, 7)]


def read(folder: Path, text: str) -> RehearsalFile:
    path = folder / "bad.toml"
    path.write_text(text)
    return load_rehearsal(path)


def test_the_example_is_one() -> None:
    rehearsal = load_rehearsal(Path(__file__).parents[1] / "examples" / "rehearsals" / "bad-internet.toml")
    assert rehearsal.needs_links and rehearsal.strikes and rehearsal.links.rtt_ms == 80
    assert [fault.do for fault in rehearsal.faults] == ["hang", "stall", "partition", "narrow", "reset", "half-open"]
    first = list(itertools.islice(fault_events(rehearsal, NAMES), 20))
    assert first == list(itertools.islice(fault_events(rehearsal, NAMES), 20))
    assert [fault.at_s for fault in first] == sorted(fault.at_s for fault in first)
    assert FaultEvent(20.0, "hang", ("volunteer-2",), 15.0) in first
    assert next(len(fault.who) for fault in first if fault.do == "partition") == 3


def test_an_empty_one_does_nothing(tmp_path: Path) -> None:
    rehearsal = read(tmp_path, "")
    assert not rehearsal.needs_links and not rehearsal.strikes and list(fault_events(rehearsal, NAMES)) == []


def test_killing_needs_no_links_and_parting_does(tmp_path: Path) -> None:
    assert not read(tmp_path, '[[faults]]\nat_s = 1\ndo = "kill"').needs_links
    assert read(tmp_path, '[[faults]]\nat_s = 1\ndo = "stall"').needs_links
    assert read(tmp_path, "[links]\nloss_percent = 1").needs_links


def test_only_a_link_with_a_bandwidth_can_be_narrowed(tmp_path: Path) -> None:
    fault = '[[faults]]\nat_s = 1\ndo = "narrow"\nwho = ["volunteer-2"]\n'
    of_its_own = read(tmp_path, fault + '[[volunteers]]\nname = "volunteer-2"\nup_mbit = 5')
    assert next(fault_events(of_its_own, NAMES)).bandwidth_percent == 50
    with raises_code("missing-key", UserError, "links.up_mbit: missing; allowed: more than 0"):
        fault_events(read(tmp_path, fault), NAMES)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("[links]\njiter_ms = 3", "unknown-key", "links.jiter_ms: unknown key; did you mean links.jitter_ms?"),
        (
            "[links]\nloss_percent = 90",
            "out-of-range",
            "links.loss_percent: 90 is refused; allowed: a number from 0 ",
        ),
        ("[link]\nrtt_ms = 1", "unknown-key", "link: unknown section; did you mean links?"),
        ("[faults]\nat_s = 1", "wrong-type", "write [[faults]]"),
        ("faults = [3]", "wrong-type", "fault 1: faults: 3 "),
        (
            '[[faults]]\nat_s = 1\ndo = "break"',
            "bad-value",
            'faults.do: "break" is refused; allowed: "kill" ',
        ),
        ('[[faults]]\ndo = "kill"', "missing-key", "fault 1: faults.at_s: "),
        ('[[faults]]\nat_s = 1\ndo = "kill"\nwho = ["a", "a"]', "bad-value", "fault 1: faults.who: "),
        ("[churn\n", "not-toml", "line 1, column 7: "),
    ],
)
def test_what_is_wrong_is_said_with_its_key(tmp_path: Path, text: str, code: str, says: str) -> None:
    with raises_code(code, UserError, says) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'bad.toml'}: ")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_name_the_example(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    (tmp_path / "long.toml").write_bytes(b"#" * 70_000)
    for name in ("none.toml", "latin.toml"):
        with raises_code("file-unreadable", UserError, "examples/rehearsals/bad-internet.toml"):
            load_rehearsal(tmp_path / name)
    with raises_code("file-too-long", UserError, "65536"):
        load_rehearsal(tmp_path / "long.toml")


def test_who_is_not_there_cannot_be_struck() -> None:
    with raises_code("no-such-volunteer", UserError, "anna", "volunteer-1"):
        fault_events(RehearsalFile(faults=(FaultSection(at_s=1, do="kill", who=("anna",)),)), NAMES)
    with raises_code("no-such-volunteer", UserError, "there are 6 volunteers", "--peers"):
        fault_events(RehearsalFile(faults=(FaultSection(at_s=1, do="kill", number=7),)), NAMES)


def test_churn_strikes_about_so_often_and_nobody_who_is_away() -> None:
    def some(seed: int) -> list[FaultEvent]:
        churn = RehearsalChurn(every_s=10, away_s=30)
        rehearsal = RehearsalFile(rehearsal=SeedSection(seed=seed), churn=churn)
        return list(itertools.islice(fault_events(rehearsal, NAMES), 1000))

    struck = some(1)
    assert struck == some(1) != some(2)
    assert struck[-1].at_s / 1000 == pytest.approx(10.0, rel=0.05)
    assert {fault.do for fault in struck} == {"kill", "leave"} and {fault.who[0] for fault in struck} == set(NAMES)
    back_s = dict.fromkeys(NAMES, 0.0)
    for fault in struck:
        assert back_s[fault.who[0]] <= fault.at_s
        back_s[fault.who[0]] = fault.at_s + 30


def test_with_everybody_away_churn_waits() -> None:
    churn = RehearsalChurn(every_s=1, away_s=100)
    times = [fault.at_s for fault in itertools.islice(fault_events(RehearsalFile(churn=churn), NAMES[:2]), 4)]
    assert times[2] >= times[0] + 100 and times[3] >= times[1] + 100


def test_churn_whose_victims_never_come_back_ends_no_loop() -> None:
    """It counted on, second by second, to the day of their return."""
    churn = RehearsalChurn(every_s=1, away_s=1e9)
    assert [fault.at_s > 1e9 for fault in itertools.islice(fault_events(RehearsalFile(churn=churn), NAMES[:1]), 2)] == [
        False,
        True,
    ]


def test_a_volunteer_may_have_a_link_of_its_own(tmp_path: Path) -> None:
    text = """
        links.up_mbit = 20
        links.down_mbit = 100
        volunteers = [{ name = "volunteer-2", up_mbit = 5 }, { name = "volunteer-3", down_mbit = 0, hidden = true }]
    """
    rehearsal = read(tmp_path, text)
    links = [rehearsal.links_of(name) for name in NAMES[:3]]
    assert [(each.up_mbit, each.down_mbit) for each in links] == [(20, 100), (5, 100), (20, 0)]
    assert [rehearsal.is_hidden(name) for name in NAMES[:3]] == [False, False, True]
    assert read(tmp_path, '[[volunteers]]\nname = "volunteer-1"\nhidden = true').needs_links
    with raises_code("unknown-key", UserError, "volunteer 1: volunteers.up: unknown key"):
        read(tmp_path, '[[volunteers]]\nname = "a"\nup = 1')
    with raises_code("wrong-type", UserError, "volunteers: is a list"):
        read(tmp_path, "volunteers = 3")
    with raises_code("no-such-volunteer", UserError, "volunteers.name: no volunteer is called anna"):
        fault_events(read(tmp_path, '[[volunteers]]\nname = "anna"'), NAMES)
