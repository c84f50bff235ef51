"""Load of the archive: how much it asks of which peer, and how often."""

from __future__ import annotations

import pytest

from swarmtrain.protocol.archive.load import (
    archive_bytes,
    archive_every_s,
    archived_sources,
    is_early_archive_due,
    is_measurement_due,
    not_the_slowest,
)
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.rounds.roles import LinkRates


@pytest.mark.parametrize(
    ("parameters", "sources"), [(460_000, 16), (8_000_000, 16), (10**7, 12), (57 * 10**6, 3), (10**10, 3)]
)
def test_fewer_sources_of_a_large_model_but_three(parameters: int, sources: int) -> None:
    assert archived_sources(parameters) == sources


def test_one_archive_brings_the_weights_of_each_and_one_momentum() -> None:
    assert archive_bytes(1000, 2) == 4 * 1000 * 3
    assert archive_bytes(57 * 10**6, 50) == 4 * 57 * 10**6 * 4


def test_a_small_model_is_archived_as_the_run_file_says_whatever_it_took() -> None:
    assert archive_every_s(60, 25, 1_000_000) == 60


def test_a_large_one_so_that_links_are_free_for_merging() -> None:
    assert archive_every_s(60, 3, 57_000_000) == 60
    assert archive_every_s(60, 90, 57_000_000) == 900
    assert archive_every_s(60, 900, 57_000_000) == 1800
    assert archive_every_s(7200, 900, 57_000_000) == 7200


def test_a_state_that_all_hold_is_not_pulled_over_the_slow_links() -> None:
    rates = {"a": 1e6, "b": 10e6, "c": 3e6, "unmeasured": 0.0}
    infos = [PeerInfo(peer=peer, link=LinkRates(rate, rate)) for peer, rate in rates.items()]
    infos.append(PeerInfo(peer="old"))
    assert [info.peer for info in not_the_slowest(infos)] == ["b", "c", "unmeasured", "old"]
    assert [info.peer for info in not_the_slowest(infos[3:])] == ["unmeasured", "old"]
    assert [info.peer for info in not_the_slowest(infos[:1])] == ["a"]
    assert not_the_slowest([]) == []


@pytest.mark.parametrize(
    ("gained", "since_s", "took_s", "every_s", "parameters", "due"),
    [
        (0.05, 6.0, 0.1, 60.0, 460_000, True),
        (0.04, 59.0, 0.1, 60.0, 460_000, False),  # a 24th of the run is not over yet
        (0.05, 4.0, 0.1, 60.0, 460_000, False),
        (0.05, 20.0, 2.0, 60.0, 460_000, False),  # of slow links
        (0.05, 41.0, 2.0, 60.0, 460_000, True),
        (0.05, 200.0, 0.1, 3600.0, 460_000, False),  # the run file wants few
        (0.05, 301.0, 0.1, 3600.0, 460_000, True),
        (0.05, 50.0, 0.1, 60.0, 5_000_000, False),  # large
    ],
)
def test_a_short_run_of_a_small_model_is_archived_more_often(
    gained: float, since_s: float, took_s: float, every_s: float, parameters: int, due: bool
) -> None:
    assert is_early_archive_due(gained, since_s, took_s, every_s, parameters) is due


@pytest.mark.parametrize(
    ("since_s", "took_s", "parameters", "due"),
    [
        (61.0, 0.1, 5_000_000, True),
        (59.0, 0.1, 5_000_000, False),
        (299.0, 30.0, 5_000_000, False),  # the trainer waits for it
        (301.0, 30.0, 5_000_000, True),
        (6.0, 0.1, 460_000, True),  # as a small one is archived early
    ],
)
def test_a_volunteer_in_place_of_a_bootstrap_measures_in_a_tenth_of_its_time(
    since_s: float, took_s: float, parameters: int, due: bool
) -> None:
    assert is_measurement_due(0.05, since_s, took_s, 60.0, parameters) is due
