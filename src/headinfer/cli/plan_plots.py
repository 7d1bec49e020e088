"""The plots of `headinfer plan --plot`: memory by method, seconds a token and the roofline.

They need matplotlib, which is imported when a plot is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.plan.compare import METHODS, OURS, memory_by_method, seconds_by_method
from headinfer.plan.footprint import Footprint
from headinfer.plan.operating_points import OperatingPoint
from headinfer.plan.planner import Plan
from headinfer.utils.approximation import short_form
from headinfer.utils.files import Output
from headinfer.utils.units import format_tokens

__all__ = ["checked_plot", "draw"]

_CREATOR = "headinfer plan"
# By suffix: the first bytes of a file of that format, and the bytes that it contains if draw() wrote it.
_MARKS = {
    ".png": (b"\x89PNG\r\n", b"tEXtCreator\0" + _CREATOR.encode()),
    ".svg": (b"<?xml", b"<dc:title>" + _CREATOR.encode() + b"</dc:title>"),
    ".pdf": (b"%PDF", b"/Creator (" + _CREATOR.encode() + b")"),
}
_MAX_PLOT_BYTES = 2**26
_CONTEXTS = tuple(1024 * 2**power for power in range(13))  # 1K to 4M
_INCHES = (9.0, 13.0)  # 900 pixels wide at 100 dpi, which fits a README
_COMPONENTS: tuple[tuple[str, str, Callable[[Footprint], int]], ...] = (
    ("weights", "#4c72b0", lambda found: found.weights_bytes),
    ("KV on the device", "#dd8452", lambda found: found.device_kv_bytes),
    ("activations", "#55a868", lambda found: found.activation_bytes),
    ("overhead", "#b0b0b0", lambda found: found.overhead_bytes),
)
_COLORS = ("#8c8c8c", "#4c72b0", "#55a868", "#937860", "#dd8452", "#c44e52")
_MARKERS = ("o", "s", "^", "v", "D", "*")
_LINE = {"linewidth": 1.5, "markersize": 5, "zorder": 2, "alpha": 0.95}
_BROAD_LINE = {"linewidth": 7, "markersize": 13, "zorder": 1, "alpha": 0.45}


def checked_plot(path: Path) -> Output:
    """Check that a plot can be drawn into a file.

    Raises:
        UsageError: the suffix is not a known format, the folder does not exist, or the file exists and is not an
            earlier plot.
    """
    if path.suffix.lower() not in _MARKS:
        raise UsageError(f"cannot draw into {path}: its name must end with {', '.join(_MARKS)}")
    if not path.parent.is_dir():
        raise UsageError(f"cannot draw into {path}: there is no folder {path.parent}")
    return Output(path, is_ours=_is_plot)


def draw(plan: Plan, model: str, path: Path, points: Sequence[OperatingPoint]) -> None:
    """Draw the three plots, one above the other, into an image file.

    Args:
        plan: the plan.
        model: the model's name, for the titles.
        path: the file, whose suffix is its format; an earlier plot is replaced.
        points: the points of the roofline.

    Raises:
        UsageError: matplotlib is missing, or as for checked_plot().
    """
    written = checked_plot(path)
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'headinfer[plot]'") from None
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=_INCHES, dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        memory, seconds, roofline = figure.subplots(3, 1, height_ratios=(1, 1.15, 1.15))
        _draw_memory(memory, plan, model)
        _draw_seconds(seconds, plan, model)
        _draw_roofline(roofline, plan, points)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:].lower(), metadata={"Creator": _CREATOR})
    written.write(drawn.getvalue())


def _is_plot(path: Path) -> bool:
    """Return whether draw() wrote a file, which then contains the creator's name."""
    if path.stat().st_size > _MAX_PLOT_BYTES:
        return False
    data = path.read_bytes()
    return any(data.startswith(start) and mark in data for start, mark in _MARKS.values())


def _draw_memory(axes: Any, plan: Plan, model: str) -> None:
    """Draw a stacked bar for each method, in the order of the tables."""
    found = dict(reversed(memory_by_method(plan).items()))
    gib = 2.0**30
    left = [0.0] * len(found)
    for name, color, size in _COMPONENTS:
        widths = [size(one) / gib for one in found.values()]
        axes.barh(list(found), widths, left=left, color=color, label=name, height=0.65)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (one, end) in enumerate(zip(found.values(), left, strict=True)):
        label = axes.text(end + 0.01 * max(left), row, f"{end:,.1f}{_host_text(one)}", va="center")
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    room = plan.request.room_bytes / gib
    axes.axvline(room, color="black", linestyle="--", linewidth=1, zorder=0.5)
    axes.text(room, len(found) - 0.45, f" {plan.request.hardware.name}: {room:.3g} GiB", va="bottom")
    axes.set_xlim(0, max(*left, room) * 1.25)
    axes.set_xlabel("device memory, GiB")
    title = f"Memory of {model} at {format_tokens(plan.request.context_tokens)} tokens"
    axes.set_title(title + _approximate_text(plan), loc="left", pad=18)
    axes.legend(framealpha=1, edgecolor="none", loc="lower right")


def _approximate_text(plan: Plan) -> str:
    """Return a line below a title that says what is approximate; empty if the plan is exact."""
    form = short_form(plan.request.kv_dtype, plan.request.sparse_heads)
    return f"\n{OURS}: approximate ({form})" if form else ""


def _host_text(found: Footprint) -> str:
    return f" (+ {found.host_kv_bytes / 2**30:.4g} in host RAM)" if found.host_kv_bytes else ""


def _draw_seconds(axes: Any, plan: Plan, model: str) -> None:
    """Draw the seconds of a decoded token against the context, for each method up to the contexts that fit."""
    table = seconds_by_method(plan, _CONTEXTS)
    seen = [cell[1].total_s for row in table.values() for cell in row if cell is not None]
    for name, row in table.items():
        color = _COLORS[METHODS.index(name)]
        marker = _MARKERS[METHODS.index(name)]
        fitting = [(tokens, cell[1].total_s) for tokens, cell in zip(_CONTEXTS, row, strict=True) if cell is not None]
        if fitting:
            # The lines of methods with all KV on the device coincide, so headinfer's is broad and behind the others.
            style = _BROAD_LINE if name == OURS else _LINE
            xs, ys = zip(*fitting, strict=True)
            axes.plot(xs, ys, label=name, color=color, marker=marker, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(_CONTEXTS, [format_tokens(tokens) for tokens in _CONTEXTS])
    axes.minorticks_off()
    axes.set_ylim(10 ** math.floor(math.log10(min(seen))), 10 ** math.ceil(math.log10(max(seen))))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens of context; a line ends at the longest context that fits")
    axes.set_ylabel("seconds per token")
    axes.set_title(f"Decode of {model} on {plan.request.hardware.name}{_approximate_text(plan)}", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_roofline(axes: Any, plan: Plan, points: Sequence[OperatingPoint]) -> None:
    """Draw the two roofs, of device memory and of the link, and the points of one layer's attention."""
    hardware = plan.request.hardware
    peak = hardware.attained_flops_per_s(plan.request.dtype)
    roofs = [("device", "#4c72b0", hardware.attained_device_bytes_per_s)]
    if not hardware.is_host:
        roofs.append(("link", "#c44e52", hardware.attained_link_bytes_per_s))
    most = max(point.intensity for point in points) * 4
    for memory, color, rate in roofs:
        edge = peak / rate
        axes.plot([0.5, edge, most], [0.5 * rate, peak, peak], color=color, label=f"{memory}, {rate / 1e9:.3g} GB/s")
        for phase, marker in (("prefill", "s"), ("decode", "o")):
            shown = [point for point in points if point.memory == memory and point.phase == phase]
            intensities = [point.intensity for point in shown]
            rates = [point.flops_per_s for point in shown]
            axes.plot(intensities, rates, marker, color=color, markersize=7)
            if phase == "decode":  # the intensity of decode is the same at any context, so one label is enough
                shown = shown[-1:]
            for point in shown:
                _label_point(axes, point, color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("FLOP per second")
    axes.set_title("Roofline: attention of one layer (squares: prefill of 1K, 10K, 100K tokens)", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")


def _label_point(axes: Any, point: OperatingPoint, color: str) -> None:
    """Write the context below a point of prefill, or "decode" beside a point of decode."""
    if point.phase == "prefill":
        text = format_tokens(point.tokens)
        offset = (0, -30 if point.memory == "link" else -16)
        align = "center"
    else:
        text = "decode"
        offset = (10, -4)
        align = "left"
    axes.annotate(
        text,
        (point.intensity, point.flops_per_s),
        xytext=offset,
        textcoords="offset points",
        color=color,
        ha=align,
    )
