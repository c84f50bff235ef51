"""Process that owns a node: prints its daemon's process id and socket folder, then waits to be killed.

After SIGINT it prints whether the daemon is still there, leaves, and ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from swarmtrain.network.identity import load_or_create_identity
from swarmtrain.network.node import NetworkThread, Node, NodeSettings


def main(directory: Path) -> None:
    interrupted = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    key_path = directory / "identity.key"
    identity = load_or_create_identity(key_path)
    network = NetworkThread()
    settings = NodeSettings(directory=directory, listen=("/ip4/127.0.0.1/tcp/0",))
    node = network.run(Node.start(settings, identity, key_path), 30)
    daemon = node._p2p._child
    print(daemon.pid, node._sockets, flush=True)
    interrupted.wait()
    os.kill(daemon.pid, 0)
    print("alive" if network.run(node.addresses(), 5) else "dead", flush=True)
    network.run(node.stop(), 5)
    network.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
