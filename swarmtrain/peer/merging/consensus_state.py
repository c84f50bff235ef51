"""The run's present weights, for the archive and for `export`, whichever way the run merges.

With rosters there is one state, which any peer has; with a server there is its. Where each peer has its own it is the
consensus of a sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.network.asynchronous.state_fetcher import FetchedState
from swarmtrain.network.rounds.runner import NewState
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.node import state_of
from swarmtrain.peer.merging.consensus import (
    consensus_of,
    counts_in_untrusted,
    layout_of_specs,
    not_far_behind,
    places_of_untrusted,
    round_of,
)
from swarmtrain.protocol.gossip.partners import Place, agreed_places
from swarmtrain.protocol.rounds.rosters import Roster
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.protocol.tokens.tally import agreed_counts
from swarmtrain.v1 import snapshot_pb2 as pb

__all__ = ["ConsensusState", "WantedStates", "consensus_state_of", "fetch_consensus_state"]

WantedStates = Callable[[Mapping[str, int], Collection[str]], bool]
"""Told whose tokens states hold, and whose states they are; whether their weights are worth having."""


@dataclass(frozen=True, kw_only=True)
class ConsensusState:
    """The run's weights and momentum, its counters, and the roster behind them where there are rosters."""

    state: OuterState
    progress: Progress
    roster: Roster | None = None
    signed_roster: pb.Signed | None = None
    holds: Mapping[str, int] = field(default_factory=dict)
    """Each peer's tokens as far as they are in these weights, where each has its own."""
    places: Sequence[Mapping[str, Place]] = ()
    """Up to where each peer is in these weights, of each fragment."""
    shard_rows: Sequence[tuple[str, Sequence[pb.Signed]]] = ()
    """What was told of the data with each of the states, by PeerID of who told it."""


def consensus_state_of(new: NewState) -> ConsensusState:
    """What a state with its roster says."""
    state, progress = state_of(new)
    return ConsensusState(state=state, progress=progress, roster=new.roster, signed_roster=new.signed_roster)


async def fetch_consensus_state(
    swarm: Swarm, peers: Sequence[str], reason: str, above_tokens: int = 0, is_wanted: WantedStates | None = None
) -> ConsensusState | None:
    """What `peers` have, if it counts more than `above_tokens` tokens, and where each peer has its own weights, if it
    `is_wanted`; None if nobody has such, or delivers."""
    if not swarm.asynchronous:
        new = await swarm.rounds.search.fetch_newest_state(peers, reason, above_tokens)
        return None if new is None else consensus_state_of(new)
    published = swarm.published.run.published
    server = None if published is None else published.server
    states = [] if server is None else await swarm.states.fetch([server], 1)
    states = states or await swarm.states.fetch(peers, 1)  # where there is no server, or it is gone: each has its own
    if not states:
        return None
    told = {state.peer: counts_in_untrusted(state.held.snapshot.manifest) for state in states}
    holds = agreed_counts(list(told.values()))
    for peer, counts in told.items():  # what it has trained itself is in its weights
        holds[peer] = counts.get(peer, 0)
    counts = holds
    if swarm.presence.me.is_bootstrap:  # it has seen how fast they are: nobody's claim ends the run
        swarm.tallying.bring(list(told.values()))
        swarm.tallying.hear_all(holds)
        counts = swarm.tallying.contributions()
        holds = {peer: min(tokens, counts.get(peer, 0)) for peer, tokens in holds.items()}
    if is_wanted is not None and not is_wanted(holds, told.keys()):
        return None
    run_tokens = sum(counts.values())
    if run_tokens <= above_tokens:
        return None
    rows = [(state.peer, list(state.held.snapshot.manifest.coverage)) for state in states]
    states = not_far_behind(states, swarm.published.run.merge.max_staleness_rounds)
    progress = Progress(round=round_of(states), run_tokens=run_tokens, peer_tokens=counts)
    places = _places_of(swarm, states, progress.round)
    state = await asyncio.to_thread(consensus_of, states, layout_of_specs(swarm.specs))
    return ConsensusState(state=state, progress=progress, holds=holds, places=places, shard_rows=rows)


def _places_of(swarm: Swarm, states: Sequence[FetchedState], round: int) -> list[dict[str, Place]]:
    """Up to where each peer is in the consensus of states, of each fragment."""
    section = swarm.published.run.merge
    told = [places_of_untrusted(state.held.snapshot.manifest, section) for state in states]
    rounds = {info.peer: info.round for info in swarm.membership.volunteers()}
    rounds |= {state.peer: max(state.round, rounds.get(state.peer, 0)) for state in states}
    by_fragment = zip(*told, strict=True)
    return [agreed_places(each, rounds, round, section.max_staleness_rounds) for each in by_fragment]
