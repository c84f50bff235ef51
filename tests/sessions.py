"""Helpers for tests that train with a session."""

from __future__ import annotations

from swarmtrain.peer.training.loop import InnerLoop
from swarmtrain.peer.training.session import Session


def train_round(loop: InnerLoop, session: Session) -> None:
    """Train one round, to its end or until it is interrupted."""
    while (ahead := session.next_step()) is not None:
        loop.train_step(session, ahead)
        if not session.is_in_round:
            return
