"""What the two kinds of bootstrap have in common: that of a run, and that of a run whose model is cut into stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarmtrain.events import DoneEvent, short_peer, stamped
from swarmtrain.membership.lifecycle import PeerInfo
from swarmtrain.network.daemon import swarm_time
from swarmtrain.network.finding import PublishedRun
from swarmtrain.network.node import NetworkThread, Node
from swarmtrain.network.swarm import Swarm
from swarmtrain.peer.common import Emit, PeerSettings, as_peer, process_age_s, start_node
from swarmtrain.peer.controlled import Controlled
from swarmtrain.peer.folder import PeerFolder
from swarmtrain.peer.keeping import Keeper
from swarmtrain.peer.limits import limit_link
from swarmtrain.peer.stopping import StopFlag

__all__ = ["LAST_ARCHIVE_S", "BootstrapPeer"]

LAST_ARCHIVE_S = 4.0
"""How long one last archive may take when a bootstrap is asked to leave."""


@dataclass
class BootstrapPeer:
    """A peer that publishes, serves and archives, and does not train."""

    published: PublishedRun
    settings: PeerSettings
    folder: PeerFolder
    network: NetworkThread
    control: Controlled
    emit: Emit = field(init=False)
    stop: StopFlag = field(init=False)
    node: Node | None = None
    swarm: Swarm | None = None
    keeper: Keeper | None = None
    name: str = ""
    loss: float | None = None
    since_s: float = field(default_factory=swarm_time)

    def __post_init__(self) -> None:
        self.emit, self.stop = self.control.emit, self.control.stop

    def enter_network(self) -> tuple[Node, PeerInfo]:
        """Listen; the node, and what this peer says of itself."""
        self.control.starting("starting the network")
        node = self.node = start_node(self.network, self.settings, self.folder, self.stop)
        limit_link(node.traffic, self.settings.limits, self.published.run.network)
        self.name = self.settings.name or short_peer(node.identity.peer_id)
        self.emit = as_peer(self.emit, node.identity.peer_id, self.name)
        return node, PeerInfo(peer=node.identity.peer_id, name=self.name, is_bootstrap=True)

    def leave_stages(self) -> None:
        """Goodbye to those who hold stages, before the run's swarm is left: here there are none."""

    def ended(self, reason: str, run_tokens: int) -> DoneEvent:
        """How it ended."""
        event = DoneEvent(
            held_out_loss=self.loss, tokens=0, run_tokens=run_tokens, wall_s=process_age_s(), reason=reason
        )
        return stamped(event, 0.0, "" if self.node is None else self.node.identity.peer_id, self.name)
