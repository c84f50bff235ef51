"""What a volunteer's link carries besides the payload of merges: records in the DHT, states, and the bootstrap's share.

Arithmetic on what the product does: who reads which buckets how often (decision 0033), whose states the archive takes,
what a peer pulls at the end and when it comes back. `RECORD_BYTES` is what fits links that were measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain.membership.records import BUCKET_LIMIT, read_every_s
from swarmtrain.run import RunFile
from swarmtrain.simulate.living import Lived, Machines, stage_parameters

__all__ = ["Traffic", "dht_bytes_per_s", "traffic_of"]

RECORD_BYTES = 500
"""A record with its signature, as an answer of the DHT brings it."""
PULL_BYTES = 1200
"""A pull's question and answer without the bytes that are pulled: manifest, presence, coverage."""
_OVERHEAD = 1.01
"""libp2p's frames around payload."""
_ARCHIVED, _FINAL, _JOINING = 16, 4, 4
"""Whose states are taken: by the bootstrap for its archive, by each at the end, by a late joiner."""
_REPLICAS, _READ_OF_KNOWN = 5, 2.75
"""Who keeps a record; and who is asked where the keepers are known: two of them, and all every fourth time."""
_REMEMBERED_FROM = 8
_LOOK_S, _COUNT_S, _MOST_COUNT_S = 3.0, 5.0, 15.0
_MOST_BUCKETS, _COUNTED_AT_ONCE = 64, 4


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The mean over the volunteers, in bytes per second, but for what comes once in a run, in bytes."""

    merging_up: float
    merging_down: float
    """What is pulled, with what is said about it."""
    states_up: float
    states_down: float
    """For the archive, and for those who come back."""
    records: float
    """The DHT's, each way."""
    once_up: float
    once_down: float
    """The first and the last archive, and what each takes of others for the last weights."""
    bootstrap_up: float
    bootstrap_down: float

    @property
    def up(self) -> float:
        """All that a volunteer sends while the run goes on."""
        return self.merging_up + self.states_up + self.records

    @property
    def down(self) -> float:
        """All that it receives."""
        return self.merging_down + self.states_down + self.records


def traffic_of(run: RunFile, found: Lived, machines: Machines) -> Traffic:
    """Of volunteers who live like that."""
    num, method = machines.num, run.merge.method
    rounds_per_s = sum(1 / one for one in found.round_s) / len(found.round_s) * (1 - machines.away_share)
    talk = 2 * max(found.partners, 1.0) * PULL_BYTES if num > 1 else 0.0
    theta, others = 4.0 * stage_parameters(run), num // run.pipeline.stages - 1
    archive, archives_per_s = _archive_bytes(run, theta, num), 1 / run.network.archive_every_s
    comes_back = theta * (1 + (min(_JOINING, others) if method == "gossip" else 1)) * (others > 0)
    comes_back_per_s = comes_back * _returns_per_s(machines)
    last = theta * min(_FINAL, others) * (method == "gossip")
    serves = num * rounds_per_s * (method == "server")
    records = dht_bytes_per_s(num + 1, run.network.presence_ttl_s)
    return Traffic(
        merging_up=_OVERHEAD * (found.up_bytes + talk) * rounds_per_s,
        merging_down=_OVERHEAD * (found.down_bytes + talk) * rounds_per_s,
        states_up=_OVERHEAD * (archive * archives_per_s / num + comes_back_per_s),
        states_down=_OVERHEAD * comes_back_per_s,
        records=records,
        once_up=_OVERHEAD * (2 * archive / num + last),
        once_down=_OVERHEAD * last,
        bootstrap_up=_OVERHEAD * found.down_bytes * serves + records,
        bootstrap_down=_OVERHEAD * (archive * archives_per_s + found.up_bytes * serves) + records,
    )


def _archive_bytes(run: RunFile, theta: float, num: int) -> float:
    """What the bootstrap takes for its archive each time, of all volunteers together."""
    if run.merge.method == "server":
        return 0.0
    if run.merge.method == "diloco":
        return 2 * theta
    stages = run.pipeline.stages
    return stages * (min(_ARCHIVED, num // stages) + 1) * theta


def _returns_per_s(machines: Machines) -> float:
    """How often a volunteer comes back."""
    return 1 / (machines.churn.every_s * machines.num) if machines.churn.every_s else 0.0


def dht_bytes_per_s(num_nodes: int, presence_ttl_s: float) -> float:
    """What reading records brings a node of so many, each second; its own part of what others read is as much.

    Presence is read in all buckets, progress in four of them at a time; whoever keeps a bucket sends all of it.
    """
    if num_nodes < 2:
        return 0.0
    buckets = _buckets(num_nodes)
    looked_s = read_every_s(num_nodes - 1, _LOOK_S, presence_ttl_s / 3)
    looked_s = _LOOK_S * round(looked_s / _LOOK_S)
    counted_s = read_every_s(num_nodes - 1, _COUNT_S, _MOST_COUNT_S)
    records = sum(buckets) / looked_s + sum(buckets[:_COUNTED_AT_ONCE]) / counted_s
    answers = float(min(_REPLICAS, num_nodes - 1))
    if num_nodes >= _REMEMBERED_FROM:  # of one's own bucket it is known who keeps it
        own_per_s = buckets[-1] / looked_s + buckets[-1] / counted_s / -(-len(buckets) // _COUNTED_AT_ONCE)
        records -= (1 - _READ_OF_KNOWN / answers) * own_per_s
    return RECORD_BYTES * answers * records


def _buckets(num_records: int) -> list[float]:
    """How many are in each bucket that is read, the shallowest first."""
    left, sizes = float(num_records), list[float]()
    for depth in range(_MOST_BUCKETS):
        width = 2**depth
        if left <= 0 or len(sizes) + width > _MOST_BUCKETS:
            break
        each = min(left / width, float(BUCKET_LIMIT))
        sizes += [each] * width
        left -= each * width
    return sizes
