"""Quantised keys and values: the format's error, and the CPU kernel of every target against float64 attention."""

import math

import pytest
import torch
from attention_cases import relative_error, seeded

from headinfer.attention import native_build, quantised
from headinfer.attention.native import attend_quantised
from headinfer.attention.native_build import QUANTISED, TARGETS
from headinfer.attention.quantised import UNIT
from headinfer.attention.reference import attend_reference

BITS = (8, 4)
KERNEL_ERROR = {8: 1e-3, 4: 5e-2}  # of rounded query rows and weights, relative, if scores have a deviation of 3
NO_KERNEL = native_build.load(torch.quint8)[1]
needs_kernel = pytest.mark.skipif(bool(NO_KERNEL), reason=f"no native kernel: {NO_KERNEL}")
of_bits = pytest.mark.parametrize("bits", BITS)
on_targets = pytest.mark.parametrize(
    "target", [target for target in TARGETS if set(QUANTISED) <= set(target.dtypes)], ids=lambda target: target.name
)


def keys_and_values(heads, tokens, dim, rng):
    """Make K with a large mean in some elements, as real keys have, and V."""
    k = torch.randn(heads, tokens, dim, generator=rng) + 4 * torch.randn(heads, 1, dim, generator=rng)
    v = torch.randn(heads, tokens, dim, generator=rng) * torch.rand(heads, tokens, 1, generator=rng)
    return k, v


def skip_unless_it_runs(target):
    if not native_build._features().issuperset(target.features):
        pytest.skip(f"this CPU is no {target.name}")


# -- the format --------------------------------------------------------------------------------------------------


@of_bits
def test_an_element_is_at_most_half_a_step_from_its_value(bits):
    k, v = keys_and_values(3, 4 * UNIT, 96, seeded(1))
    for x, encode, decode, axis in (
        (k, quantised.encode_k, quantised.decode_k, 2),
        (v, quantised.encode_v, quantised.decode_v, 3),
    ):
        packed = encode(x, bits)
        found = decode(packed, 96, bits)
        blocks = x.view(3, 4, UNIT, 96)
        step = (blocks.amax(axis, keepdim=True) - blocks.amin(axis, keepdim=True)) / (2**bits - 1)
        rounding = 2**-10 * blocks.abs().amax(axis, keepdim=True)  # of scales and offsets to float16
        assert bool(((found.view_as(blocks) - blocks).abs() <= 0.5 * step + rounding).all())


@of_bits
def test_what_was_decoded_is_encoded_to_the_same_numbers(bits):
    """So KV that is decoded and encoded again, such as after a crop, does not lose more and more."""
    k, v = keys_and_values(2, 2 * UNIT, 64, seeded(2))
    once_k = quantised.decode_k(quantised.encode_k(k, bits), 64, bits)
    once_v = quantised.decode_v(quantised.encode_v(v, bits), 64, bits)
    again_k = quantised.decode_k(quantised.encode_k(once_k, bits), 64, bits)
    again_v = quantised.decode_v(quantised.encode_v(once_v, bits), 64, bits)
    assert relative_error(again_k, once_k) < 1e-3
    assert relative_error(again_v, once_v) < 1e-3


@of_bits
def test_the_bytes_of_a_token(bits):
    k, v = keys_and_values(2, UNIT, 128, seeded(3))
    assert quantised.encode_k(k, bits).shape == (2, UNIT, quantised.key_bytes(128, bits))
    assert quantised.encode_v(v, bits).shape == (2, UNIT, quantised.value_bytes(128, bits))
    assert (quantised.key_bytes(128, bits), quantised.value_bytes(128, bits)) == {8: (136, 132), 4: (72, 68)}[bits]


@of_bits
def test_blocks_do_not_depend_on_each_other(bits):
    """So new tokens never change what is stored, and any whole blocks may be moved."""
    k, v = keys_and_values(2, 3 * UNIT, 64, seeded(4))
    for x, encode in ((k, quantised.encode_k), (v, quantised.encode_v)):
        parts = [encode(x[:, start : start + UNIT], bits) for start in range(0, 3 * UNIT, UNIT)]
        assert torch.equal(encode(x, bits), torch.cat(parts, dim=1))


@of_bits
def test_equal_elements_and_zeros_are_exact(bits):
    for value in (0.0, 1.5, -3.0):
        x = torch.full((1, UNIT, 32), value)
        assert torch.equal(quantised.decode_k(quantised.encode_k(x, bits), 32, bits), x)
        assert torch.equal(quantised.decode_v(quantised.encode_v(x, bits), 32, bits), x)


# -- the kernel --------------------------------------------------------------------------------------------------

SHAPES = (  # rows, head dim, tokens of the pieces
    (1, 128, (64,)),
    (4, 16, (512, 64)),
    (5, 80, (128,)),
    (2, 32, (128, 1024)),
    (3, 96, (576, 64)),
    (4, 64, (1536,)),
    (7, 128, (512, 64, 640)),
    (16, 256, (192,)),
    (17, 160, (64, 64)),
    (64, 64, (704,)),
)


@needs_kernel
@of_bits
@on_targets
def test_every_target_is_attention_over_the_decoded_pieces(target, bits):
    """Rows from 1 to 64, head dims that are multiples of 16, several pieces, soft caps, strides of heads, threads."""
    skip_unless_it_runs(target)
    rng = seeded(5)
    for number, (rows, dim, sizes) in enumerate(SHAPES):
        soft_cap = 5.0 if number % 3 == 1 else None
        scale = 3 / math.sqrt(dim)
        q = torch.randn(2, rows, dim, generator=rng)
        pieces = []
        decoded = []
        for tokens in sizes:
            k, v = keys_and_values(4, tokens, dim, rng)
            packed_k = quantised.encode_k(k, bits)[::2]  # heads that are not next to each other
            packed_v = quantised.encode_v(v, bits)[::2]
            pieces.append((packed_k, packed_v))
            decoded.append((quantised.decode_k(packed_k, dim, bits), quantised.decode_v(packed_v, dim, bits)))
        k, v = (torch.cat(sides, dim=1) for sides in zip(*decoded, strict=True))
        wanted = attend_reference(q[None], k[None], v[None], scale=scale, softcap=soft_cap)[0]
        found = attend_quantised(
            q, pieces, bits=bits, value_dim=dim, scale=scale, soft_cap=soft_cap, threads=1, target=target
        )
        assert relative_error(found.out, wanted.out) <= KERNEL_ERROR[bits]
        assert float((found.lse - wanted.lse).abs().max()) <= KERNEL_ERROR[bits] * 3
        other = attend_quantised(
            q, pieces, bits=bits, value_dim=dim, scale=scale, soft_cap=soft_cap, threads=3, target=target
        )
        assert torch.equal(other.out, found.out)
        assert torch.equal(other.lse, found.lse)


@needs_kernel
@of_bits
@on_targets
def test_the_kernel_adds_little_to_the_error_of_the_format(target, bits):
    """The error against attention to the exact K and V is at most 1.1 times that of attention to the decoded ones."""
    skip_unless_it_runs(target)
    rng = seeded(6)
    for scale in (0.02, 0.125, 0.4):
        k, v = keys_and_values(4, 1024, 64, rng)
        q = torch.randn(4, 4, 64, generator=rng)
        packed = quantised.encode_k(k, bits), quantised.encode_v(v, bits)
        decoded = quantised.decode_k(packed[0], 64, bits), quantised.decode_v(packed[1], 64, bits)
        exact = attend_reference(q[None], k[None], v[None], scale=scale).out[0]
        of_format = attend_reference(q[None], decoded[0][None], decoded[1][None], scale=scale).out[0]
        found = attend_quantised(q, [packed], bits=bits, value_dim=64, scale=scale, target=target).out
        assert relative_error(found, exact) <= 1.1 * relative_error(of_format, exact)


@needs_kernel
@of_bits
@on_targets
def test_nan_in_a_query_reaches_its_row_only(target, bits):
    skip_unless_it_runs(target)
    k, v = keys_and_values(2, 128, 32, seeded(7))
    q = torch.randn(2, 5, 32, generator=seeded(8))
    q[1, 3, 7] = torch.nan
    packed = quantised.encode_k(k, bits), quantised.encode_v(v, bits)
    out = attend_quantised(q, [packed], bits=bits, value_dim=32, scale=0.2, target=target).out
    wanted = torch.zeros(2, 5, 32, dtype=torch.bool)
    wanted[1, 3] = True
    assert torch.equal(out.isnan(), wanted)


@needs_kernel
@of_bits
def test_no_keys(bits):
    none = (
        torch.empty(2, 0, quantised.key_bytes(32, bits), dtype=torch.uint8),
        torch.empty(2, 0, quantised.value_bytes(32, bits), dtype=torch.uint8),
    )
    found = attend_quantised(torch.randn(2, 3, 32), [none], bits=bits, value_dim=32, scale=1.0)
    assert torch.equal(found.out, torch.zeros(2, 3, 32))
    assert torch.equal(found.lse, torch.full((2, 3), -torch.inf))
