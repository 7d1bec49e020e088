"""Triton kernels: attention with a log-sum-exp (soft cap, split keys), its splits joined, and a tile merged.

Imports triton, which not every torch brings: only `triton_calls.py` loads this file, when a kernel is wanted. Names in
capitals are compile-time constants. Offsets that grow with a tensor are computed in 64 bits, those within a tile in 32.
Scores are kept in units of log 2, since exp2 is what the hardware has.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    """From exp2, whose absolute error is about 1e-7; where PRECISE, its series below 0.3, for the relative error."""
    fade = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - fade) / (1.0 + fade)
    large = tl.where(x < 0.0, -large, large)
    if PRECISE:
        y = x * x
        series = y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835 - y * (1382.0 / 155925)))))
        return tl.where(tl.abs(x) < 0.3, x + x * series, large)
    return large


@triton.jit
def _over_keys(
    q, acc, best, total,  # the state of a block of query rows: not yet divided by the total
    k_at, v_at, k_token, v_token,  # where the key `start` lies; elements between tokens
    start, stop, row, unit, cap,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Take in the keys [start, stop). Not MASKED: whole blocks of keys that all rows see."""
    position = tl.arange(0, BLOCK_KEYS)
    k_lane, v_lane = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    k_offsets = position[:, None] * k_token + k_lane[None, :]
    v_offsets = position[:, None] * v_token + v_lane[None, :]
    for at in range(start, stop, BLOCK_KEYS):
        is_key = at + position < stop
        if MASKED or KEY_DIM != KEY_WIDTH:
            k = tl.load(k_at + k_offsets, mask=is_key[:, None] & (k_lane < KEY_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_at + k_offsets)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * unit
        if CAPPED:
            scores = _tanh(scores, PRECISE) * cap
        if MASKED:
            seen = is_key[None, :]
            if CAUSAL:
                seen = seen & (at + position[None, :] <= row[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        anchor = tl.where(peak == float("-inf"), 0.0, peak)  # no NaN from -inf - -inf
        weights = tl.exp2(scores - anchor[:, None])
        fade = tl.exp2(best - anchor)
        total = total * fade + tl.sum(weights, 1)
        if MASKED or VALUE_DIM != VALUE_WIDTH:
            v = tl.load(v_at + v_offsets, mask=is_key[:, None] & (v_lane < VALUE_DIM)[None, :], other=0.0)
        else:
            v = tl.load(v_at + v_offsets)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        best = peak
        k_at += BLOCK_KEYS * k_token
        v_at += BLOCK_KEYS * v_token
    return acc, best, total


@triton.jit(do_not_specialize=["heads", "rows", "keys", "split_keys"])
def attend(
    q, k, v, out, lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, rows, keys, split_keys, unit, cap,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """q [B, heads, rows, KEY_DIM], k [B, heads / GROUP, keys, KEY_DIM], v likewise; a program for each block of rows,
    head and split of the keys. out [splits, B, heads, rows, VALUE_DIM] and lse [splits, B, heads, rows], contiguous.

    unit, cap: scores are q . k * unit, or tanh(q . k * unit) * cap, in units of log 2.
    """
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block  # the blocks with the most keys start first
    batch, own = (head // heads).to(tl.int64), head % heads
    own, shared = own.to(tl.int64), (own // GROUP).to(tl.int64)
    first = block * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    start = split * split_keys
    stop = tl.minimum(start + split_keys, keys)
    whole = start + (stop - start) // BLOCK_KEYS * BLOCK_KEYS
    if CAUSAL:
        stop = tl.minimum(first + BLOCK_ROWS, keys)
        whole = (first + 1) // BLOCK_KEYS * BLOCK_KEYS  # up to here every row of the block sees every key
    lane = tl.arange(0, KEY_WIDTH)
    q_at = q + batch * q_batch + own * q_head + first.to(tl.int64) * q_token
    q_offsets = (row - first)[:, None] * q_token + lane[None, :]
    query = tl.load(q_at + q_offsets, mask=(row < rows)[:, None] & (lane < KEY_DIM)[None, :], other=0.0)
    k_at, v_at = k + batch * k_batch + shared * k_head, v + batch * v_batch + shared * v_head
    best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, VALUE_WIDTH], tl.float32)
    acc, best, total = _over_keys(
        query, acc, best, total,
        k_at + start.to(tl.int64) * k_token, v_at + start.to(tl.int64) * v_token, k_token, v_token,
        start, whole, row, unit, cap,
        False, CAUSAL, CAPPED, PRECISE, BLOCK_KEYS, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    acc, best, total = _over_keys(
        query, acc, best, total,
        k_at + whole.to(tl.int64) * k_token, v_at + whole.to(tl.int64) * v_token, k_token, v_token,
        whole, stop, row, unit, cap,
        True, CAUSAL, CAPPED, PRECISE, BLOCK_KEYS, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    position = (split * tl.num_programs(1) + head).to(tl.int64) * rows + row
    tl.store(lse + position, (best + tl.log2(total)) * LN_2, mask=row < rows)
    v_lane = tl.arange(0, VALUE_WIDTH)
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    offsets = position[:, None] * VALUE_DIM + v_lane[None, :]
    tl.store(out + offsets, mean, mask=(row < rows)[:, None] & (v_lane < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def join(
    parts, parts_lse, out, lse, rows, splits,
    BLOCK_SPLITS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge parts [splits, rows, VALUE_DIM] and parts_lse [splits, rows] over the splits; a program for each row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, VALUE_WIDTH)
    best, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    acc = tl.zeros([VALUE_WIDTH], tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        position = split.to(tl.int64) * rows + row
        part_lse = tl.load(parts_lse + position, mask=split < splits, other=float("-inf"))
        mask = (split < splits)[:, None] & (lane < VALUE_DIM)[None, :]
        part = tl.load(parts + position[:, None] * VALUE_DIM + lane[None, :], mask=mask, other=0.0)
        peak = tl.maximum(best, tl.max(part_lse, 0))
        anchor = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2((part_lse - anchor) * LOG2_E)
        fade = tl.exp2((best - anchor) * LOG2_E)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(weights[:, None] * part, 0)
        best = peak
    tl.store(lse + row, best + tl.log2(total) * LN_2)
    tl.store(out + row * VALUE_DIM + lane, acc / tl.where(total == 0.0, 1.0, total), mask=lane < VALUE_DIM)


@triton.jit(do_not_specialize=["rows", "inner"])
def merge(
    out, lse, part, part_lse, rows, inner,
    out_outer, out_inner, lse_outer, lse_inner, part_outer, part_inner, part_lse_outer, part_lse_inner,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge part [rows / inner, inner, DIM], float32 or a half type, into out in place; the others are float32.

    Equal to AttentionState.merge_: empty with empty stays empty, empty takes over the other's bits.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, WIDTH)
    outside, inside, is_row = row // inner, row % inner, row < rows
    mask = is_row[:, None] & (lane < DIM)[None, :]
    out_at = out + (outside * out_outer + inside * out_inner)[:, None] + lane[None, :]
    lse_at = lse + outside * lse_outer + inside * lse_inner
    part_at = part + (outside * part_outer + inside * part_inner)[:, None] + lane[None, :]
    old = tl.load(lse_at, mask=is_row, other=0.0)
    new = tl.load(part_lse + outside * part_lse_outer + inside * part_lse_inner, mask=is_row, other=0.0)
    mine = tl.load(out_at, mask=mask, other=0.0)
    other = tl.load(part_at, mask=mask, other=0.0).to(tl.float32)
    # Threads may read the same log-sum-exp: all of them must have it before one of them writes the new one.
    tl.debug_barrier()
    weight = 1.0 / (1.0 + tl.exp2((old - new) * LOG2_E))
    weight = tl.where(new == float("-inf"), 0.0, weight)[:, None]
    # The form with the smaller rounding error, as in torch.lerp: exact at both ends.
    merged = tl.where(weight < 0.5, mine + weight * (other - mine), other - (other - mine) * (1.0 - weight))
    peak = tl.where(old > new, old, new)
    gap = tl.abs(old - new)
    both = tl.where(old == new, old + LN_2, peak + tl.log2(1.0 + tl.exp2(-gap * LOG2_E)) * LN_2)  # also of infinities
    tl.store(lse_at, both, mask=is_row)
    tl.store(out_at, merged, mask=mask)
