"""Every attention backend on its device against the float64 oracle.

The CUDA backends are tested if there is a GPU. In half precision the relative Frobenius error may be at most 1.5 times
that of torch's attention, over at least 10,000 outputs, with flat and peaked softmax.
"""

import math

import pytest
import torch
from attention_cases import copy_of, random_state, relative_error, seeded, with_head_stride

from headinfer.attention import triton_calls
from headinfer.attention.backends import BACKENDS, Problem, capability_of
from headinfer.attention.reference import attend_reference, causal_mask
from headinfer.attention.state import AttentionState

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = {"cpu": (), "cuda": (pytest.mark.gpu,)}
DIMS = {"cpu": ((80, 96), (64, 64)), "cuda": ((64, 64), (128, 128), (80, 96), (256, 256), (320, 64))}
on_every_device = pytest.mark.parametrize(
    ("device", "backend", "dims"),
    [
        pytest.param(device, backend, dims, marks=marks, id=f"{device}-{backend.name}-{dims[0]}-{dims[1]}")
        for device, marks in DEVICES.items()
        for backend in BACKENDS
        for dims in DIMS[device]
        if backend.device_type in (device, "any")
    ],
)
with_any_type = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
with_any_softmax = pytest.mark.parametrize("sharpness", [0.05, 6.0], ids=["flat", "peaked"])


def problem_of(device, dtype, rows, dims, softcap=None, tokens=0):
    capability = capability_of(torch.device(device, 0) if device == "cuda" else torch.device(device))
    return Problem(device, dtype, rows, *dims, softcap is not None, capability, tokens)


def skip_refused(backend, problem):
    if (reason := backend.refuses(problem)) is not None:
        pytest.skip(f"{backend.name} refuses: {reason}")


def torch_attention(q, k, v, scale, softcap, causal):
    """Compute attention with torch in q's type: sdpa, or matrix products as in transformers if there is a soft cap."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
    scores = torch.tanh((q @ k.mT) * scale / softcap) * softcap
    if causal:
        scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


LSE_BOUND = {"cpu-flash-bf16": 1e-4}  # torch approximates the exponential; the error does not depend on the length


def assert_as_good_as_torch(out, lse, wanted, theirs, backend):
    """Compare outputs in the model's type with float64. A floor allows float32 kernels to sum in any order."""
    assert out.shape == wanted.out.shape
    assert wanted.out.numel() >= 10_000
    assert out.isfinite().all()
    floor = 3e-6 if out.dtype == torch.float32 else 0.0
    assert relative_error(out, wanted.out) <= max(1.5 * relative_error(theirs, wanted.out), floor)
    assert float((lse.double() - wanted.lse).abs().max()) <= max(
        5e-6 * max(1.0, float(wanted.lse.abs().max())), LSE_BOUND.get(backend.name, 0.0)
    )


def check_attend_full(device, backend, dtype, sharpness, dims, heads, rows, sizes, softcap=None):
    rng = seeded(rows)
    q = torch.randn(heads, rows, dims[0], generator=rng).to(dtype).to(device)
    pieces = [tuple(with_head_stride(heads, size, dim, 8, rng, dtype, device) for dim in dims) for size in sizes]
    k, v = (torch.cat(sides, dim=1) for sides in zip(*pieces, strict=True))
    scale = sharpness / math.sqrt(dims[0])
    wanted = attend_reference(q[None], k[None], v[None], scale=scale, softcap=softcap)[0]
    theirs = torch_attention(q[None], k[None], v[None], scale, softcap, causal=False)[0]
    parts = [backend.attend_full(q, [piece], scale, softcap) for piece in pieces]
    merged = AttentionState.empty((heads, rows), dims[1], device)
    for part in parts:
        merged.merge_(part)
    at_once = backend.attend_full(q, pieces, scale, softcap)
    for state in (merged, at_once):
        assert state.out.device.type == device
        assert_as_good_as_torch(state.out.to(dtype), state.lse, wanted, theirs, backend)
    again = backend.attend_full(q, pieces, scale, softcap)
    assert torch.equal(again.out, at_once.out)  # the same call gives the same bits
    assert torch.equal(again.lse, at_once.lse)


@on_every_device
@with_any_type
@with_any_softmax
def test_chunk_attends_to_the_past(device, backend, dtype, sharpness, dims):
    rows = 1024 if backend.name == "cuda-cudnn" else 129  # cuDNN is only used for chunks
    skip_refused(backend, problem_of(device, dtype, rows, dims, tokens=1024))
    check_attend_full(device, backend, dtype, sharpness, dims, 2, rows, (1024, 507))


@on_every_device
@with_any_type
@with_any_softmax
@pytest.mark.parametrize("rows", [1, 17])
def test_decode_attends_to_the_past(device, backend, dtype, sharpness, dims, rows):
    skip_refused(backend, problem_of(device, dtype, rows, dims, tokens=4099))
    heads = -(-10_000 // (rows * dims[1]))
    check_attend_full(
        device, backend, dtype, sharpness, dims, min(heads, 160), rows, (4099 if device == "cuda" else 515, 255)
    )


@on_every_device
@with_any_type
@with_any_softmax
@pytest.mark.parametrize("rows", [4, 129])
def test_soft_caps_with_the_past(device, backend, dtype, sharpness, dims, rows):
    skip_refused(backend, problem_of(device, dtype, rows, dims, 50.0))
    heads = -(-10_000 // (rows * dims[1]))
    check_attend_full(device, backend, dtype, 4 * sharpness, dims, heads, rows, (1024, 255), softcap=50.0)


@on_every_device
@with_any_type
@with_any_softmax
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("tokens", [1, 255])
def test_chunk_attends_to_itself(device, backend, dtype, sharpness, dims, softcap, tokens):
    skip_refused(backend, problem_of(device, dtype, 0, dims, softcap))
    rng = seeded(tokens)
    kv_heads = 2
    group = 3
    batch = -(-10_000 // (kv_heads * group * tokens * dims[1]))
    q, k, v = (
        torch.randn(batch, tokens, heads, dim, generator=rng).to(dtype).to(device).transpose(1, 2)
        for heads, dim in ((kv_heads * group, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]))
    )
    scale = sharpness / math.sqrt(dims[0])
    wanted = attend_reference(q, k, v, scale=scale, softcap=softcap, mask=causal_mask(tokens, tokens, device))
    theirs = torch_attention(q, k, v, scale, softcap, causal=True)
    found = backend.attend_causal(q, k, v, scale, softcap)
    assert found.out.dtype == found.lse.dtype == torch.float32
    assert found.out.is_contiguous()
    assert_as_good_as_torch(found.out.to(dtype), found.lse, wanted, theirs, backend)


@pytest.mark.gpu
def test_triton_kernels_compile_on_this_device():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels need compute capability 8.0")
    assert triton_calls.unavailable_reason() == ""


@pytest.mark.gpu
@with_any_type
@pytest.mark.parametrize("dim", [1, 33, 128, 300])
@pytest.mark.parametrize("shape", [(7,), (3, 500), (1, 8, 2049)], ids=str)
def test_merge_kernel_agrees_with_torch(shape, dim, dtype):
    state, part = (random_state(shape, dim, seeded(dim), dtype=torch.float32, empty=0.3) for _ in range(2))
    part.out = part.out.to(dtype)
    wanted = copy_of(state).merge_(part)
    mine, other = (AttentionState(x.out.cuda(), x.lse.cuda()) for x in (state, part))
    assert triton_calls.merge_(mine.out, mine.lse, other.out, other.lse) or triton_calls.unavailable_reason()
    if not triton_calls.unavailable_reason():
        torch.testing.assert_close(mine.out.cpu(), wanted.out, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(mine.lse.cpu(), wanted.lse, rtol=2e-6, atol=2e-6)


@pytest.mark.gpu
def test_merging_with_an_empty_state_on_the_device_changes_nothing():
    state = random_state((3, 100), 128, seeded(1), dtype=torch.float32)
    state = AttentionState(state.out.cuda(), state.lse.cuda())
    empty = AttentionState.empty((3, 100), 128, "cuda")
    for mine, other in ((copy_of(state), empty), (copy_of(empty), state)):
        mine.merge_(other)
        assert torch.equal(mine.out, state.out)
        assert torch.equal(mine.lse, state.lse)


@pytest.mark.gpu
@with_any_type
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("keys", [40, 3000])
def test_kept_triton_kernels_give_the_same_bits(monkeypatch, dtype, offset, keys):
    """The second call of each shape launches the compiled kernels directly. They are the same ones."""
    if triton_calls.unavailable_reason():
        pytest.skip(triton_calls.unavailable_reason())
    kernel_class = type(triton_calls._kernels().merge)
    run = kernel_class.run
    through_triton = []
    monkeypatch.setattr(kernel_class, "run", lambda *args, **kw: through_triton.append(args[0]) or run(*args, **kw))
    monkeypatch.setattr(triton_calls, "_compiled", {})
    rng = seeded(keys)
    q, k, v = (torch.randn(1, 2, size, 64, generator=rng).to(dtype) for size in (3, keys, keys))
    longer = [torch.zeros(x.numel() + offset, dtype=dtype, device="cuda") for x in (q, k, v)]
    q, k, v = (memory[offset:].view(x.shape).copy_(x) for memory, x in zip(longer, (q, k, v), strict=True))
    found = []
    counts = []
    for _ in range(3):
        state = AttentionState(*triton_calls.attend(q, k, v, scale=0.2, softcap=None, causal=False))
        first = copy_of(state)
        assert triton_calls.merge_(state.out, state.lse, first.out, first.lse)
        found.append(torch.cat([first.out.flatten(), first.lse.flatten(), state.out.flatten(), state.lse.flatten()]))
        counts.append(len(through_triton))
    assert counts == [3 if keys == 3000 else 2] * 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    wanted = attend_reference(q.cpu(), k.cpu(), v.cpu(), scale=0.2)
    assert relative_error(found[0][: wanted.out.numel()].cpu(), wanted.out.flatten()) <= 1e-2
