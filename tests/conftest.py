"""What holds for every test: it computes in one thread, as do the processes that it starts, and hang-ups end those."""

from __future__ import annotations

import gc
import os
import signal

from hypothesis import settings

# Before torch is imported. The tensors of the tests are small: two threads wait for each other in a loop most of the
# time, and where something else runs on the same cores they wait for it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Started under nohup, or by something else that ignores a hang-up, the processes of the tests would inherit that. One
# that is handled here goes on here, and is as usual in what is started.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# Thousands of tests and the package's syntax trees are objects that stay: to look through all of them again and again
# took a sixth of the time.
gc.set_threshold(100_000, 20, 20)

# An example may take as long as it takes: on a machine with other work that says nothing of the code.
settings.register_profile("swarmtrain", deadline=None)
settings.load_profile("swarmtrain")
