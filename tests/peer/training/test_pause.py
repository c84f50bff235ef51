"""Pausing: a peer rests while anybody wants it to."""

from __future__ import annotations

import pytest

from swarmtrain.errors import RunTimeError
from swarmtrain.peer.training.pause import ASKED, PauseSwitch


def test_it_rests_while_anybody_holds_it_and_says_why() -> None:
    switch = PauseSwitch()
    assert not switch.held and switch.reason == ""
    switch.hold(ASKED, "you asked for it")
    switch.hold("hours", "outside the hours 22-7")
    assert switch.held and switch.reason == "you asked for it; outside the hours 22-7"
    assert switch.release(ASKED) and not switch.release(ASKED)
    assert switch.held and switch.reason == "outside the hours 22-7"
    assert switch.release("hours") and not switch.held


def test_the_wait_ends_with_the_last_hold_or_when_the_peer_is_to_end() -> None:
    switch = PauseSwitch()
    switch.hold(ASKED, "you asked for it")
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            switch.release(ASKED)

    assert switch.wait_released(sleep) < 1 and len(looks) == 3
    switch.hold(ASKED, "again")

    def end(seconds: float) -> None:
        raise RunTimeError("the daemon ended")

    with pytest.raises(RunTimeError):
        switch.wait_released(end)
