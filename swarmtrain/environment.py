"""Environment of child processes: what they need, and none of the user's tokens, keys and agents.

A child may run others' code (a chat template, a tracker's library) or read others' bytes (the network daemon), so that
it must have nothing to give away. Names are patterns, as `fnmatch` has them.
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase

_RUNS = (
    "PATH HOME USER LOGNAME LANG LC_* TZ TMPDIR PYTHON[A-Z]* VIRTUAL_ENV CONDA_PREFIX LD_* DYLD_* MALLOC_* "
    "GLIBC_TUNABLES SYSTEMROOT"
)
"""Variables without which a program may not start, or starts differently."""
COMPUTES = (
    "TORCH* PYTORCH_* OMP_* GOMP_* KMP_* MKL_* OPENBLAS_* VECLIB_* CUDA_* CUBLAS_* CUDNN_* NCCL_* GLOO_* HIP_* HSA_* "
    "ROCR_* ROCM_* MIOPEN_* NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES TRITON_* CC CXX CPATH C_INCLUDE_PATH "
    "CPLUS_INCLUDE_PATH LIBRARY_PATH XDG_CACHE_HOME"
)
"""Those of torch, its libraries, graphics cards and compilers."""
_CALLS = "XDG_* SSL_CERT_* REQUESTS_CA_BUNDLE CURL_CA_BUNDLE *_proxy *_PROXY HF_HOME HF_HUB_* HF_DATASETS_* HF_ENDPOINT"
DAEMON = "LIBP2P_* GOLOG_* GODEBUG GOGC GOMAXPROCS GOMEMLIMIT"
"""Those of the network daemon."""
PEER = f"{COMPUTES} {_CALLS} {DAEMON} SWARMTRAIN_* TRANSFORMERS_* TOKENIZERS_* GRPC_* HF_TOKEN"
"""Those of a whole peer. It may load what its user's token opens."""
BY_TRACKER = {
    "tensorboard": "",
    "wandb": f"{_CALLS} NETRC WANDB_*",
    "trackio": f"{_CALLS} HF_TOKEN TRACKIO_* GRADIO_*",
}
"""Those of each tracker, with its own keys."""


def minimal_environment(needed: str = "") -> dict[str, str]:
    """Return the variables of this process that any program needs, and those that `needed` names."""
    patterns = f"{_RUNS} {needed}".split()
    return {name: value for name, value in os.environ.items() if any(fnmatchcase(name, each) for each in patterns)}


def keep_minimal_environment(needed: str = "") -> None:
    """Remove all others from this process, a worker that got all."""
    for name in os.environ.keys() - minimal_environment(needed):
        del os.environ[name]
