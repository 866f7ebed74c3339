"""Forward hooks on modules: what went into every layer, and the edge where its error comes back.

Gradient edges are used instead of backward hooks or the output tensors. A layer's output may be
overwritten by an in-place activation, while the edge still leads to the net input. No other file of
`biasshift.measure` adds hooks to modules.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from biasshift.measure.examples import Inputs
from biasshift.measure.function_calls import watch_function_calls
from biasshift.measure.module_hooks import add_hook
from biasshift.measure.sandbox import forward
from biasshift.restoration import Restoration, restoring

# May return something else for the module to have returned.
OutputHook = Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]


# -- hooks -----------------------------------------------------------------------------------------


def underlying(model: nn.Module) -> nn.Module:
    """Returns the module under `torch.compile`, `DistributedDataParallel` and `DataParallel`.

    Hooks that are added to a compiled module never fire, and wrappers change the names of modules.

    Raises:
        ValueError: for an argument that is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"'model' must be an nn.Module, got {type(model).__name__}.")
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


@restoring()
def call_hooks(
    restoration: Restoration,
    modules: Mapping[str, nn.Module],
    hook: OutputHook,
    *,
    copy_inputs: bool = False,
) -> None:
    """Calls ``hook(name, module, input, output)`` after each use of a layer, in the block.

    It may be a call of the module, whose own output is shown, or one of ``F.linear`` with its
    parameters.

    Args:
        copy_inputs: let every layer read a copy of its input.
    """
    for module in modules.values() if copy_inputs else ():
        add_hook(restoration, module, partial(_with_copies), before=True, with_kwargs=True)
    add_output_hooks(restoration, modules, hook, raw=True)
    watch_function_calls(restoration, modules, hook, copy_inputs)


def add_output_hooks(
    restoration: Restoration,
    modules: Mapping[str, nn.Module],
    hook: OutputHook,
    *,
    raw: bool = False,
) -> None:
    """Calls ``hook(name, module, first input, output)`` after each forward of the modules.

    The hooks are on the modules within the block only, and skip outputs that are not tensors.

    Args:
        raw: show the module's own output, before the user's forward hooks may replace it.
    """
    for name, module in modules.items():
        call = partial(_call_hook, name, hook)
        add_hook(restoration, module, call, with_kwargs=True, prepend=raw)


output_hooks = restoring()(add_output_hooks)


def add_output_hook(
    name: str, module: nn.Module, hook: OutputHook, *, raw: bool = False
) -> RemovableHandle:
    """Adds one hook as `output_hooks` does, which stays until its handle is removed.

    The hook gets the module's first argument, by position or by keyword, and its output. What it
    returns, if not None, replaces the output.
    """
    call = partial(_call_hook, name, hook)
    return module.register_forward_hook(call, with_kwargs=True, prepend=raw)


def _call_hook(
    name: str, hook: OutputHook, module: nn.Module, args: tuple, kwargs: dict, output: object
) -> Tensor | None:
    if not isinstance(output, Tensor):
        return None
    a = args[0] if args else next(iter(kwargs.values()), None)
    return hook(name, module, a if isinstance(a, Tensor) else output, output)


@contextmanager
def call_counts(modules: Mapping[str, nn.Module]) -> Iterator[Counter[str]]:
    """Counts how often every module is called inside the block, by name.

    Calls that return something else than a tensor count too, and those of ``F.linear`` with a
    layer's parameters. The counter fills while the block runs, and can be read after it.
    """
    counts: Counter[str] = Counter()

    def count(name: str, *_: object) -> None:
        counts[name] += 1

    def change(restoration: Restoration) -> None:
        for name, module in modules.items():
            add_hook(restoration, module, partial(count, name))
        watch_function_calls(restoration, modules, count)

    with Restoration(change):
        yield counts


class WeakHook:
    """A hook that does not keep its owner alive, and does nothing in a copied model.

    A model may thus outlive what watches it, and be copied or pickled with its hooks: what a copy
    or a pickle holds is a function that returns None.
    """

    def __init__(self, owner: object, method: str) -> None:
        self._owner, self._method = weakref.ref(owner), method

    def __call__(self, *args: object) -> Any:
        """Returns what the method returns: another output of the module, or None for its own."""
        owner = self._owner()
        return None if owner is None else getattr(owner, self._method)(*args)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _deaf_ear, ()


# Users' pickled models refer to the next two functions by module and name: `_deaf_ear` stands in a
# model that was pickled with its hooks, and `_hear_nothing` in a copy of one. Neither may be
# renamed or moved. Models of version 0.1 look for them in `biasshift.optim.passes`.
def _deaf_ear() -> Callable:
    return _hear_nothing


def _hear_nothing(*args: object) -> None:
    pass


# -- one recorded forward pass ---------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of one layer: its incoming activations, and the gradient edge of its net inputs.

    The activations are not copied. A later in-place change of them shows in their version.
    """

    a: Tensor
    version: int  # of ``a`` at the call: it differs after an in-place change
    edge: GradientEdge
    shape: torch.Size  # of the net inputs


@dataclass
class Tape:
    """The calls of every layer in one forward pass, in order, by layer name.

    ``refused`` holds the reasons for the layers whose calls could not be recorded, since they ran
    without gradients.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> Tensor | None:
        """Records one call, as an `OutputHook`.

        Returns:
            A copy of the output where it is a view, for the module to return in its place. An
            in-place change would give a view another node, and its edge would lead nowhere.
        """
        if not (torch.is_grad_enabled() and output.requires_grad):
            self.refused[name] = (
                "it ran without gradients, inside torch.no_grad or a reentrant checkpoint, which "
                "autograd does not follow (use_reentrant=False would do)"
            )
            return None
        view = output._is_view()
        output, a = output.clone() if view else output, a.detach()
        call = Call(a, a._version, get_gradient_edge(output), output.shape)
        self.calls.setdefault(name, []).append(call)
        return output if view else None

    def overwritten(self) -> bool:
        """Tells whether an incoming activation was changed in place after its layer had read it."""
        return any(c.a._version != c.version for calls in self.calls.values() for c in calls)


def traced(model: nn.Module, modules: Mapping[str, nn.Module], x: Inputs) -> tuple[Tape, object]:
    """Runs the model once and returns the tape and the model's outputs.

    Hooks are removed when the forward pass returns, so that a checkpoint's recomputation is not
    recorded a second time. Where an activation was overwritten after a layer had read it, the pass
    is repeated with every layer reading a copy.
    """
    tape = Tape()
    with call_hooks(modules, tape.record):
        outputs = forward(model, x)
    if tape.overwritten():
        tape = Tape()
        with call_hooks(modules, tape.record, copy_inputs=True):
            outputs = forward(model, x)
    return tape, outputs


def _with_copies(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A hook before a forward pass that lets it read copies."""
    copies = {name: _copied(value) for name, value in kwargs.items()}
    return tuple(map(_copied, args)), copies


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def edge_gradients(
    outputs: Tensor, edges: list[GradientEdge], seeds: Tensor, keep: bool
) -> tuple[Tensor | None, ...]:
    """Returns the gradients at every edge for a stack of seeds.

    Args:
        seeds: (passes, batch, …, classes), each sent backwards from the outputs.
        keep: whether the graph stays for more backward passes.

    Returns:
        (passes, batch, …) for each edge. None stands for a layer without influence on the outputs,
        whose units are dead.
    """
    # Convolutions have no batched backward pass: vmap would loop over the seeds and copy more.
    if len(seeds) > 1 and not any("Convolution" in edge.node.name() for edge in edges):
        # The graph stays, for a backward pass of the user's own (a custom autograd.Function) may
        # not run for all seeds at once.
        with suppress(Exception):
            return torch.autograd.grad(
                outputs, edges, seeds, retain_graph=True, is_grads_batched=True, allow_unused=True
            )
    stacks: dict[int, Tensor] = {}
    for i, seed in enumerate(seeds):
        retain = keep or i + 1 < len(seeds)
        # without a name, so that no pass keeps the gradients of the one before
        for k, delta in enumerate(
            torch.autograd.grad(outputs, edges, seed, retain_graph=retain, allow_unused=True)
        ):
            if delta is not None:
                if k not in stacks:
                    # Passes lie behind examples in memory, as the sums over both read them.
                    stacks[k] = delta.new_empty(len(delta), len(seeds), *delta.shape[1:])
                stacks[k][:, i] = delta
    return tuple(stacks[k].transpose(0, 1) if k in stacks else None for k in range(len(edges)))


# -- which module feeds which ----------------------------------------------------------------------


@dataclass
class LayerGraph:
    """Which module's output each layer reads, recorded in one forward pass.

    Storage addresses identify tensors, through views and in-place changes alike. A functional
    operation in between hides the module whose output it has read.
    """

    kinds: dict[str, str] = field(default_factory=dict)  # the name of each module's class
    fed_by: dict[str, str] = field(default_factory=dict)  # "" for the model's own input
    _writers: dict[int, str] = field(default_factory=dict)
    _alive: list[Tensor] = field(default_factory=list)  # a freed tensor's address is used again

    def record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        """Records one call, as an `OutputHook`."""
        self.kinds[name] = type(module).__name__
        self.fed_by.setdefault(name, self._writers.get(a.untyped_storage().data_ptr(), ""))
        self._writers[output.untyped_storage().data_ptr()] = name
        self._alive += [a.detach(), output.detach()]

    def finish(self) -> None:
        """Releases the activations, when the forward pass has returned."""
        self._writers.clear()
        self._alive.clear()
