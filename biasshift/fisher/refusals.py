"""What arguments of a layer's matrices must be, and why an inverse may not exist."""

from collections.abc import Sequence

import torch
from torch import Tensor

from biasshift.fisher.moments import Sums


def check_samples(a: Tensor, delta2: Tensor) -> None:
    """Raises ValueError for samples that no matrices can be made of.

    Args:
        a: must be a floating (samples, inputs), finite.
        delta2: must be a floating (samples, units), finite and ≥ 0.
    """
    for name, x, axes in (("a", a, "(samples, inputs)"), ("delta2", delta2, "(samples, units)")):
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 2 and x.numel() > 0):
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"'{name}' must be a non-empty floating tensor {axes}, got {got}.")
        bad = int((~x.isfinite()).any(1).sum())
        if bad:
            raise ValueError(f"'{name}' must be finite, got NaN or infinity in {bad} samples.")
    if len(a) != len(delta2):
        raise ValueError(
            f"'a' and 'delta2' must have the same samples, got {len(a)} and {len(delta2)}."
        )
    if (delta2 < 0).any():
        raise ValueError(
            f"'delta2' must be ≥ 0, got {delta2.min().item():.4g}. It is a mean of squares: pass "
            "δ², not δ."
        )


def check_vectors(name: str, sums: Sums, bias: bool, v: Tensor, v0: Tensor | None) -> None:
    """Raises ValueError for vectors that do not fit a layer.

    Args:
        name: the layer's.
        sums: its sums.
        bias: whether its units have a bias.
        v: must be (units, inputs).
        v0: must be (units,), and None without a bias.
    """
    units, inputs = sums.first.shape
    if (v0 is not None) != bias:
        raise ValueError(
            f"Layer '{name}' has {'a' if bias else 'no'} bias: give "
            f"{'both vectors' if bias else 'one vector'}."
        )
    if v.shape != (units, inputs) or (v0 is not None and v0.shape != (units,)):
        got = tuple(v.shape) if v0 is None else (tuple(v.shape), tuple(v0.shape))
        raise ValueError(
            f"Layer '{name}' has {units} units with {inputs} inputs, got shapes {got}. "
            f"Give ({units}, {inputs}) for weights and ({units},) for biases."
        )


def check_summands(mine: tuple, theirs: tuple, storage: str, other: str) -> None:
    """Raises ValueError for layers whose samples cannot be joined.

    Args:
        mine, theirs: the shape, damping, bias and labels of both, which must be equal.
        storage, other: those of both, of which none or both may be implicit.
    """
    if mine != theirs:
        raise ValueError(
            f"Only layers of equal shape, damping, bias and labels can be added, got {mine} "
            f"and {theirs}. Use damped() for equal damping."
        )
    if storage != other and "implicit" in (storage, other):
        raise ValueError(
            f"Only layers of equal storage can be added, got '{storage}' and "
            f"'{other}'. Choose storage= for both."
        )


def too_large(name: str, units: int, size: int) -> str:
    """Returns why the blocks of so many units, of so many bytes, are not formed."""
    return (
        f"Layer '{name}': the blocks of {units} units take {size / 2**20:.0f} MiB, more than "
        "memory_budget. They are kept implicitly: measure a few units with units=, or raise "
        "memory_budget."
    )


def no_inverse(
    name: str, sums: Sums, damping: float, singular: int, usable: Tensor, constant: Sequence[int]
) -> str:
    """Returns why the covariance of some units has no inverse, with the remedy.

    Args:
        name: the layer's.
        sums: its sums.
        damping: that of the covariance.
        singular: how many units have no inverse.
        usable: (units,) bool, the units that are alive and have some variance.
        constant: the inputs that vary under no unit's q.
    """
    units, inputs = sums.first.shape
    causes = []
    if constant:
        shown = ", ".join(map(str, constant[:5])) + ", …" * (len(constant) > 5)
        causes.append(f"{len(constant)} of {inputs} inputs never vary (inputs {shown})")
    fewest = sums.effective_samples[usable].min().item() if usable.any() else torch.inf
    if fewest <= inputs:
        causes.append(
            f"{sums.positions} samples, as few as {fewest:.1f} effective ones, stand "
            f"against {inputs} inputs"
        )
    why = "; ".join(causes) or "some inputs are linear combinations of others"
    return (
        f"Layer '{name}': the covariance of the incoming activations is singular for "
        f"{singular} of {units} units at damping={damping}, where {why}. Use "
        "damping > 0, for example fisher.damped(1e-4), or measure more samples."
    )
