"""One forward pass, watched: what went into every layer, and the edge through which its error will come back.

Gradient edges are used instead of backward hooks or the output tensors: a layer's output may be overwritten by an in-place
activation, while the edge still leads to the net input. The only file with hooks on modules.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

Watcher = Callable[[str, nn.Module, Tensor, Tensor], None]


@contextmanager
def watching(modules: Mapping[str, nn.Module], watcher: Watcher, *, raw: bool = False) -> Iterator[None]:
    """Calls ``watcher(name, module, first input, output)`` after each forward of the modules, within the block only.

    ``raw`` shows the module's own output, before the user's forward hooks may replace it.
    """
    handles = [watch(name, module, watcher, raw=raw) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(name: str, module: nn.Module, watcher: Watcher, *, raw: bool = False) -> torch.utils.hooks.RemovableHandle:
    """One hook on one module, until its handle is removed."""
    return module.register_forward_hook(partial(_call_watcher, name, watcher), with_kwargs=True, prepend=raw)


def _call_watcher(name: str, watcher: Watcher, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
    a = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(output, Tensor):
        watcher(name, module, a if isinstance(a, Tensor) else output, output)


@dataclass(frozen=True)
class Call:
    """One call of one layer: its incoming activations, and the gradient edge of its net inputs."""

    a: Tensor
    version: int  # of ``a`` at the call: a later in-place change would make it somebody else's activations
    edge: GradientEdge
    shape: torch.Size  # of the net inputs


@dataclass
class Tape:
    """The calls of every layer in one forward pass, in order."""

    calls: dict[str, list[Call]] = field(default_factory=dict)

    def record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            raise RuntimeError(
                f"Layer '{name}' ran without gradients, inside torch.no_grad or a reentrant checkpoint: its errors cannot be "
                "measured. Use checkpoint(..., use_reentrant=False), or leave the layer out with layers=."
            )
        a = a.detach()
        self.calls.setdefault(name, []).append(Call(a, a._version, get_gradient_edge(output), output.shape))

    def overwritten(self) -> bool:
        """Whether an incoming activation was changed in place after its layer had read it."""
        return any(call.a._version != call.version for calls in self.calls.values() for call in calls)


def traced(model: nn.Module, modules: Mapping[str, nn.Module], x: Tensor) -> tuple[Tape, object]:
    """Runs the model once and returns the tape and the model's outputs.

    Hooks are gone when the forward pass returns, so that a checkpoint's recomputation is not recorded a second time. Where
    an activation was overwritten after a layer had read it, the pass is repeated with every layer reading a copy.
    """
    tape = Tape()
    with watching(modules, tape.record, raw=True):
        outputs = model(x)
    if tape.overwritten():
        tape = Tape()
        with _reading_copies(modules.values()), watching(modules, tape.record, raw=True):
            outputs = model(x)
    return tape, outputs


@contextmanager
def _reading_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    def copy(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        return tuple(value.clone() if isinstance(value, Tensor) else value for value in args), copied

    handles = [module.register_forward_pre_hook(copy, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def errors(outputs: Tensor, edges: list[GradientEdge], seeds: Tensor, keep: bool) -> tuple[Tensor | None, ...]:
    """The gradients at every edge for a stack of seeds: (passes, batch, …) each. ``keep`` leaves the graph for more.

    None stands for a layer without influence on the outputs: its units are dead.
    """
    single = len(seeds) == 1
    found = torch.autograd.grad(
        outputs, edges, seeds[0] if single else seeds, retain_graph=keep, is_grads_batched=not single, allow_unused=True
    )
    return tuple(d if d is None or not single else d[None] for d in found)


def underlying(model: nn.Module) -> nn.Module:
    """The module underneath `torch.compile` and `DistributedDataParallel`."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
