"""Which merges a peer that gossips has prepared of what it pulled, one after the other, of all fragments.

A merge of all that is here is prepared, and anew as long as more comes. Where that cannot be, what was pulled is tried
one by one; who published what cannot be merged has failed.
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

__all__ = ["MergePreparation"]

_LEFT_OUT_S = 0.25


@dataclass(slots=True)
class _Preparing(Generic[Held, Payload]):
    """A merge that is being prepared; where it cannot be, what is tried one by one to find out why."""

    plan: MergePlan
    fragment: int
    began_s: float
    pulled: tuple[ReceivedPublication[Held, Payload], ...]
    number: int = -1
    is_sifted: bool = False
    stays: tuple[ReceivedPublication[Held, Payload], ...] = ()
    bad: tuple[ReceivedPublication[Held, Payload], ...] = ()

    @property
    def tried(self) -> tuple[ReceivedPublication[Held, Payload], ...]:
        """What is being merged: the last of them may be the one that cannot be."""
        return (*self.stays, self.pulled[self.num_tried]) if self.is_sifted else self.pulled

    @property
    def num_tried(self) -> int:
        """How many are known to be good or bad."""
        return len(self.stays) + len(self.bad)


class MergePreparation(Generic[Held, Payload, Ready]):
    """The one merge that is being prepared, of whichever fragment."""

    def __init__(
        self,
        lanes: Sequence[FragmentState[Held, Payload, Ready]],
        others: OtherPeers,
        schedule: PullSchedule,
        commands: CommandList[Held, Payload, Ready],
        *,
        is_large: bool,
    ) -> None:
        """`is_large`: of a large model only the fragments that are merged first are prepared: what is prepared takes 8
        bytes a number, and what was pulled a few bits."""
        self._lanes, self._others, self._schedule = lanes, others, schedule
        self._commands, self._is_large = commands, is_large
        self._preparing: _Preparing[Held, Payload] | None = None

    def more(self) -> bool:
        """Have a merge of all that is here prepared. False: there is nothing to prepare."""
        if self._preparing is not None:
            return True
        merges = self._schedule.merges
        for fragment in self._schedule.merged_first() if self._is_large else range(len(merges)):
            plan, received = merges[fragment].plan, self._lanes[fragment].received
            if plan is not None and received.has_more:
                self._prepare(_Preparing(plan, fragment, merges[fragment].began_s, tuple(received.pulled)))
                return True
        return False

    def _prepare(self, preparing: _Preparing[Held, Payload]) -> None:
        preparing.number, self._preparing = self._commands.next_number(), preparing
        self._commands.add(PrepareMerge(preparing.number, preparing.plan, preparing.fragment, preparing.tried))

    def prepared(self, number: int, merge: Ready | None, now: float) -> bool:
        """It is, or cannot be (None). Whether this one has ended, so that there may be more to prepare."""
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
        of, round = self._schedule.merges[preparing.fragment], preparing.plan.round
        if of.plan is not None and of.plan.round == round and of.began_s == preparing.began_s:
            self._lanes[preparing.fragment].received.ready = ReadyMerge(round, preparing.pulled, merge)
        return True

    def _sift(self, preparing: _Preparing[Held, Payload], is_good: bool, now: float) -> bool:
        """No merge of all that was pulled can be prepared: drop what cannot be merged with those that were here before
        it and stay. Who published it has failed, and another is tried."""
        tried = preparing.tried[-1]
        if is_good:
            preparing.stays = (*preparing.stays, tried)
        else:
            preparing.bad = (*preparing.bad, tried)
        if preparing.num_tried < len(preparing.pulled):
            self._prepare(preparing)
            return False
        lane = self._lanes[preparing.fragment]
        for one in preparing.bad:
            follows = self._others.back_off.failed(one.peer, now, "what it published cannot be merged")
            until_s = max(preparing.plan.ends_s, now + _LEFT_OUT_S)
            lane.open.leave_out(one.section, one.peer, until_s)
            self._commands.add(PartnerBackedOff(one.peer, follows))
        lane.received.hold([one for one in lane.received.pulled if one not in preparing.bad])
        if preparing.bad:
            self._schedule.look_by(now)
        return True

    def stop(self) -> None:
        """Whatever is being prepared is not wanted any more."""
        self._preparing = None
