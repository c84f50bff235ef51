"""Deterministic search for faults: random schedules of what goes wrong, played in virtual time, and what must hold.

A schedule follows from a seed (`draw`), the same one plays the same way everywhere (`play`), and one in which an
invariant breaks is shortened (`shrink`) and written down as a test (`as_test`). Peers run the product's own decisions.
"""

from swarmtrain.simulate.search.play import as_test, draw, play, replay, shrink
from swarmtrain.simulate.search.schedule import FaultSchedule, ScheduledFault, Violation

__all__ = ["FaultSchedule", "ScheduledFault", "Violation", "as_test", "draw", "play", "replay", "shrink"]
