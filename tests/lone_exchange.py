"""An exchange with nobody, for sessions of a test that take so many steps."""

from swarmtrain.peer.alone import _Nobody
from swarmtrain.run import RunFile


def lone_exchange(run: RunFile, inner_steps: int, num_steps: int) -> _Nobody:
    """Return the exchange of one volunteer by itself: rounds of `inner_steps` until it has taken `num_steps`."""
    total = run.run.model_copy(update={"total_tokens": num_steps * run.tokens_per_step})
    merge = run.merge.model_copy(update={"inner_steps": inner_steps})
    return _Nobody(run.model_copy(update={"run": total, "merge": merge}))
