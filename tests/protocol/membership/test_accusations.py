"""Reports of misbehaving peers, bounded although strangers decide how much there is to report."""

from __future__ import annotations

from swarmtrain.protocol.membership.budgets import NamedOnce

HOUR_S = 3600.0


def test_a_peer_is_named_once_in_a_while_for_each_rule() -> None:
    named = NamedOnce()
    assert [named.is_due("a", now) for now in (0.0, 3.0, 6000.0, 7 * HOUR_S)] == [True, False, False, True]
    assert named.is_due("a", 7 * HOUR_S, "hash") and not named.is_due("a", 7 * HOUR_S, "hash")
    minutes = NamedOnce(again_s=60.0)
    assert [minutes.is_due("a", now) for now in (0.0, 59.0, 61.0)] == [True, False, True]
    assert named.is_due("a", 0.0), "a clock that was put back silences nobody"
    assert named.is_due("b", 0.0) and named.is_due("c", 1.0)


def test_a_crowd_that_was_named_does_not_mute_all_others_for_hours() -> None:
    """64 invented ones did, for six hours, and whatever rule the others broke."""
    named = NamedOnce()
    assert sum(named.is_due(f"invented {number}", 0.0, "tokens") for number in range(1000)) == 16
    assert named.is_due("mallory", 0.0, "hash"), "another rule"
    assert not named.is_due("eve", 1.0, "tokens")
    assert named.is_due("eve", 61.0, "tokens"), "the same one, a minute later"


def test_a_flood_comes_through_at_a_bounded_rate_and_so_does_an_honest_report() -> None:
    named, passed, eve_s = NamedOnce(), 0, list[float]()
    for second in range(int(3 * HOUR_S)):
        passed += sum(named.is_due(f"invented {second} {number}", float(second), "tokens") for number in range(2))
        if second % 7 == 0 and named.is_due("eve", float(second), "hash"):
            eve_s.append(second)
    assert 180 <= passed <= 180 + 16 and eve_s == [0.0]
