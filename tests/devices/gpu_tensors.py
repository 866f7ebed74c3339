"""Tensors that lie on a GPU which is none: their numbers are in the memory of the CPU.

A `GpuTensor` is a wrapper subclass on PyTorch's Python-only device PrivateUse1, so that autograd,
vmap and batched backward passes run as they are. Every operation on it is checked as CUDA checks
it, and what makes the host wait is counted by the line of the package that led there.
"""

import copy
import sys
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

PACKAGE = "/biasshift/"  # whose lines are named
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

WAITING = set(
    "_local_scalar_dense equal nonzero masked_select _unique2 unique_dim unique_consecutive "
    "is_nonzero bincount _linalg_check_errors linalg_eig _linalg_eigh histc allclose".split()
)
INDEXING = {"index", "_unsafe_index", "index_put_", "index_put", "_index_put_impl_"}
# Operations that take CPU tensors beside those on the GPU: any, or those without axes.
MIXED = {"index", "_unsafe_index", "copy_", "_to_copy", "lift_fresh", "set_"}
MIXED_SCALARS = INDEXING | {"masked_fill", "masked_fill_", "fill_", "where"}


class Backend:
    """What PyTorch asks the module of a device for, `torch.fakegpu` here."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        seed_gpu(seed)

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return STATE["random"].clone()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        STATE.update(random=state.clone())

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> None:
    """Gives the process the device for good; no import does, for pytest imports this file."""
    if torch._C._get_privateuse1_backend_name() != "fakegpu":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _setup_privateuseone_for_python_backend("fakegpu", backend_module=Backend())


# -- what is remembered ----------------------------------------------------------------------------

STATE = {"random": torch.Generator().manual_seed(7).get_state()}  # of the GPU
WAITS: Counter[str] = Counter()  # why and where the host has waited for the GPU
GENERATORS: list[Any] = []  # of the calls that are under way; operations get another object


def seed_gpu(seed: int) -> None:
    STATE["random"] = torch._C.Generator(CPU).manual_seed(seed).get_state()


def wait(reason: str) -> None:
    """Counts one time that the host waits, with the nearest two lines of the package."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < 2:
        file = frame.f_code.co_filename
        if PACKAGE in file and "site-packages" not in file:
            lines.append(f"{file.rsplit(PACKAGE, 1)[1]}:{frame.f_lineno}")
        frame = frame.f_back
    WAITS[f"{reason} at {' < '.join(lines)}"] += 1


# -- tensors and generators ------------------------------------------------------------------------


def on_gpu(device: Any) -> bool:
    """Whether a device that is asked for is the GPU."""
    kind = device.type if isinstance(device, torch.device) else str(device).split(":")[0]
    return kind in ("cuda", "fakegpu")


class GpuTensor(Tensor):
    """A tensor on the GPU: ``numbers`` are its numbers."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, requires_grad: bool = False):
        made = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device="fakegpu:0",
            requires_grad=requires_grad,
        )
        made.numbers = numbers
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    data: Any = property(lambda self: self.detach(), lambda self, new: self._set_data(new))

    def _set_data(self, new: Any) -> None:
        Tensor.data.__set__(self, new)  # leaves the numbers behind
        self.numbers = new.numbers

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> Any:
        return self.numbers.untyped_storage()

    def storage_offset(self) -> int:
        return self.numbers.storage_offset()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"GpuTensor({self.numbers!r})"

    def cuda(self, *_: Any, **__: Any) -> Any:
        return self

    def __deepcopy__(self, memo: dict) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                new = GpuTensor(self.numbers.clone(), self.requires_grad)
            kept = {name: value for name, value in vars(self).items() if name != "numbers"}
            vars(new).update(copy.deepcopy(kept, memo))
            if self.grad is not None:
                new.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = new
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Generator(torch._C.Generator):
    """Draws the numbers of a generator on the CPU, and says that it is where it was asked for."""

    def __new__(cls, device: Any = "cpu"):
        made = torch._C.Generator.__new__(cls, CPU)
        made.asked = torch.device(device)
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    device = property(lambda self: GPU if self.asked.type == "cuda" else self.asked)


# -- one operation ---------------------------------------------------------------------------------


def run(func: Any, args: Any, kwargs: dict) -> Any:
    """Carries out one operation of PyTorch on the numbers, where its tensors or its result are on
    the GPU, and refuses what CUDA refuses.
    """
    leaves = tree_leaves((args, kwargs))
    gpu = [x for x in leaves if isinstance(x, GpuTensor)]
    cpu = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, GpuTensor)]
    name, device = func._schema.name.split("::")[1], kwargs.get("device")
    to_gpu = on_gpu(device) if device is not None else bool(gpu)
    _refuse_other_generator(leaves, to_gpu)
    if not gpu and not to_gpu:
        return func(*args, **kwargs)
    if gpu and cpu:
        _refuse_mixed(func, name, args, cpu)
    _count_waits(name, args, kwargs, to_gpu)
    inner = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    if device is not None:
        inner["device"] = CPU
    found = _compute(func, *tree_map(_numbers, (args, inner)))
    if not to_gpu:
        return found
    made = tree_map(lambda x: GpuTensor(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, made) if gpu else made


def _numbers(x: Any) -> Any:
    return x.numbers if isinstance(x, GpuTensor) else x


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    given = any(isinstance(x, torch._C.Generator) for x in tree_leaves((args, kwargs)))
    if given or torch.Tag.nondeterministic_seeded not in func.tags:
        return func(*args, **kwargs)
    before = torch.get_rng_state()
    torch.set_rng_state(STATE["random"])
    try:
        return func(*args, **kwargs)
    finally:
        STATE["random"] = torch.get_rng_state()
        torch.set_rng_state(before)


def _refuse_other_generator(leaves: list, to_gpu: bool) -> None:
    if GENERATORS and any(isinstance(x, torch._C.Generator) for x in leaves):
        found = GENERATORS[-1].device.type
        if (found == "cuda") != to_gpu:
            wanted = "cuda" if to_gpu else "cpu"
            raise RuntimeError(
                f"Expected a '{wanted}' device type for generator but found '{found}'"
            )


def _refuse_mixed(func: Any, name: str, args: Any, cpu: list) -> None:
    if name in INDEXING and not isinstance(args[0], GpuTensor):
        raise RuntimeError("indices should be either on cpu or on the same device")
    scalars = torch.Tag.pointwise in func.tags or name in MIXED_SCALARS
    allowed = [x for x in cpu if x.dim() == 0] if scalars else []
    if name in INDEXING and "put" in name:
        allowed += [x for x in cpu if any(x is index for index in args[1])]
    if name not in MIXED and len({*map(id, allowed)}) < len({*map(id, cpu)}):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! (in {name})"
        )


def _count_waits(name: str, args: Any, kwargs: dict, to_gpu: bool) -> None:
    if name in WAITING:
        wait(name.strip("_"))
    if name in ("_to_copy", "copy_"):
        _count_copy(name, args, kwargs, to_gpu)
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, GpuTensor) for index in indices):
            wait("an index from the host")
        masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if masks and not ("put" in name and args[2].dim() == 0):  # a number fills by a mask
            wait("a boolean index")


def _count_copy(name: str, args: Any, kwargs: dict, to_gpu: bool) -> None:
    source = args[0] if name == "_to_copy" else args[1]
    into = to_gpu if name == "_to_copy" else isinstance(args[0], GpuTensor)
    asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:3] == (True,))
    number = name == "copy_" and not isinstance(source, GpuTensor) and source.dim() == 0
    if isinstance(source, GpuTensor) != into and source.numel() and not (asynchronous or number):
        wait("a copy to the host" if isinstance(source, GpuTensor) else "a copy to the device")
