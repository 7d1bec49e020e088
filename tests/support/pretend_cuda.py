"""Simulates two CUDA devices on a CPU, so that code for GPUs can be tested without one.

This is a pytest plugin for a separate process (see test_pretend_cuda.py). torch finds two devices like an H100. A
tensor on one of them is a `DeviceTensor`. Its values are stored in a CPU tensor, which only operations of the device
can access. The rules of a device apply:

- All operands are on the same device, except single numbers and indices.
- The copies of a stream run when something waits for them. Until then their destination is NaN. Both sides have the
  same layout. Copies from or to pageable memory run immediately, because the host waits for them.
- After set_sync_debug_mode("error") all operations that make the host wait are errors.
- Attention kernels accept the same inputs as the real ones and return their types and layouts. Triton kernels run in
  Triton's interpreter.

The simulation cannot test the numbers of the real kernels, real times, or other orders of events (see orders.py).
"""

import ctypes
import functools
import importlib
import os
import threading
import time
import types
import warnings
import weakref
from collections import deque
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from headinfer.attention.reference import attend_reference, causal_mask

os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # Mode below is active in one thread only
ATEN = torch.ops.aten
DEVICES = 2
TOTAL_BYTES = 4 << 30
CAPABILITY = (9, 0)
HALVES = (torch.bfloat16, torch.float16)
OURS = ("cuda", "meta")  # for "cuda" without an index, torch asks the guard of guard_devices(), which returns "meta"


class Current(dict):
    """The state of torch.cuda. Each thread has a current device of its own."""

    own = threading.local()

    def __getitem__(self, name):
        return getattr(self.own, name, 0) if name == "device" else super().__getitem__(name)

    def __setitem__(self, name, value):
        if name == "device":
            self.own.device = value
        else:
            super().__setitem__(name, value)


current = Current(is_strict=False, streams=[[] for _ in range(DEVICES)], fraction=1.0)
LOCK = threading.RLock()  # threads that release host memory wait for all streams


def device_of(where):
    """The CUDA device with its index; None for other devices."""
    if isinstance(where, int):
        return torch.device("cuda", where)
    found = torch.device(where) if where is not None else torch.device("cuda")
    if found.type not in OURS:
        return None
    index = current["device"] if found.index is None else found.index
    if index >= DEVICES:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return torch.device("cuda", index)


def tensors_in(tree):
    """All tensors in an operation's arguments. (torch's pytree is too slow.)"""
    found = []
    for one in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, (tuple, list)):
            found += tensors_in(one)
    return found


def changed(tree, kind, change):
    """A copy of nested arguments in which each tensor of a kind is changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([changed(one, kind, change) for one in tree])
    return tree


# -- tensors -----------------------------------------------------------------------------------------------------------


class DeviceTensor(torch.Tensor):
    """A tensor on a simulated device."""

    @staticmethod
    def __new__(cls, host, where):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device="cpu",
            dispatch_device=True,
        )
        made.host = host
        made.where = where
        return made

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        return self.clone()

    def __repr__(self):
        return f"DeviceTensor({self.host!r}, {self.where})"


class Mode(TorchDispatchMode):
    """Handles operations that create a tensor on a simulated device."""

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type in OURS:
            return run(func, args, kwargs)
        if any(isinstance(one, DeviceTensor) for one in (*tensors_in(args), *tensors_in(kwargs))):
            return run(func, args, kwargs)
        if kwargs.get("pin_memory"):
            found = func(*args, **{**kwargs, "pin_memory": False})
            pin(found)
            return found
        return func(*args, **kwargs)


MIXED = {ATEN.copy_.default, ATEN._to_copy.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default}
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default,
         ATEN.is_nonzero.default, ATEN._unique2.default}  # fmt: skip
KERNELS = {}  # replacements of operations; see kernel()


def waits(what):
    """Raise an error in debug mode if an operation makes the host wait."""
    if current["is_strict"]:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


@functools.cache
def is_composite(func):
    """Whether an operation consists of other operations."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def run(func, args, kwargs):
    """Run an operation with a tensor on a device."""
    if func is torch.ops.prim.device.default:
        return args[0].where
    if is_composite(func):
        with Mode():  # in inference_mode() composite operations arrive here undecomposed
            return func.decompose(*args, **kwargs)
    leaves = [*tensors_in(args), *tensors_in(kwargs)]
    on_device = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    if func in MIXED:
        return copied(func, args, kwargs)
    devices = {tensor.where for tensor in on_device}
    on_host = [leaf for leaf in leaves if not isinstance(leaf, DeviceTensor)]
    if func in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices if isinstance(index, DeviceTensor)):
            waits("indexing with a mask")
        if any(not isinstance(index, DeviceTensor) for index in indices):
            waits("indexing with a tensor on the host")
            on_host = [one for one in on_host if all(one is not index for index in indices)]
    if len(devices) > 1 or (devices and any(one.ndim for one in on_host)):
        found = sorted({str(device) for device in devices} | ({"cpu"} if on_host else set()))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} for {func}")
    if func in WAITS:
        waits(func)
    wanted = device_of(kwargs["device"]) if kwargs.get("device") is not None else None
    where = wanted or next(iter(devices))
    if stream := side_stream(where):
        stream.finish()
    host_args = changed(args, DeviceTensor, lambda tensor: tensor.host)
    host_kwargs = {name: changed(value, DeviceTensor, lambda tensor: tensor.host) for name, value in kwargs.items()}
    if "device" in host_kwargs:
        host_kwargs["device"] = "cpu"
    found = KERNELS.get(func, func)(*host_args, **host_kwargs)
    mine = {id(tensor.host): tensor for tensor in on_device}
    return changed(
        found, torch.Tensor, lambda host: mine[id(host)] if id(host) in mine else wrap(host, where, on_device)
    )


def wrap(host, where, sources=()):
    """Make a tensor on a device and count its memory. A view has the inference mode of its source."""
    memory.count(host, where)
    storage = host.untyped_storage()._cdata
    origin = next((tensor for tensor in sources if tensor.host.untyped_storage()._cdata == storage), None)
    if origin is None or origin.is_inference() == torch.is_inference_mode_enabled():
        return DeviceTensor(host, where)
    with torch.inference_mode(origin.is_inference()):
        return DeviceTensor(host, where)


def copied(func, args, kwargs):
    """Run copy_ and _to_copy between devices in the current stream."""
    source = args[1] if func is ATEN.copy_.default else args[0]
    if func is ATEN.copy_.default:
        target = args[0]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        blocking = not kwargs.get("non_blocking", False)
        wanted = kwargs.get("device")
        device = device_of(wanted) if wanted is not None else source.where
        options = {
            name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")
        }
        host = source.host if isinstance(source, DeviceTensor) else source
        empty = ATEN._to_copy.default(host, **options)  # of the right type, shape and layout
        if device is not None and device == getattr(source, "where", None):
            return wrap(empty, device)
        target = wrap(torch.empty_like(empty), device) if device is not None else torch.empty_like(empty)
        if device is None and not blocking:
            pin(target)  # as torch does
    ends = [one.where if isinstance(one, DeviceTensor) else None for one in (target, source)]
    if ends[0] == ends[1]:  # on one device
        stream = side_stream(ends[0])
        if stream:
            stream.finish()
        target.host.copy_(source.host)
        return target
    to, what = (one.host if isinstance(one, DeviceTensor) else one for one in (target, source))
    stream = side_stream(ends[0] or ends[1])
    if None in ends and (blocking or not is_pinned(what if ends[1] is None else to)):
        if blocking:
            waits("a blocking copy")  # CUDA does not report copies to pageable memory, which block as well
        blocking = True
    if stream is None or blocking:
        if stream:
            stream.finish()
        to.copy_(what)
        return target
    if not same_layout(to, what):
        raise AssertionError("a copy between devices and layouts allocates, stages and blocks")
    spoil(to)
    stream.jobs.append(lambda: to.copy_(what))
    return target


def same_layout(one, other):
    return one.is_contiguous() and other.is_contiguous() and one.dtype == other.dtype


def spoil(tensor):
    with torch.inference_mode():
        tensor.fill_(torch.nan if tensor.dtype.is_floating_point else 77)


# -- streams -----------------------------------------------------------------------------------------------------------


class Stream:
    """A queue whose copies run when something waits for them. Those of the default stream run immediately."""

    def __init__(self, device=None, priority=0, **_):
        self.device = device_of(device if not isinstance(device, DeviceTensor) else device.where)
        self.jobs = deque()
        self.done = 0
        self.within = []
        known.add(self)

    def finish(self, count=None):
        """Run all jobs, or only the first `count` ones of all that were ever queued."""
        with LOCK:
            while self.jobs and (count is None or self.done < count):
                job = self.jobs.popleft()
                self.done += 1
                with torch.inference_mode():
                    job()

    def wait_event(self, event):
        if event.stream is None:
            return
        stream = event.stream
        count = event.count
        if side(self):
            self.jobs.append(lambda: stream.finish(count))
        else:
            stream.finish(count)

    def wait_stream(self, stream):
        self.wait_event(stream.record_event())

    def record_event(self, event=None):
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self):
        self.finish()

    def query(self):
        return not self.jobs

    def __enter__(self):
        self.within.append(StreamContext(self))
        self.within[-1].__enter__()

    def __exit__(self, *_):
        self.within.pop().__exit__()


class Event:
    """After recording, marks a position in a stream: all jobs before it are done."""

    def __init__(self, enable_timing=False, **_):
        self.stream = None
        self.count = 0
        self.seconds = 0.0
        self.timed = enable_timing

    def record(self, stream=None):
        self.stream = stream or current_stream()
        self.count = self.stream.done + len(self.stream.jobs)
        self.seconds = time.perf_counter()

    def wait(self, stream=None):
        (stream or current_stream()).wait_event(self)

    def synchronize(self):
        if self.stream is not None:
            self.stream.finish(self.count)

    def query(self):
        return self.stream is None or self.stream.done >= self.count

    def elapsed_time(self, other):
        assert self.timed
        assert other.timed
        return 1000 * max(other.seconds - self.seconds, 1e-9)


known = weakref.WeakSet()
defaults = []


def side(stream):
    return stream not in defaults


def current_stream(device=None):
    device = device_of(device).index
    return current["streams"][device][-1] if current["streams"][device] else defaults[device]


def side_stream(where):
    """The current stream of a device; None if it is the default stream."""
    found = current_stream(where)
    return found if side(found) else None


class StreamContext:
    """Makes a stream the current one of its device. The context can be entered repeatedly."""

    def __init__(self, stream):
        self.stream = stream
        self.before = []

    def __enter__(self):
        if self.stream is not None:
            self.before.append(exchange_device(self.stream.device.index))
            current["streams"][self.stream.device.index].append(self.stream)

    def __exit__(self, *_):
        if self.stream is not None:
            current["streams"][self.stream.device.index].pop()
            exchange_device(self.before.pop())


def synchronize(index):
    for stream in list(known):
        if stream.device.index == index:
            stream.finish()


# -- memory ------------------------------------------------------------------------------------------------------------


class Memory:
    """Counts the memory of tensors on the devices."""

    def __init__(self):
        self.held = {}
        self.upper = [0] * DEVICES
        self.peak = [0] * DEVICES

    def count(self, host, where):
        """Count the storage of a tensor, unless it is counted already."""
        storage = host.untyped_storage()
        index = where.index
        before = self.held.get(storage._cdata)
        if before is not None and not before[0].expired():
            return
        self.held[storage._cdata] = (StorageWeakRef(storage), index, storage.nbytes())
        self.upper[index] += storage.nbytes()  # an upper bound: freed storage is not subtracted yet
        if self.upper[index] > self.peak[index]:
            self.peak[index] = max(self.peak[index], self.allocated(index))
        limit = current["fraction"] * TOTAL_BYTES
        if self.upper[index] > limit and self.allocated(index) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory: the simulated device is full")

    def allocated(self, index):
        """The bytes of all tensors on a device."""
        self.held = {key: found for key, found in self.held.items() if not found[0].expired()}
        self.upper[index] = sum(nbytes for _, device, nbytes in self.held.values() if device == index)
        return self.upper[index]

    def forget_peak(self, index):
        self.peak[index] = self.allocated(index)

    def stats(self, index):
        """Statistics in the nested form of torch."""
        found = {"current": self.allocated(index), "peak": self.peak[index]}
        return {"allocated_bytes": {"all": found}, "reserved_bytes": {"all": found}}


memory = Memory()
pinned = {}  # address: number of bytes of memory that was registered or allocated as pinned


def pin(tensor):
    pinned[tensor.data_ptr()] = tensor.untyped_storage().nbytes()


def is_pinned(tensor, device=None):
    if isinstance(tensor, DeviceTensor):
        return False
    at = tensor.data_ptr()
    return any(begin <= at < begin + nbytes for begin, nbytes in list(pinned.items())) or tensor.numel() == 0


def pin_memory(tensor, device=None):
    found = tensor.clone()
    pin(found)
    return found


class Cudart:
    """The functions of CUDA's runtime that headinfer calls. The error 712 means that memory is already registered."""

    @staticmethod
    def cudaHostRegister(address, nbytes, flags):
        if address in pinned:
            return 712
        pinned[address] = nbytes
        return 0

    @staticmethod
    def cudaHostUnregister(address):
        return 0 if pinned.pop(address, None) else 713

    @staticmethod
    def cudaMemGetInfo(index):
        return TOTAL_BYTES - memory.allocated(index), TOTAL_BYTES


# -- kernels -----------------------------------------------------------------------------------------------------------


def kernel(name):
    def register(stand_in):
        KERNELS[getattr(ATEN, name).default] = stand_in
        return stand_in

    return register


def attend(q, k, v, causal, scale, *, types, groups, widest):
    """Compute attention with the rounding of a kernel and its output layout [B, T, H, D]."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in types
    assert q.shape[0] == k.shape[0] == v.shape[0]
    assert q.shape[3] == k.shape[3] == v.shape[3] <= widest
    assert q.shape[3] % 8 == 0
    assert k.shape[1:3] == v.shape[1:3]
    assert q.shape[1] % k.shape[1] == 0 if groups else q.shape[1] == k.shape[1]
    assert min(q.shape[2], k.shape[2]) > 0
    for x in (q, k, v):
        assert x.stride(3) == 1, "a kernel reads contiguous rows"
        assert all(stride % 8 == 0 for stride in x.stride()[:3]), "a kernel reads 16 bytes at a time"
        assert x.data_ptr() % 16 == 0
    mask = causal_mask(q.shape[2], k.shape[2]) if causal else None
    state = attend_reference(q, k, v, scale=scale, mask=mask)
    out = state.out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return out, state.lse.float()


@kernel("_scaled_dot_product_flash_attention")
def flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    out, lse = attend(q, k, v, causal, scale, types=HALVES, groups=True, widest=256)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, q.shape[2], k.shape[2], nothing, nothing, nothing


@kernel("_scaled_dot_product_cudnn_attention")
def cudnn(q, k, v, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    assert bias is None
    assert with_lse
    out, lse = attend(q, k, v, causal, scale, types=HALVES, groups=False, widest=128)
    nothing = torch.empty(0)
    return out, lse.unsqueeze(-1), nothing, nothing, q.shape[2], k.shape[2], nothing, nothing, nothing


@kernel("_scaled_dot_product_efficient_attention")
def efficient(q, k, v, bias, with_lse, dropout=0.0, causal=False, *, scale=None):
    assert bias is None
    assert with_lse
    out, lse = attend(q, k, v, causal, scale, types=(torch.float32, *HALVES), groups=False, widest=65_536)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    return out, lse, torch.empty(0), torch.empty(0)


@kernel("histc")
def histc(x, *more, **options):
    """Count integers as well, as on CUDA."""
    return torch.histc(x.float(), *more, **options).to(x.dtype)


class Launched:
    """triton_kernels.py with kernels that get the values of device tensors."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        found = getattr(self.module, name)
        return Launches(found) if name in ("attend", "join", "merge", "quantise", "dequantise") else found


class Launches:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **constants):
            on_device = [x for x in args if isinstance(x, torch.Tensor)]
            assert len({x.where for x in on_device}) == 1, "a kernel's operands are on one device"
            assert on_device[0].where.index == current["device"], "Triton launches on the current device"
            self.kernel[grid](*(x.host if isinstance(x, DeviceTensor) else x for x in args), **constants)

        return launch


# -- torch -------------------------------------------------------------------------------------------------------------


class Generator(torch.Generator):
    """A generator on the host."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def properties(index):
    return types.SimpleNamespace(
        name="a simulated GPU",
        total_memory=TOTAL_BYTES,
        multi_processor_count=4,
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
    )


def exchange_device(index):
    before = current["device"]
    if index >= 0:
        current["device"] = device_of(index).index
    return before


def set_sync_debug_mode(mode):
    current["is_strict"] = mode == 2
    if mode:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=3)


def guard_devices():
    """Use the guard of "meta", which does nothing, for CUDA.

    torch's C++ code makes a tensor's device the current one during each call, which is impossible without CUDA.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 24).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    kinds = {"cuda": 1, "meta": 14}  # c10::DeviceType
    guards[kinds["cuda"]] = guards[kinds["meta"]]


# If possible, the functions that torch.cuda calls are replaced instead of those of torch.cuda, which check arguments.
INNER = {
    "_cuda_emptyCache": lambda: None,
    "_cuda_getDevice": lambda: current["device"],
    "_cuda_getMemoryFraction": lambda index: current["fraction"],
    "_cuda_memoryStats": memory.stats,
    "_cuda_resetPeakMemoryStats": memory.forget_peak,
    "_cuda_setDevice": exchange_device,
    "_cuda_setMemoryFraction": lambda fraction, index: current.update(fraction=fraction),
    "_cuda_set_sync_debug_mode": set_sync_debug_mode,
    "_cuda_synchronize": lambda: synchronize(current["device"]),
}
OUTER = {
    "Event": Event,
    "Stream": Stream,
    "_exchange_device": exchange_device,
    "_get_device_properties": properties,
    "_maybe_exchange_device": exchange_device,
    "can_device_access_peer": lambda *_: True,
    "cudart": lambda: Cudart,
    "current_stream": current_stream,
    "default_stream": lambda device=None: defaults[device_of(device).index],
    "device_count": lambda: DEVICES,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "manual_seed_all": lambda seed: None,
    "stream": StreamContext,
}


def pretend():
    """Make torch find the simulated devices in this process. This cannot be undone."""
    assert not torch.cuda.is_available(), "this machine has real devices"
    guard_devices()
    torch.cuda._initialized = True
    for module, stand_ins in ((torch._C, INNER), (torch.cuda, OUTER)):
        for name, stand_in in stand_ins.items():
            setattr(module, name, stand_in)
    torch.Generator = Generator
    torch.Stream = Stream
    torch.accelerator.empty_host_cache = lambda: None
    torch.Tensor.is_pinned = is_pinned
    torch.Tensor.pin_memory = pin_memory
    torch.backends.cudnn.is_available = lambda: True
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    defaults.extend(Stream(torch.device("cuda", index)) for index in range(DEVICES))
    launched = Launched(importlib.import_module("headinfer.attention.triton_kernels"))
    importlib.import_module("headinfer.attention.triton_calls")._kernels = lambda: launched
    torch._C._set_only_lift_cpu_tensors(True)  # lets the mode handle the copy of torch.tensor(..., device=)
    Mode().__enter__()


def pytest_configure():
    pretend()
