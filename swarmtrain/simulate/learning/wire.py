"""Transfers take time: each machine's link carries one transfer after the other, in each direction."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

from swarmtrain.simulate.learning.setting import Setting


@dataclass
class Wire:
    """Links of all machines, by name."""

    setting: Setting
    sent_bytes: int = 0
    """Bytes that all machines sent."""
    _up_free_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _down_free_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def arrives_s(self, now_s: float, sender: str, receiver: str, size_bytes: int, rng: random.Random) -> float:
        """Return the time at which a transfer that is requested now has arrived."""
        setting, self.sent_bytes = self.setting, self.sent_bytes + size_bytes
        asked_s = now_s + setting.rtt_s
        down_s = max(asked_s, self._down_free_s[receiver]) + size_bytes / setting.link_of(receiver)[1]
        up_s = max(asked_s, self._up_free_s[sender]) + size_bytes / setting.link_of(sender)[0]
        self._down_free_s[receiver], self._up_free_s[sender] = down_s, up_s
        return max(down_s, up_s) + setting.late_s(size_bytes, rng)

    def arrives_at_last_s(self, now_s: float, sender: str, receiver: str, size_bytes: int, rng: random.Random) -> float:
        """Return the time at which a transfer that is requested now has arrived, if the rest is requested each time it
        breaks off midway."""
        while self.setting.failing and rng.random() < self.setting.failing:
            come_bytes = int(rng.random() * size_bytes)
            now_s = self.arrives_s(now_s, sender, receiver, come_bytes, rng)
            size_bytes -= come_bytes
        return self.arrives_s(now_s, sender, receiver, size_bytes, rng)
