"""Bootstraps archive by what states hold, and not by who counts more tokens."""

from __future__ import annotations

from swarmtrain.protocol.archive.schedule import ArchiveSchedule, adds_to_archive, tokens_gained
from swarmtrain.protocol.membership.membership import PeerInfo

ARCHIVED = {"ada": 400_000, "ben": 500_000}


def test_a_newcomers_state_that_was_built_on_the_archive_adds_to_it() -> None:
    assert adds_to_archive({**ARCHIVED, "carl": 768}, ["carl"], ARCHIVED)
    assert adds_to_archive({"carl": 768}, ["carl"], {}), "the first"


def test_what_counts_more_and_holds_nothing_new_adds_nothing() -> None:
    assert not adds_to_archive(ARCHIVED, ["ada", "ben"], ARCHIVED)
    assert not adds_to_archive({**ARCHIVED, "dora": 10**6}, ["ada"], ARCHIVED), "dora's work is not in its weights"
    assert not adds_to_archive({}, [], ARCHIVED)


def test_a_state_from_an_old_folder_must_bring_more_than_it_loses() -> None:
    old = {"ada": 100_000, "ben": 100_000}
    assert not adds_to_archive({**old, "carl": 5000}, ["carl"], ARCHIVED)
    assert not adds_to_archive({**old, "ada": 100_500}, ["ada"], ARCHIVED)
    assert adds_to_archive({**ARCHIVED, "ben": 499_000, "carl": 5000}, ["carl"], ARCHIVED)
    assert adds_to_archive({**ARCHIVED, "ben": 490_000, "carl": 5000}, ["carl"], ARCHIVED, slack_tokens=8000)


def test_states_are_asked_for_once_somebody_has_merged_a_round_since() -> None:
    watch = ArchiveSchedule()

    def at(**rounds: int) -> list[PeerInfo]:
        return [PeerInfo(peer=peer, round=round, run_tokens=5) for peer, round in rounds.items()]

    assert not watch.is_new([]) and not watch.is_new(at(ada=0))
    assert watch.is_new(at(ada=3))
    watch.archived(at(ada=3, ben=0))
    assert not watch.is_new(at(ada=3, ben=0)), "whatever they count"
    assert watch.is_new(at(ada=4)) and watch.is_new(at(ada=3, ben=1)) and watch.is_new(at(carl=2))
    assert watch.is_new(at(ada=2)), "an older folder: it may have gone on elsewhere"


def test_those_who_train_on_are_the_run_after_a_minute() -> None:
    """Seen: one liar's claim, once archived, kept everybody's work out of the archive for hours."""
    watch = ArchiveSchedule()
    assert not adds_to_archive({"ada": 5000}, ["ada"], {"liar": 26_000})
    assert tokens_gained({"ada": 5000}, ["ada"], {"liar": 26_000}) == 5000
    assert [watch.refuse(now) for now in (100.0, 130.0, 159.0, 160.0)] == [True, True, True, False]
    watch.archived([])
    assert watch.refuse(161.0), "and from the start"
    assert watch.refuse(50.0) and not watch.refuse(110.0), "a clock that was put back"
    assert watch.refuse(500.0), "hours later it is another that is refused"
