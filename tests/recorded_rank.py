"""Process of a further rank that keeps the digest of its weights after each step, and whose memory may be limited.

Two environment variables say where it writes (a line a step: its number, and the digest), and how many sequences fit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import FileStore

from swarmtrain.peer.devices import rank_process

DIGESTS = "TORCH_RECORDED_RANK_DIGESTS"  # of a name that a rank gets from its parent
FITTING = "TORCH_RECORDED_RANK_FITTING"


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a digest of the tensors' bytes, on the processor."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


class RecordedRank(rank_process.RankWork):
    def __init__(self, task: dict[str, Any], store: FileStore) -> None:
        super().__init__(task, store)
        right, fitting = self.model.loss, int(os.environ.get(FITTING, "1000"))

        def loss(batch: Tensor) -> Tensor:
            if len(batch) > fitting:
                raise MemoryError
            return right(batch)

        self.model.loss = loss  # type: ignore[method-assign]
        self._loss_of = self.model.loss

    def optimize(self, progress: float, scale: float) -> None:
        super().optimize(progress, scale)
        with Path(os.environ[DIGESTS]).open("a") as file:
            moments = self.inner.moment_tensors()
            file.write(f"{int(moments[0])} {digest([*self.model.parameters(), *moments])}\n")


if __name__ == "__main__":
    rank_process.RankWork = RecordedRank  # type: ignore[misc]
    rank_process.main()
