"""Costs of merging for each peer, by merge method: bytes on its link per round, and bytes in its memory.

Arithmetic on the run file alone; `peer/estimate.py` adds what does not depend on the method.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from swarmtrain.methods import load_object
from swarmtrain.protocol.gossip.pulls import LARGE_MODEL, PublicationBytes, WantedPartners, gradient_format
from swarmtrain.protocol.rounds.roles import carried_bytes
from swarmtrain.run import RunFile

# fp32: weights, gradients, AdamW's two moments, outer weights, outer momentum, the last two publications, and the copy
# of the moments that a checkpoint is written from.
BYTES_PER_PARAMETER = 4 + 4 + 8 + 4 + 4 + 2 * 4 + 8
_MOST_FREE_BYTES = 120_000_000
"""Free bytes that the heap keeps at most, measured with 0.5, 10 and 57 million parameters: they stop growing with the
model, because the allocator maps large vectors one by one and returns them.
"""
_READ_SHARE = 2 / 3
"""Share of a round in which a state is being read by others, measured with rounds of 20 s and more."""


class MergeCosts(ABC):
    """Costs of one merge method."""

    @abstractmethod
    def merge_bytes(self, run: RunFile, num_parameters: int, others: int) -> tuple[int, int]:
        """Return (bytes sent per round, bytes held of what arrives and is being merged) with `others` other peers."""

    def memory_bytes(self, run: RunFile, num_parameters: int, others: int) -> int:
        """Return the bytes that a volunteer holds of a whole model, without autograd graphs and the program."""
        return BYTES_PER_PARAMETER * num_parameters + self.merge_bytes(run, num_parameters, others)[1]


def costs_of(run: RunFile) -> MergeCosts:
    """Return the costs of the run's merge method."""
    kind: type[MergeCosts] = load_object(run.merge.kind.costs)
    return kind()


class GossipCosts(MergeCosts):
    """Costs of gossip: publications of the partners, fragment by fragment."""

    def merge_bytes(self, run: RunFile, num_parameters: int, others: int) -> tuple[int, int]:
        """Return (bytes sent per round, bytes held of what arrives and is being merged) with `others` other peers. See
        `MergeCosts`."""
        merge, gradient_bytes, sizes = run.merge, 4 * num_parameters, publication_sizes(run, num_parameters, others)
        num, sent = min(merge.num_partners, others), pulled_bytes(run, sizes, others)
        num += min(merge.num_weights, others)
        # bytes and decoded vector of each; the prepared merge; bytes of pulls that may be resumed
        pieces = merge.num_fragments
        whole = 2 * gradient_bytes if pieces > 1 else 0  # weights and momentum as a late joiner takes them
        return sent, 2 * sent + (num + 2) * gradient_bytes // pieces + whole

    def memory_bytes(self, run: RunFile, num_parameters: int, others: int) -> int:
        """Return the bytes that a volunteer holds of a whole model, without autograd graphs and the program. See
        `MergeCosts`."""
        return math.ceil(sum(copies(run, num_parameters, others).values()) * num_parameters)


class DilocoCosts(MergeCosts):
    """Costs of synchronous rounds: whole pseudo-gradients, or in larger swarms shares of them."""

    def merge_bytes(self, run: RunFile, num_parameters: int, others: int) -> tuple[int, int]:
        """Return (bytes sent per round, bytes held of what arrives and is being merged) with `others` other peers. See
        `MergeCosts`."""
        gradient_bytes = 4 * num_parameters
        if others + 1 <= run.merge.share_above:
            return gradient_bytes * others, gradient_bytes * others  # the whole pseudo-gradient, to each other peer
        # Like an all-reduce: scatter the shares, gather the results. Links that are alike have equal shares.
        return math.floor(carried_bytes(gradient_bytes, others + 1, 1, others + 1)), 2 * gradient_bytes


class BatchCosts(DilocoCosts):
    """Costs of one large batch: a gradient for each step, merged as in synchronous rounds.

    Of memory it is the same sum: in place of the inner optimizer's moments a volunteer has the gradients added up (4
    bytes a parameter) and the second moment of the common step (4).
    """

    def merge_bytes(self, run: RunFile, num_parameters: int, others: int) -> tuple[int, int]:
        """Return (bytes sent per round, bytes held of what arrives and is being merged) with `others` other peers. See
        `MergeCosts`."""
        from swarmtrain.algorithm.quantize import encoded_size_bytes  # torch takes a second: only once a file was read

        mean_bytes, sent = 4 * num_parameters, encoded_size_bytes(run.merge.roster_format, [num_parameters])
        lost = 0 if run.merge.roster_format == "fp32" else 3 * mean_bytes  # kept for the next one, and decoded twice
        if others + 1 <= run.merge.share_above:
            return sent * others, mean_bytes * others + lost
        return (sent + mean_bytes) * others // (others + 1), 2 * mean_bytes + lost


class ServerCosts(MergeCosts):
    """Costs of a volunteer with a server: it sends pseudo-gradients and pulls the server's weights."""

    def merge_bytes(self, run: RunFile, num_parameters: int, others: int) -> tuple[int, int]:
        """Return (bytes sent per round, bytes held of what arrives and is being merged) with `others` other peers. See
        `MergeCosts`."""
        sizes = publication_sizes(run, num_parameters, others)
        return sizes.gradient, sizes.both + 3 * 4 * num_parameters


def copies(run: RunFile, num_parameters: int, others: int) -> dict[str, float]:
    """Return the memory that a volunteer which gossips with `others` others holds at its worst moment, in bytes per
    parameter, by purpose."""
    merge, sizes = run.merge, publication_sizes(run, num_parameters, others)
    partners, thetas = min(merge.num_partners, others), min(merge.num_weights, others)
    weights, gradient = sizes.weights / num_parameters, sizes.gradient / num_parameters
    fragment = 4 / merge.num_fragments
    fed_back = any(format in ("int4", "int2") for format in merge.gradient_formats)
    judged = merge.robust != "none" and others > 0
    decoded, prepared = 4.0 * (partners + thetas), 8.0
    if num_parameters >= LARGE_MODEL:  # memory counts for more than time (decision 56): one fragment at a time
        prepared = 2 * fragment
        if merge.robust in ("none", "clip", "direction"):  # other rules need each publication decoded at the merge
            decoded = 2 * fragment
    return {
        "the model's weights": 4,
        "their gradient, from a step's backward to its end": 4,
        "AdamW's two moments": 8,
        "weights after each fragment's last merge, and the outer momentum": 8,
        "the newest pseudo-gradient, which is published and compared with": 4,
        "the one before it, until the newest is made, fragment by fragment": fragment * judged,
        "what rounding has lost of pseudo-gradients, for the next ones": 2.0 * fed_back,
        "the same of the round under way": 2.0 * fed_back,
        "publications as they travel": (weights + gradient) * (others > 0),
        "partners' publications as they came, and the gradients merged last": 2 * partners * gradient
        + thetas * weights,
        "partners' publications decoded": decoded * (others > 0),
        "merges that are prepared": prepared * (others > 0),
        "what merges have replaced of a state that the archive or a joiner reads": _READ_SHARE * (8.0 - 2 * fragment),
        "what the heap holds free until the next checkpoint": min(6.0, _MOST_FREE_BYTES / num_parameters),
    }


def publication_sizes(
    run: RunFile, num_parameters: int, others: int, round_s: float = math.inf, bytes_per_s: float = math.inf
) -> PublicationBytes:
    """Return the sizes of a publication of `num_parameters` parameters.

    The gradient format, and so the size, depends on the number of other peers, the length of a round in seconds and the
    link's bytes per second.
    """
    from swarmtrain.algorithm.quantize import encoded_size_bytes  # torch takes a second: only once a file was read

    merge = run.merge
    theta = encoded_size_bytes(merge.theta_format, [num_parameters])
    sizes = {one: PublicationBytes(theta, encoded_size_bytes(one, [num_parameters])) for one in merge.gradient_formats}
    return sizes[
        gradient_format(sizes, others, round_s, bytes_per_s, WantedPartners(merge.num_partners, merge.num_weights))
    ]


def pulled_bytes(run: RunFile, sizes: PublicationBytes, others: int) -> int:
    """Return the bytes that one round of gossip pulls from `others` other peers, if the link can carry them."""
    merge = run.merge
    return min(merge.num_partners, others) * sizes.gradient + min(merge.num_weights, others) * sizes.weights
