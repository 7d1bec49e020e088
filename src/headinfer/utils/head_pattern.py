"""Head patterns: which KV heads see the whole context, and which only its first and newest tokens (DuoAttention).

A file is JSON, as `headinfer heads` writes it, or full_attention_heads.tsv of DuoAttention (arXiv 2410.10819).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.utils.files import read_json_object, read_text
from headinfer.utils.values import real_number, shown, whole_number

__all__ = ["PATTERN_FORMAT", "HeadPattern", "read_pattern"]

PATTERN_FORMAT = "headinfer-heads"
"""The field `format` of a pattern in JSON."""

_VERSION = 1
_DUO_FILE = "full_attention_heads.tsv"
_DUO_CONFIG = "config.json"
_FIELDS = ("format", "version", "sink_tokens", "recent_tokens", "threshold", "heads")
_DIGEST_DIGITS = 12
_MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class HeadPattern:
    """Which KV heads of a model see the whole context.

    A full head attends to all tokens. In a streaming head, the query at position i attends to key j <= i only if
    j < sink_tokens or i - j < recent_tokens. Positions count the visible tokens of a row.

    Attributes:
        values: for each decoder layer and KV head, how much the head needs the whole context, 0 to 1. It is empty for
            a layer without full attention.
        threshold: a head whose value is at least this is full.
        sink_tokens: the first tokens, which streaming heads see.
        recent_tokens: the newest tokens that streaming heads see, with the token of the query itself.
        info: further fields of the file, such as how it was made. They do not count in comparisons.

    Raises:
        UsageError: a value is out of range, or there are no heads.
    """

    values: tuple[tuple[float, ...], ...]
    threshold: float = 0.5
    sink_tokens: int = 64
    recent_tokens: int = 256
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        layers = []
        for layer, values in enumerate(self.values):
            name = f"the value of a head of layer {layer}"
            layers.append(tuple(real_number(value, name, low=0.0, high=1.0) for value in values))
        object.__setattr__(self, "values", tuple(layers))
        object.__setattr__(self, "threshold", real_number(self.threshold, "threshold", low=0.0, high=1.0))
        sink = whole_number(self.sink_tokens, "sink_tokens", low=0, high=_MOST_TOKENS)
        recent = whole_number(self.recent_tokens, "recent_tokens", low=1, high=_MOST_TOKENS)
        object.__setattr__(self, "sink_tokens", sink)
        object.__setattr__(self, "recent_tokens", recent)
        if not any(self.values):
            raise UsageError("a head pattern without heads says nothing: give a value for each layer and KV head")

    def full_heads(self, layer: int) -> tuple[int, ...]:
        """Return the KV heads of a decoder layer that attend to all tokens."""
        return tuple(head for head, value in enumerate(self.values[layer]) if value >= self.threshold)

    def streaming_heads(self, layer: int) -> tuple[int, ...]:
        """Return the KV heads of a decoder layer that attend to the first and the newest tokens only."""
        return tuple(head for head, value in enumerate(self.values[layer]) if value < self.threshold)

    @property
    def heads(self) -> int:
        """The KV heads of all layers."""
        return sum(len(values) for values in self.values)

    @property
    def share(self) -> float:
        """The share of the heads that are streaming."""
        return sum(value < self.threshold for values in self.values for value in values) / self.heads

    def with_share(self, share: float) -> HeadPattern:
        """Return a pattern in which this share of the heads, those with the lowest values, is streaming.

        Among equal values, heads of lower layers become streaming first. If such values are on both sides of the
        threshold, those on one side change in their last bit.

        Args:
            share: 0 to 1; the number of streaming heads is rounded to the nearest whole number.

        Raises:
            UsageError: the share is out of range, or leaves no full head.
        """
        share = real_number(share, "the share of streaming heads", low=0.0, high=1.0)
        ranked = sorted(
            (value, layer, head) for layer, values in enumerate(self.values) for head, value in enumerate(values)
        )
        count = math.floor(share * len(ranked) + 0.5)
        if count == len(ranked):
            raise UsageError(
                f"a share of {share:g} leaves none of the {len(ranked)} heads full: choose a smaller share of "
                "streaming heads"
            )
        if count == 0:
            return replace(self, threshold=0.0)
        threshold = ranked[count][0]
        values = self.values
        if ranked[count - 1][0] == threshold:
            streaming = {(layer, head) for _, layer, head in ranked[:count]}
            low = threshold if threshold < 1.0 else math.nextafter(1.0, 0.0)
            threshold = math.nextafter(low, 1.0)
            values = tuple(
                tuple(
                    min(value, low) if (layer, head) in streaming else max(value, threshold)
                    for head, value in enumerate(heads)
                )
                for layer, heads in enumerate(values)
            )
        return replace(self, values=values, threshold=threshold)

    def reduced(self) -> HeadPattern:
        """Return the pattern with values 0 (streaming) and 1 (full) and nothing else that does not count."""
        values = tuple(tuple(float(value >= self.threshold) for value in heads) for heads in self.values)
        return HeadPattern(values, 0.5, self.sink_tokens, self.recent_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return the pattern as a JSON object, which from_dict() reads."""
        return {
            **self.info,
            "format": PATTERN_FORMAT,
            "version": _VERSION,
            "sink_tokens": self.sink_tokens,
            "recent_tokens": self.recent_tokens,
            "threshold": self.threshold,
            "heads": [list(values) for values in self.values],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], name: str = "the head pattern") -> HeadPattern:
        """Return the pattern of a JSON object.

        Args:
            content: what as_dict() returned. Fields that are not of the pattern are kept as `info`.
            name: what it was read from, for messages.

        Raises:
            UsageError: the object is not a pattern, is of a later version, or a value is wrong.
        """
        if content.get("format") != PATTERN_FORMAT:
            raise UsageError(
                f"{name} is not a head pattern: it has no field format with the value {PATTERN_FORMAT}; make one with "
                "`headinfer heads MODEL --calibrate`"
            )
        if content.get("version") != _VERSION:
            raise UsageError(
                f"{name} has version {shown(content.get('version'))} of the format, and this headinfer reads version "
                f"{_VERSION}: make it again with `headinfer heads`"
            )
        heads = content.get("heads")
        if not _is_table(heads):
            raise UsageError(f"{name} needs a field heads: for each layer, a list of one number for each KV head")
        assert isinstance(heads, Sequence)
        given = {key: content[key] for key in ("threshold", "sink_tokens", "recent_tokens") if key in content}
        info = {key: value for key, value in content.items() if key not in _FIELDS}
        try:
            return cls(tuple(tuple(values) for values in heads), info=info, **given)
        except UsageError as error:
            raise UsageError(f"{name} is wrong: {error}") from error

    def check(self, kv_heads: Sequence[int]) -> None:
        """Check that the pattern is for a model.

        Args:
            kv_heads: the KV heads of each decoder layer; 0 for a layer without full attention.

        Raises:
            UsageError: the model has another number of layers or KV heads, or no head is full.
        """
        advice = "make a pattern for this model with `headinfer heads MODEL --calibrate`"
        if len(kv_heads) != len(self.values):
            raise UsageError(
                f"the head pattern has {len(self.values)} layers, and the model has {len(kv_heads)}: {advice}"
            )
        for layer, (values, heads) in enumerate(zip(self.values, kv_heads, strict=True)):
            if len(values) != heads:
                raise UsageError(
                    f"the head pattern has {len(values)} KV heads in layer {layer}, and the model has {heads} with "
                    f"full attention there: {advice}"
                )
        if self.share == 1.0:
            raise UsageError(
                "the head pattern has no full head, so that nothing of the context but its first and newest tokens "
                "would be seen: lower its threshold or the share of streaming heads"
            )

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of what decides results: which heads are streaming, sink_tokens and recent_tokens."""
        deciding = self.reduced()
        text = json.dumps([deciding.values, deciding.sink_tokens, deciding.recent_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_DIGITS]


def read_pattern(path: str | Path, share: float | None = None) -> HeadPattern:
    """Read a head pattern.

    Args:
        path: a JSON file; full_attention_heads.tsv of DuoAttention, with its config.json in the same folder; or that
            folder.
        share: the share of the heads to be streaming, as for with_share(); None keeps the threshold of the file.

    Raises:
        UsageError: the file cannot be read, or is not a pattern.
    """
    path = Path(path)
    if path.is_dir():
        path = path / _DUO_FILE
    text = read_text(path)
    pattern = _from_json(text, path) if text.lstrip().startswith("{") else _from_table(text, path)
    return pattern if share is None else pattern.with_share(share)


def _from_json(text: str, path: Path) -> HeadPattern:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: it is not valid JSON ({error})") from error
    return HeadPattern.from_dict(content, str(path))


def _from_table(text: str, path: Path) -> HeadPattern:
    """Return the pattern of a table of DuoAttention: a line for each layer, a number for each KV head.

    Values outside of 0 to 1, which its training leaves, are clipped, as DuoAttention does.
    """
    try:
        values = [[float(number) for number in line.split()] for line in text.splitlines() if line.strip()]
    except ValueError:
        values = []
    are_numbers = all(math.isfinite(value) for heads in values for value in heads)
    if not values or len({len(heads) for heads in values}) > 1 or not are_numbers:
        raise UsageError(
            f"{path} is not a head pattern: it must be JSON of `headinfer heads`, or a table of DuoAttention with a "
            "line for each layer and a number for each KV head"
        )
    config = read_json_object(path.with_name(_DUO_CONFIG))
    if "sink_size" not in config or "recent_size" not in config:
        raise UsageError(
            f"cannot read {path}: {_DUO_CONFIG} in the same folder must have the fields sink_size and recent_size, as "
            "DuoAttention writes it"
        )
    clipped = tuple(tuple(min(max(value, 0.0), 1.0) for value in heads) for heads in values)
    try:
        return HeadPattern(clipped, sink_tokens=config["sink_size"], recent_tokens=config["recent_size"])
    except UsageError as error:
        raise UsageError(f"{path.with_name(_DUO_CONFIG)} is wrong: {error}") from error


def _is_table(value: Any) -> bool:
    """Return whether a value of JSON is a list of lists of numbers."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        return False
    return all(isinstance(item, (int, float)) and not isinstance(item, bool) for row in value for item in row)
