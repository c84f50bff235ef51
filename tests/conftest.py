"""What holds for every test: it computes in one thread, and so do the processes that it starts."""

from __future__ import annotations

import os

# Before torch is imported. The tensors of the tests are small: two threads wait for each other in a loop most of the
# time, and where something else runs on the same cores they wait for it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
