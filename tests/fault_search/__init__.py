"""Deterministic search for faults: random schedules of faults, played in virtual time and judged by invariants.

A schedule follows from a seed (`draw`), and plays the same way everywhere (`play`). If an invariant breaks, the
schedule is shortened (`shrink`) and written down as a test (`as_test`). Peers run the product's own decisions.
"""

from fault_search.play import as_test, draw, play, replay, shrink
from fault_search.schedule import FaultSchedule, ScheduledFault, Violation

__all__ = ["FaultSchedule", "ScheduledFault", "Violation", "as_test", "draw", "play", "replay", "shrink"]
