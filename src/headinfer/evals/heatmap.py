"""Scores by length and depth as a picture, as in the paper's figure 6."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.evals.run import Results
from headinfer.utils.files import Output
from headinfer.utils.units import format_tokens

__all__ = ["is_heatmap", "save_heatmap"]

_CREATOR = "headinfer eval"
_PNG = b"\x89PNG\r\n"


def save_heatmap(results: Results, path: Path) -> None:
    """Write a PNG: one column a length, one row a depth, green where all answers are right.

    Raises UsageError if matplotlib is missing, or if the file holds something else than an earlier heatmap.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("the heatmap needs matplotlib: pip install 'headinfer[eval]'") from error
    scores: dict[Any, float] = dict(results.scores("length", "depth"))
    lengths = sorted({length for length, _ in scores})
    depths = sorted({depth for _, depth in scores})
    width, height = 2.4 + 0.75 * min(max(len(lengths), 5), 12), 1.8 + 0.34 * min(max(len(depths), 4), 16)
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.add_subplot()
    grid = [[scores.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [format_tokens(length) for length in lengths])
    step = -(-len(depths) // 21)  # at most 21 labels
    axes.set_yticks(range(0, len(depths), step), [f"{depth:.0%}" for depth in depths[::step]])
    if step == 1:
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if value == value:  # not NaN
                    axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"{results.about['model']}: needles found, head-wise cache", fontsize=10)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Creator": _CREATOR})
    Output(path, is_ours=is_heatmap).write(drawn.getvalue())


def is_heatmap(path: Path) -> bool:
    """Whether a file is a picture that save_heatmap() wrote."""
    with open(path, "rb") as file:
        start = file.read(4096)
    return start.startswith(_PNG) and b"tEXtCreator\0" + _CREATOR.encode() in start
