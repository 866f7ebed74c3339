"""New activation modules from a name, an import path, or a class.

An import path is followed only where somebody names it, in a call or on the command line. What is
recorded of runs never comes here.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from biasshift.activations import canonical, constructor, is_import_path, printable, shown

Activation = str | Callable[[], nn.Module]
# Of fully connected layers and of feature maps, for an activation function has to take both.
SHAPES = ((2, 3), (2, 3, 4, 4))
LONGEST_REASON = 120


def activation_constructor(
    activation: Activation, called: str = "'activation'"
) -> Callable[[], nn.Module]:
    """Returns what makes a new module of an activation function for every layer, and checks it.

    Args:
        activation: a name, ``elu:α``, ``lrelu:slope``, an import path ``package.module:Class``
            (which is imported), a class of modules, or a function that returns a new module.
        called: what an error calls it.

    Raises:
        ValueError: an unknown name; or what was named cannot be imported, is not a class of modules
            or such a function, needs arguments, returns one module twice, or changes the shape or
            dtype of a tensor. The message gives cause and remedy.

    >>> activation_constructor("torch.nn:Hardswish")()
    Hardswish()
    """
    if isinstance(activation, str):
        canonical(activation, called)
        if not is_import_path(activation):
            return constructor(activation)
        named, make = shown(activation), _imported(activation, called)
    else:
        named, make = shown(getattr(activation, "__qualname__", repr(activation))), activation
    _check_takes_no_arguments(make, f"{called} {named}")
    _check_modules(make, f"{called} {named}")
    return make


def activation_module(activation: Activation) -> nn.Module:
    """Returns a new activation module.

    Raises:
        ValueError: as `activation_constructor`.
    """
    return activation_constructor(activation)()


class ActivationModules:
    """Makes the activation modules of one network, a new one on every call.

    A constructor that draws random numbers draws them from a generator of the seed. The global
    random state is untouched, and so are the weights of the network.

    Args:
        activation: as in `activation_constructor`.
        seed: of the network.

    Raises:
        ValueError: as `activation_constructor`.
    """

    def __init__(self, activation: Activation, seed: int):
        self._make = activation_constructor(activation)
        self._random_state = torch.Generator().manual_seed(seed).get_state()

    def __call__(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            module = self._make()
            self._random_state = torch.get_rng_state()
        return module


# -- what was named ----------------------------------------------------------------------------


def _imported(path: str, called: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    # A module that ends the program while it is imported is a script.
    except (Exception, SystemExit) as error:
        raise _refused(
            called,
            f"{shown(path)} must be importable, got {_reason(error)}. Check its spelling, "
            "or add its folder to PYTHONPATH.",
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise _refused(
            called,
            f"{shown(path)} must name a class, and '{module_name}' has no '{attribute}'. "
            "Check its spelling.",
        ) from None


def _check_takes_no_arguments(make: Any, named: str) -> None:
    """Refuses what is not a class of modules or a function before it is called."""
    is_module = isinstance(make, type) and issubclass(make, nn.Module)
    if not (is_module or inspect.isfunction(make)):
        if isinstance(make, nn.Module):
            raise _refused(
                named,
                "must be a class, got one module, which layers would share. Give its "
                "class, or a function that returns a new one.",
            )
        raise _refused(
            named,
            f"must be a class of nn.Module, or a function that returns one, got {_kind(make)}.",
        )
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError) as error:
        raise _refused(
            named,
            f"must take no arguments, got {_reason(error)}. Give a class with defaults, or "
            "a function that fills them in.",
        ) from error


def _check_modules(make: Callable[[], Any], named: str) -> None:
    """Makes two modules, and applies one; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        try:
            first, second = make(), make()
        except (Exception, SystemExit) as error:
            raise _refused(
                named,
                f"must be made without arguments, got {_reason(error)}. Mend it, or give another.",
            ) from error
        _check_new(first, second, named)
        for shape in SHAPES:
            for dtype in (torch.float32, torch.float64):
                _check_output(first.to(dtype), torch.linspace(-2, 2, 6, dtype=dtype), shape, named)


def _check_new(first: Any, second: Any, named: str) -> None:
    for made in (first, second):
        if not isinstance(made, nn.Module):
            raise _refused(
                named, f"must return an nn.Module, got {_kind(made)}. Wrap it in a module."
            )
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    if first is second or shared:
        raise _refused(
            named,
            "must return a new module on every call: layers would share one. Make it "
            "inside of the function.",
        )
    if any(isinstance(p, UninitializedParameter) for p in first.parameters()):
        raise _refused(named, "must have its parameters from the beginning, got a lazy module.")


def _check_output(module: nn.Module, values: Tensor, shape: tuple[int, ...], named: str) -> None:
    x = values[torch.arange(torch.Size(shape).numel()) % len(values)].view(shape)
    x = x.requires_grad_() * 1  # no leaf: an activation may work in place
    try:
        output = module(x)
    except Exception as error:
        raise _refused(
            named,
            f"must be applicable to tensors of shape {shape} and {x.dtype}, got "
            f"{_reason(error)}. Mend its forward.",
        ) from error
    got = (
        f"{tuple(output.shape)} and {output.dtype}" if isinstance(output, Tensor) else _kind(output)
    )
    if not isinstance(output, Tensor) or (output.shape, output.dtype) != (shape, x.dtype):
        raise _refused(
            named,
            f"must keep shape and dtype, got {got} for {shape} and {x.dtype}. Mend its forward.",
        )
    if not output.requires_grad:
        raise _refused(
            named,
            "must be differentiable, got an output without a gradient. Compute it by "
            "PyTorch alone.",
        )


def _refused(named: str, reason: str) -> ValueError:
    return ValueError(f"{named} {reason}")


def _kind(value: object) -> str:
    kind = type(value).__name__
    return f"the {kind} '{value.__name__}'" if hasattr(value, "__name__") else f"of kind {kind}"  # type: ignore[attr-defined]


def _reason(error: BaseException) -> str:
    """Type and first line of an error, as a part of a sentence."""
    first = printable((str(error).strip().split("\n") or [""])[0])[:LONGEST_REASON].rstrip(".")
    return f"{type(error).__name__} ({first})" if first else type(error).__name__
