"""Helpers shared by bootstrap and volunteer: start the node, wait interruptibly, measure and save the model, leave."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from swarmtrain.algorithm.outer import OuterState, flatten, unflatten_into
from swarmtrain.data.held_out import held_out_parts
from swarmtrain.data.tokenizer_json import tokenizer_files, tokenizer_json
from swarmtrain.data.tokens import Tokenizer
from swarmtrain.errors import RunTimeError, UserError
from swarmtrain.events import EvalEvent, Event, InviteEvent, WarningEvent, stamped
from swarmtrain.model.evaluation import TextLoss, evaluate
from swarmtrain.model.export import export_model, load_exported
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.model.model_card import ModelCard
from swarmtrain.model.run_model import spec_of
from swarmtrain.network.discovery.invite import Invite, format_invite, where_it_serves
from swarmtrain.network.discovery.run_lookup import FoundRun, PublishedRun
from swarmtrain.network.identity import load_or_create_identity, peer_id_from_bytes_untrusted
from swarmtrain.network.node import NetworkThread, Node, NodeSettings
from swarmtrain.network.reachability import listen
from swarmtrain.network.reachability.monitor import is_loopback_only
from swarmtrain.network.rounds.state_fetch import NewState
from swarmtrain.network.snapshots.store import NumServed, TensorSpec, all_chunks
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.start_options import Started
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.protocol.devices import CompileRequest, DeviceRequest, PrecisionRequest
from swarmtrain.protocol.limits import Limits
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.v1.control_pb2 import PeerStatus
from swarmtrain.words import short_peer, time_in_words

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_GOODBYE_S = 3.0
_POLL_INTERVAL_S = 0.1

_SMALL_PARAMETERS = 10_000_000
"""Below this size a step is so short that a second thread saves little. Where other programs use the processors it
costs many times that, since each step waits for a thread that has no turn.
"""

Emit = Callable[[Event], None]
"""Function that takes an event, from any thread."""


@dataclass(frozen=True, kw_only=True)
class PeerSettings:
    """Settings of a peer on this machine; addresses are multiaddresses."""

    directory: Path
    name: str
    listen: tuple[str, ...] = ()
    announce: tuple[str, ...] = ()
    data_folder: Path | None = None
    cache_folder: Path | None = None
    model_folder: Path | None = None
    """Folder with the files of the run's model, or some of them (`--model-dir`); they are used if their hashes are the
    run's."""
    limits: Limits = field(default_factory=Limits)
    device: DeviceRequest = field(default_factory=DeviceRequest)
    precision: PrecisionRequest = "auto"
    compile: CompileRequest = "auto"
    base_bits: int = 32
    """Bits of each weight of an adapter's frozen model, 32 or 4."""
    adapter_rank: int = 0
    """Components of the run's adapter, by their number, to train in each round; 0: all."""
    vram_bytes: int = 0
    """Memory of a graphics card that may be used; 0: no limit."""
    log_descriptors: tuple[int, ...] = ()  # descriptors of this process that follow the log file
    control: str = ""
    """HOST:PORT at which to serve control over TCP as well; empty: only at the socket in `directory`."""
    metrics: str = ""
    """HOST:PORT at which to serve Prometheus metrics; empty: nowhere."""
    samples_archive: bool = True
    """Of a bootstrap: whether it measures its archive and lets it write, now and then."""
    report_to: tuple[str, ...] = ()
    """Trackers that draw this peer's curves: names in `peer/trackers/sinks.py:SINKS`."""
    accept_clock: bool = False
    """True to follow the others' clock however far it is from this machine's."""
    accept_size: bool = False
    """True to take part in a run however much of this machine it takes."""
    disk_bytes: int = 0
    """Most bytes of the disk that a run may take; 0: what is free."""
    only_announced: bool = False
    """True to announce the addresses in `announce` and no others (for a rehearsal)."""
    checks_reach: bool = False
    """True to ask the others whether they can dial this peer, although all are on this machine (for a rehearsal)."""
    num_served_by: Callable[[str], NumServed] = lambda name: all_chunks
    """Return, for a peer's name, how many of a pull's chunks it serves, so that pulls can fail (for a rehearsal)."""
    started: Started | None = None
    """Command line by which the peer is started, to be kept in its folder."""
    show_status: Callable[[Callable[[], PeerStatus]], None] = lambda status: None
    """Called with a function that returns the status, as soon as there is one; for a display of the command's own."""
    first_stages: tuple[int, ...] = ()
    """Stages of a pipeline to take first (for a rehearsal); empty: those that need this peer most."""


def clock_warning(correction_s: float) -> WarningEvent:
    """Return the warning that the swarm's time is not this machine's."""
    direction = "behind" if correction_s > 0 else "ahead of"
    return WarningEvent(
        message=f"this machine's clock is {abs(correction_s):.1f} s {direction} the others'; this run corrects for it; "
        "set it right when you can",
        code="clock-skew",
    )


def clock_warnings(found: FoundRun) -> list[WarningEvent]:
    """Return the warnings about the clocks of the peers that answered."""
    told = [clock_warning(found.clock_correction_s)] if found.clock_correction_s else []
    for peer, ahead_s in found.clock_outliers:
        direction = "ahead of" if ahead_s > 0 else "behind"
        apart = f"{time_in_words(abs(ahead_s))} {direction}"
        message = f"the clock of {short_peer(peer)} is {apart} this peer's time; this peer ignores it"
        told.append(WarningEvent(message=message, code="clock-outlier"))
    return told


def wait_for(future: Future[_T], stop: StopFlag, look: Callable[[], None] = lambda: None) -> _T:
    """Return the future's result, calling `look` while waiting.

    Raises as `StopFlag.check` does as soon as an end is asked for; the future is cancelled then.
    """
    while not future.done():
        concurrent.futures.wait([future], _POLL_INTERVAL_S)
        if not future.done():
            try:
                stop.check()
                look()
            except BaseException:
                future.cancel()
                raise
    return future.result()


def check_addresses(settings: PeerSettings) -> None:
    """Raise RunTimeError if this peer cannot listen where its settings say, before anything is written."""
    listen.check_addresses(settings.listen, {"--control": settings.control, "--metrics": settings.metrics})


def start_node(network: NetworkThread, settings: PeerSettings, folder: PeerFolder, stop: StopFlag) -> Node:
    """Start this peer's node. Raises RunTimeError if the port is taken.

    Without an address to listen at it takes the port that it had last time in this folder, so that its invites stay
    valid.
    """
    identity = load_or_create_identity(folder.key_path)
    node_settings = NodeSettings(
        directory=folder.path,
        announce=settings.announce,
        only_announced=settings.only_announced,
        checks_reach=settings.checks_reach,
    )
    if settings.listen:
        node_settings = dataclasses.replace(node_settings, listen=settings.listen)
        return wait_for(network.submit(Node.start(node_settings, identity, folder.key_path)), stop)
    port = folder.kept_port()
    if port is not None:
        same = tuple(address.replace("/tcp/0", f"/tcp/{port}") for address in node_settings.listen)
        try:
            again = dataclasses.replace(node_settings, listen=same)
            return wait_for(network.submit(Node.start(again, identity, folder.key_path)), stop)
        except RunTimeError as error:
            _log.info("cannot listen at the previous port: %s", error)
    node = wait_for(network.submit(Node.start(node_settings, identity, folder.key_path)), stop)
    folder.keep_port(wait_for(network.submit(node.addresses()), stop))
    return node


@runtime_checkable
class _Identifiable(Protocol):
    def identify(self, peer: str, name: str) -> None: ...


def as_peer(emit: Emit, peer: str, name: str) -> Emit:
    """Return `emit` for this peer's events: PeerID and name are filled in.

    An `emit` with a method `identify` gets both too, so that an error that ends the command names the peer.
    """
    sink: object = emit
    if isinstance(sink, _Identifiable):
        sink.identify(peer, name)
    return lambda event: emit(stamped(event, 0.0, peer, name))


def leave_swarm(network: NetworkThread, swarm: Swarm | None, node: Node | None) -> None:
    """Say goodbye, end the daemon and the network thread; within a few seconds."""
    try:
        if swarm is not None:
            network.run(swarm.leave(), _GOODBYE_S)
        elif node is not None:
            network.run(node.stop(), _GOODBYE_S)
    except Exception as error:
        # The network thread must end in any case, and the daemon with it.
        _log.debug("leaving failed: %s", error)
    network.stop()


def state_of(new: NewState) -> tuple[OuterState, Progress]:
    """Return weights, momentum and counters of a pulled state. The state was checked when it was pulled."""
    assert new.held.buffer is not None
    manifest = new.held.snapshot.manifest
    vector = torch.frombuffer(new.held.buffer, dtype=torch.float32)
    size = sum(math.prod(tensor.shape) for tensor in manifest.tensors if tensor.name.startswith("theta/"))
    theta, momentum = vector[:size].clone(), vector[size:].clone()
    counts = {peer_id_from_bytes_untrusted(item.peer): item.tokens for item in manifest.peer_tokens}
    progress = Progress(
        round=manifest.round,
        run_tokens=manifest.run_tokens,
        peer_tokens=counts,
        roster_sha256=manifest.roster_sha256.hex(),
    )
    return OuterState(theta, momentum), progress


def held_out_loss(
    model: LanguageModel,
    theta: Tensor,
    published: PublishedRun,
    tokenizer: Tokenizer,
    check: Callable[[], None] = lambda: None,
) -> TextLoss:
    """Return the loss of `theta` (P,) on the run's held-out text; the model's own weights are restored afterwards.

    `check` is called between batches and may raise.
    """
    trained = model.trained_tensors()
    own = flatten(trained)
    unflatten_into(theta, trained)
    try:
        return held_out_loss_of(model, published, tokenizer, check)
    finally:
        unflatten_into(own, trained)


def held_out_loss_of(
    model: LanguageModel, published: PublishedRun, tokenizer: Tokenizer, check: Callable[[], None] = lambda: None
) -> TextLoss:
    """Return the held-out loss of the model's present weights, as a whole and by source."""
    run = published.run
    sizes, parts = (run.model.context_tokens, run.evaluation.batch_sequences), {}
    for source, part in held_out_parts(run, published.held_out, tokenizer).items():
        nats, number = evaluate(model, _checked(part.batches(*sizes), check))
        parts[source] = TextLoss(nats + part.unspelt_nats, number, part.num_bytes)
    return TextLoss.of_parts(parts)


def eval_event(round: int, loss: TextLoss, own_loss: TextLoss | None = None) -> EvalEvent | WarningEvent:
    """Return the event with the held-out loss after a round, in all its units.

    Events hold finite numbers only: return a warning if the loss is not, and leave `own_loss` out if that is not.
    """
    if not loss.is_finite:
        return WarningEvent(
            message=f"the held-out loss after round {round} is not a finite number: training diverged; lower "
            "inner.learning_rate in a new run",
            code="training-diverged",
        )
    own_loss = own_loss if own_loss is not None and own_loss.is_finite else None
    return EvalEvent(
        round=round,
        held_out_loss=loss.nats_per_byte,
        bits_per_byte=loss.bits_per_byte,
        perplexity=loss.perplexity,
        own_loss=None if own_loss is None else own_loss.nats_per_byte,
        sources=tuple(loss.by_source),
        source_losses=loss.source_losses,
    )


def _checked(batches: Iterable[Tensor], check: Callable[[], None]) -> Iterator[Tensor]:
    for batch in batches:
        check()
        yield batch


def save_final_weights(
    folder: PeerFolder,
    weights: Mapping[str, Tensor],
    published: PublishedRun,
    progress: Progress,
    loss: TextLoss,
    files: Path | None,
) -> WarningEvent | None:
    """Save the weights at a run's end, whose held-out loss is `loss`; see `save_weights`.

    Return a warning if the folder does not take them, since more remains to be done.
    """
    try:
        save_weights(folder.model_path, weights, published, progress, files, loss)
    except OSError as error:
        return WarningEvent(
            message=f"the model could not be saved in {folder.path}: {error.strerror}; make room or make it writable, "
            "then start this peer again",
            code="model-not-saved",
        )
    except UserError as error:
        return WarningEvent(message=f"the model could not be saved in {folder.path}: {error}", code="model-not-saved")
    return None


def kept_final_model(folder: PeerFolder, published: PublishedRun, files: Path | None = None) -> LanguageModel | None:
    """Return the model that the run ended with, if an earlier process of this peer left it in the folder.

    An adapter is put into the model in `files`.

    Returns None if there is no model, or it is damaged, of another run, or from before the end.
    """
    path, run = folder.model_path, published.run
    try:
        exported, data = load_exported(path, files), (path / "run.toml").read_bytes()
    except (UserError, OSError) as error:
        _log.info("no final model: %s", error)
        return None
    is_of_run = (data, exported.held_out) == (published.data, published.held_out)
    is_of_run &= exported.tokenizer in (tokenizer_json(published.tokenizer), published.tokenizer)
    is_of_run &= not run.model.is_built_in or exported.model.section == run.model
    return exported.model if is_of_run and exported.run_tokens >= run.run.total_tokens else None


def had_ended(folder: PeerFolder) -> WarningEvent:
    """Return the warning that a kept final model stays as it is."""
    return WarningEvent(
        message=f"this run has ended; its model in {folder.model_path} stays as it is", code="run-had-ended"
    )


def named_weights(theta: Tensor, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return the weights by name, as views of `theta` (P,)."""
    pieces = torch.split(theta, [math.prod(spec.shape) for spec in specs])
    return {spec.name: piece.view(tuple(spec.shape)) for spec, piece in zip(specs, pieces, strict=True)}


def save_model(folder: Path, model: LanguageModel, theta: Tensor, published: PublishedRun, progress: Progress) -> None:
    """Write the model with weights `theta` (P,), for `eval`, `generate` and other programs."""
    save_weights(folder, weights_in(model, theta), published, progress, model.spec.files)


def weights_in(model: LanguageModel, theta: Tensor) -> dict[str, Tensor]:
    """Load `theta` (P,) into the model; return the trained weights by name."""
    unflatten_into(theta, model.trained_tensors())
    return dict(model.trained_parameters())


def save_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    published: PublishedRun,
    progress: Progress,
    files: Path | None,
    loss: TextLoss | None = None,
) -> None:
    """Write the model's weights, given by name, with all files that a reader needs.

    `files` is the folder of the run's pinned model files, None if its model is built in; `loss` is the held-out loss of
    the weights, if it was measured. Raises UserError if files are missing or `folder` holds something else, and
    OSError.
    """
    run = published.run
    card = ModelCard(
        run=run,
        run_sha256=published.sha256,
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
        run_tokens=progress.run_tokens,
        peer_tokens=progress.peer_tokens,
        loss=loss,
    )
    beside = {
        **tokenizer_files(published.tokenizer, run.model.context_tokens),
        "README.md": card.text().encode(),
        "held-out.txt": published.held_out,
        "run.toml": published.data,
    }
    export_model(folder, weights, spec_of(run, files), progress.run_tokens, beside)


def invite_event(invite: Invite) -> InviteEvent:
    """Return the event that shows an invite."""
    word = format_invite(invite)
    addresses = tuple(address for peer in invite.peers for address in peer.full_addresses)
    return InviteEvent(line=f"swarmtrain join {word}", invite=word, run_sha256=invite.run_sha256, addresses=addresses)


def show_invite(swarm: Swarm, folder: PeerFolder, emit: Emit) -> None:
    """Emit the invite, and write it to the folder for `swarmtrain invite`."""
    invite = swarm.invite()
    event = invite_event(invite)
    if swarm.presence.me.is_bootstrap and (words := where_it_serves(invite)) and not is_loopback_only(event.addresses):
        # Before the invite: a peer that starts in the background is not watched after it.
        emit(WarningEvent(message=words, code="invite-local-only"))
    try:
        folder.write_invite(event.line)
    except OSError as error:  # others can join all the same
        emit(
            WarningEvent(
                message=f"the invite could not be kept in {folder.path}: {error.strerror}; make room, or make it "
                "writable",
                code="invite-not-written",
            )
        )
    emit(event)


def use_threads(threads: int) -> None:
    """Limit the processor threads of torch; 0 leaves its own choice."""
    if threads > 0:
        torch.set_num_threads(threads)


def useful_threads(model: nn.Module) -> int:
    """Return the number of threads for measuring this model or generating with it, if the person named none; 0: torch's
    choice."""
    return 1 if sum(parameter.numel() for parameter in model.parameters()) < _SMALL_PARAMETERS else 0
