"""Measure how long the gossip engine holds its lock: the time of each event, with eight partners and four fragments.

    python benchmarks/engine_of_gossip.py [--partners 8] [--fragments 4] [--others 64] [--rounds 200]

Every pull is answered; rounds follow one another. Prints the median, the 99th percentile and the longest of each event,
in microseconds of processor time. Garbage collection is off while an event is timed, as it could fall into any of them.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections import defaultdict, deque
from typing import Any

from swarmtrain.protocol.gossip.engine import GossipEngine, GossipSettings
from swarmtrain.protocol.gossip.merge_plans import MergePlanner, TrainersRound
from swarmtrain.protocol.gossip.messages import (
    AskPartner,
    DecodePublication,
    DownloadPublication,
    MergeDue,
    MergePrepared,
    MergesPlanned,
    PartnerReplied,
    PartnersChanged,
    PrepareMerge,
    PublicationDecoded,
    PublicationDownloaded,
    PullTimerFired,
)
from swarmtrain.protocol.gossip.partners import PublicationVersion
from swarmtrain.protocol.gossip.pulls import PublicationBytes, WantedPartners
from swarmtrain.protocol.membership.membership import PeerInfo

STEPS, STEP_S = 100, 0.5


class Peer:
    """Peer whose partners answer at once."""

    def __init__(self, partners: int, fragments: int, others: int) -> None:
        sizes: Any = {"int2": PublicationBytes(10**6, 250_000, 1 / fragments)}
        settings = GossipSettings(
            groups={"weights": "mean", "gradient": "outer step"},
            sizes=[sizes] * fragments,
            wanted=WantedPartners(partners, 3),
            num_parts=32,
            max_staleness_rounds=8,
        )
        self.engine: GossipEngine[int, int, int] = GossipEngine("me", settings, random.Random(1), random.Random(1))
        self.planner, self.fragments = MergePlanner(fragments), fragments
        self.others = [f"peer {number}" for number in range(others)]
        self.now, self.num_merged = 0.0, 0
        self.took_us: dict[str, list[float]] = defaultdict(list)

    def tell(self, event: Any) -> list[Any]:
        gc.disable()
        began = time.thread_time_ns()
        commands = self.engine.receive(event, self.now)
        self.took_us[type(event).__name__].append((time.thread_time_ns() - began) / 1e3)
        gc.enable()
        return commands

    def does(self, commands: list[Any], round: int) -> None:
        """Carry out all commands, and those that follow from them."""
        left = deque(commands)
        while left:
            match left.popleft():
                case AskPartner(number, _, _, group, _, _):
                    version = (
                        PublicationVersion(round, 32, 6400) if group == "gradient" else PublicationVersion(round, 0, 0)
                    )
                    left += self.tell(PartnerReplied(number, version, number))
                case DownloadPublication(number):
                    self.now += 0.001
                    left += self.tell(PublicationDownloaded(number, 10**5))
                case DecodePublication(number):
                    left += self.tell(PublicationDecoded(number, number))
                case PrepareMerge(number):
                    left += self.tell(MergePrepared(number, number))
                case _:
                    pass

    def round(self, round: int) -> None:
        """Play one round."""
        infos = [
            PeerInfo(peer=peer, training=True, round=round, part=16, part_tokens=3200, inner_steps=STEPS)
            for peer in self.others
        ]
        self.does(self.tell(PartnersChanged(infos)), round)
        merge_after = [STEPS * (number + 1) // self.fragments for number in range(self.fragments)]
        began_s = self.now
        of = TrainersRound(
            number=round,
            inner_steps=STEPS,
            merge_after=merge_after,
            gradient_format="int2",
            steps_per_s=1 / STEP_S,
        )
        plans: Any = self.planner.round_began(of, began_s)
        for number, after in enumerate(merge_after):
            if plans is not None:
                self.does(self.tell(MergesPlanned(round, plans)), round)
            while (wake_s := self.engine.wake_at()) is not None and wake_s < began_s + after * STEP_S:
                self.now = max(self.now, wake_s)
                self.does(self.tell(PullTimerFired()), round)
            self.now = max(self.now, began_s + after * STEP_S)
            (merge,) = self.tell(MergeDue(round, number))
            self.num_merged += len(merge.pulled)
            plans = self.planner.merged(number, self.now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partners", type=int, default=8)
    parser.add_argument("--fragments", type=int, default=4)
    parser.add_argument("--others", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    peer = Peer(options.partners, options.fragments, options.others)
    began_s = time.perf_counter()
    for round in range(options.rounds):
        peer.round(round)
    took_s = time.perf_counter() - began_s
    print(f"{options.partners} partners of {options.others}, {options.fragments} fragments; {options.rounds} rounds,")
    print(f"{peer.num_merged / options.rounds:.1f} publications merged in each, {took_s / options.rounds * 1e6:.0f} us")
    print("| event | times | median | 99 % | longest, us |\n|---|---|---|---|---|")
    for name, took in sorted(peer.took_us.items()):
        ordered = sorted(took)
        most = ordered[int(0.99 * len(ordered))]
        print(f"| {name} | {len(took)} | {statistics.median(took):.1f} | {most:.1f} | {ordered[-1]:.1f} |")


if __name__ == "__main__":
    main()
