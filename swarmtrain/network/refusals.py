"""Report bad bytes: which rule a peer broke, in a word, and at most how often that is reported."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from swarmtrain.errors import PeerError
from swarmtrain.events import Event, RefusedEvent
from swarmtrain.network.daemon import swarm_time
from swarmtrain.protocol.membership.budgets import NamedOnce

_log = logging.getLogger(__name__)
_AGAIN_S = 60.0
RULES = {
    "against-own": "direction",
    "bad-hash": "hash",
    "bad-presence": "presence",
    "bad-publication": "publication",
    "bad-round": "round",
    "bad-shape": "shape",
    "bad-signature": "signature",
    "bad-size": "size",
    "bad-stream": "stream",
    "bad-tokens": "tokens",
    "far-from-usual": "huge",
    "not-finite": "finite",
    "stalled": "stall",
    "too-often": "flood",
}
"""Rules by the codes of errors. Events and metrics have the rules, so their names stay."""


@dataclass
class Refusals:
    """Emits an event for each refusal, at most once a minute per peer and rule: a peer may send as fast as it likes."""

    emit: Callable[[Event], None]
    spares: Callable[[str, str, str], bool] = lambda peer, rule, detail: False
    """Returns whether (peer, rule, detail) must not be reported yet."""
    _named: NamedOnce = field(default_factory=lambda: NamedOnce(again_s=_AGAIN_S))

    def tell(self, peer: str, error: PeerError) -> None:
        """Report that something `peer` sent was refused."""
        rule = rule_of(error.code)
        if not self.spares(peer, rule, str(error)) and self._named.is_due(peer, swarm_time(), rule):
            self.emit(RefusedEvent(from_peer=peer, rule=rule, detail=str(error)))
        else:
            _log.debug("refused from %s: %s", peer, error)


def rule_of(code: str) -> str:
    """Return the rule of the `refused` event for an error's code."""
    return RULES.get(code, "format")
