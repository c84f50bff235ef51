"""Checks, during synchronous rounds, whether a bootstrap that has appeared holds a preferred state in its archive."""

from __future__ import annotations

import random
from collections.abc import Collection
from concurrent.futures import Future

from swarmtrain.network.node import NetworkThread
from swarmtrain.network.rounds.state_fetch import NewState
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.node import wait_for
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.protocol.archive.watched import ArchivesSeen
from swarmtrain.protocol.rounds.rosters import AdvertisedRound

_SAMPLE = 16


class ArchiveWatch:
    """Asks the bootstraps that appear, at a round's start and beside the training, for their rounds; knows at the
    round's end whether an archive's state is preferred."""

    def __init__(self, network: NetworkThread, swarm: Swarm, stop: StopFlag) -> None:
        self._network, self._swarm, self._stop = network, swarm, stop
        self._seen = ArchivesSeen(swarm.membership)
        self._told: Future[dict[str, AdvertisedRound]] | None = None
        """Answers of the bootstraps that appeared in this round, and of some volunteers."""

    def joined(self, told: Collection[str]) -> None:
        """Record which peers were asked when this peer joined or came back."""
        self._seen.forget()
        self._seen.told(told)

    def ask(self) -> None:
        """Begin to ask the peers that `ArchivesSeen` names; does not wait for the answers."""
        rounds, self._told = self._swarm.rounds, None
        if came := self._seen.to_ask(rounds.listening_since_s):
            volunteers = [info.peer for info in self._swarm.membership.volunteers()]
            asked = [*came, *random.sample(volunteers, min(_SAMPLE, len(volunteers)))]
            self._told = self._network.submit(rounds.search.ask_now(asked))

    def state_that_holds(self) -> NewState | None:
        """Return the state of one of these peers, if its answer is here and its state is preferred to this peer's; else
        None.
        """
        asking, self._told = self._told, None
        if asking is None or not asking.done() or asking.cancelled() or asking.exception() is not None:
            return None
        told = asking.result()
        if not self._seen.told(told):
            return None
        search = self._swarm.rounds.search
        return wait_for(self._network.submit(search.fetch_advertised_state(told, "the archive is back")), self._stop)
