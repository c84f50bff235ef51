"""Stage leases: promises to stay in a stage, by which a move never empties one, whatever the peers believe.

A record in a DHT is no lock: two peers that see each other's record may both leave. So a peer that wants to leave a
stage asks another holder, its *anchor*, to stay for a while. The answer comes by an authenticated call, not by a
record, and whoever has given it stays until the lease ends. So when a peer leaves, another is there that cannot leave;
only a crash can remove that one.

Clocks need not agree. The peer that leaves counts from the moment when it asked, the anchor from the later moment when
it answered.

Everything here is pure: `now` is an argument, and every answer carries its reason.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from swarmtrain.words import short_peer


@dataclass(frozen=True, kw_only=True)
class LeaseRequest:
    """Request of `mover`, which wants to leave `stage`, that `anchor` stay."""

    stage: int
    mover: str
    anchor: str
    asked_s: float
    """Time of the request by the mover's clock. It comes back with the lease and means nothing to the anchor."""


@dataclass(frozen=True, kw_only=True)
class StageLease:
    """Promise of the request's anchor to hold the stage for at least `lasts_s` seconds."""

    request: LeaseRequest
    lasts_s: float

    def holds(self, now: float) -> bool:
        """Return whether the mover can rely on the lease, by the mover's clock."""
        return now < self.request.asked_s + self.lasts_s


@dataclass
class StageLeases:
    """Leases that one peer has given and received. `lasts_s` is the duration of those that it gives."""

    me: str
    lasts_s: float = 60.0
    _bound_until_s: dict[int, float] = field(default_factory=dict)
    """Time until which this peer must stay in each stage."""
    _leaving: dict[int, StageLease | None] = field(default_factory=dict)
    """Stages that this peer wants to leave, with the lease that it received for each."""

    # ------------------------------------------------------------------ who is asked

    def asked(self, request: LeaseRequest, stages: Collection[int], now: float) -> tuple[StageLease | None, str]:
        """Decide whether to give a lease, and record it if so. Return (lease or None, reason). `stages` are those that
        this peer serves now."""
        if request.anchor != self.me or request.mover == self.me:
            return None, "it was not this peer that was asked"
        if request.stage not in stages:
            return None, f"{short_peer(self.me)} does not serve stage {request.stage}"
        # Two holders that want to leave at the same time refuse each other, and both stay.
        if request.stage in self._leaving:
            return None, f"{short_peer(self.me)} wants to leave stage {request.stage} itself"
        until_s = max(now + self.lasts_s, self._bound_until_s.get(request.stage, now))
        self._bound_until_s[request.stage] = until_s
        return StageLease(request=request, lasts_s=self.lasts_s), f"it stays for {self.lasts_s:g} s"

    def bound(self, now: float) -> tuple[int, ...]:
        """Return the stages that this peer has promised not to leave, for its presence record."""
        return tuple(sorted(stage for stage, until_s in self._bound_until_s.items() if now < until_s))

    def bound_s(self, stage: int, now: float) -> float:
        """Return for how many seconds this peer must stay in the stage; 0 if it need not."""
        return max(0.0, self._bound_until_s.get(stage, now) - now)

    # ------------------------------------------------------------------ who leaves

    def wants_to_leave(self, stage: int, now: float) -> tuple[bool, str]:
        """Record that this peer wants to leave `stage`, unless it has promised to stay. Return (True if it may ask
        others to stay there, reason). If so, it gives no more leases for that stage."""
        if self.bound_s(stage, now) > 0:
            return False, f"it has promised to stay in stage {stage} for {self.bound_s(stage, now):.0f} s more"
        self._leaving.setdefault(stage, None)
        return True, f"nobody was promised that it stays in stage {stage}"

    def granted(self, lease: StageLease) -> None:
        """Record a lease that this peer received."""
        if lease.request.mover == self.me and lease.request.stage in self._leaving:
            self._leaving[lease.request.stage] = lease

    def may_leave(self, stage: int, now: float) -> tuple[bool, str]:
        """Return (True if this peer may leave the stage at this moment; reason)."""
        if self.bound_s(stage, now) > 0:
            return False, f"it has promised to stay in stage {stage}"
        lease = self._leaving.get(stage)
        if lease is None:
            return False, f"nobody has promised to stay in stage {stage}"
        if not lease.holds(now):
            return False, f"the promise to stay in stage {stage} has ended: it asks again"
        return True, f"{short_peer(lease.request.anchor)} stays in stage {stage}"

    def over(self, stage: int) -> None:
        """End the attempt to leave `stage`: this peer has left it, or wants to stay after all."""
        self._leaving.pop(stage, None)
