"""Plot of a comparison's loss curves, over tokens and over virtual time, as a PNG or SVG file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swarmtrain.simulate.comparison import Comparison


def draw(found: Comparison, path: Path) -> None:
    """Draw each method with its best constants and its first seed. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = found.scenario.scenario.name  # the same comparison gives the same bytes
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    for method, row in found.best().items():
        curve = next(iter(row.outcomes.values())).curve
        losses = [loss for _, _, loss in curve]
        by_tokens.plot([tokens / 1e6 for tokens, _, _ in curve], losses, label=method)
        by_time.plot([time_s / 60 for _, time_s, _ in curve], losses, label=method)
    by_tokens.set(xlabel="million tokens of the whole run", ylabel="held-out loss, nats per byte")
    by_time.set(xlabel="virtual minutes")
    by_time.legend()
    figure.suptitle(found.scenario.scenario.name)
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(path, metadata=metadata)
