"""Pulls of a peer that gossips, each from the question to the merge that is prepared with it.

A pull asks the author, or the hosts of a hidden one. It downloads and decodes what is new, and ends when the merge that
contains it is prepared. A source that is busy, gone or wrong is left alone for a while, and the user is told about
lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from swarmtrain.protocol.gossip.fragments import steps_of_fragment
from swarmtrain.protocol.gossip.messages import (
    AdvertisedProgress,
    AskPartner,
    CancelPull,
    DecodePublication,
    DownloadPublication,
    FindRoute,
    Held,
    PartnerBackedOff,
    PartnerReplied,
    Payload,
    PublicationDecoded,
    PublicationDownloaded,
    PullFailed,
    PullFailure,
    Ready,
    ReceivedPublication,
    ReportFailure,
    RouteFound,
)
from swarmtrain.protocol.gossip.open_pulls import OpenPull
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.peers import OtherPeers
from swarmtrain.protocol.gossip.pull_schedule import PullSchedule
from swarmtrain.protocol.gossip.pulls import BytesBegun, GroupName, round_began_s
from swarmtrain.protocol.gossip.state import CommandList, FragmentState


@dataclass(slots=True)
class GossipPull(Generic[Held]):
    """State of one pull."""

    number: int
    fragment: int
    open: OpenPull
    round_s: float
    """Duration of the fragment's share of a round."""
    sources: list[str]
    """Peers to ask, the next one first."""
    source: str = ""
    asked_s: float = 0.0
    version: PublicationVersion | None = None
    held: Held | None = None
    began_s: float | None = None
    """Time at which the author's round of the fragment began, if it advertised that."""
    begun: BytesBegun | None = None
    bytes_s: float = 0.0
    """Seconds that the download took."""


class GossipPulls(Generic[Held, Payload, Ready]):
    """Pulls that have begun and not ended, by number. Events of pulls that were given up are ignored."""

    def __init__(
        self,
        states: Sequence[FragmentState[Held, Payload, Ready]],
        num_parts: int,
        others: OtherPeers,
        schedule: PullSchedule,
        commands: CommandList[Held, Payload, Ready],
    ) -> None:
        """`num_parts`: number of parts into which a round's pseudo-gradients are divided."""
        self._states, self._num_parts, self._others = states, num_parts, others
        self._schedule, self._times, self._commands = schedule, schedule.times, commands
        self.by_number: dict[int, GossipPull[Held]] = {}
        self._decoded: list[GossipPull[Held]] = []
        """Pulls whose merge is being prepared."""

    # ------------------------------------------------------------- whom to ask for it

    def begin(
        self, state: FragmentState[Held, Payload, Ready], group: GroupName, peer: str, round_s: float, now: float
    ) -> None:
        """Pull a tensor group of `peer` for the fragment; a fragment's share of a round lasts `round_s`."""
        number, hosts = self._commands.next_number(), self._others.hosts_of(peer)
        opened = state.open.begin(group, peer, now)
        sources = [peer] if hosts is None else [*hosts]
        pull = self.by_number[number] = GossipPull(number, state.number, opened, round_s, sources)
        if hosts is None:
            self._ask_next(pull, now)
        else:
            self._commands.add(FindRoute(number, peer))

    def routed(self, event: RouteFound, now: float) -> None:
        """Ask the hidden peer itself, or its hosts if it cannot be dialled."""
        if (pull := self.by_number.get(event.pull)) is not None:
            pull.sources = [pull.open.peer] if event.is_direct else self._others.hosts.of(pull.sources, now)
            self._ask_next(pull, now)

    def _ask_next(self, pull: GossipPull[Held], now: float) -> None:
        """Ask the next source, if one is left."""
        group, peer = pull.open.group, pull.open.peer
        if not pull.sources:  # its hosts failed, which is not its fault; they may recover within the round
            self._busy(pull, now)
            return
        pull.source, pull.asked_s = pull.sources.pop(0), now
        known = self._states[pull.fragment].merged.last(group, peer)
        self._commands.add(AskPartner(pull.number, pull.source, peer, group, pull.fragment, known))

    # ------------------------------------------------------------- what it has

    def replied(self, event: PartnerReplied[Held], now: float) -> None:
        """Download the publication if anything of it is new."""
        if (pull := self.by_number.get(event.pull)) is None:
            return
        state, group, peer, version = self._states[pull.fragment], pull.open.group, pull.open.peer, event.version
        if version is None or event.held is None:
            self._nothing_new(pull, now)
            return
        reference = self._others.reference_round()
        if state.merged.news(group, peer, version, reference) is None:
            # Only the author itself is accused of an old publication: a host may not have the newest yet.
            is_its_word = pull.source == peer
            own_round = self._others.round
            wrong = state.merged.wrong_counter(group, peer, version, reference, own_round) if is_its_word else ""
            if wrong:
                self._fail(pull, PullFailure(wrong, is_incident=True, code="bad-round"), now)
            else:
                self._nothing_new(pull, now)
            return
        state.merged.right_counter(group, peer)
        pull.version, pull.held = version, event.held
        pull.began_s = self._round_began_s(state.number, version, event.advertised)
        pull.begun = self._times.bytes_begin(now)
        self._commands.add(DownloadPublication(pull.number, pull.source, event.held))

    def _round_began_s(
        self, fragment: int, version: PublicationVersion, advertised: AdvertisedProgress | None
    ) -> float | None:
        """Return the time at which the author's round of the fragment began.

        None if the author advertises another round than it publishes, or does not know its speed yet.
        """
        if advertised is None:
            return None
        done = advertised.inner_steps_done
        found = steps_of_fragment(fragment, len(self._states), done, advertised.inner_steps, self._num_parts)
        if found is None or advertised.round + found[0] != version.round:
            return None
        return round_began_s(advertised.since_s, found[1], advertised.steps_per_s)

    def downloaded(self, event: PublicationDownloaded, now: float) -> None:
        """Decode the publication if anything of it is still new."""
        if (pull := self.by_number.get(event.pull)) is None:
            return
        assert pull.version is not None
        assert pull.held is not None
        assert pull.begun is not None
        pull.bytes_s = now - pull.begun.at_s
        self._times.bytes_end(pull.begun, now, event.num_bytes)
        if event.wrong is not None and event.wrong.is_incident:
            self._commands.add(ReportFailure(pull.source, event.wrong))
        group, peer, fragment = pull.open.group, pull.open.peer, pull.fragment
        if pull.source != peer:
            self._others.hosts.back_off.answered(pull.source)
        reference = self._others.reference_round()  # it may have taken long
        found = self._states[fragment].merged.news(group, peer, pull.version, reference)
        if found is None:
            self._nothing_new(pull, now)
        else:
            news, earlier = found
            self._commands.add(DecodePublication(pull.number, peer, group, fragment, pull.held, news, earlier))

    def decoded(self, event: PublicationDecoded[Payload], now: float) -> bool:
        """Add the decoded publication to those that wait to be merged. Return False if the pull was given up."""
        if (pull := self.by_number.get(event.pull)) is None:
            return False
        assert pull.version is not None
        assert pull.held is not None
        state, peer = self._states[pull.fragment], pull.open.peer
        pulled = ReceivedPublication(
            group=pull.open.group,
            peer=peer,
            version=pull.version,
            payload=event.payload,
            held=pull.held,
            pull_s=now - pull.asked_s,
            began_s=pull.began_s,
        )
        state.received.add(pulled)
        state.open.answered(peer)  # first this, since the preparation may find that it cannot be merged
        self._decoded.append(pull)
        return True

    # ------------------------------------------------------------- how it ends

    def take_decoded(self) -> Sequence[GossipPull[Held]]:
        """Return the decoded pulls, whose merges are now prepared, and forget them here."""
        decoded, self._decoded = self._decoded, []
        return decoded

    def end_prepared(self, pull: GossipPull[Held], now: float) -> bool:
        """End a pull whose merge is prepared. Return False if it had ended before."""
        if pull.number not in self.by_number:
            return False
        self._times.merged(now - pull.asked_s - pull.bytes_s)
        del self.by_number[pull.number]
        self._states[pull.fragment].open.end(pull.open)
        return True

    def _end(self, pull: GossipPull[Held], now: float) -> None:
        """Remove a pull that ended without a publication, and check at once whether another partner should be asked."""
        del self.by_number[pull.number]
        self._schedule.look_by(now)

    def _nothing_new(self, pull: GossipPull[Held], now: float) -> None:
        self._end(pull, now)
        self._states[pull.fragment].open.nothing_new(pull.open, now, pull.round_s)

    def _busy(self, pull: GossipPull[Held], now: float) -> None:
        self._end(pull, now)
        self._states[pull.fragment].open.end(pull.open)
        self._commands.add(PartnerBackedOff(pull.open.peer, self._others.back_off.busy(pull.open.peer, now)))

    def failed(self, event: PullFailed, now: float) -> None:
        """End a pull that has failed, or ask its next source."""
        if (pull := self.by_number.get(event.pull)) is not None:
            self._fail(pull, event.failure, now)

    def _fail(self, pull: GossipPull[Held], failure: PullFailure, now: float) -> None:
        """Handle a failed pull: after a host's fault ask the next source; after the author's, end the pull and leave
        the author alone for a while."""
        peer, source = pull.open.peer, pull.source
        # A host's fault counts against the host; the author's publication may be had from the next one.
        if source != peer and not failure.is_authors:
            if failure.kind not in ("away", "busy"):
                self._others.hosts.back_off.failed(source, now, failure.reason)
                if failure.is_incident:
                    self._commands.add(ReportFailure(source, failure))
            self._ask_next(pull, now)
            return
        if failure.kind == "busy":
            self._busy(pull, now)
            return
        self._end(pull, now)
        is_silent = failure.kind == "silent"
        if follows := self._states[pull.fragment].open.fail(pull.open, now, failure.reason, is_silent):
            self._commands.add(PartnerBackedOff(peer, follows))
        if failure.is_incident:
            self._commands.add(ReportFailure(peer, failure))

    def give_up(self, before_s: float) -> None:
        """Cancel the pulls that began before that time."""
        for pull in [pull for pull in self.by_number.values() if pull.open.began_s < before_s]:
            del self.by_number[pull.number]
            self._states[pull.fragment].open.give_up(pull.open)
            self._commands.add(CancelPull(pull.number))

    def stop(self) -> None:
        """Cancel all pulls."""
        self.give_up(math.inf)
        self._decoded = []
