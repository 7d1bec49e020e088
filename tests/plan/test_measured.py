"""The cost model against what an H200 measured. h200.json has the lines, the machine and the commands."""

import dataclasses
import json
from pathlib import Path

import pytest

from headinfer.engine import streaming
from headinfer.plan import tiles
from headinfer.plan.hardware import HARDWARE
from headinfer.plan.models import find_shape
from headinfer.plan.roofline import Schedule, prefill_seconds
from headinfer.plan.tiles import LayerWork, TilePlan, TileRates, busy_share, choose_tiles, kernel_calls, layer_seconds

LLAMA = find_shape("llama-3-8b")
LAYERS = len(LLAMA.layers)
H200 = HARDWARE["h200"]
RATES = H200.tile_rates("bfloat16")
RUNS = json.loads((Path(__file__).parent / "h200.json").read_text())["runs"]
SLOT_BYTES = 191 * 2**20 // 2  # of a budget of 256 MiB: 33 MiB are tails and 32 write-back buffers
PIN_BYTES_PER_S = 4.7e9  # of host memory that was not touched before, on this machine


def lines(suite, **wanted):
    found = [line | {"run": run} for run in RUNS for line in run["lines"] if line["suite"] == suite]
    return [line for line in found if all(line.get(name) == value for name, value in wanted.items())]


CHUNKS = [line for line in lines("prefill") if "past_tokens" in line]
OURS = {line["past_tokens"]: line for line in CHUNKS if line["who"] == "headinfer"}
BEST = [line for line in CHUNKS if line["heads_per_group"] == 8]


def work(line):
    past_tokens = line["past_tokens"] - 128  # the tail is on the device
    return LayerWork.of_layer(LLAMA.layers[0], 2, rows=1, query_tokens=line["tokens"], past_tokens=past_tokens)


def chunk_seconds(line, rates=RATES, tile=None):
    """Predict a chunk: linear layers, attention of the chunk on itself, and on tiles as they were cut in the run."""
    one = work(line)
    heads, tokens = tile or (line["heads_per_group"], line["tile_tokens"])
    length = tokens if tile else TilePlan(heads, min(tokens, one.past_tokens), "", 128).length(one.past_tokens)
    linear_s = 2 * LLAMA.active_weights * line["tokens"] / H200.attained_flops_per_s("bfloat16")
    own_s = LLAMA.layers[0].flops_per_pair * line["tokens"] ** 2 / 2 / rates.flops_per_s / rates.rest_share
    own_s /= busy_share(rates, heads, one.query_rows)
    return linear_s + LAYERS * (own_s + layer_seconds(one, rates, heads, length))


def name(line):
    return f"{line['past_tokens']} {line['who']}"


@pytest.mark.parametrize("line", CHUNKS, ids=name)
def test_chunks_of_1_2_and_8_heads_are_predicted(line):
    assert chunk_seconds(line) == pytest.approx(line["value"], rel=0.06)


@pytest.mark.parametrize("line", BEST, ids=name)
def test_8_heads_are_predicted_to_be_as_much_faster_as_they_were(line):
    """All KV at hand, 8 heads at a time, against 2 heads x 97,792 tokens; and 8 heads x what a slot holds is close."""
    ours_s = chunk_seconds(OURS[line["past_tokens"]])
    assert chunk_seconds(line) / ours_s == pytest.approx(line["ratio"], rel=0.03)
    assert chunk_seconds(line, tile=(8, 16_384)) / ours_s == pytest.approx(line["ratio"], rel=0.03)


@pytest.mark.parametrize("past_tokens", sorted(OURS))
def test_8_heads_are_chosen_for_256_mib(past_tokens):
    """24,448 tokens fit a slot, but cuDNN would serve only 16,384 of them, and flash attention the rest."""
    one = work(OURS[past_tokens])
    plan = choose_tiles(one, SLOT_BYTES, RATES)
    assert (plan.heads_per_group, plan.tile_tokens) == (8, 16_384)
    chosen_s = layer_seconds(one, RATES, 8, 16_384)
    assert chosen_s < layer_seconds(one, RATES, 8, 24_448)
    assert all(plan.length(tokens) == 16_384 for tokens in range(16_384, 200_000, 999))
    any_length = dataclasses.replace(RATES, block_tokens=1)
    assert choose_tiles(one, SLOT_BYTES, any_length).heads_per_group == 8


def test_one_block_of_128_rows_at_a_time_fits_best(monkeypatch):
    def worst(block_rows, idle_gain):
        monkeypatch.setattr(tiles, "_QUERY_BLOCK", block_rows)
        errors = []
        for tera in range(540, 680, 10):
            rates = dataclasses.replace(RATES, flops_per_s=tera * 1e12, idle_gain=idle_gain)
            errors.append(max(abs(chunk_seconds(line, rates) / line["value"] - 1) for line in CHUNKS))
        return min(errors)

    assert worst(128, RATES.idle_gain) < 0.06
    assert worst(128, 1e-9) > 0.06  # waves / ceil(waves)
    assert worst(128, 1.0) > 0.09
    assert worst(64, RATES.idle_gain) > 0.12
    assert worst(192, RATES.idle_gain) > 0.12


def test_flash_attention_has_half_the_rate_of_cudnn():
    rates = {line["who"]: line["flops_per_s"] for line in lines("attention")}
    assert rates["cuda-flash"] / rates["cuda-cudnn"] == pytest.approx(RATES.rest_share, rel=0.04)


@pytest.mark.parametrize("line", lines("prefill", is_whole=True, who="headinfer"), ids=lambda line: line["point"])
def test_reading_is_predicted(line):
    """The run pinned new host memory meanwhile, which is not part of the model. Its tiles held the whole past."""
    tile = (2, 98_304)
    options = {"merges": True, "writes_back": True, "prefetches_next_layer": True}
    schedule = Schedule(line["chunk_tokens"], (0,) * LAYERS, tile, tile, **options)
    predicted_s = prefill_seconds(LLAMA, H200, line["tokens"], schedule).total_s
    error = 0.15 if line["tokens"] == 10_240 else 0.03
    assert predicted_s + line["link_to_host_bytes"] / PIN_BYTES_PER_S == pytest.approx(line["value"], rel=error)


def test_a_copy_takes_3_microseconds_beside_its_bytes():
    """Two sizes of copies through the ring give the rate and the time of a copy. Decode reached what follows from it.

    A tile of 24,448 tokens was cut from segments of 16,384, so it was 2 copies for each head and each segment.
    """
    (short, long) = lines("link")
    sizes = [line["tile_tokens"] * 256 for line in (short, long)]
    seconds = [size / line["value"] / 1e9 for size, line in zip(sizes, (short, long), strict=True)]
    byte_s = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    assert seconds[0] - sizes[0] * byte_s == pytest.approx(RATES.copy_s, rel=0.05)
    for line in lines("decode"):
        link = line["run"]["link_bytes_per_s"]
        layer_bytes = line["streamed_bytes"] / LAYERS
        copies = tiles.tile_copies(8, line["tile_tokens"]) * layer_bytes / (line["tile_tokens"] * 4096)
        predicted = layer_bytes / (layer_bytes + copies * RATES.copy_s * link)
        measured = line["streamed_bytes"] / line["value"] / link
        assert measured == pytest.approx(predicted, abs=0.012)


@pytest.mark.parametrize("tokens", [8, 8192, 16_384, 24_448, 24_576, 97_792, 98_304, 131_072, 200_000])
def test_calls_are_those_of_the_loop(tokens):
    blocks = streaming.BLOCK_TOKENS
    assert blocks == (4 * RATES.block_tokens, 2 * RATES.block_tokens, RATES.block_tokens)
    rest = tokens
    calls = 0
    while rest:
        rest -= next((block for block in blocks if block <= rest), rest)
        calls += 1
    assert kernel_calls(RATES, tokens) == calls
    assert kernel_calls(TileRates(), tokens) == 1
