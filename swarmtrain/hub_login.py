"""Login of the Hugging Face hub, for what a run names: its data, its model, its tokenizer.

A run file may name what only the owner of this machine can read. So a login is used only if the owner says so, and then
only the one in `HF_TOKEN`, never one that is saved in the home folder.
"""

from __future__ import annotations

import os

USE_LOGIN = "SWARMTRAIN_USE_HF_TOKEN"
"""Environment variable by which the owner says so; the option `--use-hf-token` sets it."""


def use_login() -> None:
    """Use the login of `HF_TOKEN` in this process and its children."""
    os.environ[USE_LOGIN] = "1"


def hub_token() -> str | bool:
    """Return the login, as the hub's libraries take it; False: none."""
    return (os.environ.get(USE_LOGIN, "0") not in ("", "0") and os.environ.get("HF_TOKEN")) or False


def has_unused_login() -> bool:
    """Return whether there is a login whose owner has not said that it may be used."""
    return bool(os.environ.get("HF_TOKEN")) and not hub_token()
