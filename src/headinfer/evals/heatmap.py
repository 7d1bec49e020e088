"""Draws scores by length and depth, as in the paper (arXiv 2502.12574, figure 6)."""

from __future__ import annotations

import io
import math
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
    """Draw a heatmap of the scores, with one column for each length and one row for each depth.

    Args:
        results: the answers of a needle-in-a-haystack test.
        path: the PNG file to write. An earlier heatmap is replaced.

    Raises:
        UsageError: matplotlib is not installed, or the file exists and is not an earlier heatmap.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("the heatmap needs matplotlib: pip install 'headinfer[eval]'") from error
    scores: dict[Any, float] = dict(results.scores("length", "depth"))
    lengths = sorted({length for length, _ in scores})
    depths = sorted({depth for _, depth in scores})
    width = 2.4 + 0.75 * min(max(len(lengths), 5), 12)
    height = 1.8 + 0.34 * min(max(len(depths), 4), 16)
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
                if not math.isnan(value):
                    axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"{results.about['model']}: needles found, head-wise cache", fontsize=10)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Creator": _CREATOR})
    Output(path, is_ours=is_heatmap).write(picture.getvalue())


def is_heatmap(path: Path) -> bool:
    """Return whether a file was written by `save_heatmap()`."""
    with open(path, "rb") as file:
        start = file.read(4096)
    return start.startswith(_PNG) and b"tEXtCreator\0" + _CREATOR.encode() in start
