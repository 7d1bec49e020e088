"""Descriptions of machines: memory and rates, from data sheets or from a probe.

The rates of a data sheet are peaks, and the *_share fields say which part of them kernels and copies attain. A probe
measures attained rates, and its shares are 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headinfer.errors import UsageError
from headinfer.plan.tiles import TileRates
from headinfer.utils.files import Output, read_json_object
from headinfer.utils.user_folders import cache_folder

__all__ = ["HARDWARE", "Hardware", "find_hardware", "is_probe", "probe_path"]

MIB = 2**20
GIGA = 10**9
TERA = 10**12
_POSITIVE = (
    "device_memory_bytes", "device_bytes_per_s", "link_bytes_per_s", "link_back_bytes_per_s", "dram_bytes_per_s",
    "disk_read_bytes_per_s", "disk_write_bytes_per_s", "multiprocessors", "launch_s", "blocks_at_once", "idle_gain",
    "block_tokens", "rest_share", "copy_s", "compute_share", "device_share", "link_share", "dram_share",
)  # fmt: skip
_BY_DTYPE = ("flops_per_s", "attention_flops_per_s", "weight_bytes_per_s")
_BY_ROWS = ("cpu_beside_link_bytes_per_s", "link_beside_cpu_bytes_per_s")


@dataclass(frozen=True)
class Hardware:
    """One compute device and its host. Rates are bytes or FLOP per second, and 1 GB/s is 10^9 bytes per second.

    Attributes:
        name: the device's name, for people.
        device_memory_bytes: the device memory.
        flops_per_s: the rate of matrix products, by dtype.
        device_bytes_per_s: the rate of device memory.
        link_bytes_per_s: the rate from host to device.
        link_back_bytes_per_s: the rate from device to host.
        dram_bytes_per_s: the rate of host memory.
        disk_read_bytes_per_s: the sequential rate at which the disk reads.
        disk_write_bytes_per_s: the sequential rate at which the disk writes.
        source: where the figures come from.
        multiprocessors: the multiprocessors that a kernel must fill.
        is_host: whether the device is the host's CPU. Device memory is then host RAM, and nothing crosses a link.
        launch_s: host seconds to queue one kernel or copy from Python.
        blocks_at_once: see TileRates; of half types, as are the next three.
        idle_gain: see TileRates.
        block_tokens: see TileRates.
        rest_share: see TileRates.
        copy_s: seconds that each copy takes on the link beside its bytes.
        overhead_bytes: device memory for the driver's context, libraries and the allocator's gaps, and a reserve.
        compute_share: the attained share of flops_per_s.
        attention_share: the share of flops_per_s that prefill's attention attains in half types if no multiprocessor
            is idle; None for compute_share.
        device_share: the attained share of device_bytes_per_s.
        link_share: the attained share of link_bytes_per_s and link_back_bytes_per_s.
        dram_share: the attained share of dram_bytes_per_s.
        attention_flops_per_s: the attained rate of prefill's attention by dtype, if a probe has measured it.
        weight_bytes_per_s: the attained rate of reading weights for one token by dtype, if a probe has measured it.
        kv_bytes_per_s: the attained rate of reading KV in decode's attention, if a probe has measured it.
        cpu_kv_bytes_per_s: the rate at which the host's CPU attends to KV in host memory, in bfloat16 and with 8 KV
            heads of width 128, if a probe has measured it: by query rows per KV head, and then by threads.
        cpu_threads_beside_link: the threads with which the CPU and the link together bring the most KV.
        cpu_beside_link_bytes_per_s: the rate of the CPU while the link copies to the device, with these threads, by
            query rows per KV head.
        link_beside_cpu_bytes_per_s: the rate of the link meanwhile, by the same query rows.
    """

    name: str
    device_memory_bytes: int
    flops_per_s: dict[str, float]
    device_bytes_per_s: float
    link_bytes_per_s: float
    link_back_bytes_per_s: float
    dram_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    source: str
    multiprocessors: int = 1
    is_host: bool = False
    launch_s: float = 20e-6
    blocks_at_once: int = 2
    idle_gain: float = 1.0
    block_tokens: int = 1
    rest_share: float = 1.0
    copy_s: float = 2.8e-6
    overhead_bytes: int = 1024 * MIB
    compute_share: float = 0.85
    attention_share: float | None = None
    device_share: float = 0.85
    link_share: float = 0.8
    dram_share: float = 0.8
    attention_flops_per_s: dict[str, float] = field(default_factory=dict)
    weight_bytes_per_s: dict[str, float] = field(default_factory=dict)
    kv_bytes_per_s: float | None = None
    cpu_kv_bytes_per_s: dict[str, dict[str, float]] = field(default_factory=dict)
    cpu_threads_beside_link: int | None = None
    cpu_beside_link_bytes_per_s: dict[str, float] = field(default_factory=dict)
    link_beside_cpu_bytes_per_s: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            self._check(name, getattr(self, name))
        for name in _BY_DTYPE:
            rates = getattr(self, name)
            if not isinstance(rates, dict):
                raise UsageError(f"hardware {self.name}: {name} is {rates!r}: it must be a rate for each dtype")
            for dtype, rate in rates.items():
                self._check(f"{name} of {dtype}", rate)
        if not self.flops_per_s:
            raise UsageError(f"hardware {self.name}: flops_per_s is empty: it must have a rate for a dtype")
        for name in ("kv_bytes_per_s", "attention_share"):
            if getattr(self, name) is not None:
                self._check(name, getattr(self, name))
        threads = self.cpu_threads_beside_link
        if threads is not None and (type(threads) is not int or threads < 1):
            raise UsageError(
                f"hardware {self.name}: cpu_threads_beside_link is {threads!r}: it must be a positive whole number"
            )
        if self.overhead_bytes != 0:
            self._check("overhead_bytes", self.overhead_bytes)
        for name in _BY_ROWS:
            self._check_by_count(name, "query rows", getattr(self, name))
        self._check_by_count("cpu_kv_bytes_per_s", "query rows", self.cpu_kv_bytes_per_s, "threads")
        if self.cpu_beside_link_bytes_per_s.keys() != self.link_beside_cpu_bytes_per_s.keys():
            raise UsageError(
                f"hardware {self.name}: {_BY_ROWS[0]} and {_BY_ROWS[1]} have other query rows: they must have the same"
            )

    def _check_by_count(self, name: str, of: str, rates: Any, *then: str) -> None:
        """Check positive rates by positive whole numbers of something, or by two of them."""
        if not isinstance(rates, dict):
            raise UsageError(f"hardware {self.name}: {name} is {rates!r}: it must be a rate for each number of {of}")
        for count, rate in rates.items():
            if not re.fullmatch(r"[1-9]\d{0,6}", str(count)):
                raise UsageError(f"hardware {self.name}: {name} has {count!r} {of}: it must be a positive number")
            if then:
                self._check_by_count(f"{name} at {count} {of}", then[0], rate)
            else:
                self._check(f"{name} at {count} {of}", rate)

    def _check(self, name: str, value: Any) -> None:
        """Raise UsageError if a figure is not a positive, finite number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UsageError(f"hardware {self.name}: {name} is {value!r}: it must be a positive number")

    def attained_flops_per_s(self, dtype: str) -> float:
        """Return the FLOP per second that kernels attain in a dtype.

        Raises:
            UsageError: the device has no figure for the dtype.
        """
        if dtype not in self.flops_per_s:
            raise UsageError(f"{self.name} has no figure for {dtype}: choose one of {', '.join(self.flops_per_s)}")
        return self.flops_per_s[dtype] * self.compute_share

    def attained_attention_flops_per_s(self, dtype: str) -> float:
        """Return the FLOP per second that attention attains in prefill if no multiprocessor is idle."""
        attained = self.attained_flops_per_s(dtype)
        if self.attention_share is not None and dtype != "float32":
            attained = self.flops_per_s[dtype] * self.attention_share
        return self.attention_flops_per_s.get(dtype) or attained

    def attained_weight_bytes_per_s(self, dtype: str) -> float:
        """Return the bytes of weights that are read per second to multiply them with one token."""
        return self.weight_bytes_per_s.get(dtype) or self.attained_device_bytes_per_s

    @property
    def attained_kv_bytes_per_s(self) -> float:
        """The bytes of K and V that decode's attention reads per second on the device."""
        return self.kv_bytes_per_s or self.attained_device_bytes_per_s

    @property
    def attained_device_bytes_per_s(self) -> float:
        """The bytes per second that kernels read from device memory; on a CPU, from DRAM."""
        if self.is_host:
            return self.dram_bytes_per_s * self.dram_share
        return self.device_bytes_per_s * self.device_share

    @property
    def attained_link_bytes_per_s(self) -> float:
        """The bytes per second from host RAM to the device, which the link or DRAM limits."""
        return min(self.link_bytes_per_s * self.link_share, self.dram_bytes_per_s * self.dram_share)

    def tile_rates(self, dtype: str) -> TileRates:
        """Return the rates that `choose_tiles` needs."""
        kernels: dict[str, Any] = {}
        if dtype != "float32":  # other kernels serve float32
            kernels = {
                "blocks_at_once": self.blocks_at_once,
                "idle_gain": self.idle_gain,
                "block_tokens": self.block_tokens,
                "rest_share": self.rest_share,
            }
        return TileRates(
            flops_per_s=self.attained_attention_flops_per_s(dtype),
            device_bytes_per_s=self.attained_device_bytes_per_s,
            link_bytes_per_s=self.attained_link_bytes_per_s,
            launch_s=self.launch_s,
            multiprocessors=self.multiprocessors,
            copy_s=self.copy_s,
            **kernels,
        )

    def text(self) -> str:
        """Return the description as JSON, which `load` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write `text` to a file. An earlier probe is replaced, and no other file.

        Raises:
            UsageError: the file exists and is not a probe.
        """
        Output(path, is_ours=is_probe).write(self.text())

    @classmethod
    def load(cls, path: Path) -> Hardware:
        """Read a file that `save` wrote.

        Raises:
            UsageError: the file is missing or is not a description of hardware.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise TypeError("it holds no JSON object")
            return cls(**fields)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{path} is not a description of hardware: {error}") from error


# A device's data sheet does not describe its host, so the host is assumed.
_DESKTOP_DRAM = 89.6 * GIGA  # two channels of DDR5-5600: 2 x 8 B x 5.6 GT/s
_SERVER_DRAM = 204.8 * GIGA  # eight channels of DDR4-3200
# Sequential rates in data sheets of PCIe 4 x4 NVMe drives, rounded down.
_DISK_READ = 7.0 * GIGA
_DISK_WRITE = 5.0 * GIGA
# PCI Express in each direction, after its 128b/130b coding: 0.985, 1.969 and 3.938 GB/s a lane for generations 3 to 5.
_PCIE = {"3 x16": 15.75 * GIGA, "4 x8": 15.75 * GIGA, "4 x16": 31.5 * GIGA, "5 x16": 63.0 * GIGA}


def _gpu(
    name: str,
    mib: int,
    tensor_tera: float,
    float32_tera: float,
    bandwidth_giga: float,
    units: int,
    pcie: str,
    source: str,
    *,
    server: bool = False,
    has_bfloat16: bool = True,
    **attained: Any,
) -> Hardware:
    """Describe a GPU of a data sheet.

    Args:
        name: its name.
        mib: the memory that the driver reports.
        tensor_tera: TFLOP/s of dense float16 with float32 accumulation.
        float32_tera: TFLOP/s of float32.
        bandwidth_giga: GB/s of device memory.
        units: multiprocessors.
        pcie: generation and lanes of its link, a key of _PCIE.
        source: the data sheet.
        server: whether its host is assumed to be a server.
        has_bfloat16: whether it has tensor cores for bfloat16.
        attained: further fields of Hardware.

    Returns:
        The GPU and its assumed host.
    """
    flops = {"float16": tensor_tera * TERA, "float32": float32_tera * TERA}
    if has_bfloat16:
        flops["bfloat16"] = tensor_tera * TERA
    return Hardware(
        name=name,
        device_memory_bytes=mib * MIB,
        flops_per_s=flops,
        device_bytes_per_s=bandwidth_giga * GIGA,
        link_bytes_per_s=_PCIE[pcie],
        link_back_bytes_per_s=_PCIE[pcie],
        dram_bytes_per_s=_SERVER_DRAM if server else _DESKTOP_DRAM,
        source=f"{source}; PCIe {pcie}",
        multiprocessors=units,
        disk_read_bytes_per_s=_DISK_READ,
        disk_write_bytes_per_s=_DISK_WRITE,
        **attained,
    )


# Hopper attends to blocks of 8K keys with cuDNN, and to the rest with flash attention (attention/backends.py). Measured
# on an H200 (benchmarks/results): 757 and 791 TFLOP/s of 989.4 in a matrix product. All chunks of 5,376 tokens are
# predicted best with 605 TFLOP/s for cuDNN and one block of query rows at once. For the same tile flash attention took
# 1.94 times as long as cuDNN (tests/plan/test_measured.py).
_HOPPER: dict[str, Any] = {
    "compute_share": 0.78,
    "attention_share": 0.61,
    "blocks_at_once": 1,
    "idle_gain": 0.25,
    "block_tokens": 8192,
    "rest_share": 0.5,
}
_AMPERE = "NVIDIA Ampere GA102 whitepaper and product page"
_ADA = "NVIDIA Ada GPU architecture whitepaper and product page"

HARDWARE: dict[str, Hardware] = {
    # Name, MiB, TFLOP/s in half types and in float32, GB/s of device memory, multiprocessors, link, source.
    "rtx3060": _gpu("RTX 3060 12 GB", 12_288, 25.5, 12.7, 360, 28, "4 x16", _AMPERE),
    "rtx3090": _gpu("RTX 3090", 24_576, 71.0, 35.6, 936, 82, "4 x16", _AMPERE),
    "rtx4060ti": _gpu("RTX 4060 Ti 16 GB", 16_380, 44.1, 22.1, 288, 34, "4 x8", _ADA),
    "rtx4070": _gpu("RTX 4070", 12_282, 58.3, 29.1, 504, 46, "4 x16", _ADA),
    "rtx4090": _gpu("RTX 4090", 24_564, 165.2, 82.6, 1008, 128, "4 x16", _ADA),
    "rtx5090": _gpu("RTX 5090", 32_607, 209.5, 104.8, 1792, 170, "5 x16", "NVIDIA RTX Blackwell whitepaper"),
    "a100-40": _gpu("A100 40 GB", 40_960, 312, 19.5, 1555, 108, "4 x16", "NVIDIA A100 data sheet (PCIe)", server=True),
    "a100-80": _gpu("A100 80 GB", 81_920, 312, 19.5, 1935, 108, "4 x16", "NVIDIA A100 data sheet (PCIe)", server=True),
    "h100": _gpu(
        "H100 80 GB", 81_559, 989.4, 66.9, 3350, 132, "5 x16", "NVIDIA H100 data sheet (SXM)", server=True, **_HOPPER
    ),
    "h200": _gpu(
        "H200 141 GB", 143_771, 989.4, 66.9, 4800, 132, "5 x16", "NVIDIA H200 data sheet (SXM)", server=True, **_HOPPER
    ),
    "l4": _gpu("L4", 23_034, 121, 30.3, 300, 58, "4 x16", "NVIDIA L4 data sheet", server=True),
    "t4": _gpu("T4", 15_360, 65, 8.1, 320, 40, "3 x16", "NVIDIA T4 data sheet", server=True, has_bfloat16=False),
    # Eight cores x 3.5 GHz x 32 float32 FLOP a cycle (two 256-bit multiply-adds); half types are converted to float32.
    # This project's decode kernel reaches about half of the DRAM bandwidth (benchmarks/results).
    "laptop-cpu": Hardware(
        name="laptop CPU, 8 cores",
        device_memory_bytes=32 * 2**30,
        flops_per_s=dict.fromkeys(("bfloat16", "float16", "float32"), 8 * 3.5 * GIGA * 32),
        device_bytes_per_s=_DESKTOP_DRAM,
        link_bytes_per_s=_DESKTOP_DRAM,
        link_back_bytes_per_s=_DESKTOP_DRAM,
        dram_bytes_per_s=_DESKTOP_DRAM,
        source="arithmetic: 8 cores x 3.5 GHz x 32 FLOP; two channels of DDR5-5600",
        is_host=True,
        compute_share=0.5,
        dram_share=0.5,
        disk_read_bytes_per_s=_DISK_READ,
        disk_write_bytes_per_s=_DISK_WRITE,
    ),
}
_ALIASES = {
    "a100": "a100-80",
    "rtx306012gb": "rtx3060",
    "rtx4060ti16gb": "rtx4060ti",
    "cpu": "laptop-cpu",
    # Names that CUDA gives.
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "Tesla T4": "t4",
}


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|[ _-]|(?<=[01])gb$", "", name.lower())


def find_hardware(name: str) -> Hardware:
    """Return a device of HARDWARE, or one that a JSON file describes.

    Args:
        name: the device's name, or the path of a file that ends with .json. Case, spaces and "NVIDIA GeForce" in a
            name do not matter.

    Raises:
        UsageError: there is no such device, and the message names the nearest ones; or the file is not a description
            of hardware.
    """
    if name.endswith(".json"):
        return Hardware.load(Path(name))
    keys = {_key(key): key for key in HARDWARE} | {_key(alias): key for alias, key in _ALIASES.items()}
    if _key(name) in keys:
        return HARDWARE[keys[_key(name)]]
    near = dict.fromkeys(keys[key] for key in difflib.get_close_matches(_key(name), keys, n=3, cutoff=0.5))
    raise UsageError(f"there is no device {name!r} in the table: choose one of {', '.join(near or HARDWARE)}")


def is_probe(path: Path) -> bool:
    """Return whether `headinfer probe` of any version wrote a file."""
    return str(read_json_object(path).get("source", "")).startswith("headinfer probe")


def probe_path() -> Path:
    """Return the file in the user's cache folder that holds the probe of this machine."""
    return cache_folder() / "hardware.json"
