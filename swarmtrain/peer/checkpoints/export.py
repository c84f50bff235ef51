"""Get the model out: export it from a live swarm or from a peer's folder, and generate text with it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from swarmtrain.data.tokenizer_json import own_tokenizer
from swarmtrain.data.tokens import Tokenizer, tokenizer_from_bytes_untrusted
from swarmtrain.errors import BadBytesError, NewerRunError, PeerError, RunTimeError, UserError, VersionError
from swarmtrain.model.export import ExportedModel, copy_exported, is_first_format, load_exported
from swarmtrain.model.language_model import ModelSpec
from swarmtrain.model.parameter_count import num_parameters
from swarmtrain.model.run_model import build_run_model, empty_model
from swarmtrain.model.run_stages import empty_run_stage, run_stage_shapes
from swarmtrain.model.sampling import generate
from swarmtrain.network.codec import average_bytes_untrusted, tensor_specs
from swarmtrain.network.discovery.invite import Invite
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.swarm import PublishedRun, Swarm, fetch_published, find_run
from swarmtrain.peer.checkpoints.checkpoint import load_newest
from swarmtrain.peer.checkpoints.files import CheckpointFolder
from swarmtrain.peer.devices.model_device import move_model
from swarmtrain.peer.lifecycle.folder import PeerFolder, peer_folder
from swarmtrain.peer.lifecycle.node import (
    PeerSettings,
    StopFlag,
    leave_swarm,
    named_weights,
    save_model,
    save_weights,
    start_node,
    use_threads,
    useful_threads,
    wait_for,
)
from swarmtrain.peer.merging.consensus_state import fetch_consensus_state
from swarmtrain.protocol.devices import DeviceRequest
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import parse_published_untrusted, run_sha256

__all__ = ["Sampling", "export_from_folder", "export_from_swarm", "model_of_swarm", "sample_text", "tokenizer_of"]

_log = logging.getLogger(__name__)
_SAMPLE = 16


def export_from_folder(folder: Path, target: Path) -> int:
    """Copy the model in a peer's folder to `target`; return the run's tokens.

    Taken is the final model, else the archive, else the newest checkpoint; the folder may be an export itself. Raises
    UserError if there is none, RunTimeError if it cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists; give a new folder with --to", code="folder-not-empty")
    with _writing(target):
        for source in (folder / "model", folder / "archive", folder):
            if (source / "config.json").exists():
                try:
                    return _copied(source, target)
                except UserError as error:
                    _log.warning("%s is not used: %s", source, error)
        return _export_checkpoint(PeerFolder(folder), target)


def _copied(source: Path, target: Path) -> int:
    """Copy the model in `source`, or write it anew if it has the first format of exports; return the run's tokens."""
    if not is_first_format(source):
        return copy_exported(source, target)
    exported, data = load_exported(source), (source / "run.toml").read_bytes()
    sha256 = run_sha256(data)
    try:
        run = parse_published_untrusted(data, sha256)
    except PeerError as error:
        raise UserError(
            f"{source / 'run.toml'} was altered: {error}; export another model", code="folder-altered"
        ) from None
    published = PublishedRun(data, sha256, run, exported.held_out, exported.tokenizer)
    progress = Progress(run_tokens=exported.run_tokens)
    save_weights(target, dict(exported.model.named_parameters()), published, progress)
    return exported.run_tokens


def _writing(target: Path) -> AbstractContextManager[None]:
    return _in_words(f"the model cannot be written to {target}", "make room there, or give another folder with --to")


@contextmanager
def _in_words(what: str, advice: str) -> Iterator[None]:
    """Turn an error of a full or read-only disk into an error of one line that ends the command."""
    try:
        yield
    except OSError as error:
        raise RunTimeError(f"{what}: {error.strerror or error}; {advice}", code="model-not-saved") from None


def _export_checkpoint(folder: PeerFolder, target: Path) -> int:
    published = folder.kept_run()
    if published is not None and published.run.pipeline.stages > 1:
        raise UserError(
            f"{folder.path} has only some stages of the model; export from the bootstrap's folder, or from the "
            "swarm by its invite",
            code="stages-only",
        )
    if published is not None:
        run, files = published.run, CheckpointFolder(folder.checkpoints_path, published.sha256, None)
        found = load_newest(files, run, num_parameters(run.model), lambda message: _log.warning("%s", message))
        if found is not None:
            kept, _ = found
            model = build_run_model(run, None)
            save_model(target, model, kept.state.theta, published, kept.progress)
            return kept.progress.run_tokens
    raise UserError(
        f"{folder.path}: has no model yet: a peer keeps a checkpoint from the first merged round on; try again then",
        code="no-model",
    )


def export_from_swarm(invite: Invite, target: Path, stop: StopFlag, *, accept_clock: bool = False) -> int:
    """Join as an onlooker, take the newest state and write it as a model; return the run's tokens.

    Raises RunTimeError if nobody answers, nobody has trained yet, or the model cannot be written.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give a new folder with --to", code="folder-not-empty")
    published, weights, progress = _pulled(invite, stop, accept_clock)
    with _writing(target):
        save_weights(target, weights, published, progress)
    return progress.run_tokens


def model_of_swarm(invite: Invite, stop: StopFlag, *, accept_clock: bool = False) -> ExportedModel:
    """Join as an onlooker and return the model of the newest state. Raises as `export_from_swarm` does."""
    published, weights, progress = _pulled(invite, stop, accept_clock)
    model = build_run_model(published.run, None)
    model.load_state_dict(weights)
    return ExportedModel(
        model=model, tokenizer=published.tokenizer, held_out=published.held_out, run_tokens=progress.run_tokens
    )


def _pulled(invite: Invite, stop: StopFlag, accept_clock: bool) -> tuple[PublishedRun, dict[str, Tensor], Progress]:
    """Return the run of `invite`, its present weights by name, and its counters (those of the first stage, for a
    pipeline).
    """
    with (
        _in_words("no temporary folder can be used", "make room, or name another place with TMPDIR"),
        tempfile.TemporaryDirectory(prefix="swarmtrain-") as directory,
        peer_folder(Path(directory)) as folder,
    ):
        return _pulled_from(invite, folder, stop, accept_clock)


def _pulled_from(
    invite: Invite, folder: PeerFolder, stop: StopFlag, accept_clock: bool
) -> tuple[PublishedRun, dict[str, Tensor], Progress]:
    network = NetworkThread()
    swarm = node = None
    try:
        node = start_node(network, PeerSettings(directory=folder.path, name="export"), folder, stop)
        finding = find_run(node, invite.run_sha256, invite.peers, accept_clock=accept_clock)
        source = wait_for(network.submit(finding), stop).peer
        calls = PeerCalls(node, invite.run_sha256)
        published = wait_for(network.submit(fetch_published(calls, source, parse_published_untrusted, {})), stop)
        weights: dict[str, Tensor] = {}
        counters: list[Progress] = []
        for part, module in _parts(published):
            specs = tensor_specs(module.named_parameters())
            # Never announced: nobody should count on an onlooker.
            me = PeerInfo(peer=node.identity.peer_id)
            swarm = Swarm(node, part, specs, average_bytes_untrusted, lambda event: None, me)
            wait_for(network.submit(swarm.start(invite.peers)), stop)
            live = [info.peer for info in swarm.membership.live()]
            present = wait_for(network.submit(fetch_consensus_state(swarm, live[:_SAMPLE], "export")), stop)
            if present is None:
                raise RunTimeError(
                    "no peer has a model yet: the first round is not over, or all have left; try "
                    "again in a minute, or export from a peer's folder with --dir",
                    code="no-model",
                )

            weights |= named_weights(present.state.theta, specs)
            counters.append(present.progress)
        return published, weights, counters[0]
    except NewerRunError as error:
        raise VersionError(*error.problems) from None
    except PeerError as error:
        raise RunTimeError(
            f"the swarm did not deliver its model: {error}; try again in a minute", code="model-not-delivered"
        ) from None
    finally:
        leave_swarm(network, swarm, node)


def _parts(published: PublishedRun) -> Iterator[tuple[PublishedRun, nn.Module]]:
    """Yield each swarm whose weights make up the model, with a module of its shapes: the run's own, or one for each
    stage.
    """
    run = published.run
    if run.published is None or run.published.boundaries is None:
        yield published, empty_model(ModelSpec(run.model))
        return
    for number, shape in enumerate(run_stage_shapes(run, None, run.published.boundaries)):
        yield published.of_stage(number), empty_run_stage(shape)


@dataclass(frozen=True)
class Sampling:
    """Settings for generating text; `threads` 0 uses as many as are useful. `device` "auto" is the best that works."""

    num_tokens: int
    temperature: float
    seed: int
    threads: int = 0
    device: DeviceRequest = field(default_factory=DeviceRequest)


def sample_text(
    exported: ExportedModel,
    prompt: str,
    sampling: Sampling,
    advance: Callable[[int], None] = lambda number: None,
    tell: Callable[[str], None] = lambda words: None,
) -> str:
    """Return the prompt and what the model writes after it. `advance` is called with each token's number, `tell` with
    why a device was passed over.

    Raises UserError if the device asked for is not there or does not work.
    """
    use_threads(sampling.threads or useful_threads(exported.model))
    move_model(exported.model, sampling.device, 1, tell)
    tokenizer = tokenizer_of(exported)
    tokens = [int(token) for token in tokenizer.encode(prompt.encode())]
    number, temperature, seed = sampling.num_tokens, sampling.temperature, sampling.seed
    written = generate(exported.model, tokens, number, temperature, seed, advance)
    return (prompt.encode() + tokenizer.decode(written)).decode(errors="replace")


def tokenizer_of(exported: ExportedModel) -> Tokenizer:
    """Return the model's tokenizer. Raises UserError if it is invalid, or its library is missing."""
    own = own_tokenizer(exported.tokenizer)
    data = exported.tokenizer if own is None else own
    try:
        return tokenizer_from_bytes_untrusted(data, exported.model.vocabulary_size)
    except BadBytesError as error:
        raise UserError(
            f"the model's tokenizer cannot be used: {error}; export the model again", code="not-a-model"
        ) from None
