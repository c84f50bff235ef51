"""How a move never empties a stage, whatever its peers believe: a promise to stay, given by one to another.

A record in a DHT is no lock: two peers that each see the other may both leave. So who leaves a stage asks another that
holds it, its anchor, to stay for a while. The answer is signed and comes by a call, not by a record. Who has given it
stays until it ends. So at the moment in which a peer leaves, another one is there that cannot leave; only a crash can
take that one.

Clocks need not agree: the mover counts from the moment in which it asked, the other from the later one in which it
answered.

Pure: `now` is an argument, every answer carries its reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from swarmtrain.words import short_peer

__all__ = ["LeaseRequest", "StageLease", "StageLeases"]


@dataclass(frozen=True, kw_only=True)
class LeaseRequest:
    """`mover` wants to leave `stage`, and asks `anchor` to stay."""

    stage: int
    mover: str
    anchor: str
    asked_s: float
    """By the mover's clock; it comes back in the promise, and means nothing to the other."""


@dataclass(frozen=True, kw_only=True)
class StageLease:
    """`anchor` holds the stage of the request for `lasts_s` at least."""

    request: LeaseRequest
    lasts_s: float

    def holds(self, now: float) -> bool:
        """Whether the mover can count on it, by the mover's clock."""
        return now < self.request.asked_s + self.lasts_s


@dataclass
class StageLeases:
    """What one peer has promised and was promised. `lasts_s` is how long its own promises last."""

    me: str
    lasts_s: float = 60.0
    _bound_until_s: dict[int, float] = field(default_factory=dict)
    _leaving: dict[int, StageLease | None] = field(default_factory=dict)
    """Stages that it wants to leave, and what it was promised for that."""

    # ------------------------------------------------------------------ who is asked

    def asked(self, request: LeaseRequest, stages: Collection[int], now: float) -> tuple[StageLease | None, str]:
        """Whether to promise; `stages` are those that this peer serves now. With the reason."""
        if request.anchor != self.me or request.mover == self.me:
            return None, "it was not this peer that was asked"
        if request.stage not in stages:
            return None, f"{short_peer(self.me)} does not serve stage {request.stage}"
        if request.stage in self._leaving:
            return None, f"{short_peer(self.me)} wants to leave stage {request.stage} itself"
        until_s = max(now + self.lasts_s, self._bound_until_s.get(request.stage, now))
        self._bound_until_s[request.stage] = until_s
        return StageLease(request=request, lasts_s=self.lasts_s), f"it stays for {self.lasts_s:g} s"

    def bound(self, now: float) -> tuple[int, ...]:
        """The stages that it has promised not to leave: for its record."""
        return tuple(sorted(stage for stage, until_s in self._bound_until_s.items() if now < until_s))

    def bound_s(self, stage: int, now: float) -> float:
        """For so long it has to stay."""
        return max(0.0, self._bound_until_s.get(stage, now) - now)

    # ------------------------------------------------------------------ who leaves

    def wants_to_leave(self, stage: int, now: float) -> tuple[bool, str]:
        """Before it asks: whether it may think of it. From here on it promises nothing for that stage."""
        if self.bound_s(stage, now) > 0:
            return False, f"it has promised to stay in stage {stage} for {self.bound_s(stage, now):.0f} s more"
        self._leaving.setdefault(stage, None)
        return True, f"nobody was promised that it stays in stage {stage}"

    def promised(self, promise: StageLease) -> None:
        """Somebody stays."""
        if promise.request.mover == self.me and promise.request.stage in self._leaving:
            self._leaving[promise.request.stage] = promise

    def may_leave(self, stage: int, now: float) -> tuple[bool, str]:
        """Whether it can leave now: asked at the moment in which it does. With the reason."""
        if self.bound_s(stage, now) > 0:
            return False, f"it has promised to stay in stage {stage}"
        promise = self._leaving.get(stage)
        if promise is None:
            return False, f"nobody has promised to stay in stage {stage}"
        if not promise.holds(now):
            return False, f"the promise to stay in stage {stage} has ended: it asks again"
        return True, f"{short_peer(promise.request.anchor)} stays in stage {stage}"

    def over(self, stage: int) -> None:
        """It has left the stage, or does not want to any more."""
        self._leaving.pop(stage, None)
