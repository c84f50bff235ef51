"""The methods that a scenario can compare, by name: what each changes in the run file, and what runs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from swarmtrain.errors import UserError
from swarmtrain.methods import BATCH, DILOCO, GOSSIP, SERVER, load_object, method_named
from swarmtrain.packages import NAME
from swarmtrain.simulate.learning.hostile import gossip
from swarmtrain.simulate.learning.sampled import modest, noloco
from swarmtrain.simulate.learning.server import async_nesterov, fedbuff, server_waiting
from swarmtrain.simulate.learning.setting import RunOutcome, Setting
from swarmtrain.simulate.learning.synchronous import data_parallel, diloco


@dataclass(frozen=True, kw_only=True)
class Method:
    """Method that a scenario can name: a sentence for people, the keys that it sets in the run file, and the function
    that runs it with real models."""

    says: str
    run: Callable[[Setting], RunOutcome] | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    hostile: bool = False
    """True if some volunteers can be hostile."""
    churn: bool = False
    """True if volunteers can come and go."""
    other_works: tuple[str, ...] = ()
    """Kinds of work without tensors that it can do too."""

    @property
    def works(self) -> tuple[str, ...]:
        """Kinds of work (`scenario.work`) that it can do."""
        return ("learning", *self.other_works) if self.run is not None else self.other_works


METHODS: dict[str, Method] = {
    "data-parallel": Method(
        says="data-parallel training: gradients are averaged at every step",
        run=data_parallel,
        keys={"merge.method": "diloco", "merge.pacing": False},
    ),
    "local-sgd": Method(
        says="synchronous rounds of H steps; then the weights are averaged (arXiv 1805.09767)",
        run=diloco,
        keys={
            "merge.method": "diloco",
            "merge.pacing": False,
            "merge.outer_learning_rate": 1.0,
            "merge.outer_momentum": 0.0,
        },
        churn=True,
    ),
    "diloco": Method(
        says="synchronous rounds of H steps, each followed by an outer Nesterov step (arXiv 2311.08105)",
        run=load_object(DILOCO.learns),
        keys={"merge.method": "diloco", "merge.pacing": False},
        churn=True,
    ),
    "diloco-paced": Method(
        says="DiLoCo with an H for each peer that fits its speed",
        run=diloco,
        keys={"merge.method": "diloco", "merge.pacing": True},
        churn=True,
    ),
    "batch": Method(
        says="one large batch: gradients are added up until all have merge.target_tokens (DeDLOC, arXiv 2106.10207)",
        run=load_object(BATCH.learns),
        keys={
            "merge.method": "batch",
            "merge.outer_learning_rate": 0.7,
            "merge.outer_momentum": 0.8,
            "merge.momentum_ramp_rounds": 0,
            "merge.pacing": False,
        },
        churn=True,
    ),
    "gossip": Method(
        says="peers publish, pull and merge without waiting; swarmtrain's default",
        run=load_object(GOSSIP.learns),
        keys={"merge.method": "gossip", "merge.pacing": True},
        hostile=True,
        churn=True,
        other_works=("systems",),
    ),
    "gossip-plain": Method(
        says="gossip without the variance correction",
        run=lambda setting: gossip(replace(setting, corrected=False)),
        keys={"merge.method": "gossip", "merge.pacing": True},
        hostile=True,
        churn=True,
    ),
    "server": Method(
        says="a server that applies delayed Nesterov as updates arrive; workers do not wait for it",
        run=load_object(SERVER.learns),
        keys={"merge.method": "server", "merge.pacing": True},
        churn=True,
    ),
    "server-waiting": Method(
        says="delayed Nesterov as published: workers wait for weights that contain their gradient (arXiv 2401.09135)",
        run=server_waiting,
        keys={"merge.method": "server", "merge.pacing": True},
    ),
    "async-nesterov": Method(
        says="the naive variant of the same paper: each arriving gradient is a Nesterov step (arXiv 2401.09135)",
        run=async_nesterov,
        keys={"merge.method": "server", "merge.pacing": True},
    ),
    "fedbuff": Method(
        says="a server that averages a buffer of updates, with less weight for older ones (arXiv 2106.06639)",
        run=fedbuff,
        keys={"merge.method": "server", "merge.pacing": True},
    ),
    "noloco": Method(
        says="synchronous rounds in which random pairs merge (arXiv 2506.10911)",
        run=noloco,
        keys={"merge.method": "diloco", "merge.pacing": False},
    ),
    "modest": Method(
        says="in each round a random sample of peers trains and is averaged (arXiv 2302.13837)",
        run=modest,
        keys={"merge.method": "diloco", "merge.pacing": False},
    ),
    "pipeline": Method(
        says="a pipeline whose volunteers move between stages by measured rates; swarmtrain's default",
        keys={"pipeline.balance": "rates", "pipeline.balance_every_s": 10.0},
        churn=True,
        other_works=("pipeline",),
    ),
    "pipeline-swarm": Method(
        says="a pipeline by SWARM's rule: volunteers move by the lengths of queues (arXiv 2301.11913)",
        keys={"pipeline.balance": "queues"},
        churn=True,
        other_works=("pipeline",),
    ),
    "pipeline-fixed": Method(
        says="a pipeline whose volunteers stay in the stage that needed them when they joined",
        keys={"pipeline.balance": "none", "pipeline.balance_every_s": 10.0},
        churn=True,
        other_works=("pipeline",),
    ),
}
"""Methods by name. Keys that a method does not name are the run file's, or the grid's."""


def scenario_method(name: str) -> Method:
    """Return the method of that name, of `METHODS` or "PACKAGE:METHOD" of an installed package.

    Raises UserError if there is none, or the package's method has no function for virtual time.
    """
    if name in METHODS:
        return METHODS[name]
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"scenario.methods: there is no method {name}; there are {', '.join(METHODS)}", code="no-such-method"
        )
    kind = method_named(name)
    if not kind.learns:
        raise UserError(
            f"scenario.methods: {name} works with real peers only, since its package does not say how to simulate it; "
            "ask its authors",
            code="no-such-method",
        )
    return Method(says=kind.says, run=load_object(kind.learns), keys={"merge.method": name})
