"""Start a container of wan.yaml: its emulated link, the firewall that leads all traffic through it, and then the peer.

The link runs as a separate user, the only one that may send to others; if it ends, nothing passes. The peer cannot
bypass it: it may not change the firewall, and its non-TCP traffic, such as requests to a router for a port, is dropped.
Names are resolved at an address of the container itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import socket
import subprocess
import sys

from own_link import OwnLink
from pydantic import ValidationError

from swarmtrain.peer.local.swarm import link_shape
from swarmtrain.rehearsal import LinksSection

LINK_USER, PEER_USER = "link", "swarmtrain"
SETTINGS = {
    "SWARMTRAIN_LINK_RTT": "rtt_ms",
    "SWARMTRAIN_LINK_UP": "up_mbit",
    "SWARMTRAIN_LINK_DOWN": "down_mbit",
    "SWARMTRAIN_LINK_JITTER": "jitter_ms",
    "SWARMTRAIN_LINK_LOSS": "loss_percent",
}
RULES = """
table ip wan {{
    chain dialling {{
        type nat hook output priority -100;
        ip daddr 127.0.0.0/8 accept
        meta skuid {user} accept
        meta l4proto tcp counter redirect to :{dialling}
    }}
    chain dialled {{
        type nat hook prerouting priority -100;
        iif != lo meta l4proto tcp counter redirect to :{dialled}
    }}
    chain others {{
        type filter hook output priority 0;
        ip daddr 127.0.0.0/8 accept
        meta l4proto tcp ct state established,related accept
        meta skuid {user} accept
        meta l4proto tcp counter drop
        drop
    }}
}}
table ip6 wan {{
    chain others {{
        type filter hook output priority 0;
        oif lo accept
        drop
    }}
}}
"""


def settings() -> LinksSection:
    """Read the link's settings from the environment; a missing one adds no impairment."""
    try:
        given = {key: float(os.environ[name]) for name, key in SETTINGS.items() if os.environ.get(name)}
        return LinksSection(**given)
    except (ValueError, ValidationError) as error:
        sys.exit(f"error: the settings of the link ({', '.join(SETTINGS)}; peers/wan.env): {error}")


def become(user: str) -> None:
    """Become `user`, irrevocably."""
    entry = pwd.getpwnam(user)
    os.initgroups(user, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ["HOME"] = entry.pw_dir


def main() -> None:
    shape = link_shape(settings(), volunteer=True)
    link = OwnLink(shape, seed=socket.gethostname())
    rules = RULES.format(user=LINK_USER, dialling=link.dialling_port, dialled=link.dialled_port)
    subprocess.run(["nft", "--file", "-"], input=rules, text=True, check=True)
    if (child := os.fork()) == 0:
        if os.fork() == 0:  # not a child of the peer, which regards all its children as its own
            become(LINK_USER)
            logging.basicConfig(level=logging.WARNING, format="link: %(message)s")
            asyncio.run(link.serve())
        os._exit(0)
    os.waitpid(child, 0)
    become(PEER_USER)
    os.execvp("swarmtrain", ["swarmtrain", *sys.argv[1:]])


if __name__ == "__main__":
    main()
