"""The trainer's side of merging with a server: it hands in its rounds, goes on from the server's weights, never waits.

At a round's end the worker goes on from the newest weights of the server that came in the background, moved on by those
of the worker's rounds that are not in them yet (`lead`). So it loses no step, though it never stands still for an
answer (docs/decisions/0022 has what else was tried); each of its steps enters the server's weights once, by its rounds'
numbers (`membership.serving`). Where nothing new came, it goes on from where it is.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.algorithm.pacing import fewest_inner_steps, steps_of_everybody
from swarmtrain.errors import BadBytesError, RunTimeError
from swarmtrain.events import WarningEvent
from swarmtrain.membership.ending import still_needed_apart
from swarmtrain.membership.lifecycle import PeerState
from swarmtrain.membership.progress import Progress
from swarmtrain.membership.serving import HandIn
from swarmtrain.network.codec import VectorCodec, body_of
from swarmtrain.network.consensus import PeerState as FetchedState
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.serving import (
    HandInPublisher,
    Pulls,
    RoundTimes,
    ServedWeights,
    ServerLink,
    entered_round_untrusted,
)
from swarmtrain.network.snapshots import Body
from swarmtrain.peer.common import wait_for
from swarmtrain.peer.consensus import (
    consensus_of,
    counts_in_untrusted,
    layout_of_specs,
    mean_of_near,
    round_of,
    theta_of,
)
from swarmtrain.peer.exchange import SwarmExchange
from swarmtrain.peer.trainer import Contribution, Merged, Replaced, Served, Start

__all__ = ["ServerExchange", "lead"]

_log = logging.getLogger(__name__)
_SAMPLE = 16
_LAST_ROUND_S = 45.0
"""How long a peer that is done waits for the server's last weights."""
_LOOK_S = 0.2
_TRIES = 3
_GUESSED_ROUND_S = 1.0
_SILENT_ROUNDS = 3
_LEAST_SILENT_S = 10.0


@torch.no_grad()
def lead(theta: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The server's weights `theta` (P,), moved on by the worker's gradients (P,) that it has yet to take in."""
    for gradient in gradients:
        theta = theta - gradient
    return theta


@dataclass
class ServerExchange(SwarmExchange):
    """Asynchronous rounds with a server: nobody waits for anybody."""

    link: ServerLink = field(init=False)
    publisher: HandInPublisher = field(init=False)
    _contribution: Contribution = field(init=False)
    _base_arrivals: int = 0
    """How many gradients had entered the server's weights that this peer goes on from."""
    _served_tokens: int = 0
    """What the server had counted by its newest weights here."""
    _round_s: float = 0.0
    _told_silent: bool = False

    def __post_init__(self) -> None:
        swarm, section, rounds = self.swarm, self.run.merge, self.swarm.rounds.settings
        assert swarm.published.run.published is not None and swarm.published.run.published.server is not None
        server = swarm.published.run.published.server
        weights = VectorCodec("theta", swarm.specs, section.theta_format)
        gradients = VectorCodec("gradient", swarm.specs, section.gradient_format)

        def encode(piece: HandIn[Tensor]) -> Body:
            return gradients.encode_sum(piece.gradient, piece.round)

        most = section.max_staleness_rounds
        self.publisher = HandInPublisher(
            swarm.identity,
            rounds.run_sha256,
            gradients.tensors,
            swarm.store,
            server=server,
            encode=encode,
            max_rounds_tokens=(most * section.inner_steps, most * rounds.max_tokens),
        )
        self.link = ServerLink(
            me=swarm.identity.peer_id,
            server=server,
            pulls=Pulls(
                swarm.calls,
                rounds.run_sha256,
                weights.tensors,
                rounds.pull,
                swarm.signed_presence,
                swarm.heard_untrusted,
            ),
            decode=weights.decode_untrusted,
            counted=swarm.tallying.hear,
            refused=swarm.rounds.refused,
        )
        swarm.publisher, swarm.gossip = self.publisher, self.link

    # ------------------------------------------------------------- the trainer's calls

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """See `Exchange`."""
        if self._fresh and progress.round == 0:
            self._wait_for_company()
        self._check()
        section, others = self.run.merge, self.swarm.membership.volunteers()
        steps = section.inner_steps
        if section.pacing and steps_per_s <= 0:  # a short first one, until it knows how fast it is
            steps = fewest_inner_steps(steps)
        steps = self.round_steps = self._paced(steps_per_s, steps)
        self._begin(steps)
        now = swarm_time()
        self._round_s = steps / steps_per_s if steps_per_s > 0 else _GUESSED_ROUND_S
        times = RoundTimes(started_s=now, ends_s=now + self._round_s)
        self._look_whether_silent(now)

        async def begin() -> None:
            self.swarm.rounds.inner_steps_done = 0
            self.swarm.describe(round=progress.round, steps_per_s=steps_per_s, run_tokens=progress.run_tokens)
            self.swarm.describe_part(0, self.swarm.me.part_tokens)
            self.link.begin(times)

        self._do_soon(begin())
        return Start(
            inner_steps=steps,
            num_peers=len(others) + 1,
            run_steps_a_step=steps_of_everybody(steps_per_s, [info.steps_per_s for info in others]),
        )

    def _look_whether_silent(self, now: float) -> None:
        silent_s = now - self.link.heard_s
        is_silent = silent_s > max(_LEAST_SILENT_S, _SILENT_ROUNDS * self._round_s)
        if is_silent and not self._told_silent:
            message = (
                "the server does not answer: going on alone; what is learnt meanwhile is handed in when it is back"
            )
            self.swarm.emit(WarningEvent(message=message))
        self._told_silent = is_silent

    def publish(self, contribution: Contribution) -> None:
        """See `Exchange`."""
        self._contribution = contribution
        if not bool(torch.isfinite(contribution.gradient).all()):
            _log.warning("round %d is not handed in: it is not finite", contribution.round)
            return
        piece = HandIn(
            round=contribution.round,
            tokens=contribution.tokens,
            inner_steps=contribution.inner_steps,
            arrivals=self._base_arrivals,
            own_tokens=contribution.own_tokens,
            gradient=contribution.gradient,
        )
        with self.publisher.lock:
            self.publisher.hand_ins.add(piece)

        async def announce() -> None:
            self.swarm.describe_part(1, contribution.tokens)
            await self.swarm.greet(self.publisher.server)

        self._do_soon(announce())

    def collect(self) -> Served:
        """See `Exchange`. Waits for nobody."""
        own, swarm = self._contribution, self.swarm
        swarm.tallying.learn({swarm.identity.peer_id: own.own_tokens})
        came, merged = self.link.take(), tuple[Merged, ...]()
        if came is not None:
            theta, open_rounds = self._go_on_from(came.theta, came.arrivals, came.entered_round)
            merged = (self._merged(came, open_rounds),)
        else:  # it goes on from where it is, if that is anywhere
            theta = own.reached if bool(torch.isfinite(own.gradient).all()) else own.theta
        counts = swarm.tallying.contributions()
        return Served(theta=theta, merged=merged, run_tokens=sum(counts.values()), peer_tokens=counts)

    def _merged(self, came: ServedWeights, open_rounds: int) -> Merged:
        known, self._served_tokens = self._served_tokens, came.run_tokens
        return Merged(
            peer=self.publisher.server,
            round=came.arrivals,
            part=1,
            tokens=max(0, came.run_tokens - known) if known else 0,
            staleness_rounds=open_rounds,
            pull_s=came.pull_s,
        )

    def _go_on_from(self, theta: Tensor, arrivals: int, entered_round: int | None) -> tuple[Tensor, int]:
        """Where to go on, given the server's weights; and how many pieces of this peer's are not in them."""
        with self.publisher.lock:
            hand_ins = self.publisher.hand_ins
            hand_ins.entered(entered_round)
            pieces = hand_ins.pieces
        self._base_arrivals = arrivals
        return lead(theta, [piece.gradient for piece in pieces]), len(pieces)

    def _do_soon(self, work: Coroutine[Any, Any, None]) -> None:
        """Have the network thread do it; the trainer does not wait."""
        self.network.submit(work).add_done_callback(_log_failure)

    # ------------------------------------------------------------- present weights

    def offer(self, state: OuterState, progress: Progress) -> None:
        """See `SwarmExchange`. The trainer does not wait for it."""
        if progress is self._offered:
            return
        self._offered = progress
        body = body_of(state.theta, state.momentum)

        async def offer() -> None:
            self.swarm.set_state(progress, body)
            self.swarm.describe(
                round=progress.round, steps_per_s=self.swarm.me.steps_per_s, run_tokens=progress.run_tokens
            )

        self._do_soon(offer())

    def present_state(self, progress: Progress) -> Replaced | None:
        """See `SwarmExchange`: the server's, or if it is gone and this peer has nothing, the others' mean."""
        self._fresh = True
        has_own = progress.round > 0
        reason = "was away" if has_own else "joined late"
        membership, server = self.swarm.membership, self.publisher.server
        for _ in range(_TRIES):
            is_there, info = membership.state(server) is PeerState.LIVE, membership.info(server)
            others = [other.peer for other in membership.volunteers() if other.round > 0]
            if not others and (info is None or not info.round):
                return None  # nobody has trained yet
            if (new := self._fetch([server], progress, reason)) is not None:
                return new
            if has_own:
                break  # the server's weights come at the end of its first round
            sample = random.sample(others, min(_SAMPLE, len(others)))
            if not is_there and (new := self._fetch(sample, progress, reason)) is not None:
                return new
            self.stop.sleep(1.0)
        if has_own:
            return None
        raise RunTimeError("nobody could deliver the run's present state; try again in a minute")

    def _fetch(self, peers: Sequence[str], progress: Progress, reason: str) -> Replaced | None:
        swarm = self.swarm
        fetching = self.network.submit(swarm.states.fetch(peers, 1))
        states = wait_for(fetching, self.stop, lambda: self.on_arriving(swarm.store.arriving))
        if not states:
            return None
        known = {info.peer for info in swarm.membership.known()}
        for peer, tokens in counts_in_untrusted(states, known).items():
            swarm.tallying.hear(peer, tokens)
        counts = swarm.tallying.contributions()
        state, round = consensus_of(states, layout_of_specs(swarm.specs)), max(progress.round, round_of(states))
        if states[0].peer == self.publisher.server:
            theta, round = self._start_from(states[0], state.theta, round)
            state = OuterState(theta, state.momentum)
        new = Progress(round=round, run_tokens=sum(counts.values()), peer_tokens=counts)
        self.offer(state, new)
        return Replaced(state=state, progress=new, from_peer=states[0].peer, reason=reason)

    def _start_from(self, fetched: FetchedState, theta: Tensor, round: int) -> tuple[Tensor, int]:
        """Where to go on from the server's state, and in which round: a later one than any that it has had of us."""
        manifest = fetched.held.snapshot.manifest
        try:
            entered = entered_round_untrusted(manifest, self.swarm.identity.peer_id)
        except BadBytesError as error:
            self.swarm.rounds.refused(fetched.peer, error)
            entered = None
        self.link.take()  # it is older
        self.link.heard_s = swarm_time()
        theta, _ = self._go_on_from(theta, manifest.arrivals, entered)
        return theta, round if entered is None else max(round, entered + 1)

    def final_theta(self, own: Tensor) -> Tensor:
        """See `SwarmExchange`: the server's last weights; without a server, the mean of all who have finished."""
        swarm, total, server = self.swarm, self.run.run.total_tokens, self.publisher.server
        give_up_s = time.monotonic() + _LAST_ROUND_S
        states: list[FetchedState] = []
        while not states and time.monotonic() < give_up_s:
            wait_for(self.network.submit(swarm.greet_everyone()), self.stop)
            info = swarm.membership.info(server)
            if info is not None and info.run_tokens >= total:
                states = wait_for(self.network.submit(swarm.states.fetch_weights([server], 1)), self.stop)
            elif swarm.membership.state(server) is not PeerState.LIVE and self._others_are_done(total):
                break
            self.stop.sleep(_LOOK_S)
        if states:
            theta = theta_of(states[0], own.numel())
        else:
            others = [info.peer for info in swarm.membership.volunteers() if info.run_tokens >= total]
            sample = random.sample(others, min(_SAMPLE - 1, len(others)))
            states = wait_for(self.network.submit(swarm.states.fetch_weights(sample, 1)), self.stop)
            thetas = [own, *(theta_of(state, own.numel()) for state in states)]
            theta = mean_of_near(thetas, layout_of_specs(swarm.specs))[0] if states else own
        self.network.run(self._settle(), _LAST_ROUND_S)
        return theta

    def _others_are_done(self, total: int) -> bool:
        return all(info.run_tokens >= total for info in self.swarm.membership.volunteers())

    async def _settle(self) -> None:
        """Say that this peer needs nothing more."""
        self.swarm.me = dataclasses.replace(self.swarm.me, settled=True)

    def still_needed(self, last: Progress) -> str:
        """See `SwarmExchange`."""
        return still_needed_apart(self.swarm.membership, self.run.run.total_tokens)


def _log_failure(future: Any) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.error("merging with a server: the network's part failed", exc_info=error)
