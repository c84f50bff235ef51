"""Fetch the run's present weights, for the archive and for `export`, whatever the merge method.

With rosters all peers hold the same state; with a server it is the server's. Where each peer has its own, it is the
consensus of a sample. The coroutines run in the network thread; averaging is done on another thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.network.asynchronous.state_fetcher import FetchedState
from swarmtrain.network.rounds.state_fetch import NewState
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

WantedStates = Callable[[Mapping[str, int], Collection[str]], bool]
"""Function of each peer's tokens in some states and of the states' authors; returns whether those weights are worth
having.
"""


@dataclass(frozen=True, kw_only=True)
class ConsensusState:
    """Weights and momentum of the run, its counters, and the roster they follow from, if there are rosters."""

    state: OuterState
    progress: Progress
    roster: Roster | None = None
    signed_roster: pb.Signed | None = None
    holds: Mapping[str, int] = field(default_factory=dict)
    """Tokens of each peer that are in these weights, where each peer has its own weights."""
    places: Sequence[Mapping[str, Place]] = ()
    """For each fragment, how far each peer's publications are in these weights."""
    shard_rows: Sequence[tuple[str, Sequence[pb.Signed]]] = ()
    """Signed rows of data coverage that came with each state, by the PeerID of the state's author."""


def consensus_state_of(new: NewState) -> ConsensusState:
    """Convert a state that came with its roster."""
    state, progress = state_of(new)
    return ConsensusState(state=state, progress=progress, roster=new.roster, signed_roster=new.signed_roster)


async def fetch_consensus_state(
    swarm: Swarm, peers: Sequence[str], reason: str, above_tokens: int = 0, is_wanted: WantedStates | None = None
) -> ConsensusState | None:
    """Fetch the present state from `peers`.

    Returns None if nobody delivers, if the state counts no more than `above_tokens` tokens, or if `is_wanted` refuses
    it; `is_wanted` is asked only where each peer has its own weights.
    """
    if not swarm.asynchronous:
        new = await swarm.rounds.search.fetch_newest_state(peers, reason, above_tokens)
        return None if new is None else consensus_state_of(new)
    published = swarm.published.run.published
    server = None if published is None else published.server
    states = [] if server is None else await swarm.states.fetch([server], 1)
    # No server, or it does not answer: each peer has a state of its own.
    states = states or await swarm.states.fetch(peers, 1)
    if not states:
        return None
    told = {state.peer: counts_in_untrusted(state.held.snapshot.manifest) for state in states}
    holds = agreed_counts(list(told.values()))
    for peer, counts in told.items():  # a peer's weights contain all that it has trained itself
        holds[peer] = counts.get(peer, 0)
    counts = holds
    if swarm.presence.me.is_bootstrap:  # it has measured their speeds, so that a false claim cannot end the run
        swarm.accounting.adopt(list(told.values()))
        swarm.accounting.receive_all(holds)
        counts = swarm.accounting.contributions()
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
    """For each fragment, map each peer to the place up to which the consensus of the states contains its
    publications."""
    section = swarm.published.run.merge
    told = [places_of_untrusted(state.held.snapshot.manifest, section) for state in states]
    rounds = {info.peer: info.round for info in swarm.membership.volunteers()}
    rounds |= {state.peer: max(state.round, rounds.get(state.peer, 0)) for state in states}
    by_fragment = zip(*told, strict=True)
    return [agreed_places(each, rounds, round, section.max_staleness_rounds) for each in by_fragment]
