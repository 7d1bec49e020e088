"""The list of all suites, and the loop that runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from headinfer.bench import cpu_attention, cpu_suites, disk_suites
from headinfer.bench.batch import batch
from headinfer.bench.gpu_attention import attention
from headinfer.bench.gpu_decode import decode
from headinfer.bench.gpu_link import link, measure_rates, rate_measurements
from headinfer.bench.gpu_prefill import prefill
from headinfer.bench.gpu_real import real
from headinfer.bench.host_time import host
from headinfer.bench.job import CpuJob, GpuJob
from headinfer.bench.kv_dtype import kv_dtype
from headinfer.bench.measurement import Measurement
from headinfer.bench.plan_check import check_plan
from headinfer.bench.probe import probe
from headinfer.engine.machine import chosen_device
from headinfer.errors import UsageError
from headinfer.utils.units import format_seconds

__all__ = ["CPU_SUITES", "GPU_SUITES", "Suite", "check_device", "check_suites", "run_check", "run_suites"]

J = TypeVar("J")


@dataclass(frozen=True)
class Suite(Generic[J]):
    """A suite that can be named on the command line.

    Attributes:
        run: measures; it gets the job. A suite that takes long yields the measurements of each point.
        share: its share of the time if the job has a limit. A later suite also gets what an earlier one leaves.
        by_default: whether it runs if no suite is named.
    """

    run: Callable[[J], list[Measurement] | Iterator[list[Measurement]]]
    share: float = 1.0
    by_default: bool = True


# Suites run in this order. Those that write gigabytes to a disk, take minutes or measure a kernel run only if named.
CPU_SUITES: Mapping[str, Suite[CpuJob]] = {
    "decode": Suite(cpu_suites.decode),
    "prefill": Suite(cpu_suites.prefill),
    "memory": Suite(cpu_suites.memory),
    "device-kv": Suite(cpu_suites.device_kv),
    "host": Suite(host),
    "attention": Suite(cpu_attention.attention, by_default=False),
    "batch": Suite(batch, by_default=False),
    "kv-dtype": Suite(kv_dtype, by_default=False),
    "session": Suite(disk_suites.session, by_default=False),
    "disk-tier": Suite(disk_suites.disk_tier, by_default=False),
}
GPU_SUITES: Mapping[str, Suite[GpuJob]] = {
    "link": Suite(link, share=0.06),
    "decode": Suite(decode, share=0.52),
    "prefill": Suite(prefill, share=0.36),
    "attention": Suite(attention, share=0.06),
    "real": Suite(real, by_default=False),
}


def check_device(name: str) -> torch.device:
    """Return the CUDA device of a --device option.

    Raises:
        UsageError: there is no such device.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"--device {name}: this torch ({torch.__version__}) sees no CUDA device, and the GPU suites measure one: "
            "run them on a machine with an NVIDIA GPU, its driver and a CUDA build of torch, or leave --device out"
        )
    device = chosen_device(name)
    if device.type != "cuda":
        raise UsageError(f"--device {name}: choose cpu, or cuda or cuda:N for the GPU suites")
    index = device.index if device.index is not None else torch.cuda.current_device()
    return torch.device("cuda", index)


def check_suites(names: Sequence[str], *, is_gpu: bool) -> None:
    """Check the names of CPU or GPU suites.

    Raises:
        UsageError: there is no suite of that name.
    """
    suites: Mapping[str, object] = GPU_SUITES if is_gpu else CPU_SUITES
    unknown = [name for name in names if name not in suites]
    if unknown:
        kind = "GPU suite" if is_gpu else "suite"
        raise UsageError(f"there is no {kind} {unknown[0]!r}: choose among {', '.join(suites)}")


def run_suites(names: Sequence[str], job: CpuJob | GpuJob) -> Iterator[list[Measurement]]:
    """Run suites, and yield the measurements of each point, or of each suite, when they are there.

    So a caller can write results as they come, and an error in a later suite does not lose them. On a GPU, the
    machine's rates come with the first suite. If there is no time for a measurement within the job's limit, its note
    says so.

    Args:
        names: the suites to run; if it is empty, those that run by default.
        job: the run.

    Raises:
        UsageError: there is no suite of that name. It is raised before anything is measured.
    """
    is_gpu = isinstance(job, GpuJob)
    check_suites(names, is_gpu=is_gpu)
    suites: Mapping[str, Suite[Any]] = GPU_SUITES if is_gpu else CPU_SUITES
    chosen = {name: suite for name, suite in suites.items() if (name in names if names else suite.by_default)}
    return _run(chosen, job)


def _run(chosen: Mapping[str, Suite[Any]], job: CpuJob | GpuJob) -> Iterator[list[Measurement]]:
    start = time.monotonic()
    found: list[Measurement] = []
    if isinstance(job, GpuJob):
        job.rates = measure_rates(job)
        found = rate_measurements(job.rates)
    machine = "" if isinstance(job, GpuJob) else " on two cores of an AMD EPYC"
    job.say(f"suites: {', '.join(chosen)}; {_duration(job, chosen)}{machine} in all")
    total = sum(suite.share for suite in chosen.values())
    passed = 0.0
    for name, suite in chosen.items():
        passed += suite.share
        job.until = start + job.limit_s * passed / total
        job.say(f"measuring {name}, {_duration(job, [name])} ...")
        with torch.inference_mode():
            measured = suite.run(job)
            parts = iter([measured]) if isinstance(measured, list) else measured
        while True:
            with torch.inference_mode():
                part = next(parts, None)
            if part is None:
                break
            if found or part:
                yield found + part
                found = []
        job.clean()


def _duration(job: CpuJob | GpuJob, names: Iterable[str]) -> str:
    """Return how long suites will take, for people: at most, on a GPU, and about, on two cores of an AMD EPYC."""
    if isinstance(job, GpuJob):
        return f"at most {format_seconds(max(job.left_s, 0))}"
    about_s = sum(job.sizes.about_s[name] for name in names)
    return f"about {format_seconds(about_s)}"


def run_check(job: CpuJob) -> list[Measurement]:
    """Compare the planner's predictions with measurements, on the CPU.

    The predictions use a probe of the same run: on a shared machine the load has changed since an earlier one.
    """
    return check_plan(job, probe(torch.device("cpu"), job.say))
