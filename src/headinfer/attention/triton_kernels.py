"""Triton kernels: attention with a log-sum-exp (soft caps, split keys), the merges of its results, and quantisation.

This file imports triton, which is not installed with every torch. So only triton_calls.py imports it, when the first
kernel is needed. Names in capitals are compile-time constants. Offsets that grow with a tensor are computed in 64 bits,
offsets within a block in 32 bits. Scores are kept in units of log 2, because GPUs have an instruction for exp2.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    """Compute tanh(x) from exp2, with an absolute error of about 1e-7.

    If PRECISE, |x| < 0.3 uses the power series, whose relative error is as small as that of float32.
    """
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - decay) / (1.0 + decay)
    large = tl.where(x < 0.0, -large, large)
    if PRECISE:
        y = x * x
        series = y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835 - y * (1382.0 / 155925)))))
        return tl.where(tl.abs(x) < 0.3, x + x * series, large)
    return large


@triton.jit
def _attend_keys(
    q, acc, row_max, total,
    k_at, v_at, k_token, v_token,
    start, stop, row, unit, cap,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Attend to the keys [start, stop) with a block of query rows, and return the new state of the block.

    acc [BLOCK_ROWS, VALUE_WIDTH], row_max and total [BLOCK_ROWS] are the state: the weighted sum of the values, the
    maximum of the scores and the sum of the weights exp2(score - row_max), by which acc is not divided yet. k_at and
    v_at point to the key `start`; k_token and v_token are the strides between tokens. If not MASKED, the keys are whole
    blocks, all of which every row sees.
    """
    position = tl.arange(0, BLOCK_KEYS)
    k_dim = tl.arange(0, KEY_WIDTH)
    v_dim = tl.arange(0, VALUE_WIDTH)
    k_offsets = position[:, None] * k_token + k_dim[None, :]
    v_offsets = position[:, None] * v_token + v_dim[None, :]
    for at in range(start, stop, BLOCK_KEYS):
        is_key = at + position < stop
        if MASKED or KEY_DIM != KEY_WIDTH:
            k = tl.load(k_at + k_offsets, mask=is_key[:, None] & (k_dim < KEY_DIM)[None, :], other=0.0)
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
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf is NaN
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        total = total * rescale + tl.sum(weights, 1)
        if MASKED or VALUE_DIM != VALUE_WIDTH:
            v = tl.load(v_at + v_offsets, mask=is_key[:, None] & (v_dim < VALUE_DIM)[None, :], other=0.0)
        else:
            v = tl.load(v_at + v_offsets)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
        k_at += BLOCK_KEYS * k_token
        v_at += BLOCK_KEYS * v_token
    return acc, row_max, total


@triton.jit(do_not_specialize=["heads", "rows", "keys", "split_keys"])
def attend(
    q, k, v, out, lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    heads, rows, keys, split_keys, unit, cap,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute attention, for each split of the keys on its own.

    The grid is (blocks of query rows, B * heads, splits).

    q [B, heads, rows, KEY_DIM], k [B, heads / GROUP, keys, KEY_DIM] and v [B, heads / GROUP, keys, VALUE_DIM] have the
    strides that are passed; the last dim is contiguous. out [splits, B, heads, rows, VALUE_DIM] and lse [splits, B,
    heads, rows] are contiguous. The scores, in units of log 2, are q . k * unit, or tanh(q . k * unit) * cap if CAPPED.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block  # the blocks with the most keys start first
    batch = (head // heads).to(tl.int64)
    q_index = (head % heads).to(tl.int64)
    kv_index = (head % heads // GROUP).to(tl.int64)
    first = block * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    start = split * split_keys
    stop = tl.minimum(start + split_keys, keys)
    whole = start + (stop - start) // BLOCK_KEYS * BLOCK_KEYS
    if CAUSAL:
        stop = tl.minimum(first + BLOCK_ROWS, keys)
        whole = (first + 1) // BLOCK_KEYS * BLOCK_KEYS  # every row of the block sees every key before this one
    dim = tl.arange(0, KEY_WIDTH)
    q_at = q + batch * q_batch + q_index * q_head + first.to(tl.int64) * q_token
    q_offsets = (row - first)[:, None] * q_token + dim[None, :]
    query = tl.load(q_at + q_offsets, mask=(row < rows)[:, None] & (dim < KEY_DIM)[None, :], other=0.0)
    k_at = k + batch * k_batch + kv_index * k_head
    v_at = v + batch * v_batch + kv_index * v_head
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, VALUE_WIDTH], tl.float32)
    acc, row_max, total = _attend_keys(
        query, acc, row_max, total,
        k_at + start.to(tl.int64) * k_token, v_at + start.to(tl.int64) * v_token, k_token, v_token,
        start, whole, row, unit, cap,
        False, CAUSAL, CAPPED, PRECISE, BLOCK_KEYS, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    acc, row_max, total = _attend_keys(
        query, acc, row_max, total,
        k_at + whole.to(tl.int64) * k_token, v_at + whole.to(tl.int64) * v_token, k_token, v_token,
        whole, stop, row, unit, cap,
        True, CAUSAL, CAPPED, PRECISE, BLOCK_KEYS, KEY_DIM, KEY_WIDTH, VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    position = (split * tl.num_programs(1) + head).to(tl.int64) * rows + row
    tl.store(lse + position, (row_max + tl.log2(total)) * LN_2, mask=row < rows)
    v_dim = tl.arange(0, VALUE_WIDTH)
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    offsets = position[:, None] * VALUE_DIM + v_dim[None, :]
    tl.store(out + offsets, mean, mask=(row < rows)[:, None] & (v_dim < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def join(
    parts, parts_lse, out, lse, rows, splits,
    BLOCK_SPLITS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Merge parts [splits, rows, VALUE_DIM] and parts_lse [splits, rows] over the splits; the grid is (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, VALUE_WIDTH)
    row_max = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([VALUE_WIDTH], tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        position = split.to(tl.int64) * rows + row
        part_lse = tl.load(parts_lse + position, mask=split < splits, other=float("-inf"))
        mask = (split < splits)[:, None] & (dim < VALUE_DIM)[None, :]
        part = tl.load(parts + position[:, None] * VALUE_DIM + dim[None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tl.max(part_lse, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2((part_lse - shift) * LOG2_E)
        rescale = tl.exp2((row_max - shift) * LOG2_E)
        total = total * rescale + tl.sum(weights, 0)
        acc = acc * rescale + tl.sum(weights[:, None] * part, 0)
        row_max = new_max
    tl.store(lse + row, row_max + tl.log2(total) * LN_2)
    tl.store(out + row * VALUE_DIM + dim, acc / tl.where(total == 0.0, 1.0, total), mask=dim < VALUE_DIM)


@triton.jit(do_not_specialize=["rows", "inner"])
def merge(
    out, lse, part, part_lse,
    out_outer, out_inner, lse_outer, lse_inner, part_outer, part_inner, part_lse_outer, part_lse_inner,
    rows, inner,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge a part into a state in place, as AttentionState.merge_() does; the grid is (blocks of rows,).

    out and part are [rows / inner, inner, DIM], lse and part_lse [rows / inner, inner]; the strides of both dims are
    passed. part may be of a half type, the others are float32. If neither has seen a key, the row stays empty; if only
    one has, the row has its bits.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, WIDTH)
    outer_index = row // inner
    inner_index = row % inner
    is_row = row < rows
    mask = is_row[:, None] & (dim < DIM)[None, :]
    out_at = out + (outer_index * out_outer + inner_index * out_inner)[:, None] + dim[None, :]
    lse_at = lse + outer_index * lse_outer + inner_index * lse_inner
    part_at = part + (outer_index * part_outer + inner_index * part_inner)[:, None] + dim[None, :]
    old_lse = tl.load(lse_at, mask=is_row, other=0.0)
    new_lse = tl.load(part_lse + outer_index * part_lse_outer + inner_index * part_lse_inner, mask=is_row, other=0.0)
    old_out = tl.load(out_at, mask=mask, other=0.0)
    new_out = tl.load(part_at, mask=mask, other=0.0).to(tl.float32)
    # Several threads may read the same log-sum-exp. All must have read it before one of them writes the new one.
    tl.debug_barrier()
    weight = 1.0 / (1.0 + tl.exp2((old_lse - new_lse) * LOG2_E))
    weight = tl.where(new_lse == float("-inf"), 0.0, weight)[:, None]
    # As in torch.lerp, use the form with the smaller rounding error, so that weights of 0 and 1 are exact.
    step = new_out - old_out
    merged = tl.where(weight < 0.5, old_out + weight * step, new_out - step * (1.0 - weight))
    larger = tl.where(old_lse > new_lse, old_lse, new_lse)
    gap = tl.abs(old_lse - new_lse)
    # The first case serves equal infinities, whose gap is NaN.
    merged_lse = tl.where(old_lse == new_lse, old_lse + LN_2, larger + tl.log2(1.0 + tl.exp2(-gap * LOG2_E)) * LN_2)
    tl.store(lse_at, merged_lse, mask=is_row)
    tl.store(out_at, merged, mask=mask)


@triton.jit
def _byte_of(token, element, KEYS: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr):
    """Return where the integer of a token and an element of the head dim is in a block, and its shift in that byte.

    quantised.py describes the order. A lane of 8 bits has 2 integers, one of 4 bits has 4; a vector has 16 lanes.
    """
    RUN: tl.constexpr = 2 if BITS == 8 else 4
    if KEYS:
        number = element // RUN * (UNIT * RUN) + token * RUN + element % RUN
    else:
        number = token // RUN * (WIDE * RUN) + element * RUN + token % RUN
    if BITS == 8:
        return number, number * 0
    vector = number // (16 * RUN)
    return vector // 2 * (16 * RUN) + number % (16 * RUN), vector % 2 * 4


@triton.jit
def dequantise(
    packed, out, packed_head, out_head,
    KEYS: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Dequantise a block of keys or values; the grid is (blocks, H).

    packed is uint8 [H, blocks, bytes of a block], out [H, blocks * UNIT, DIM]; the strides of H are passed. WIDE is the
    head dim as it is stored.
    """
    SCALES: tl.constexpr = DIM if KEYS else UNIT
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    at = packed + head * packed_head + block * (UNIT * WIDE * BITS // 8 + 4 * SCALES)
    halves = at.to(tl.pointer_type(tl.float16), bitcast=True)
    token = tl.arange(0, UNIT)[:, None]
    element = tl.arange(0, WIDTH)[None, :]
    is_element = element < DIM
    index = element if KEYS else token
    scale = tl.load(halves + index, mask=index < SCALES, other=0.0).to(tl.float32) / (1 << BITS)
    low = tl.load(halves + SCALES + index, mask=index < SCALES, other=0.0).to(tl.float32)
    byte, shift = _byte_of(token, element, KEYS, BITS, WIDE, UNIT)
    number = tl.load(at + 4 * SCALES + byte, mask=is_element, other=0).to(tl.int32) >> shift & ((1 << BITS) - 1)
    value = low + scale * number.to(tl.float32)
    to = out + head * out_head + (block * UNIT + token) * DIM + element
    tl.store(to, value.to(out.dtype.element_ty), mask=is_element)


@triton.jit
def _integers(x, low, scale, is_element, BITS: tl.constexpr):
    """Return (x - low) / scale, rounded to the nearest integer of BITS bits, and to an even one from the middle."""
    whole = tl.div_rn(x - low, scale) + 12582912.0 - 12582912.0  # 1.5 * 2^23
    most = (1 << BITS) - 1.0
    return tl.where(is_element, tl.minimum(tl.maximum(whole, 0.0), most), 0.0).to(tl.int32)


@triton.jit
def quantise(
    x, packed, x_head, x_token, packed_head,
    KEYS: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr,
    UNIT: tl.constexpr, WIDENING: tl.constexpr,
):  # fmt: skip
    """Quantise a block of keys or values; the grid is (blocks, H).

    x is [H, blocks * UNIT, DIM], packed uint8 [H, blocks, bytes of a block]; the strides are passed. WIDENING is
    2^BITS / (2^BITS - 1). With 4 bits a byte has two integers: of tokens (keys) or elements (values) that are 16 apart.
    """
    PARTS: tl.constexpr = 8 // BITS
    SCALES: tl.constexpr = DIM if KEYS else UNIT
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token = tl.arange(0, UNIT // PARTS if KEYS else UNIT)[:, None]
    element = tl.arange(0, WIDTH if KEYS else WIDTH // PARTS)[None, :]
    next_token = 0
    next_element = 0
    if PARTS == 2 and KEYS:
        token = token // 16 * 32 + token % 16
        next_token = 16
    if PARTS == 2 and not KEYS:
        element = element // 16 * 32 + element % 16
        next_element = 16
    AXIS: tl.constexpr = 0 if KEYS else 1
    here = x + head * x_head + block * UNIT * x_token
    is_first = (element < DIM) & (token < UNIT)
    first = tl.load(here + token * x_token + element, mask=is_first, other=0.0).to(tl.float32)
    least = tl.min(tl.where(is_first, first, float("inf")), AXIS, keep_dims=True)
    most = tl.max(tl.where(is_first, first, float("-inf")), AXIS, keep_dims=True)
    if PARTS == 2:
        is_second = (element + next_element < DIM) & (token < UNIT)
        from_second = here + (token + next_token) * x_token + element + next_element
        second = tl.load(from_second, mask=is_second, other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.min(tl.where(is_second, second, float("inf")), AXIS, keep_dims=True))
        most = tl.maximum(most, tl.max(tl.where(is_second, second, float("-inf")), AXIS, keep_dims=True))
    low = least.to(tl.float16)
    wide = (most - low.to(tl.float32)) * WIDENING
    scale = tl.maximum(wide, 5.9604644775390625e-08).to(tl.float16)  # 2^-24, the smallest positive float16
    at = packed + head * packed_head + block * (UNIT * WIDE * BITS // 8 + 4 * SCALES)
    halves = at.to(tl.pointer_type(tl.float16), bitcast=True)
    index = element if KEYS else token
    tl.store(halves + index, scale, mask=index < SCALES)
    tl.store(halves + SCALES + index, low, mask=index < SCALES)
    step = scale.to(tl.float32) / (1 << BITS)
    number = _integers(first, low.to(tl.float32), step, is_first, BITS)
    if PARTS == 2:
        number = number | _integers(second, low.to(tl.float32), step, is_second, BITS) << 4
    byte, _ = _byte_of(token, element, KEYS, BITS, WIDE, UNIT)
    tl.store(at + 4 * SCALES + byte, number.to(tl.uint8), mask=(element < WIDE) & (token < UNIT))
