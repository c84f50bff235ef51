"""Preparation of merges: one after the other, for all fragments.

A merge of everything that has arrived for a fragment is prepared in the background, and prepared anew when more
arrives. If it cannot be prepared, the publications are tried one by one, and the author of each that cannot be merged
has failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from swarmtrain.protocol.gossip.merge_plans import MergePlan
from swarmtrain.protocol.gossip.messages import (
    Held,
    PartnerBackedOff,
    Payload,
    PrepareMerge,
    Ready,
    ReceivedPublication,
)
from swarmtrain.protocol.gossip.peers import OtherPeers
from swarmtrain.protocol.gossip.pull_schedule import PullSchedule
from swarmtrain.protocol.gossip.state import CommandList, FragmentState, ReadyMerge

_LEFT_OUT_S = 0.25
"""Seconds, at least, for which a tensor group that could not be merged is not asked for again."""


@dataclass(slots=True)
class _Preparing(Generic[Held, Payload]):
    """Merge that is being prepared, and the state of the search for what makes it impossible."""

    plan: MergePlan
    fragment: int
    began_s: float
    pulled: tuple[ReceivedPublication[Held, Payload], ...]
    number: int = -1
    is_sifted: bool = False
    """True once a merge of all publications could not be prepared, so that they are tried one by one."""
    stays: tuple[ReceivedPublication[Held, Payload], ...] = ()
    bad: tuple[ReceivedPublication[Held, Payload], ...] = ()

    @property
    def tried(self) -> tuple[ReceivedPublication[Held, Payload], ...]:
        """Publications in the present attempt; when sifting, only the last one is in doubt."""
        return (*self.stays, self.pulled[self.num_tried]) if self.is_sifted else self.pulled

    @property
    def num_tried(self) -> int:
        """Number of publications that are known to be good or bad."""
        return len(self.stays) + len(self.bad)


class MergePreparation(Generic[Held, Payload, Ready]):
    """Prepares at most one merge at a time, of whichever fragment has one to prepare."""

    def __init__(
        self,
        states: Sequence[FragmentState[Held, Payload, Ready]],
        others: OtherPeers,
        schedule: PullSchedule,
        commands: CommandList[Held, Payload, Ready],
        *,
        is_large: bool,
    ) -> None:
        """`is_large`: prepare only the fragments that are merged next. A prepared merge takes 8 bytes a parameter, but
        a publication only a few bits."""
        self._states, self._others, self._schedule = states, others, schedule
        self._commands, self._is_large = commands, is_large
        self._preparing: _Preparing[Held, Payload] | None = None

    def more(self) -> bool:
        """Start to prepare the next merge. Return False if there is nothing to prepare."""
        if self._preparing is not None:
            return True
        merges = self._schedule.merges
        for fragment in self._schedule.merged_first() if self._is_large else range(len(merges)):
            plan, received = merges[fragment].plan, self._states[fragment].received
            if plan is not None and received.has_more:
                self._prepare(_Preparing(plan, fragment, merges[fragment].began_s, tuple(received.pulled)))
                return True
        return False

    def _prepare(self, preparing: _Preparing[Held, Payload]) -> None:
        preparing.number, self._preparing = self._commands.next_number(), preparing
        self._commands.add(PrepareMerge(preparing.number, preparing.plan, preparing.fragment, preparing.tried))

    def prepared(self, number: int, merge: Ready | None, now: float) -> bool:
        """Record that a merge was prepared, or cannot be prepared if `merge` is None. Return True if the preparation
        has ended, so that another may follow."""
        preparing = self._preparing
        if preparing is None or preparing.number != number:
            return False
        self._preparing = None
        if preparing.is_sifted:
            return self._sift(preparing, merge is not None, now)
        if merge is None:
            preparing.is_sifted = True
            self._prepare(preparing)
            return False
        # The fragment may have been merged, or its round have begun anew, while this was prepared.
        of, round = self._schedule.merges[preparing.fragment], preparing.plan.round
        if of.plan is not None and of.plan.round == round and of.began_s == preparing.began_s:
            self._states[preparing.fragment].received.ready = ReadyMerge(round, preparing.pulled, merge)
        return True

    def _sift(self, preparing: _Preparing[Held, Payload], is_good: bool, now: float) -> bool:
        """Record whether the last publication can be merged with the good ones before it.

        When all are tried, drop the bad ones, leave their authors alone for a while and let others be asked. Return
        whether this preparation has ended.
        """
        tried = preparing.tried[-1]
        if is_good:
            preparing.stays = (*preparing.stays, tried)
        else:
            preparing.bad = (*preparing.bad, tried)
        if preparing.num_tried < len(preparing.pulled):
            self._prepare(preparing)
            return False
        state = self._states[preparing.fragment]
        for one in preparing.bad:
            follows = self._others.back_off.failed(one.peer, now, "what it published cannot be merged")
            until_s = max(preparing.plan.ends_s, now + _LEFT_OUT_S)
            state.open.leave_out(one.group, one.peer, until_s)
            self._commands.add(PartnerBackedOff(one.peer, follows))
        state.received.hold([one for one in state.received.pulled if one not in preparing.bad])
        if preparing.bad:
            self._schedule.look_by(now)
        return True

    def stop(self) -> None:
        """Ignore the result of the present preparation."""
        self._preparing = None
