"""Trainer's side of merging with a server: upload rounds, continue from the server's weights, never wait.

At a round's end the worker continues from the newest server weights that arrived in the background, moved on by those
of its own rounds that they do not contain yet (`lead`). So it loses no step and never waits for an answer
(docs/decisions/0022 lists what else was tried). Each of its steps enters the server's weights once, by the numbers of
its rounds (`protocol.server`). If nothing new arrived, it continues from where it is.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from swarmtrain.algorithm.outer import OuterState
from swarmtrain.errors import BadBytesError, RunTimeError
from swarmtrain.events import WarningEvent
from swarmtrain.network.answers import Serving
from swarmtrain.network.asynchronous.server_link import (
    GradientUploader,
    Pulls,
    RoundTimes,
    ServedWeights,
    ServerLink,
    entered_round_untrusted,
)
from swarmtrain.network.asynchronous.state_fetcher import FetchedState as FetchedState
from swarmtrain.network.codec import PublicationCodec
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.snapshots.store import Body
from swarmtrain.network.tensor_groups import groups_of
from swarmtrain.peer.lifecycle.node import wait_for
from swarmtrain.peer.merging.asynchronous_exchange import AsynchronousExchange
from swarmtrain.peer.merging.consensus import consensus_of, layout_of_specs, mean_of_near, theta_of
from swarmtrain.peer.merging.updates import LocalUpdate, MergeInput, Replaced, Served
from swarmtrain.peer.training.session import Start
from swarmtrain.protocol.membership.membership import PeerState
from swarmtrain.protocol.server import GradientUpload
from swarmtrain.protocol.tokens.progress import Progress

_log = logging.getLogger(__name__)
_SAMPLE = 16
_LAST_ROUND_S = 45.0
"""Seconds that a peer that is done waits for the server's last weights."""
_POLL_INTERVAL_S = 0.2
_TRIES = 3
_SILENT_ROUNDS = 3
_LEAST_SILENT_S = 10.0


@torch.no_grad()
def lead(theta: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Return the server's weights `theta` (P,) moved on by the worker's gradients (P,) that are not in them yet.

    Each gradient counts whole, not by the eps/N that the server will make of it: that measured 3.0 to 4.5 % worse
    (decision 22).
    """
    for gradient in gradients:
        theta = theta - gradient
    return theta


@dataclass
class ServerExchange(AsynchronousExchange):
    """Exchange with a server: rounds in which no peer waits."""

    link: ServerLink = field(init=False)
    publisher: GradientUploader = field(init=False)
    _contribution: LocalUpdate = field(init=False)
    _base_arrivals: int = 0
    """Number of gradients in the server's weights that this peer continues from."""
    _served_tokens: int = 0
    """Tokens of the run when the newest server weights that this peer has were published."""
    _lasts_s: float = 0.0
    _told_silent: bool = False

    def __post_init__(self) -> None:
        swarm, section, rounds = self.swarm, self.run.merge, self.swarm.rounds.settings
        assert swarm.published.run.published is not None and swarm.published.run.published.server is not None
        server = swarm.published.run.published.server
        codec = PublicationCodec(groups_of(swarm.specs, section.theta_format, section.gradient_formats))
        weights, gradients = codec.weights, codec.gradient
        (format,) = gradients.of

        def encode(piece: GradientUpload[Tensor]) -> Body:
            return Body([gradients.encode_sum(piece.gradient, format, piece.round)])

        most = section.max_staleness_rounds
        self.publisher = GradientUploader(
            swarm.identity,
            rounds.run_sha256,
            gradients.of[format].tensors,
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
                swarm.presence.signed,
                swarm.peers.receive_reply_untrusted,
            ),
            decode=weights.decode_untrusted,
            counted=swarm.accounting.receive,
            refused=swarm.peers.refused,
        )

    def serving(self) -> Serving:
        """Return the gradient's publisher and the link that pulls the server's weights."""
        return Serving(publishers={("gradient", 0): self.publisher}, pulling=self.link)

    # ------------------------------------------------------------- the trainer's calls

    def start_round(self, progress: Progress, steps_per_s: float) -> Start:
        """Return the plan of the next round. See `Exchange`."""
        steps_taken = self._take_over_steps()
        start = self._enter_round(progress, steps_per_s)
        now, own_steps_per_s = swarm_time(), steps_per_s / self.step_share
        self._lasts_s = self._round_s(start.inner_steps, own_steps_per_s)
        started_s = now - (steps_taken / own_steps_per_s if steps_per_s > 0 else 0.0)
        times = RoundTimes(started_s=started_s, ends_s=started_s + self._lasts_s)
        self._look_whether_silent(now)

        async def begin() -> None:
            self._describe_start(progress, steps_per_s)
            self.link.begin(times)

        self._do_soon(begin())
        return start

    def _look_whether_silent(self, now: float) -> None:
        silent_s = now - self.link.heard_s
        is_silent = silent_s > max(_LEAST_SILENT_S, _SILENT_ROUNDS * self._lasts_s)
        if is_silent and not self._told_silent:
            message = (
                "the server (the bootstrap) does not answer: this peer trains on alone, and hands its updates in when "
                "the server is back"
            )
            self.swarm.emit(WarningEvent(message=message, code="server-silent"))
        self._told_silent = is_silent

    def publish(self, contribution: LocalUpdate) -> None:
        """Hand over the round's update so far, for others to pull. See `Exchange`."""
        self._contribution = contribution
        if not bool(torch.isfinite(contribution.gradient).all()):
            _log.warning("round %d is not uploaded: its gradient is not finite", contribution.round)
            return
        piece = GradientUpload(
            round=contribution.round,
            tokens=contribution.tokens,
            inner_steps=contribution.inner_steps,
            arrivals=self._base_arrivals,
            own_tokens=contribution.own_tokens,
            gradient=contribution.gradient,
        )
        with self.publisher.lock:
            self.publisher.uploads.add(piece)

        async def announce() -> None:
            self.swarm.presence.describe_part(1, contribution.tokens)
            await self.swarm.greeter.greet(self.publisher.server)

        self._do_soon(announce())

    def collect(self, fragment: int = 0) -> Served:
        """See `Exchange`. Waits for nobody."""
        own, swarm = self._contribution, self.swarm
        swarm.accounting.learn({swarm.identity.peer_id: own.own_tokens})
        came, merged = self.link.take(), tuple[MergeInput, ...]()
        if came is not None:
            theta, open_rounds = self._go_on_from(came.theta, came.arrivals, came.entered_round)
            merged = (self._merged(came, open_rounds),)
        else:  # nothing new: continue from where it is, unless that is not finite
            assert own.reached is not None
            theta = own.reached if bool(torch.isfinite(own.gradient).all()) else own.thetas[0]
        counts = swarm.accounting.contributions()
        return Served(theta=theta, merged=merged, run_tokens=sum(counts.values()), peer_tokens=counts)

    def _merged(self, came: ServedWeights, open_rounds: int) -> MergeInput:
        known, self._served_tokens = self._served_tokens, came.run_tokens
        return MergeInput(
            peer=self.publisher.server,
            round=came.arrivals,
            part=1,
            tokens=max(0, came.run_tokens - known) if known else 0,
            staleness_rounds=open_rounds,
            pull_s=came.pull_s,
        )

    def _go_on_from(self, theta: Tensor, arrivals: int, entered_round: int | None) -> tuple[Tensor, int]:
        """Return (weights to continue from, given the server's weights; number of this peer's rounds that the server's
        weights lack)."""
        with self.publisher.lock:
            uploads = self.publisher.uploads
            uploads.entered(entered_round)
            pieces = uploads.pieces
        self._base_arrivals = arrivals
        return lead(theta, [piece.gradient for piece in pieces]), len(pieces)

    # ------------------------------------------------------------- present weights

    def present_state(self, progress: Progress) -> Replaced | None:
        """See `SwarmExchange`: the server's state, or if it is gone and this peer has nothing, the mean of others."""
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
                break  # the server's weights arrive at the end of its first round
            sample = random.sample(others, min(_SAMPLE, len(others)))
            if not is_there and (new := self._fetch(sample, progress, reason)) is not None:
                return new
            self.stop.sleep(1.0)
        if has_own:
            return None
        raise RunTimeError(
            "no peer delivered the run's current weights; try again in a minute", code="state-not-delivered"
        )

    def _fetch(self, peers: Sequence[str], progress: Progress, reason: str) -> Replaced | None:
        swarm = self.swarm
        fetching = self.network.submit(swarm.states.fetch(peers, 1))
        states = wait_for(fetching, self.stop, lambda: self.on_arriving(swarm.store.arriving))
        if not states:
            return None
        is_server = states[0].peer == self.publisher.server
        new = self._progress_of(states, progress.round, is_server=is_server)
        state = consensus_of(states, layout_of_specs(swarm.specs))
        if is_server:
            theta, round = self._start_from(states[0], state.theta, new.round)
            state, new = OuterState(theta, state.momentum), dataclasses.replace(new, round=round)
        self.offer(state, new)
        return Replaced(state=state, progress=new, from_peer=states[0].peer, reason=reason)

    def _start_from(self, fetched: FetchedState, theta: Tensor, round: int) -> tuple[Tensor, int]:
        """Return the weights to continue from, given the server's state, and a round later than any that the server has
        of this peer.
        """
        manifest = fetched.held.snapshot.manifest
        try:
            entered = entered_round_untrusted(manifest, self.swarm.identity.peer_id)
        except BadBytesError as error:
            self.swarm.peers.refused(fetched.peer, error)
            entered = None
        self.link.take()  # whatever arrived before is older
        self.link.heard_s = swarm_time()
        theta, _ = self._go_on_from(theta, manifest.arrivals, entered)
        return theta, round if entered is None else max(round, entered + 1)

    def final_theta(self, own: Tensor) -> Tensor:
        """See `SwarmExchange`: the server's last weights; without a server, the mean of all that have finished."""
        swarm, total, server = self.swarm, self.run.run.total_tokens, self.publisher.server
        give_up_s = time.monotonic() + _LAST_ROUND_S
        states: list[FetchedState] = []
        while not states and time.monotonic() < give_up_s:
            wait_for(self.network.submit(swarm.greeter.greet_everyone()), self.stop)
            info = swarm.membership.info(server)
            if info is not None and info.run_tokens >= total:
                states = wait_for(self.network.submit(swarm.states.fetch_weights([server], 1)), self.stop)
            elif swarm.membership.state(server) is not PeerState.LIVE and self._others_are_done(total):
                break
            self.stop.sleep(_POLL_INTERVAL_S)
        if states:
            theta = theta_of(states[0], own.numel())
        else:
            others = [info.peer for info in swarm.membership.volunteers() if info.run_tokens >= total]
            sample = random.sample(others, min(_SAMPLE - 1, len(others)))
            states = wait_for(self.network.submit(swarm.states.fetch_weights(sample, 1)), self.stop)
            thetas = [own, *(theta_of(state, own.numel()) for state in states)]
            theta = mean_of_near(thetas, layout_of_specs(swarm.specs))[0] if states else own
        self._say_that_it_is_finished()
        return theta

    def _others_are_done(self, total: int) -> bool:
        return all(info.run_tokens >= total for info in self.swarm.membership.volunteers())
