"""A GPU that is not there: tensors on ``cuda`` have real numbers in main memory, and every wait for them is noted.

Tensors are plain ones of the CPU. A register of their storages says which of them are on a device; ``tensor.device``
and its like answer by it, so that code takes the branches that it takes on a GPU. Every operator is seen by a dispatch
mode. One whose tensors are on several devices raises the error that CUDA raises, and one that would make the host wait
is noted with the stack that called it: reading a value back, copying from or to the host, and operators whose result
has a size that only the device knows.
"""

import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TORCH, _to = str(Path(torch.__file__).parent), Tensor.to
CPU, GPU, SECOND_GPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)

# On a GPU these read a value back, check an error code, or make a tensor whose size depends on the values.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "unique_consecutive",
    "_unique", "_unique2", "unique_dim", "bincount", "_linalg_svd", "_linalg_eigh", "_linalg_check_errors",
}  # fmt: skip
READS = ("tolist", "numpy", "__array__", "__reduce_ex__")
FACTORIES = [
    "empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "tensor",
    "as_tensor", "scalar_tensor", "empty_strided", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like",
    "randn_like", "tril_indices", "triu_indices",
]  # fmt: skip
COPIES = {"tensor", "as_tensor"}
"""Those that copy values of the host to the device, and wait for that."""

_PLACES: dict[int, tuple[StorageWeakRef, torch.device]] = {}
"""By the addresses of storages; for the whole process, as caches keep tensors from one test to the next."""

_UNDECIDED: dict[int, StorageWeakRef] = {}
"""Made from nothing within torch, such as the zeros of ``one_hot``: on the device of what they meet first."""


@dataclass(frozen=True)
class Wait:
    """The host waits for the device."""

    what: str
    stack: tuple[str, ...]
    """Functions that called it, as ``file:line function``, the innermost last and without torch's own."""

    def under(self, names: Any) -> bool:
        """Whether one of these called it: names of functions, or ``file.py:name``."""
        called = [(Path(frame.rpartition(":")[0]).name, frame.rpartition(" ")[2]) for frame in self.stack]
        return any(name in names or f"{file}:{name}" in names for file, name in called)

    def __str__(self) -> str:
        return f"{self.what} at {' < '.join(reversed(self.stack[-6:]))}"


class FakeGpu(TorchDispatchMode):
    """See above; made by :func:`fake_gpu`."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.capability = capability

    def place_of(self, tensor: Tensor) -> torch.device:
        """The device of a tensor; of a sub-class that wraps others, that of the first of these."""
        found = _PLACES.get(next(_plain(tensor)).untyped_storage()._cdata)
        return CPU if found is None else found[1]

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Say that the memory of ``tensor`` is on ``device``."""
        for inner in _plain(tensor):
            # The weak reference keeps the address from being used again.
            reference = StorageWeakRef(inner.untyped_storage())
            _UNDECIDED.pop(reference.cdata, None)
            if device.type == "cpu":
                _PLACES.pop(reference.cdata, None)
            else:
                _PLACES[reference.cdata] = (reference, device)
        return tensor

    def note(self, what: str) -> None:
        """Remember that the host waits."""
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith((__file__, _TORCH))]
        self.waits.append(Wait(what, tuple(f"{f.filename}:{f.lineno} {f.name}" for f in frames)))

    def move(self, tensor: Tensor, device: torch.device, dtype: Any, non_blocking: bool, copy: bool) -> Tensor:
        """What ``tensor.to(device, dtype)`` does."""
        before, dtype = self.place_of(tensor), dtype or tensor.dtype
        if before == device and dtype == tensor.dtype and not copy:
            return tensor
        if before != device and not non_blocking:
            self.note(f"copy from {before} to {device}")
        return self.put(_to(tensor, dtype=dtype, copy=True), device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a sub-class, whose operators on what it wraps are seen
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = next((place for place in map(self.place_of, tensors) if place.type != "cpu"), CPU)
        if device.type != "cpu":
            for tensor in tensors:
                if tensor.ndim and tensor.untyped_storage()._cdata in _UNDECIDED:
                    self.put(tensor, device)
            self._check(func, name, tensors, [self.place_of(tensor) for tensor in tensors], args, kwargs)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result) if not func._schema.is_mutable else ():
            if not isinstance(tensor, Tensor):
                continue
            if device.type != "cpu":
                self.put(tensor, device)
            elif not tensors:
                _UNDECIDED[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
        return result

    def _check(self, func: Any, name: str, tensors: Any, places: Any, args: Any, kwargs: Any) -> None:
        # Torch has kernels for these devices only (aten/src/ATen/native/cuda/GroupedBlas.cpp), and loops on others.
        loops = name == "_grouped_mm" and (self.capability[0] not in (9, 10) or args[0].dtype != torch.bfloat16)
        if loops or name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.note(name)
        if name in ("copy_", "_foreach_copy_"):
            half, blocks = len(places) // 2, not (kwargs.get("non_blocking") or any(a is True for a in args))
            pairs = zip(places[:half], places[half:], tensors[half:], strict=True)
            if blocks and any(to != of and source.ndim for to, of, source in pairs):
                self.note(f"{name} between host and device")
            return
        if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
            indices = [i for i in args[1] if i is not None]
            fills = name != "index" and args[2].numel() == 1 and len(indices) == 1  # which CUDA does by a mask
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices) and not fills:
                self.note(f"{name} by a mask")
            if any(self.place_of(i).type == "cpu" for i in indices) and self.place_of(args[0]).type != "cpu":
                self.note(f"{name} by indices of the host")
                return
        # A number of the host may be an operand of what goes entry by entry; clamp takes none.
        scalars_pass = (torch.Tag.pointwise in func.tags and name != "clamp") or name.startswith(("_foreach", "fill"))
        found = {
            str(place)
            for tensor, place in zip(tensors, places, strict=True)
            if place.type != "cpu" or tensor.ndim or not scalars_pass
        }
        if len(found) > 1 and name != "set_":
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(sorted(found))}! ({name})"
            )


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory of their own in what may be a sub-class."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def _device(value: Any) -> torch.device | None:
    """What names a device, with its number."""
    if isinstance(value, bool) or not isinstance(value, int | str | torch.device):
        return None
    device = torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


@contextmanager
def fake_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeGpu]:
    """Within it, the devices ``cuda:0`` and ``cuda:1`` are there."""
    _device_constructors()  # which torch keeps for ``with torch.device(…)``: its own functions, not those below
    for address in [address for address, (storage, _) in _PLACES.items() if storage.expired()]:
        del _PLACES[address]
    _UNDECIDED.clear()
    gpu = FakeGpu(capability)
    with pytest.MonkeyPatch.context() as patch, gpu:
        _patch_tensors(gpu, patch)
        _patch_factories(gpu, patch)
        _patch_autocast(patch)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        yield gpu


def _patch_tensors(gpu: FakeGpu, patch: pytest.MonkeyPatch) -> None:
    inherited = {name: getattr(Tensor, name) for name in (*READS, "__deepcopy__")}
    patch.setattr(Tensor, "device", property(lambda t: t_device(t)), raising=False)

    def t_device(tensor: Tensor) -> torch.device:
        real = torch._C.TensorBase.device.__get__(tensor)
        return gpu.place_of(tensor) if real.type == "cpu" else real

    patch.setattr(Tensor, "is_cuda", property(lambda t: t_device(t).type == "cuda"), raising=False)
    patch.setattr(Tensor, "is_cpu", property(lambda t: t_device(t).type == "cpu"), raising=False)

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = next((a for a in (*args, kwargs.get("other")) if isinstance(a, Tensor)), None)
        named = [a for a in (*args[:1], kwargs.get("device")) if a is not None and not isinstance(a, Tensor)]
        device = t_device(other) if other is not None else next(filter(None, map(_device, named)), None)
        if device is None or "meta" in (device.type, t_device(tensor).type):
            return _to(tensor, *args, **kwargs)
        dtypes = [a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
        flags = [a for a in args if isinstance(a, bool)]
        non_blocking = kwargs.get("non_blocking", flags[0] if flags else False)
        copy = kwargs.get("copy", flags[1] if len(flags) > 1 else False)
        dtype = other.dtype if other is not None else dtypes[0] if dtypes else None
        return gpu.move(tensor, device, dtype, non_blocking, copy)

    patch.setattr(Tensor, "to", to)
    patch.setattr(Tensor, "cuda", lambda t, device=0, non_blocking=False, **_: to(t, GPU, non_blocking=non_blocking))
    patch.setattr(Tensor, "cpu", lambda t, **_: to(t, CPU))

    def reading(name: str) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if t_device(tensor).type != "cpu":
                if name in ("numpy", "__array__"):
                    raise TypeError(f"can't convert {t_device(tensor)} device type tensor to numpy.")
                gpu.note(name)
            return inherited[name](tensor, *args, **kwargs)

        return read

    for name in READS:
        patch.setattr(Tensor, name, reading(name))
    # A sub-class that wraps others says where they are, and torch believes it.
    wrapped = Tensor._make_wrapper_subclass

    def on_the_cpu(*args: Any, **kwargs: Any) -> Tensor:
        return wrapped(*args, **{**kwargs, "device": CPU})

    patch.setattr(Tensor, "_make_wrapper_subclass", staticmethod(on_the_cpu), raising=False)
    grouped = torch._C._group_tensors_by_device_and_dtype  # torch's optimizers ask it for the device of parameters

    def by_device(lists: Any, with_indices: bool = False) -> Any:
        found = grouped(lists, with_indices)
        one_of = {key: next(t for ts in value[0] for t in ts if t is not None) for key, value in found.items()}
        return {(t_device(one_of[key]), key[1]): value for key, value in found.items()}

    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", by_device)
    patch.setattr(Tensor, "__deepcopy__", lambda t, memo: gpu.put(inherited["__deepcopy__"](t, memo), t_device(t)))


def _patch_factories(gpu: FakeGpu, patch: pytest.MonkeyPatch) -> None:
    def made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(make)
        def factory(*args: Any, **kwargs: Any) -> Tensor:
            like = args[0] if make.__name__.endswith("_like") else kwargs.get("out")
            modes = reversed(_get_current_function_mode_stack())  # those of ``with torch.device(…)`` among them
            default = next((_device(mode.device) for mode in modes if isinstance(mode, DeviceContext)), CPU)
            device = _device(kwargs.get("device")) or (default if like is None else like.device)
            if device.type == "meta":
                return make(*args, **kwargs)
            if make.__name__ in COPIES and isinstance(args[0], Tensor):
                return args[0].to(device, kwargs.get("dtype") or args[0].dtype, copy=make.__name__ == "tensor")
            tensor = make(*args, **{**kwargs, "device": CPU})
            if make.__name__ in COPIES and device.type != "cpu" and tensor.numel():
                gpu.note(f"{make.__name__} copies values to {device}")
            return gpu.put(tensor, device)

        return factory

    for name in FACTORIES:
        patch.setattr(torch, name, made(getattr(torch, name)))

    def new_tensor(like: Tensor, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": like.dtype, "device": like.device, **kwargs})

    patch.setattr(Tensor, "new_tensor", new_tensor)


def _patch_autocast(patch: pytest.MonkeyPatch) -> None:
    """Autocast for ``cuda`` is that of the CPU, and code that asks for the CPU's finds it off."""
    start, enabled, dtype = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def init(own: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(own, _as_cpu(device_type), *args, **kwargs)

    patch.setattr(torch.autocast, "__init__", init)

    def asked(device_type: str | None = None) -> bool:
        of_torch = sys._getframe(1).f_globals["__name__"].startswith("torch.")
        return enabled(_as_cpu(device_type)) if of_torch or device_type == "cuda" else False

    patch.setattr(torch, "is_autocast_enabled", asked)
    patch.setattr(torch, "get_autocast_dtype", lambda device_type: dtype(_as_cpu(device_type)))


def _as_cpu(device_type: Any) -> Any:
    return "cpu" if device_type in ("cuda", None) else device_type
