"""One forward pass, watched: what went into every layer, and the edge through which its error will
come back.

Gradient edges are used instead of backward hooks or the output tensors: a layer's output may be
overwritten by an in-place activation, while the edge still leads to the net input. The only file
with hooks on modules.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from biasshift.measure import layer_types

OutputHook = Callable[
    [str, nn.Module, Tensor, Tensor], Tensor | None
]  # may return something else for the module to have returned


@contextmanager
def output_hooks(
    modules: Mapping[str, nn.Module], hook: OutputHook, *, raw: bool = False
) -> Iterator[None]:
    """Calls ``hook(name, module, first input, output)`` after each forward of the modules,
    within the block only.

    ``raw`` shows the module's own output, before the user's forward hooks may replace it.
    """
    handles = [add_output_hook(name, module, hook, raw=raw) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_output_hook(
    name: str, module: nn.Module, hook: OutputHook, *, raw: bool = False
) -> torch.utils.hooks.RemovableHandle:
    """One hook on one module, until its handle is removed."""
    return module.register_forward_hook(
        partial(_call_hook, name, hook), with_kwargs=True, prepend=raw
    )


def _call_hook(
    name: str, hook: OutputHook, module: nn.Module, args: tuple, kwargs: dict, output: object
) -> Tensor | None:
    a = args[0] if args else next(iter(kwargs.values()), None)
    return (
        hook(name, module, a if isinstance(a, Tensor) else output, output)
        if isinstance(output, Tensor)
        else None
    )


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """How often every module of the model is called inside the block, by name; modules that return
    no tensor count too.
    """
    counts: Counter[str] = Counter()

    def count(name: str, *_: object) -> None:
        counts[name] += 1

    handles = [
        module.register_forward_hook(partial(count, name)) for name, module in model.named_modules()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def followed_by(
    model: nn.Module, function: Callable[[Tensor], Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Has the model return a function of its outputs, under the same names of its modules."""

    def follow(module: nn.Module, args: tuple, outputs: Tensor) -> Tensor:
        return function(outputs)

    return model.register_forward_hook(follow)


@dataclass(frozen=True)
class Call:
    """One call of one layer: its incoming activations, and the gradient edge of its net inputs."""

    a: Tensor
    # of ``a`` at the call: a later in-place change would make it somebody else's activations
    version: int
    edge: GradientEdge
    shape: torch.Size  # of the net inputs


@dataclass
class Tape:
    """The calls of every layer in one forward pass, in order, and the layers whose calls could not
    be recorded.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # why, by name

    def record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> Tensor | None:
        if not (torch.is_grad_enabled() and output.requires_grad):
            self.refused[name] = (
                "it ran without gradients, inside torch.no_grad or a reentrant checkpoint, which "
                "autograd does not follow "
                "(use_reentrant=False would do)"
            )
            return None
        view = (
            output._is_view()
        )  # an in-place change would give it another node, and the edge would lead nowhere
        output = output.clone() if view else output
        a = a.detach()
        self.calls.setdefault(name, []).append(
            Call(a, a._version, get_gradient_edge(output), output.shape)
        )
        return output if view else None

    def overwritten(self) -> bool:
        """Whether an incoming activation was changed in place after its layer had read it."""
        return any(
            call.a._version != call.version for calls in self.calls.values() for call in calls
        )


def traced(model: nn.Module, modules: Mapping[str, nn.Module], x: Tensor) -> tuple[Tape, object]:
    """Runs the model once and returns the tape and the model's outputs.

    Hooks are gone when the forward pass returns, so that a checkpoint's recomputation is not
    recorded a second time. Where an activation was overwritten after a layer had read it, the pass
    is repeated with every layer reading a copy.
    """
    tape = Tape()
    with output_hooks(modules, tape.record, raw=True):
        outputs = model(x)
    if tape.overwritten():
        tape = Tape()
        with _reading_copies(modules.values()), output_hooks(modules, tape.record, raw=True):
            outputs = model(x)
    return tape, outputs


@contextmanager
def _reading_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    def copy(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        copied = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in kwargs.items()
        }
        return tuple(
            value.clone() if isinstance(value, Tensor) else value for value in args
        ), copied

    handles = [module.register_forward_pre_hook(copy, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def errors(
    outputs: Tensor, edges: list[GradientEdge], seeds: Tensor, keep: bool
) -> tuple[Tensor | None, ...]:
    """The gradients at every edge for a stack of seeds: (passes, batch, …) each. ``keep`` leaves
    the graph for more.

    None stands for a layer without influence on the outputs: its units are dead.
    """
    # Convolutions have no batched backward pass: vmap loops over the seeds all the same, and copies
    # more.
    if len(seeds) > 1 and not any("Convolution" in edge.node.name() for edge in edges):
        # The graph stays, for a backward pass of the user's own (a custom autograd.Function) may
        # not run for all seeds at once.
        with suppress(Exception):
            return torch.autograd.grad(
                outputs, edges, seeds, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
    stacks: list[Tensor | None] = [None] * len(edges)
    for i, seed in enumerate(seeds):
        retain = keep or i + 1 < len(seeds)
        for k, delta in enumerate(
            torch.autograd.grad(outputs, edges, seed, retain_graph=retain, allow_unused=True)
        ):
            if delta is not None:
                stack = stacks[
                    k
                    # passes behind examples in memory, which is how the sums over both will read
                    # them
                ]
                stacks[k] = stack = (
                    delta.new_empty(len(delta), len(seeds), *delta.shape[1:])
                    if stack is None
                    else stack
                )
                stack[:, i] = delta
    return tuple(None if stack is None else stack.transpose(0, 1) for stack in stacks)


def underlying(model: nn.Module) -> nn.Module:
    """The module underneath `torch.compile`, `DistributedDataParallel` and `DataParallel`.

    Raises:
        ValueError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}.")
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


# -- which module feeds which layer ------------------------------------------------------------


@dataclass
class Feeding:
    """Watches one forward pass. Storage addresses identify tensors, through views and in-place
    changes alike.
    """

    kinds_of: dict[str, str] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    fed_by: dict[str, str] = field(default_factory=dict)
    writer: dict[int, str] = field(default_factory=dict)
    alive: list[Tensor] = field(
        default_factory=list
    )  # an address is reused once its tensor is gone

    def record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        """A watcher for `output_hooks`."""
        self.kinds_of[name] = type(module).__name__
        self.fed_by.setdefault(name, self.writer.get(_address(a), ""))
        if layer_types.is_covered(module):
            self.units[name], self.inputs[name] = (
                layer_types.unit_count(module),
                layer_types.input_count(module),
            )
        self.writer[_address(output)] = name
        self.alive += [a.detach(), output.detach()]

    def finish(self) -> None:
        """Lets go of the activations."""
        self.writer.clear()
        self.alive.clear()


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
