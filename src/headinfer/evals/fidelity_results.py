"""The results of `headinfer eval fidelity` in JSON and Markdown. Both files are written after each length.

An interrupted evaluation continues from the JSON, and further lengths are added to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.info import gather_info, machine
from headinfer.utils.files import Output, read_json_object
from headinfer.utils.units import format_tokens

__all__ = ["FidelityResults", "markdown_table", "table"]

_FORMAT = 1
_EVALUATION = "fidelity"
_HEADING = "# Fidelity: "


def table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table for people, with a column for each length."""
    header = ["tokens", *(format_tokens(record["length"]) for record in records)]
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "KL divergence, mean": lambda one: f"{one['kl_mean']:.2g}",
        "median": lambda one: f"{one['kl_median']:.2g}",
        "99th percentile": lambda one: f"{one['kl_p99']:.2g}",
        "largest": lambda one: f"{one['kl_max']:.2g}",
        "mean, rounding alone": lambda one: f"{one['rounding']['kl_mean']:.2g}",
        "same top-1 token": lambda one: f"{one['top1_agreement']:.1%}",
        "rounding alone": lambda one: f"{one['rounding']['top1_agreement']:.1%}",
        "perplexity, exact": lambda one: f"{one['exact_perplexity']:.5g}",
        "approximate": lambda one: f"{one['perplexity']:.5g}",
    }
    if any(record["needles"] for record in records):
        rows["needles found, exact"] = lambda one: f"{one['exact_needles_found']} of {one['needles']}"
        rows["approximate "] = lambda one: f"{one['needles_found']} of {one['needles']}"
    return header, [[name.strip(), *(cell(record) for record in records)] for name, cell in rows.items()]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


@dataclass
class FidelityResults:
    """The results of an evaluation, which may be incomplete.

    Attributes:
        folder: the folder of results.json and results.md.
        about: model, text, approximation and everything else that must be equal for an evaluation to be continued.
        records: one entry for each length, in order.
        command: the command line, which is saved with the results.
    """

    folder: Path
    about: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any]) -> FidelityResults:
        """Read the results of a folder, or begin new ones.

        Raises:
            UsageError: the folder contains the results of another evaluation, or a file cannot be written.
        """
        results = cls(folder, about)
        path = results.path
        if os.path.isfile(path) and path.stat().st_size:
            found = read_json_object(path)
            before = found.get("about")
            records = found.get("lengths")
            if not (isinstance(before, dict) and isinstance(records, list) and before.get("evaluation") == _EVALUATION):
                raise UsageError(f"{path} holds no results of headinfer eval fidelity: choose another --out")
            for name in {**before, **about}:
                if before.get(name) != about.get(name):
                    raise UsageError(
                        f"{path} holds another evaluation: its {name} is {before.get(name)!r}, not "
                        f"{about.get(name)!r}; choose another --out"
                    )
            results.records = records
        results.files()
        return results

    @property
    def path(self) -> Path:
        """The JSON file."""
        return self.folder / "results.json"

    def files(self) -> tuple[Output, Output]:
        """Check that the results can be written.

        Returns:
            The JSON and the Markdown file, which do not exist or contain results of this evaluation.

        Raises:
            UsageError: a file contains something else, or the folder is not writable.
        """
        return (
            Output(self.path, is_ours=lambda path: read_json_object(path).get("about") == self.about),
            Output(self.folder / "results.md", is_ours=_is_markdown),
        )

    def has(self, length: int) -> bool:
        """Return whether a length has been measured."""
        return any(record["length"] == length for record in self.records)

    def add(self, record: dict[str, Any]) -> None:
        """Add the record of a length, and write the files."""
        self.records = sorted([*self.records, record], key=lambda one: int(one["length"]))
        self.save()

    def save(self) -> None:
        """Write all results to the files."""
        where = machine()
        content = {
            "format": _FORMAT,
            "command": self.command,
            "machine": where,
            "versions": gather_info()["versions"],
            "about": self.about,
            "lengths": self.records,
        }
        parts = [
            f"{_HEADING}{self.about['model']}, {self.approximation}",
            f"`{self.command}`",
            f"Machine: {where}.",
            f"{self.explanation[0].upper()}{self.explanation[1:]}.",
            markdown_table(*table(self.records)),
        ]
        texts = (json.dumps(content, indent=1, ensure_ascii=False) + "\n", "\n\n".join(parts) + "\n")
        for one, text in zip(self.files(), texts, strict=True):
            one.write(text)

    @property
    def approximation(self) -> str:
        """What is compared with exact KV, such as "int8"."""
        return str(self.about["approximation"])

    @property
    def explanation(self) -> str:
        """What was compared, in a sentence."""
        return (
            f"the last {self.about['window']:,} tokens of each length, predicted with exact and with approximate KV; "
            "KL(exact || approximate) in nats; rounding alone is exact KV that was read in chunks half as long"
        )


def _is_markdown(path: Path) -> bool:
    """Return whether a file begins with the heading of FidelityResults."""
    with open(path, "rb") as file:
        return file.read(len(_HEADING)) == _HEADING.encode()
