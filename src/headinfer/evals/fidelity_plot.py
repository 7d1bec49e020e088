"""Draws the results of `headinfer eval fidelity`: divergence and agreement over the length of the context."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.utils.files import Output
from headinfer.utils.units import format_tokens

__all__ = ["draw_fidelity", "plot_file"]

Records = Sequence[Mapping[str, Any]]
"""The records of FidelityResults: one for each length."""

_CREATOR = "headinfer eval fidelity"
# By suffix: the first bytes of a file of that format, and the bytes that it contains if it is such a plot.
_MARKS = {
    ".png": (b"\x89PNG\r\n", b"tEXtCreator\0" + _CREATOR.encode()),
    ".svg": (b"<?xml", b"<dc:title>" + _CREATOR.encode() + b"</dc:title>"),
}
_MOST_PLOT_BYTES = 2**24
_ALL_CURVES = {
    "kl_max": ("max", ":"),
    "kl_p99": ("99 %", "--"),
    "kl_mean": ("mean", "-"),
    "kl_median": ("median", "-."),
}
_FEW_CURVES = {name: _ALL_CURVES[name] for name in ("kl_mean", "kl_p99")}  # if several approximations are compared
_FAR_BELOW = 100.0  # rounding that is as far below everything else is not drawn
_COLORS = ("#4c72b0", "#c44e52", "#55a868", "#dd8452", "#8172b3", "#937860")


def plot_file(path: Path) -> Output:
    """Check that a plot can be drawn into a file.

    Raises:
        UsageError: the suffix is not .png or .svg, or the file exists and is not an earlier plot.
    """
    if path.suffix.lower() not in _MARKS:
        raise UsageError(f"cannot draw into {path}: its name must end with {' or '.join(_MARKS)}")
    return Output(path, is_ours=_is_plot)


def draw_fidelity(models: Mapping[str, Mapping[str, Records]], path: Path) -> None:
    """Draw the divergence of each approximation, and below it the agreement of the most likely token.

    Args:
        models: for each title, a column of the figure, the records of each approximation by its name.
        path: the file, whose suffix is its format. An earlier plot is replaced.

    Raises:
        UsageError: matplotlib is not installed, or as for plot_file().
    """
    output = plot_file(path)
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise UsageError("the plot needs matplotlib: pip install 'headinfer[eval]'") from error
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(0.6 + 4.6 * len(models), 6.8), dpi=110, layout="constrained")
        axes = figure.subplots(2, len(models), sharex="col", height_ratios=(1.5, 1), squeeze=False)
        for column, (title, approximations) in enumerate(models.items()):
            _draw_divergence(axes[0][column], title, approximations)
            _draw_agreement(axes[1][column], approximations)
        if any(len(approximations) > 1 for approximations in models.values()):
            lines = {line.get_label(): line for row in axes[1] for line in row.get_lines()}
            lines["99th percentile"] = Line2D([], [], color="#404040", linestyle="--")
            figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        picture = io.BytesIO()

        figure.savefig(picture, format=path.suffix[1:].lower(), metadata={"Creator": _CREATOR})
    output.write(picture.getvalue())


def _is_plot(path: Path) -> bool:
    """Return whether draw_fidelity() wrote a file, which then contains the creator's name."""
    if path.stat().st_size > _MOST_PLOT_BYTES:
        return False
    data = path.read_bytes()
    return any(data.startswith(start) and mark in data for start, mark in _MARKS.values())


def _draw_divergence(axes: Any, title: str, approximations: Mapping[str, Records]) -> None:
    is_alone = len(approximations) == 1
    curves = _ALL_CURVES if is_alone else _FEW_CURVES
    drawn: list[float] = []
    for color, records in zip(_COLORS, approximations.values(), strict=False):
        lengths = [record["length"] for record in records]
        for key, (curve, style) in curves.items():
            values = [record[key] for record in records]
            axes.plot(lengths, values, style, color=color, marker="o", markersize=4, label=curve)
            drawn += values
    first = next(iter(approximations.values()))
    rounding = [record["rounding"]["kl_mean"] for record in first]
    if drawn and max(rounding) > min(drawn) / _FAR_BELOW:
        axes.plot([record["length"] for record in first], rounding, color="#8c8c8c", label="rounding alone, mean")
    if any(value > 0 for value in drawn):
        axes.set_yscale("log", nonpositive="clip")
    axes.set_ylabel("KL(exact || approximate), nats" if is_alone else "KL(exact || approximate), nats: mean, 99 %")
    axes.set_title(title + (f", {next(iter(approximations))}" if is_alone else ""), loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    if is_alone:  # otherwise the figure has a legend
        axes.legend(frameon=False, fontsize=8)


def _draw_agreement(axes: Any, approximations: Mapping[str, Records]) -> None:
    lengths: set[int] = set()
    for color, (name, records) in zip(_COLORS, approximations.items(), strict=False):
        own = [record["length"] for record in records]
        agreement = [100 * record["top1_agreement"] for record in records]
        axes.plot(own, agreement, color=color, marker="o", markersize=4, label=name)
        lengths.update(own)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [format_tokens(length) for length in sorted(lengths)])
    axes.minorticks_off()
    axes.set_ylim(top=100.5)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("same most likely token, %")
    axes.grid(alpha=0.3)
