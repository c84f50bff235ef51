"""Trackers that a peer's curves can go to: one class for each, behind the protocol `Sink`.

A sink runs in a thread of the trackers' process (`process.py`), so it may be slow, print, hang or fail. This module
imports nothing heavy: each library is imported when its sink begins. What a library would send by itself, such as the
command line, the machine's name, installed packages or what the machine is doing, is switched off; a tracker gets the
points, and the run file and the machine as its configuration.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_INIT_LIMIT_S = 60.0
"""Seconds for W&B's server to answer at the start; without an answer points are kept on the disk."""


@dataclass(frozen=True, kw_only=True)
class TrackedPeer:
    """Peer whose curves are drawn."""

    folder: str
    """Folder of the peer, in which files of trackers may be kept."""
    id: str
    """Word that stays the same as long as the folder does, whatever process draws the curves."""
    run: str
    """Name of the run."""
    group: str
    """The run's name with a part of its hash: of two runs of one name, the right one."""
    name: str
    """Name of the peer."""
    role: str
    """`volunteer` or `bootstrap`."""
    step: int
    """Step of the last point that was drawn; 0 if there is none."""
    run_file: str
    """The published run file."""
    config: Mapping[str, Any]
    """The run file and the machine, as nested tables."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Place where a tracker's curves are."""

    where: str
    """Folder or address."""
    shown_by: str = ""
    """Command that shows them; empty if `where` is an address to open."""
    offline: str = ""
    """Reason why points are kept on this machine although the tracker has a server; usually empty."""


class Sink(Protocol):
    """Tracker, as its process drives it. Each method may raise whatever the library raises."""

    def begin(self, peer: TrackedPeer) -> Place:
        """Continue the curves of `peer`, or begin them; return where they are."""
        ...

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """Add a point to the curves named in `values`. `step` is greater than that of the point before; `time` is in
        Unix seconds."""
        ...

    def end(self) -> None:
        """Write what is left; no point follows."""
        ...


class TensorBoardSink:
    """Event files in the peer's folder, one for each process of the peer; TensorBoard joins them."""

    def begin(self, peer: TrackedPeer) -> Place:
        """See `Sink.begin`."""
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = Path(peer.folder) / "tensorboard"
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))
        about = summary_pb2.SummaryMetadata(
            plugin_data=summary_pb2.SummaryMetadata.PluginData(
                plugin_name="text", content=TextPluginData(version=0).SerializeToString()
            )
        )
        # Not by TensorBoard's own summaries or torch's: both import far more than is used here.
        for tag, text in _texts(peer).items():
            tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
            value = self._summary.Value(tag=tag, metadata=about, tensor=tensor)
            self._writer.add_event(self._event(step=peer.step, summary=self._summary(value=[value])))
        self._writer.flush()
        return Place(where=str(folder), shown_by=f"tensorboard --logdir {shlex.quote(str(folder))}")

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """See `Sink.log`."""
        summary = self._summary(
            value=[self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._writer.add_event(self._event(step=step, wall_time=time, summary=summary))
        self._writer.flush()  # at most a few points a minute: a peer that is killed loses none

    def end(self) -> None:
        """See `Sink.end`."""
        self._writer.close()


def _texts(peer: TrackedPeer) -> dict[str, str]:
    """Return what TensorBoard shows as text: Markdown, by tag."""
    machine = "\n".join(f"| {name} | {value} |" for name, value in peer.config["machine"].items())
    run_file = "\n".join(f"    {line}" for line in peer.run_file.splitlines())
    return {"config/run file": run_file, "config/machine": f"| machine | |\n|---|---|\n{machine}"}


class WandbSink:
    """Weights & Biases. The project is `WANDB_PROJECT`, or the run's name; other `WANDB_` variables work as usual."""

    def begin(self, peer: TrackedPeer) -> Place:
        """See `Sink.begin`. Without a login or a server, points are kept in the peer's folder, for `wandb sync`."""
        import wandb

        offline = ""
        try:
            self._run = self._init(wandb, peer)
        except wandb.errors.Error as error:
            if os.environ.get("WANDB_MODE"):
                raise
            offline = str(error)
            self._run = self._init(wandb, peer, mode="offline")
        if self._run.url and not self._run.offline:
            return Place(where=self._run.url)
        folder = str(Path(self._run.dir).parents[1])
        # One folder for each process of the peer: W&B sends them in their order, as one run.
        shown_by = f"wandb sync {shlex.quote(folder)}/offline-run-*-{peer.id}"
        return Place(where=folder, shown_by=shown_by, offline=offline)

    def _init(self, wandb: Any, peer: TrackedPeer, **more: str) -> Any:
        wanted = {
            "silent": True,
            "console": "off",
            "host": peer.name,
            "init_timeout": _INIT_LIMIT_S,
            "disable_git": True,
            "disable_code": True,
            "disable_job_creation": True,
            "save_code": False,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
        }
        # Those that begin with x_ may go: this process has nothing in its command line or environment to be kept.
        known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or peer.run,
            id=peer.id,
            resume="allow",
            name=peer.name,
            group=peer.group,
            job_type=peer.role,
            dir=peer.folder,
            config=dict(peer.config),
            settings=wandb.Settings(**known),
            **more,
        )

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """See `Sink.log`."""
        self._run.log({**values, "_timestamp": time}, step=step, commit=True)

    def end(self) -> None:
        """See `Sink.end`."""
        self._run.finish()


class TrackioSink:
    """Trackio: on this machine, or in the space or server that `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` names."""

    def begin(self, peer: TrackedPeer) -> Place:
        """See `Sink.begin`."""
        import trackio

        self._run = trackio.init(
            project=peer.run,
            name=f"{peer.name}-{peer.id}",  # its runs are continued by their names
            group=peer.group,
            config=dict(peer.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        if remote:
            return Place(where=remote.partition("?")[0])  # after it comes the token that may write
        return Place(where=str(trackio.utils.TRACKIO_DIR), shown_by=f"trackio show --project {shlex.quote(peer.run)}")

    def log(self, step: int, time: float, values: Mapping[str, float]) -> None:
        """See `Sink.log`."""
        self._run.log(dict(values), step=step)

    def end(self) -> None:
        """See `Sink.end`."""
        self._run.finish()


SINKS: Mapping[str, type[Sink]] = {"tensorboard": TensorBoardSink, "wandb": WandbSink, "trackio": TrackioSink}
"""Each tracker's sink, by the name that `--report-to` takes."""
