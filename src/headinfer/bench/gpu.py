"""The GPU suites in one run, within a limit of time: `headinfer bench --device cuda`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from headinfer.bench.gpu_attention import attention
from headinfer.bench.gpu_decode import decode
from headinfer.bench.gpu_link import link, measure_rates
from headinfer.bench.gpu_prefill import prefill
from headinfer.bench.job import GpuSizes, Job, Line, Rates
from headinfer.errors import UsageError

__all__ = ["GPU_SUITES", "check_device", "check_gpu_suites", "run_gpu"]

Suite = Callable[[Job], list[Line]]

# In the order in which they run, each with its share of the time; what one leaves is the next one's.
GPU_SUITES: dict[str, tuple[Suite, float]] = {
    "link": (link, 0.06),
    "decode": (decode, 0.52),
    "prefill": (prefill, 0.36),
    "attention": (attention, 0.06),
}


def check_device(name: str) -> torch.device:
    """The CUDA device of a --device option. Raises UsageError where there is none."""
    if not torch.cuda.is_available():
        raise UsageError(
            f"--device {name}: this torch ({torch.__version__}) sees no CUDA device, and the GPU suites measure one: "
            "run them on a machine with an NVIDIA GPU, its driver and a CUDA build of torch, or leave --device out"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: choose cpu, cuda or cuda:N") from None
    index = device.index if device.index is not None else torch.cuda.current_device()
    if device.type != "cuda" or index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: choose cpu, or cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", index)


def check_gpu_suites(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is no GPU suite's."""
    if unknown := [name for name in names if name not in GPU_SUITES]:
        raise UsageError(f"there is no GPU suite {unknown[0]!r}: choose among {', '.join(GPU_SUITES)}")


def rate_lines(rates: Rates) -> list[Line]:
    """What the suites are held against."""
    figures = (
        ("matrix product", rates.flops_per_s / 1e12, "TFLOP/s"),
        ("device memory, read and written", rates.device_bytes_per_s / 1e9, "GB/s"),
        ("pinned, to the device", rates.link_bytes_per_s / 1e9, "GB/s"),
        ("pinned, to the host", rates.back_bytes_per_s / 1e9, "GB/s"),
    )
    return [Line("rates", "of this run", *figure) for figure in figures]


@torch.inference_mode()
def run_gpu(
    names: Sequence[str],
    device: torch.device,
    sizes: GpuSizes,
    say: Callable[[str], None],
    *,
    limit_s: float = 480.0,
    gpu_memory_bytes: int | None = None,
    keep: Callable[[Job, Sequence[Line]], None] = lambda job, lines: None,
) -> tuple[Job, list[Line]]:
    """The lines of the named suites, of all where none is named, and the job with the rates that were measured.

    What does not get its turn within limit_s is a line that says so. gpu_memory_bytes: of a smaller card that the
    device stands for. keep: called with all lines so far after each suite, so that an error in a later one does not
    cost them. Raises UsageError for an unknown name, before anything is made.
    """
    check_gpu_suites(names)
    job = Job(device, sizes, say, gpu_memory_bytes=gpu_memory_bytes)
    start, chosen = time.monotonic(), {name: GPU_SUITES[name] for name in GPU_SUITES if not names or name in names}
    job.rates = measure_rates(job)
    lines = rate_lines(job.rates)
    total, passed = sum(share for _, share in chosen.values()), 0.0
    for name, (suite, share) in chosen.items():
        passed += share
        job.until = start + limit_s * passed / total
        say(f"measuring {name}, up to {max(job.left_s, 0):.0f} s ...")
        lines += suite(job)
        job.clean()
        keep(job, lines)
    return job, lines
