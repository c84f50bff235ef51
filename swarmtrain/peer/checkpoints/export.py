"""Get the model out: export it from a live swarm or from a peer's folder, and generate text with it."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from swarmtrain.data.template_process import TemplateError, TemplateProcess
from swarmtrain.data.tokenizer_file import TokenizerFile
from swarmtrain.data.tokenizer_json import own_tokenizer, tokenizer_json
from swarmtrain.data.tokenizer_source import bundle_of_files
from swarmtrain.data.tokens import Tokenizer, Tokens, tokenizer_from_bytes_untrusted
from swarmtrain.errors import BadBytesError, NewerRunError, PeerError, RunTimeError, UserError, VersionError
from swarmtrain.events import Event, WarningEvent
from swarmtrain.model.export import (
    ExportedModel,
    cast_exported,
    copy_exported,
)
from swarmtrain.model.language_model import LanguageModel
from swarmtrain.model.parameter_count import num_trained_parameters
from swarmtrain.model.provenance import description_of
from swarmtrain.model.run_model import build_run_model, empty_model, spec_of
from swarmtrain.model.run_stages import empty_run_stage, run_stage_shapes
from swarmtrain.model.sampling import generate
from swarmtrain.network.codec import average_bytes_untrusted, tensor_specs
from swarmtrain.network.discovery.invite import Invite, parse_invite
from swarmtrain.network.discovery.run_lookup import PublishedRun, fetch_published, find_run
from swarmtrain.network.node import NetworkThread
from swarmtrain.network.service import PeerCalls
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.checkpoints.adapter_base import load_with_base, merged_export
from swarmtrain.peer.checkpoints.checkpoint import load_newest_weights
from swarmtrain.peer.checkpoints.files import CheckpointFolder
from swarmtrain.peer.control.arrival import FileProgress
from swarmtrain.peer.control.board import StatusBoard
from swarmtrain.peer.devices.model_device import move_model
from swarmtrain.peer.lifecycle.folder import PeerFolder, peer_folder, running_invite
from swarmtrain.peer.lifecycle.node import (
    PeerSettings,
    leave_swarm,
    named_weights,
    save_model,
    save_weights,
    start_node,
    use_threads,
    useful_threads,
    wait_for,
)
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.peer.merging.consensus_state import fetch_consensus_state
from swarmtrain.peer.model_files.base_files import described_model
from swarmtrain.peer.model_files.fetcher import FilesPlace, SwarmSource
from swarmtrain.protocol.devices import DeviceRequest
from swarmtrain.protocol.membership.membership import PeerInfo
from swarmtrain.protocol.tokens.progress import Progress
from swarmtrain.run import parse_published_untrusted
from swarmtrain.words import ago_in_words, counted

_log = logging.getLogger(__name__)
_SAMPLE = 16
_ANSWER = "\ue000"
"""Character that stands for an answer, to see what a chat template writes around one."""
_LOOKS = 3
"""Times that checkpoints are looked for, while a running peer replaces them."""


def onlooker_place(cache: Path, model_dir: Path | None, stop: StopFlag) -> FilesPlace:
    """Return where this machine may have the files of a run's model: the folder `cache`, and that of `--model-dir`."""

    def emit(event: Event) -> None:
        if isinstance(event, WarningEvent):
            _log.warning("%s", event.message)

    progress = FileProgress(StatusBoard("export", time.time()), emit)
    return FilesPlace(cache=cache, given=model_dir, progress=progress, emit=emit, stop=stop)


def export_from_folder(folder: Path, target: Path, place: FilesPlace, *, is_merged: bool = False) -> int:
    """Copy the model in a peer's folder to `target`; return the run's tokens.

    Taken is the final model, else the archive, else the newest checkpoint, to which `place` has the description of a
    model of Hugging Face; the folder may be an export itself. With `is_merged`, an adapter is merged into the model
    that it belongs to, which `place` has. Raises UserError if there is none, RunTimeError if it cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists; give a new folder with --to", code="folder-not-empty")
    if is_merged:
        with _temporary_folder() as temporary:
            export_from_folder(folder, temporary / "adapter", place)
            with _writing(target):
                return merged_export(temporary / "adapter", target, place)
    with _writing(target):
        for source in (folder / "model", folder / "archive", folder):
            if description_of(source) is not None:
                try:
                    return copy_exported(source, target)
                except UserError as error:
                    _log.warning("%s is not used: %s", source, error)
        return _export_checkpoint(PeerFolder(folder), target, place)


def cast_model(target: Path, dtype: str | None) -> None:
    """Cast the model that was exported to `target`; see `cast_exported`. Raises RunTimeError if the disk is full."""
    with _writing(target):
        cast_exported(target, dtype)


def _writing(target: Path) -> AbstractContextManager[None]:
    return _in_words(f"the model cannot be written to {target}", "make room there, or give another folder with --to")


@contextmanager
def _in_words(what: str, advice: str) -> Iterator[None]:
    """Turn an error of a full or read-only disk into an error of one line that ends the command."""
    try:
        yield
    except OSError as error:
        raise RunTimeError(f"{what}: {error.strerror or error}; {advice}", code="model-not-saved") from None


def _export_checkpoint(folder: PeerFolder, target: Path, place: FilesPlace) -> int:
    published = folder.kept_run()
    if published is not None and published.run.pipeline.stages > 1:
        raise UserError(
            f"{folder.path} has only some stages of the model; export from the bootstrap's folder, or from the "
            "swarm by its invite",
            code="stages-only",
        )
    found = None if published is None else _checkpointed(folder, published)
    if published is None or found is None:
        raise _no_model(folder)
    model = empty_model(spec_of(published.run, described_model(published, place, None)))
    save_model(target, model, found.theta, published, found.progress)
    return found.progress.run_tokens


def _no_model(folder: PeerFolder) -> UserError:
    return UserError(
        f"{folder.path}: has no model yet: a peer keeps a checkpoint from the first merged round on; try again then",
        code="no-model",
    )


@dataclass(frozen=True, kw_only=True)
class _Checkpointed:
    """Weights (P,) in a peer's newest checkpoint, with their counters, and the Unix time of writing."""

    theta: Tensor
    progress: Progress
    time: float


def _checkpointed(folder: PeerFolder, published: PublishedRun) -> _Checkpointed | None:
    """Return the weights in the newest checkpoint; None without one.

    The peer may be running: if it has replaced all that were listed before they were read, this looks again.
    """
    number, told = num_trained_parameters(published.run), list[str]()
    for _ in range(_LOOKS):
        told.clear()
        files = CheckpointFolder(folder.checkpoints_path, published.sha256, None)
        found = load_newest_weights(files, number, told.append)
        if found is not None or not told:
            break
    for message in told:
        _log.warning("%s", message)
    return None if found is None else _Checkpointed(theta=found[0], progress=found[1], time=found[2].time)


def export_from_swarm(
    invite: Invite, target: Path, place: FilesPlace, *, accept_clock: bool = False, is_merged: bool = False
) -> int:
    """Join as an onlooker, take the newest state and write it as a model; return the run's tokens.

    With `is_merged`, an adapter is merged into the model that it belongs to.

    Raises RunTimeError if nobody answers, nobody has trained yet, or the model cannot be written, and as
    `StopFlag.check` does if the stop of `place` asks for an end.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; give a new folder with --to", code="folder-not-empty")
    pulled = _pulled(invite, place, accept_clock, has_base=is_merged)
    if is_merged:
        with _temporary_folder() as temporary:
            save_weights(temporary / "adapter", pulled.weights, pulled.published, pulled.progress, pulled.files)
            with _writing(target):
                return merged_export(temporary / "adapter", target, dataclasses.replace(place, given=pulled.files))
    with _writing(target):
        save_weights(target, pulled.weights, pulled.published, pulled.progress, pulled.files)
    return pulled.progress.run_tokens


def model_of_swarm(invite: Invite, place: FilesPlace, *, accept_clock: bool = False) -> ExportedModel:
    """Join as an onlooker and return the model of the newest state. Raises as `export_from_swarm` does."""
    pulled = _pulled(invite, place, accept_clock, has_base=True)
    return _built(pulled.published, pulled.files, pulled.weights, pulled.progress)


def model_of_folder(folder: Path, place: FilesPlace, *, accept_clock: bool = False) -> tuple[ExportedModel, str]:
    """Return the newest model of a peer, by its folder, and in words what it is.

    The peer may be running: only files are read. Taken is the final model, else the archive, else the newest
    checkpoint. A peer that holds stages of a pipeline has no whole model: then the newest state is taken from the
    swarm, as by `model_of_swarm`. Raises UserError if there is none.
    """
    peer = PeerFolder(folder)
    for source, what in ((peer.model_path, "final model"), (peer.archive_path, "newest archive")):
        if description_of(source) is not None:
            try:
                exported = load_with_base(source, place)
            except UserError as error:
                _log.warning("%s is not used: %s", source, error)
            else:
                return exported, f"the run's {what}, after {exported.run_tokens} tokens"
    published = peer.kept_run()
    if published is None:
        raise UserError(
            f"{folder} is not the folder of a peer, or it has no run yet; `swarmtrain status --all` lists the peers "
            "here with their folders",
            code="no-model",
        )
    if published.run.pipeline.stages > 1:
        exported = model_of_swarm(_invite_of(peer, published), place, accept_clock=accept_clock)
        return exported, f"the swarm's model after {exported.run_tokens} tokens (this peer holds only stages of it)"
    found = _checkpointed(peer, published)
    if found is None:
        raise _no_model(peer)
    files = described_model(published, place, None, weights=published.run.adapter.is_used)
    specs = tensor_specs(empty_model(spec_of(published.run, files)).trained_parameters())
    exported = _built(published, files, named_weights(found.theta, specs), found.progress)
    ago = ago_in_words(max(0.0, time.time() - found.time))
    rounds = counted(found.progress.round, "round")
    return exported, f"the peer's model after {rounds} and {exported.run_tokens} tokens of the run, written {ago}"


def _invite_of(folder: PeerFolder, published: PublishedRun) -> Invite:
    """Return an invite to the peer's run: the running peer's own, else one of the peers that it knew."""
    if (line := running_invite(folder.path)) is not None:
        return parse_invite(line)
    return Invite(published.sha256, folder.kept_peers())


def _built(
    published: PublishedRun, files: Path | None, weights: Mapping[str, Tensor], progress: Progress
) -> ExportedModel:
    """Build the run's model with these weights."""
    run = published.run
    model = build_run_model(run, files) if run.adapter.is_used else empty_model(spec_of(run, files))
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            parameter.copy_(weights[name])
    return ExportedModel(
        model=model, tokenizer=published.tokenizer, held_out=published.held_out, run_tokens=progress.run_tokens
    )


@dataclass(frozen=True, kw_only=True)
class _Pulled:
    """Run of an invite, and what its peers have now."""

    published: PublishedRun
    files: Path | None
    """Folder with what describes a model of Hugging Face, and with its weights if an adapter's base was asked for."""
    weights: dict[str, Tensor]
    progress: Progress
    """Counters, of a pipeline those of its first stage."""


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with (
        _in_words("no temporary folder can be used", "make room, or name another place with TMPDIR"),
        tempfile.TemporaryDirectory(prefix="swarmtrain-") as directory,
    ):
        yield Path(directory)


def _pulled(invite: Invite, place: FilesPlace, accept_clock: bool, *, has_base: bool) -> _Pulled:
    """Return what the peers have; with `has_base` the files of an adapter's base too."""
    with _temporary_folder() as directory, peer_folder(directory) as folder:
        return _pulled_from(invite, folder, place, accept_clock, has_base)


def _pulled_from(invite: Invite, folder: PeerFolder, place: FilesPlace, accept_clock: bool, has_base: bool) -> _Pulled:
    network, stop = NetworkThread(), place.stop
    swarm = node = None
    try:
        node = start_node(network, PeerSettings(directory=folder.path, name="export"), folder, stop)
        finding = find_run(node, invite.run_sha256, invite.peers, accept_clock=accept_clock)
        source = wait_for(network.submit(finding), stop).peer
        calls = PeerCalls(node, invite.run_sha256)
        published = wait_for(network.submit(fetch_published(calls, source, parse_published_untrusted, {})), stop)
        _check_tokenizer_untrusted(published.tokenizer)
        has_base = has_base and published.run.adapter.is_used
        files = described_model(published, place, SwarmSource(network, node, invite.peers), weights=has_base)
        weights: dict[str, Tensor] = {}
        counters: list[Progress] = []
        for part, named in _parts(published, files):
            specs = tensor_specs(named)
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
        return _Pulled(published=published, files=files, weights=weights, progress=counters[0])
    except NewerRunError as error:
        raise VersionError(*error.problems) from None
    except PeerError as error:
        raise RunTimeError(
            f"the swarm did not deliver its model: {error}; try again in a minute", code="model-not-delivered"
        ) from None
    finally:
        leave_swarm(network, swarm, node)


def _check_tokenizer_untrusted(tokenizer: bytes) -> None:
    """Raise BadBytesError if a run's tokenizer cannot be exported: before the weights are fetched."""
    try:
        tokenizer_json(tokenizer)
    except ValueError as error:
        raise BadBytesError(f"a tokenizer that cannot be used ({error})", code="bad-format") from None


def _parts(
    published: PublishedRun, files: Path | None
) -> Iterator[tuple[PublishedRun, Iterable[tuple[str, nn.Parameter]]]]:
    """Yield each swarm whose weights make up the model, with tensors of their shapes by name: the run's own, or one for
    each stage.
    """
    run = published.run
    if run.published is None or run.published.boundaries is None:
        yield published, empty_model(spec_of(run, files)).trained_parameters()
        return
    for number, shape in enumerate(run_stage_shapes(run, files, run.published.boundaries)):
        yield published.of_stage(number), empty_run_stage(shape).named_parameters()


@dataclass(frozen=True)
class Sampling:
    """Settings for generating text; `threads` 0 uses as many as are useful. `device` "auto" is the best that works."""

    num_tokens: int
    temperature: float
    seed: int
    threads: int = 0
    device: DeviceRequest = field(default_factory=DeviceRequest)
    ends: tuple[int, ...] = ()
    """Tokens at which to stop, besides the one that ends a text."""


def sample_text(
    exported: ExportedModel,
    prompt: str | Tokens,
    sampling: Sampling,
    advance: Callable[[int], None] = lambda number: None,
    tell: Callable[[str], None] = lambda words: None,
) -> str:
    """Return what the model writes after the prompt, up to a token that ends it. `prompt` may be tokens (n,). `advance`
    is called with 1 for each token, `tell` with why a device was passed over.

    Raises UserError if the device asked for is not there or does not work.
    """
    use_threads(sampling.threads or useful_threads(exported.model))
    move_model(exported.model, sampling.device, 1, tell)
    tokenizer = tokenizer_of(exported)
    tokens = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt

    def goes_on() -> bool:
        advance(1)
        return True

    return continuation(exported.model, tokenizer, tokens, sampling, goes_on).decode(errors="replace")


def chat_prompt(exported: ExportedModel, messages: list[dict[str, str]]) -> tuple[Tokens, tuple[int, ...]] | None:
    """Return the tokens (n,) with which the model's chat template asks for the assistant's next turn, and the one that
    ends a turn if it is one; None without a template. Raises UserError if it refuses the conversation."""
    tokenizer = tokenizer_of(exported)
    if not isinstance(tokenizer, TokenizerFile) or not (template := tokenizer.bundle.chat_template):
        return None
    with TemplateProcess(template, tokenizer.bundle.special_tokens) as process:
        try:
            text, spans = process.write([*messages, {"role": "assistant", "content": _ANSWER}])[-1]
        except TemplateError as error:
            raise UserError(
                f"the model's chat template refuses this: {error}; give --raw to continue a text", code="chat-refused"
            ) from None
    parts = text[: spans[-1][0]], text.rpartition(_ANSWER)[2].strip()
    asked, end = (tokenizer.encode_spans(part, ())[0] for part in parts)
    return asked, tuple(end.tolist()) if len(end) == 1 else ()


def continuation(
    model: LanguageModel, tokenizer: Tokenizer, prompt: Tokens, sampling: Sampling, goes_on: Callable[[], bool]
) -> bytes:
    """Return what the model writes after the prompt's tokens (n,), up to a token that ends it; that one is not among
    it. `goes_on` is called after each token, and ends it by returning False. The model computes where it is:
    `threads` and `device` of `sampling` are left alone.
    """
    ends = (*tokenizer.document_end[-1:], *sampling.ends)

    def is_wanted(token: int) -> bool:
        return goes_on() and token not in ends

    written = generate(
        model, [int(token) for token in prompt], sampling.num_tokens, sampling.temperature, sampling.seed, is_wanted
    )
    if written and written[-1] in ends:
        written.pop()
    return tokenizer.decode(written)


def tokenizer_of(exported: ExportedModel) -> Tokenizer:
    """Return the model's tokenizer. Raises UserError if it is invalid, or its library is missing."""
    data = own_tokenizer(exported.tokenizer)
    if data is None:
        files = {"tokenizer.json": exported.tokenizer, **exported.beside_tokenizer}
        data = bundle_of_files(files.get, "the model's folder").to_bytes() if len(files) > 1 else exported.tokenizer
    try:
        return tokenizer_from_bytes_untrusted(data, exported.model.vocabulary_size)
    except BadBytesError as error:
        raise UserError(
            f"the model's tokenizer cannot be used: {error}; export the model again", code="not-a-model"
        ) from None
