"""A volunteer of synchronous rounds asks bootstraps that come how far their archives are, while it trains."""

from __future__ import annotations

import random
from collections.abc import Collection
from concurrent.futures import Future

from swarmtrain.network.node import NetworkThread
from swarmtrain.network.rounds.runner import NewState
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.node import StopFlag, wait_for
from swarmtrain.protocol.archive.watched import ArchivesSeen
from swarmtrain.protocol.rounds.rosters import AdvertisedRound

__all__ = ["ArchiveWatch"]

_SAMPLE = 16


class ArchiveWatch:
    """Asks at the beginning of a round, and at its end knows whether an archive's state holds."""

    def __init__(self, network: NetworkThread, swarm: Swarm, stop: StopFlag) -> None:
        self._network, self._swarm, self._stop = network, swarm, stop
        self._seen = ArchivesSeen(swarm.membership)
        self._told: Future[dict[str, AdvertisedRound]] | None = None
        """What those say that have come in this round, and some volunteers."""

    def joined(self, told: Collection[str]) -> None:
        """These told how far they are when this peer came, or came back."""
        self._seen.forget()
        self._seen.told(told)

    def ask(self) -> None:
        """Ask those that `ArchivesSeen` names, beside the round."""
        rounds, self._told = self._swarm.rounds, None
        if came := self._seen.to_ask(rounds.listening_since_s):
            volunteers = [info.peer for info in self._swarm.membership.volunteers()]
            asked = [*came, *random.sample(volunteers, min(_SAMPLE, len(volunteers)))]
            self._told = self._network.submit(rounds.search.ask_now(asked))

    def state_that_holds(self) -> NewState | None:
        """The state of one of these, if its answer is here and it holds against ours."""
        asking, self._told = self._told, None
        if asking is None or not asking.done() or asking.cancelled() or asking.exception() is not None:
            return None
        told = asking.result()
        if not self._seen.told(told):
            return None
        search = self._swarm.rounds.search
        return wait_for(self._network.submit(search.fetch_told_state(told, "the archive is back")), self._stop)
