"""Traffic of a volunteer's link besides the payload of merges: records in the DHT, states, the bootstrap's share.

This is arithmetic on what the product does: who reads which buckets how often (decision 0033), whose states the archive
takes, what a peer pulls at the end and when it comes back. `RECORD_BYTES` is what fits measured links.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarmtrain.peer.merging.consensus import ARCHIVED, SAMPLE
from swarmtrain.protocol.archive.load import archive_bytes, archive_every_s
from swarmtrain.protocol.membership.records import (
    ALL_EVERY,
    ASKED,
    BUCKET_LIMIT,
    COUNT_EVERY_S,
    COUNTED_AT_ONCE,
    FEW,
    MAX_READ_BUCKETS,
    MOST_COUNT_EVERY_S,
    READ_EVERY_S,
    REPLICAS,
    read_every_s,
)
from swarmtrain.run import RunFile
from swarmtrain.simulate.pipeline.world import stage_parameters
from swarmtrain.simulate.planning.playback import PlaybackMachines, PlaybackResult

MERGING, ACTIVATIONS, ARCHIVE, RECORDS = "merging", "activations", "the archive", "records of who is there"
"""Names, for a person, of the kinds of traffic on a link."""
RECORD_BYTES = 500
"""Bytes of a signed record in an answer of the DHT."""
PULL_BYTES = 1200
"""Bytes of a pull's question and answer without the pulled bytes: manifest, presence, coverage."""
_OVERHEAD = 1.01
"""Factor for libp2p's frames around payload."""
_READ_OF_KNOWN = ((ALL_EVERY - 1) * FEW + REPLICAS) / ALL_EVERY
"""Mean number of nodes that are asked for a bucket, if it is known which nodes keep it."""


@dataclass(frozen=True, kw_only=True)
class TrafficEstimate:
    """Traffic in bytes per second, as the mean over the volunteers or of the bootstrap; `once_…` in bytes per run."""

    merging_up: float
    merging_down: float
    """Pulled bytes, with the questions and answers about them."""
    activations: float
    """Bytes between stages, each way."""
    archive: float
    """Bytes that the bootstrap takes for its archive."""
    returns_up: float
    returns_down: float
    """Bytes per second of weights for volunteers that come back as new ones; a server sends these itself."""
    records: float
    """Records of the DHT, each way."""
    once_up: float
    once_down: float
    """Bytes in the whole run for the first and last archive, and for the last weights that each peer pulls from
    others."""
    bootstrap_up: float
    bootstrap_down: float

    @property
    def parts_up(self) -> dict[str, float]:
        """Bytes per second that a volunteer sends while it trains, by kind of traffic."""
        return {
            MERGING: self.merging_up,
            ACTIVATIONS: self.activations,
            ARCHIVE: self.archive,
            "those who come back": self.returns_up,
            RECORDS: self.records,
        }

    @property
    def parts_down(self) -> dict[str, float]:
        """Bytes per second that a volunteer receives, by kind of traffic."""
        return {
            MERGING: self.merging_down,
            ACTIVATIONS: self.activations,
            "coming back": self.returns_down,
            RECORDS: self.records,
        }

    @property
    def up(self) -> float:
        """Bytes per second that a volunteer sends while it trains, in all."""
        return sum(self.parts_up.values())

    @property
    def down(self) -> float:
        """Bytes per second that a volunteer receives, in all."""
        return sum(self.parts_down.values())


def traffic_of(
    run: RunFile, found: PlaybackResult, machines: PlaybackMachines, link_up_bytes_per_s: float = 0.0
) -> TrafficEstimate:
    """Return the traffic of volunteers with that playback, behind links with this upload rate (0: no limit)."""
    num, method = machines.num, run.merge.kind
    rounds_per_s = sum(1 / one for one in found.round_s) / len(found.round_s) * (1 - machines.away_share)
    theta, others = 4.0 * stage_parameters(run), num // run.pipeline.stages - 1
    gradients = max(found.partners, 1.0)
    num_pulls = gradients + min(run.merge.num_weights, others) if method.own_weights else 2 * gradients
    talk = num_pulls * PULL_BYTES if num > 1 else 0.0
    archive, archives_per_s = _archive_bytes(run, theta, num), 1 / archived_every_s(run, link_up_bytes_per_s)
    weights = min(SAMPLE, others) if method.own_weights else 1
    comes_back = theta * (method.num_moments + weights) * (others > 0)
    comes_back_per_s = comes_back * _returns_per_s(machines)
    last = theta * min(SAMPLE, others) * method.own_weights
    is_server = method.has_server
    serves = num * rounds_per_s * is_server
    records = dht_bytes_per_s(num + 1, run.network.presence_ttl_s)
    return TrafficEstimate(
        merging_up=_OVERHEAD * (found.up_bytes - found.activation_bytes + talk) * rounds_per_s,
        merging_down=_OVERHEAD * (found.down_bytes - found.activation_bytes + talk) * rounds_per_s,
        activations=_OVERHEAD * found.activation_bytes * rounds_per_s,
        archive=_OVERHEAD * archive * archives_per_s / num,
        returns_up=_OVERHEAD * comes_back_per_s * (not is_server),
        returns_down=_OVERHEAD * comes_back_per_s,
        records=records,
        once_up=_OVERHEAD * (2 * archive / num + last),
        once_down=_OVERHEAD * (last + theta * is_server),
        bootstrap_up=_OVERHEAD * (found.down_bytes * serves + num * comes_back_per_s * is_server) + records,
        bootstrap_down=_OVERHEAD * (archive * archives_per_s + found.up_bytes * serves) + records,
    )


def _archive_bytes(run: RunFile, theta: float, num: int) -> float:
    """Return the bytes that the bootstrap pulls for one archive, from all volunteers together."""
    if run.merge.kind.has_server:
        return 0.0
    if not run.merge.kind.asynchronous:
        return (1 + run.merge.kind.num_moments) * theta
    stages = run.pipeline.stages
    if stages == 1:
        return float(archive_bytes(round(theta / 4), num))
    return stages * (min(ARCHIVED, num // stages) + 1) * theta


def archived_every_s(run: RunFile, link_up_bytes_per_s: float) -> float:
    """Return how often the bootstrap archives, given the volunteers' uplinks; 0 for no limit."""
    every_s, parameters = run.network.archive_every_s, stage_parameters(run)
    if run.pipeline.stages > 1 or run.merge.kind.has_server or not link_up_bytes_per_s:
        return every_s
    # Weights and moments of one, then the others' weights at once.
    wanted = run.merge.kind.state_bytes(parameters) + 4 * run.merge.kind.own_weights * parameters
    return archive_every_s(every_s, wanted / link_up_bytes_per_s, parameters)


def _returns_per_s(machines: PlaybackMachines) -> float:
    """Return how many times per second a volunteer comes back."""
    return 1 / (machines.churn.every_s * machines.num) if machines.churn.every_s else 0.0


def dht_bytes_per_s(num_nodes: int, presence_ttl_s: float) -> float:
    """Return the bytes per second of DHT records that each of `num_nodes` nodes receives by reading.

    A node sends as many to others. Presence is read in all buckets, progress in four of them at a time; each node that
    keeps a bucket sends all of it.
    """
    if num_nodes < 2:
        return 0.0
    buckets = _buckets(num_nodes)
    looked_s = READ_EVERY_S * round(read_every_s(num_nodes - 1, READ_EVERY_S, presence_ttl_s / 3) / READ_EVERY_S)
    counted_s = read_every_s(num_nodes - 1, COUNT_EVERY_S, MOST_COUNT_EVERY_S)
    records = sum(buckets) / looked_s + sum(buckets[:COUNTED_AT_ONCE]) / counted_s
    answers = float(min(REPLICAS, num_nodes - 1))
    if num_nodes >= ASKED:  # of one's own bucket it is known who keeps it
        own_per_s = buckets[-1] / looked_s + buckets[-1] / counted_s / -(-len(buckets) // COUNTED_AT_ONCE)
        records -= (1 - _READ_OF_KNOWN / answers) * own_per_s
    return RECORD_BYTES * answers * records


def _buckets(num_records: int) -> list[float]:
    """Return the number of records in each bucket that is read, the shallowest first."""
    left, sizes = float(num_records), list[float]()
    for depth in range(MAX_READ_BUCKETS):
        width = 2**depth
        if left <= 0 or len(sizes) + width > MAX_READ_BUCKETS:
            break
        each = min(left / width, float(BUCKET_LIMIT))
        sizes += [each] * width
        left -= each * width
    return sizes
