"""Settings of every test: tests and the processes that they start compute in one thread, reach no hub, and SIGHUP ends
processes."""

from __future__ import annotations

import gc
import os
import signal

from hypothesis import settings

# Before torch is imported. The tests' tensors are small: two threads would mostly spin waiting for each other, and for
# whatever else runs on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before the libraries of Hugging Face are imported: nobody listens there, and no login is used. Tests that need a hub
# run their own (`small_hub.py`).
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ.pop("HF_TOKEN", None)

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
