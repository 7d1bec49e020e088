"""What a machine can do: memory and rates, from data sheets or measured.

A data sheet's rates are peaks; the *_share fields say how much of them kernels and copies attain. A probe measures
what is attained, and sets the shares to 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from headinfer.errors import UsageError
from headinfer.plan.tiles import TileRates
from headinfer.utils.files import Output, read_json_object
from headinfer.utils.user_folders import cache_folder

__all__ = ["HARDWARE", "Hardware", "find_hardware", "is_probe", "probe_path"]

MIB = 2**20
TERA, GIGA = 10**12, 10**9
_POSITIVE = (
    "device_memory_bytes", "device_bytes_per_s", "link_bytes_per_s", "link_back_bytes_per_s", "dram_bytes_per_s",
    "disk_read_bytes_per_s", "disk_write_bytes_per_s", "multiprocessors", "launch_s",
)  # fmt: skip


@dataclass(frozen=True)
class Hardware:
    """One compute device and the host around it. Rates in bytes or FLOP per second, 1 GB/s = 10^9.

    flops_per_s: by dtype. link: host to device; link_back: device to host. is_host: the device is the host's CPU, so
    device memory is the host's RAM and nothing crosses a link. multiprocessors: what a kernel must fill. launch_s:
    host seconds to queue one kernel or copy from Python. overhead_bytes: device memory for driver context,
    libraries, the allocator's gaps, and a reserve. source: where the figures come from.

    attention_flops_per_s and weight_bytes_per_s (by dtype), kv_bytes_per_s: what prefill's attention, matrices times
    one token, and decode's attention attain, where a probe has measured them; else the rates above stand for them.
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
    overhead_bytes: int = 1024 * MIB
    compute_share: float = 0.85
    device_share: float = 0.85
    link_share: float = 0.8
    dram_share: float = 0.8
    attention_flops_per_s: dict[str, float] = field(default_factory=dict)
    weight_bytes_per_s: dict[str, float] = field(default_factory=dict)
    kv_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise UsageError(f"hardware {self.name}: {name} is {value!r}: it must be a positive number")

    def attained_flops_per_s(self, dtype: str) -> float:
        """FLOP per second that kernels attain in a dtype; UsageError where the device has no figure for it."""
        if dtype not in self.flops_per_s:
            raise UsageError(f"{self.name} has no figure for {dtype}: choose one of {', '.join(self.flops_per_s)}")
        return self.flops_per_s[dtype] * self.compute_share

    def attained_attention_flops_per_s(self, dtype: str) -> float:
        """FLOP per second that the attention kernels attain in prefill."""
        return self.attention_flops_per_s.get(dtype) or self.attained_flops_per_s(dtype)

    def attained_weight_bytes_per_s(self, dtype: str) -> float:
        """Bytes of weights that are read per second where one token is multiplied with them."""
        return self.weight_bytes_per_s.get(dtype) or self.attained_device_bytes_per_s

    @property
    def attained_kv_bytes_per_s(self) -> float:
        """Bytes of K and V per second that decode's attention reads on the device."""
        return self.kv_bytes_per_s or self.attained_device_bytes_per_s

    @property
    def attained_device_bytes_per_s(self) -> float:
        """Bytes per second that kernels read from device memory (on a CPU: from DRAM)."""
        if self.is_host:
            return self.dram_bytes_per_s * self.dram_share
        return self.device_bytes_per_s * self.device_share

    @property
    def attained_link_bytes_per_s(self) -> float:
        """Bytes per second from host RAM to the device: the link's, or DRAM's where that is slower."""
        return min(self.link_bytes_per_s * self.link_share, self.dram_bytes_per_s * self.dram_share)

    def tile_rates(self, dtype: str) -> TileRates:
        """What choose_tiles() asks of a machine."""
        return TileRates(
            flops_per_s=self.attained_flops_per_s(dtype),
            device_bytes_per_s=self.attained_device_bytes_per_s,
            link_bytes_per_s=self.attained_link_bytes_per_s,
            launch_s=self.launch_s,
            multiprocessors=self.multiprocessors,
        )

    def text(self) -> str:
        """The description as JSON, which load() reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write text() to a file, in place of an earlier probe but of nothing else.

        Raises:
            UsageError: the file holds something else.
        """
        Output(path, is_ours=is_probe).write(self.text())

    @classmethod
    def load(cls, path: Path) -> Hardware:
        """Read what save() wrote; UsageError where the file is missing or not such a file."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path} is no description of hardware: {error}") from error


# Assumptions where a data sheet of the device cannot say: the host around it.
# DRAM: two channels of DDR5-5600 in a desktop (2 x 8 B x 5.6 GT/s); eight of DDR4-3200 in a server.
# Disk: the sequential rates in data sheets of PCIe 4 x4 NVMe drives, rounded down.
_DESKTOP_DRAM, _SERVER_DRAM = 89.6 * GIGA, 204.8 * GIGA
_DISK_READ, _DISK_WRITE = 7.0 * GIGA, 5.0 * GIGA
# PCI Express after its 128b/130b coding, each way: 0.985, 1.969 and 3.938 GB/s a lane for generations 3, 4 and 5.
_PCIE = {"3 x16": 15.75 * GIGA, "4 x8": 15.75 * GIGA, "4 x16": 31.5 * GIGA, "5 x16": 63.0 * GIGA}


def _gpu(
    name: str, mib: int, tensor_tera: float, float32_tera: float, bandwidth_giga: float, units: int, pcie: str,
    source: str, *, server: bool = False, has_bfloat16: bool = True,
) -> Hardware:  # fmt: skip
    """tensor_tera: dense float16 with float32 accumulation, no sparsity. mib: what the driver reports."""
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
    )


_AMPERE = "NVIDIA Ampere GA102 whitepaper and product page"
_ADA = "NVIDIA Ada GPU architecture whitepaper and product page"

HARDWARE: dict[str, Hardware] = {
    # name, MiB, TFLOP/s in half types and in float32, GB/s of device memory, multiprocessors, link, source
    "rtx3060": _gpu("RTX 3060 12 GB", 12_288, 25.5, 12.7, 360, 28, "4 x16", _AMPERE),
    "rtx3090": _gpu("RTX 3090", 24_576, 71.0, 35.6, 936, 82, "4 x16", _AMPERE),
    "rtx4060ti": _gpu("RTX 4060 Ti 16 GB", 16_380, 44.1, 22.1, 288, 34, "4 x8", _ADA),
    "rtx4070": _gpu("RTX 4070", 12_282, 58.3, 29.1, 504, 46, "4 x16", _ADA),
    "rtx4090": _gpu("RTX 4090", 24_564, 165.2, 82.6, 1008, 128, "4 x16", _ADA),
    "rtx5090": _gpu("RTX 5090", 32_607, 209.5, 104.8, 1792, 170, "5 x16", "NVIDIA RTX Blackwell whitepaper"),
    "a100-40": _gpu("A100 40 GB", 40_960, 312, 19.5, 1555, 108, "4 x16", "NVIDIA A100 data sheet (PCIe)", server=True),
    "a100-80": _gpu("A100 80 GB", 81_920, 312, 19.5, 1935, 108, "4 x16", "NVIDIA A100 data sheet (PCIe)", server=True),
    "h100": _gpu("H100 80 GB", 81_559, 989.4, 66.9, 3350, 132, "5 x16", "NVIDIA H100 data sheet (SXM)", server=True),
    "h200": _gpu("H200 141 GB", 143_771, 989.4, 66.9, 4800, 132, "5 x16", "NVIDIA H200 data sheet (SXM)", server=True),
    "l4": _gpu("L4", 23_034, 121, 30.3, 300, 58, "4 x16", "NVIDIA L4 data sheet", server=True),
    "t4": _gpu("T4", 15_360, 65, 8.1, 320, 40, "3 x16", "NVIDIA T4 data sheet", server=True, has_bfloat16=False),
    # Eight cores x 3.5 GHz x 32 float32 FLOP a cycle (two 256-bit multiply-adds); half types are widened to float32.
    # Shares: about half of the DRAM bandwidth is what this project's decode kernel reaches (benchmarks/results).
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
_ALIASES = {"a100": "a100-80", "rtx306012gb": "rtx3060", "rtx4060ti16gb": "rtx4060ti", "cpu": "laptop-cpu"}


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|[ _-]|(?<=[01])gb$", "", name.lower())


def find_hardware(name: str) -> Hardware:
    """A device of the table by name (case, spaces and 'NVIDIA GeForce' do not matter), or of a JSON file.

    Raises UsageError with the nearest names.
    """
    if name.endswith(".json"):
        return Hardware.load(Path(name))
    keys = {_key(key): key for key in HARDWARE} | {_key(alias): key for alias, key in _ALIASES.items()}
    if _key(name) in keys:
        return HARDWARE[keys[_key(name)]]
    near = dict.fromkeys(keys[key] for key in difflib.get_close_matches(_key(name), keys, n=3, cutoff=0.5))
    raise UsageError(f"there is no device {name!r} in the table: choose one of {', '.join(near or HARDWARE)}")


def is_probe(path: Path) -> bool:
    """Whether a file is what `headinfer probe` wrote, with whatever fields that version had."""
    return str(read_json_object(path).get("source", "")).startswith("headinfer probe")


def probe_path() -> Path:
    """The file of this machine's probe, in the user's cache folder."""
    return cache_folder() / "hardware.json"
