"""Two CUDA devices that are not there, so that what was written for a GPU runs, and is compared, where there is none.

A pytest plugin, for a process of its own (see test_pretend_cuda.py). torch then finds two devices of Hopper's kind. A
tensor on one of them is a `Far`: its values lie in a CPU tensor that only operations of its device reach, under a
device's rules:

- operands lie on one device, but for single numbers and indices
- a stream's copies run only when somebody waits for them, and until then their target is NaN; both sides have one
  layout; from or to memory that is not pinned it copies at once, as the host waits for that
- after set_sync_debug_mode("error") whatever would make the host wait is an error
- attention kernels take what the real ones take, and answer in their types and layouts; Triton's run in its interpreter

What it can not show: the real kernels' numbers, real clocks, and other orders of events (orders.py has those).
"""

import ctypes
import importlib
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

ATEN = torch.ops.aten
DEVICES = 2
TOTAL_BYTES = 4 << 30
CAPABILITY = (9, 0)
HALVES = (torch.bfloat16, torch.float16)
OURS = ("cuda", "meta")  # torch asks guard_devices()'s for the index that "cuda" lacks, and that answers "meta"
current = {"device": 0, "is_strict": False, "streams": [[] for _ in range(DEVICES)], "fraction": 1.0}


def device_of(where):
    """A CUDA device with its index, of whatever names one; None for any other."""
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
    """All tensors of an operation's arguments. (torch's own trees take longer than the operations.)"""
    found = []
    for one in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, (tuple, list)):
            found += tensors_in(one)
    return found


def changed(tree, kind, change):
    """The same with each tensor of a kind changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([changed(one, kind, change) for one in tree])
    return tree


# -- tensors -----------------------------------------------------------------------------------------------------------


class Far(torch.Tensor):
    """A tensor on such a device."""

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
        made.host, made.where = host, where
        return made

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        return self.clone()

    def __repr__(self):
        return f"Far({self.host!r}, {self.where})"


class Mode(TorchDispatchMode):
    """Catches what makes a tensor on such a device out of none."""

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type in OURS:
            return run(func, args, kwargs)
        if any(isinstance(one, Far) for one in (*tensors_in(args), *tensors_in(kwargs))):
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
KERNELS = {}  # by operation: what stands for it, see kernel()


def waits(what):
    """The host would wait here."""
    if current["is_strict"]:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


def run(func, args, kwargs):
    """An operation with a tensor on a device."""
    if func is torch.ops.prim.device.default:
        return args[0].where
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Mode():  # under inference_mode() what is made of other operations comes here whole
            return func.decompose(*args, **kwargs)
    leaves = [*tensors_in(args), *tensors_in(kwargs)]
    fars = [leaf for leaf in leaves if isinstance(leaf, Far)]
    if func in MIXED:
        return copied(func, args, kwargs)
    devices = {far.where for far in fars}
    near = [leaf for leaf in leaves if not isinstance(leaf, Far)]
    if func in INDEXED:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices if isinstance(index, Far)):
            waits("indexing with a mask")
        if any(not isinstance(index, Far) for index in indices):
            waits("indexing with a tensor on the host")
            near = [one for one in near if all(one is not index for index in indices)]
    if len(devices) > 1 or (devices and any(one.ndim for one in near)):
        found = sorted({str(device) for device in devices} | ({"cpu"} if near else set()))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} for {func}")
    if func in WAITS:
        waits(func)
    wanted = device_of(kwargs["device"]) if kwargs.get("device") is not None else None
    where = wanted or next(iter(devices))
    if stream := side_stream(where):
        stream.finish()
    near_args = changed(args, Far, lambda far: far.host)
    near_kwargs = {name: changed(value, Far, lambda far: far.host) for name, value in kwargs.items()}
    if "device" in near_kwargs:
        near_kwargs["device"] = "cpu"
    found = KERNELS.get(func, func)(*near_args, **near_kwargs)
    mine = {id(far.host): far for far in fars}
    return changed(found, torch.Tensor, lambda host: mine[id(host)] if id(host) in mine else wrap(host, where, fars))


def wrap(host, where, sources=()):
    """A new tensor on a device, counted; a view of one of the sources is no more of inference_mode() than that."""
    memory.count(host, where)
    storage = host.untyped_storage()._cdata
    origin = next((far for far in sources if far.host.untyped_storage()._cdata == storage), None)
    with torch.inference_mode(torch.is_inference_mode_enabled() if origin is None else origin.is_inference()):
        return Far(host, where)


def copied(func, args, kwargs):
    """copy_ and _to_copy between places, in the stream that is current."""
    source = args[1] if func is ATEN.copy_.default else args[0]
    if func is ATEN.copy_.default:
        target, blocking = args[0], not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        blocking, wanted = not kwargs.get("non_blocking", False), kwargs.get("device")
        device = device_of(wanted) if wanted is not None else source.where
        options = {
            name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")
        }
        host = source.host if isinstance(source, Far) else source
        empty = ATEN._to_copy.default(host, **options)  # of the right type, shape and layout
        if device is not None and device == getattr(source, "where", None):
            return wrap(empty, device)
        target = wrap(torch.empty_like(empty), device) if device is not None else torch.empty_like(empty)
        if device is None and not blocking:
            pin(target)  # as torch does
    ends = [one.where if isinstance(one, Far) else None for one in (target, source)]
    if ends[0] == ends[1]:  # on one device
        stream = side_stream(ends[0])
        if stream:
            stream.finish()
        target.host.copy_(source.host)
        return target
    to, what = (one.host if isinstance(one, Far) else one for one in (target, source))
    stream = side_stream(ends[0] or ends[1])
    if None in ends and (blocking or not is_pinned(what if ends[1] is None else to)):
        if blocking:
            waits("a copy that blocks")  # to pageable memory it would too, but CUDA does not say so
        blocking = True
    if stream is None or blocking:
        if stream:
            stream.finish()
        to.copy_(what)
        return target
    if not same_layout(to, what):
        raise AssertionError("a copy between places and layouts allocates, stages and blocks")
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
    """A queue whose copies run when somebody waits for them; the default one's run at once."""

    def __init__(self, device=None, priority=0, **_):
        self.device = device_of(device if not isinstance(device, Far) else device.where)
        self.jobs, self.done, self.within = deque(), 0, []
        known.add(self)

    def finish(self, count=None):
        """Run all jobs, or so many of all that there ever were."""
        while self.jobs and (count is None or self.done < count):
            job = self.jobs.popleft()
            self.done += 1
            with torch.inference_mode():
                job()

    def wait_event(self, event):
        if event.stream is None:
            return
        stream, count = event.stream, event.count
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
    """Points behind a job of a stream, once it is recorded."""

    def __init__(self, enable_timing=False, **_):
        self.stream, self.count, self.seconds, self.timed = None, 0, 0.0, enable_timing

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
    """The stream that is current on a device where it is not the default one."""
    found = current_stream(where)
    return found if side(found) else None


class StreamContext:
    """A stream is the current one of its device within; may be entered again."""

    def __init__(self, stream):
        self.stream, self.before = stream, []

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
    """What tensors take on the devices."""

    def __init__(self):
        self.held, self.upper, self.peak = {}, [0] * DEVICES, [0] * DEVICES

    def count(self, host, where):
        """A tensor's storage is on a device, perhaps since before."""
        storage, index = host.untyped_storage(), where.index
        before = self.held.get(storage._cdata)
        if before is not None and not before[0].expired():
            return
        self.held[storage._cdata] = (StorageWeakRef(storage), index, storage.nbytes())
        self.upper[index] += storage.nbytes()  # as if nothing had been let go of since it was counted
        if self.upper[index] > self.peak[index]:
            self.peak[index] = max(self.peak[index], self.allocated(index))
            if self.peak[index] > current["fraction"] * TOTAL_BYTES:
                raise torch.OutOfMemoryError("CUDA out of memory: the pretended device is full")

    def allocated(self, index):
        """Bytes of what there is."""
        self.held = {key: found for key, found in self.held.items() if not found[0].expired()}
        self.upper[index] = sum(nbytes for _, device, nbytes in self.held.values() if device == index)
        return self.upper[index]

    def forget_peak(self, index):
        self.peak[index] = self.allocated(index)

    def stats(self, index):
        """Nested as torch's are."""
        found = {"current": self.allocated(index), "peak": self.peak[index]}
        return {"allocated_bytes": {"all": found}, "reserved_bytes": {"all": found}}


memory = Memory()
pinned = {}  # address: bytes of memory that was registered or taken pinned


def pin(tensor):
    pinned[tensor.data_ptr()] = tensor.untyped_storage().nbytes()


def is_pinned(tensor, device=None):
    if isinstance(tensor, Far):
        return False
    at = tensor.data_ptr()
    return any(begin <= at < begin + nbytes for begin, nbytes in pinned.items()) or tensor.numel() == 0


def pin_memory(tensor, device=None):
    found = tensor.clone()
    pin(found)
    return found


class Cudart:
    """What of CUDA's runtime is called by name; 712 is its answer for memory that is registered already."""

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
    """The state of attention, rounded as a kernel rounds it, out in the layout [B, T, H, D] of the kernels."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in types
    assert q.shape[0] == k.shape[0] == v.shape[0]
    assert q.shape[3] == k.shape[3] == v.shape[3] <= widest
    assert q.shape[3] % 8 == 0
    assert k.shape[1:3] == v.shape[1:3]
    assert q.shape[1] % k.shape[1] == 0 if groups else q.shape[1] == k.shape[1]
    assert min(q.shape[2], k.shape[2]) > 0
    for x in (q, k, v):
        assert x.stride(3) == 1, "a kernel reads rows of elements that lie together"
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
    """CUDA's counts whole numbers too."""
    return torch.histc(x.float(), *more, **options).to(x.dtype)


class Launched:
    """triton_kernels.py, whose kernels are given a Far's values."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        found = getattr(self.module, name)
        return Launches(found) if name in ("attend", "join", "merge") else found


class Launches:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **constants):
            fars = [x for x in args if isinstance(x, torch.Tensor)]
            assert len({x.where for x in fars}) == 1, "a kernel's operands lie on one device"
            assert fars[0].where.index == current["device"], "Triton launches on the current device"
            self.kernel[grid](*(x.host if isinstance(x, Far) else x for x in args), **constants)

        return launch


# -- torch -------------------------------------------------------------------------------------------------------------


class Generator(torch.Generator):
    """Numbers are made on the host."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def properties(index):
    return types.SimpleNamespace(
        name="a pretended GPU",
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
    """torch's C++ makes a tensor's device the current one around each call, and without CUDA it cannot for CUDA's. The
    guard of "meta", which does nothing, stands in.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 24).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    kinds = {"cuda": 1, "meta": 14}  # c10::DeviceType
    guards[kinds["cuda"]] = guards[kinds["meta"]]


# As far as it goes what torch.cuda calls is replaced, and not torch.cuda, which checks what it is given.
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
    "manual_seed_all": lambda seed: None,
    "stream": StreamContext,
}


def pretend():
    """Make torch, in this process, find the devices. There is no way back."""
    assert not torch.cuda.is_available(), "there are real ones"
    guard_devices()
    torch.cuda._initialized = True
    for module, stand_ins in ((torch._C, INNER), (torch.cuda, OUTER)):
        for name, stand_in in stand_ins.items():
            setattr(module, name, stand_in)
    torch.Generator, torch.Stream = Generator, Stream
    torch.accelerator.empty_host_cache = lambda: None
    torch.Tensor.is_pinned, torch.Tensor.pin_memory = is_pinned, pin_memory
    torch.backends.cudnn.is_available = lambda: True
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    defaults.extend(Stream(torch.device("cuda", index)) for index in range(DEVICES))
    launched = Launched(importlib.import_module("headinfer.attention.triton_kernels"))
    importlib.import_module("headinfer.attention.triton_calls")._kernels = lambda: launched
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) copies to the device where a mode sees it
    Mode().__enter__()


def pytest_configure():
    pretend()
