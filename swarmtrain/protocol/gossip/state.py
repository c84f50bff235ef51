"""State that the parts of the gossip engine share: the fragments of the model, and the list of commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic

from swarmtrain.protocol.gossip.merged import MergedPublications
from swarmtrain.protocol.gossip.messages import GossipCommand, Held, Payload, Ready, ReceivedPublication
from swarmtrain.protocol.gossip.open_pulls import OpenPulls, Which
from swarmtrain.protocol.gossip.peers import PartnerChoice
from swarmtrain.protocol.gossip.pulls import GroupName


@dataclass(slots=True)
class CommandList(Generic[Held, Payload, Ready]):
    """Commands that follow from the present event, in the order in which the parts decide them."""

    _commands: list[GossipCommand[Held, Payload, Ready]] = field(default_factory=list)
    _number: int = 0

    def add(self, command: GossipCommand[Held, Payload, Ready]) -> None:
        """Append a command."""
        self._commands.append(command)

    def next_number(self) -> int:
        """Return a unique number for a command that ends with an event."""
        self._number += 1
        return self._number

    def take(self) -> list[GossipCommand[Held, Payload, Ready]]:
        """Return all commands and drop them here: a prepared merge takes much memory, and only the caller should hold
        it."""
        if not (commands := self._commands):
            return []
        self._commands = []
        return commands


@dataclass(slots=True)
class ReadyMerge(Generic[Held, Payload, Ready]):
    """Prepared merge of one round of a fragment. Treat it as immutable."""

    round: int
    pulled: tuple[ReceivedPublication[Held, Payload], ...]
    merge: Ready


@dataclass(slots=True)
class ReceivedPublications(Generic[Held, Payload, Ready]):
    """Publications that wait for a fragment's next merge, and the merge prepared of them."""

    pulled: list[ReceivedPublication[Held, Payload]] = field(default_factory=list)
    here: list[Which] = field(default_factory=list)
    """Tensor group and peer of each item of `pulled`."""
    ready: ReadyMerge[Held, Payload, Ready] | None = None
    _groups: list[GroupName] = field(default_factory=list)

    def hold(self, pulled: list[ReceivedPublication[Held, Payload]]) -> None:
        """Replace the waiting publications."""
        self.pulled, self.here = pulled, [(each.group, each.peer) for each in pulled]
        self._groups = [each.group for each in pulled]

    def add(self, pulled: ReceivedPublication[Held, Payload]) -> None:
        """Add a publication."""
        self.pulled.append(pulled)
        self.here.append((pulled.group, pulled.peer))
        self._groups.append(pulled.group)

    def num_here(self, group: GroupName) -> int:
        """Return how many publications of that tensor group wait."""
        return self._groups.count(group)

    @property
    def has_more(self) -> bool:
        """True if a publication waits that the prepared merge does not contain."""
        return bool(self.pulled) and (self.ready is None or self.ready.pulled != tuple(self.pulled))

    def take_ready(self) -> ReadyMerge[Held, Payload, Ready] | None:
        """Return the prepared merge, if any, and drop it here."""
        ready, self.ready = self.ready, None
        return ready

    def forget(self) -> None:
        """Drop all publications and the prepared merge."""
        self.hold([])
        self.ready = None


@dataclass(frozen=True, slots=True)
class FragmentState(Generic[Held, Payload, Ready]):
    """State of one fragment of the model between its merges."""

    number: int
    open: OpenPulls
    """Pulls that have begun and not ended."""
    received: ReceivedPublications[Held, Payload, Ready]
    """Publications that wait to be merged."""
    merged: MergedPublications[Held]
    choice: PartnerChoice
    """Choice of the peers to ask."""

    def may_want(self, group: GroupName, num_due: int) -> bool:
        """Return whether another pull may be needed: too little is here, or what is on its way may be slow."""
        return self.received.num_here(group) < num_due or self.open.has_begun(group)
