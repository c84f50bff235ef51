"""What the parts of the engine of gossip share: one fragment of the model, and the commands that they write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic

from swarmtrain.protocol.gossip.merged import MergedPublications
from swarmtrain.protocol.gossip.messages import GossipCommand, Held, Payload, Ready, ReceivedPublication
from swarmtrain.protocol.gossip.open_pulls import OpenPulls, Which
from swarmtrain.protocol.gossip.peers import PartnerChoice
from swarmtrain.protocol.gossip.pulls import Section

__all__ = ["CommandList", "FragmentState", "ReadyMerge", "ReceivedPublications"]


@dataclass(slots=True)
class CommandList(Generic[Held, Payload, Ready]):
    """What follows from the present event, as those who decide write it."""

    _commands: list[GossipCommand[Held, Payload, Ready]] = field(default_factory=list)
    _number: int = 0

    def add(self, command: GossipCommand[Held, Payload, Ready]) -> None:
        """This too."""
        self._commands.append(command)

    def next_number(self) -> int:
        """For a command that ends with an event; no two have the same."""
        self._number += 1
        return self._number

    def take(self) -> list[GossipCommand[Held, Payload, Ready]]:
        """All of them. None is kept: a merge takes memory, and is held by who asked for it alone."""
        if not (commands := self._commands):
            return []
        self._commands = []
        return commands


@dataclass(slots=True)
class ReadyMerge(Generic[Held, Payload, Ready]):
    """A merge that is prepared, of that round of its fragment. Nobody changes it."""

    round: int
    pulled: tuple[ReceivedPublication[Held, Payload], ...]
    merge: Ready


@dataclass(slots=True)
class ReceivedPublications(Generic[Held, Payload, Ready]):
    """What waits for a fragment's next merge."""

    pulled: list[ReceivedPublication[Held, Payload]] = field(default_factory=list)
    here: list[Which] = field(default_factory=list)
    """What of it is of whom."""
    ready: ReadyMerge[Held, Payload, Ready] | None = None
    _sections: list[Section] = field(default_factory=list)

    def hold(self, pulled: list[ReceivedPublication[Held, Payload]]) -> None:
        """These are what was pulled."""
        self.pulled, self.here = pulled, [(each.section, each.peer) for each in pulled]
        self._sections = [each.section for each in pulled]

    def add(self, pulled: ReceivedPublication[Held, Payload]) -> None:
        """This was pulled too."""
        self.pulled.append(pulled)
        self.here.append((pulled.section, pulled.peer))
        self._sections.append(pulled.section)

    def num_here(self, section: Section) -> int:
        """How many of that section."""
        return self._sections.count(section)

    @property
    def has_more(self) -> bool:
        """Something was pulled that is in no merge that is prepared."""
        return bool(self.pulled) and (self.ready is None or self.ready.pulled != tuple(self.pulled))

    def take_ready(self) -> ReadyMerge[Held, Payload, Ready] | None:
        """The merge that is prepared; it is here no longer."""
        ready, self.ready = self.ready, None
        return ready

    def forget(self) -> None:
        """None of it is merged."""
        self.hold([])
        self.ready = None


@dataclass(frozen=True, slots=True)
class FragmentState(Generic[Held, Payload, Ready]):
    """One fragment of the model."""

    number: int
    open: OpenPulls
    """What was asked for and is not here yet."""
    received: ReceivedPublications[Held, Payload, Ready]
    """What is here, and waits to be merged."""
    merged: MergedPublications[Held]
    choice: PartnerChoice
    """Whom to ask."""

    def may_want(self, section: Section, num_due: int) -> bool:
        """Less is here than is due, or some are on their way, that may be slow."""
        return self.received.num_here(section) < num_due or self.open.has_begun(section)
