"""Find a run by its invite: dial its peers, correct the clock, and fetch the run by its hash."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field

from swarmtrain.errors import BadBytesError, ClockError, NewerRunError, PeerError, RunTimeError, VersionError
from swarmtrain.events import FetchedEvent
from swarmtrain.network.discovery.invite import Invite, InvitedPeer
from swarmtrain.network.discovery.run_lookup import PublishedRun, fetch_published, find_run
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.service import PeerCalls
from swarmtrain.peer.checkpoints.manager import known_peers, run_to_resume
from swarmtrain.peer.lifecycle.folder import PeerFolder
from swarmtrain.peer.lifecycle.needs import Needs, needs_of
from swarmtrain.peer.lifecycle.node import Emit, PeerSettings, clock_warnings, wait_for
from swarmtrain.peer.lifecycle.preparation import summary_of
from swarmtrain.peer.lifecycle.stop import StopFlag
from swarmtrain.run import parse_published_untrusted

_log = logging.getLogger(__name__)
_FIND_S = 15.0
_FETCH_ATTEMPTS = 3


@dataclass(kw_only=True)
class RunFetcher:
    """Finds peers of an invite's run, and fetches the run. Runs on the main thread."""

    invite: Invite
    folder: PeerFolder
    network: NetworkThread
    node: Node
    emit: Emit
    stop: StopFlag
    settings: PeerSettings
    needs: Needs = field(init=False)
    """What the run takes of this machine, once it is fetched."""
    through: tuple[InvitedPeer, ...] = field(init=False)
    """Peers to dial: those of the invite, and those known when this peer last ran in this folder."""

    def __post_init__(self) -> None:
        self.through = known_peers(list(self.invite.peers), self.folder.kept_peers())

    def fetch(self) -> tuple[PublishedRun, RunTimeError | None]:
        """Return (the run, None), or if nobody answers (the run kept in the folder, the error that says so).

        A kept run lets the peer continue from its checkpoint. Raises RunTimeError if there is none.
        """
        nobody: RunTimeError | None = None
        try:
            source = self.find(_FIND_S)
        except (ClockError, VersionError):
            raise  # somebody answers: continuing alone would split the run
        except RunTimeError as error:
            kept = run_to_resume(self.folder, self.invite, self.node.identity.peer_id)
            if kept is None:
                raise
            _log.info("continuing from this folder: %s", error)
            published, source, nobody = kept, self.node.identity.peer_id, error
        else:
            published = self._fetch_from(source)
            self.folder.keep_run(published)
            # Started again without the invite, it dials the peers that the invite named.
            if not self.folder.kept_peers():
                with contextlib.suppress(OSError):
                    self.folder.keep_peers(self.through)
        self.needs = needs_of(published, self.settings)
        self.emit(
            FetchedEvent(
                run_sha256=published.sha256,
                run_name=published.run.run.name,
                total_tokens=published.run.run.total_tokens,
                held_out_bytes=len(published.held_out),
                from_peer=source,
                summary=f"{summary_of(published.run)}; it takes {self.needs}",
            )
        )
        return published, nobody

    def find(self, limit_s: float) -> str:
        """Return a peer that answers; from then on the clock is corrected.

        Raises RunTimeError if nobody answers, ClockError if the correction would be large.
        """
        finding = find_run(
            self.node, self.invite.run_sha256, self.through, limit_s, accept_clock=self.settings.accept_clock
        )
        found = wait_for(self.network.submit(finding), self.stop)
        for warning in clock_warnings(found):
            self.emit(warning)
        return found.peer

    def _fetch_from(self, source: str) -> PublishedRun:
        """Fetch the run from `source` in up to three attempts: a stream may break through no fault of the peer."""
        calls = PeerCalls(self.node, self.invite.run_sha256)
        for attempts_left in reversed(range(_FETCH_ATTEMPTS)):
            fetching = fetch_published(calls, source, parse_published_untrusted, self.folder.kept_files())
            try:
                return wait_for(self.network.submit(fetching), self.stop)
            except NewerRunError as error:
                raise VersionError(*error.problems) from None
            except PeerError as error:
                if not attempts_left or isinstance(error, BadBytesError):
                    raise RunTimeError(
                        f"peer {source} did not deliver the run: {error}; try again, or ask for an invite from another "
                        "peer",
                        code="run-not-delivered",
                    ) from None
            self.stop.sleep(1.0)
        raise AssertionError("the last attempt returns or raises")
