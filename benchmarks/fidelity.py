"""Prints and draws what approximate KV changes in the predictions of two models: the results of `eval fidelity`.

    python benchmarks/fidelity.py --text text.txt
    headinfer eval fidelity MODEL --file text.txt --kv-dtype int8 --lengths 1K,4K --chunk-tokens 512 --dtype float32
    python benchmarks/fidelity.py --published
    python benchmarks/fidelity.py --plot docs/images/fidelity.png

The text is the one that headinfer ships. The results are copied to benchmarks/results as fidelity-MODEL-NAME.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headinfer.utils.units import format_tokens

_RESULTS = Path(__file__).parent / "results"
_MODELS = {"smollm2": "SmolLM2-135M", "embedded": "embedded"}
_APPROXIMATIONS = {
    "int8": "int8",
    "int4": "int4",
    "sparse25": "25% of the heads sparse",
    "sparse50": "50% of the heads sparse",
}
_IN_BFLOAT16 = "int8-bfloat16"
_HEADER = ("model", "KV", "KL: mean", "median", "99%", "largest", "same top-1", "perplexity", "needles")


def results(model: str, name: str) -> list[dict[str, Any]]:
    """Return the records of an evaluation by length; none if it has not been measured."""
    path = _RESULTS / f"fidelity-{model}-{name}.json"
    if not path.is_file():
        return []
    lengths: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["lengths"]
    return lengths


def published() -> str:
    """Return the table of docs/approximations.md: the longest length of each approximation, on two models."""
    lines = [f"| {' | '.join(_HEADER)} |", "|---" * len(_HEADER) + "|"]
    for model, title in _MODELS.items():
        for name, shown in _APPROXIMATIONS.items():
            for record in results(model, name)[-1:]:
                lines.append(_row(title, shown, record, record))
    for record in results("smollm2", _IN_BFLOAT16)[-1:]:
        lines.append(_row(f"{_MODELS['smollm2']}, bfloat16", "int8", record, record))
        lines.append(_row(f"{_MODELS['smollm2']}, bfloat16", "exact, other chunks", record, record["rounding"]))
    return "\n".join(lines) + "\n"


def _row(title: str, shown: str, record: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Return a row. The needles are those of `record`, and only known of approximate KV."""
    is_rounding = figures is not record
    found = "-" if is_rounding else f"{record['exact_needles_found']}, {record['needles_found']} of {record['needles']}"
    cells = [
        f"{title}, {format_tokens(record['length'])}",
        shown,
        *(f"{figures[name]:.2g}" for name in ("kl_mean", "kl_median", "kl_p99", "kl_max")),
        f"{figures['top1_agreement']:.1%}",
        f"{figures['exact_perplexity']:.4g}, {figures['perplexity']:.4g}",
        found,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Do what the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", action="store_true", help="print the table of docs/approximations.md")
    parser.add_argument("--text", type=Path, help="write the text that headinfer ships to this file")
    parser.add_argument("--plot", type=Path, help="draw divergence and agreement by length into this file")
    given = parser.parse_args()
    if given.text is not None:
        from headinfer.embedded import embedded_text

        given.text.write_text(embedded_text(), encoding="utf-8")
    if given.plot is not None:
        from headinfer.evals.fidelity_plot import draw_fidelity

        models = {
            title: {shown: found for name, shown in _APPROXIMATIONS.items() if (found := results(model, name))}
            for model, title in _MODELS.items()
        }
        draw_fidelity(models, given.plot)
    if given.published:
        print(published(), end="")


if __name__ == "__main__":
    main()
