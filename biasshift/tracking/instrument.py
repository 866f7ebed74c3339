"""Measurements during a training loop: hooks on a model and its optimizer, and one tidy table."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.measure.hooks import underlying
from biasshift.measure.layer_types import Selection
from biasshift.measure.likelihoods import Labels, Likelihood
from biasshift.measure.options import Mask, Options, Units
from biasshift.measure.outputs import OutputChoice
from biasshift.measure.probe import InputNames, Probe, has_labels, rereadable
from biasshift.tracking.logs import ProbeLog, TrainingLog

QUANTITIES = ("activations", "bias_shift", "fisher", "gap")


def instrument(
    model: nn.Module,
    optimizer: Any = None,  # or a wrapper of one, whose class is not ours to know
    probe: Probe | None = None,
    every: int = 100,
    *,
    likelihood: Likelihood = "categorical",
    labels: Labels = "expected",
    damping: float = 1e-4,
    quantities: Iterable[str] | None = None,
    weight_sharing: str = "per_example",
    layers: Selection = None,
    units: Units = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    distributed: bool = False,
    class_axis: int = -1,
    mask: Mask = None,
    inputs: InputNames = None,
    output: OutputChoice = None,
    uncovered: str = "skip",
    skip: Selection = None,
    step: int = 0,
) -> ProbeLog | TrainingLog:
    """Measures a model while somebody else's loop trains it; the loop stays as it is.

    With a probe, everything is measured on that fixed data in eval mode: on entry (step 0), and
    around every completed optimizer step that ``every`` divides. In between only a counter runs.
    Without a probe, the activation moments of the training batches themselves are added up on the
    model's device, until `TrainingLog.flush`.

    Where training diverges and the outputs on the probe are no longer finite, a warning says so and
    Fisher and gap rows are left out.

    Args:
        model: The model, in training by the loop.
        optimizer: The optimizer whose steps are counted. A probe needs one. In place of a wrapper
            whose own steps cannot be counted, its ``.optimizer`` is taken.
        probe: ``(x, y)``, a tensor x, a dict of the model's arguments, or a collection of batches.
            ``"gap"`` and empirical labels need y.
        every: Steps between two measurements on the probe.
        quantities: Of ``"activations"``, ``"bias_shift"``, ``"fisher"``, ``"gap"``; by default all
            with a probe, else the first.
        layers: Names, or a predicate ``(name, module) → bool``, of the weight layers and activation
            modules in the table.
        units: Increasing indices of the units kept in weight layers, for all or per layer.
        batch_size: Examples per forward pass over the probe.
        distributed: The probe is this process's share of one: what the processes of
            ``torch.distributed`` measure is merged, and every one of them has the whole table. All
            of them must make the log, and the steps.
        likelihood, labels, damping, weight_sharing, generator, class_axis, mask, inputs, output,
            uncovered, skip: As in `biasshift.unit_fisher`.
        step: How many steps were completed before, where training is resumed from a checkpoint.
            Counting goes on from there.

    Returns:
        A context manager and a handle: leaving the block, or ``remove()``, takes all hooks off the
        model and the optimizer. The table stays readable.

    Raises:
        ValueError: If arguments do not fit, the optimizer has no parameter of the model, or a layer
            cannot be measured.

    Warns:
        RuntimeWarning: If the log ends after training of which it has not seen a single step.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ELU(), nn.Linear(3, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x, y = torch.eye(2), torch.tensor([0, 1])
    >>> with instrument(model, optimizer=optimizer, probe=(x, y), every=2) as log:
    ...     for _ in range(4):
    ...         optimizer.zero_grad()
    ...         nn.functional.cross_entropy(model(x), y).backward()
    ...         _ = optimizer.step()
    >>> sorted(set(log.table().step))
    [0, 2, 4]
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"'every' must be a whole number of steps ≥ 1, got {every!r}.")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"'step' must be a number of completed steps ≥ 0, got {step!r}.")
    if optimizer is not None:
        optimizer = _counted(optimizer, model)
    wanted = _quantities(quantities, probe is not None)
    options = Options(
        labels=labels,
        likelihood=likelihood,
        weight_sharing=weight_sharing,
        layers=layers,
        units=units,
        damping=damping,
        batch_size=batch_size,
        generator=generator,
        class_axis=class_axis,
        mask=mask,
        inputs=inputs,
        output=output,
        uncovered=uncovered,
        skip=skip,
    )
    if probe is None:
        return TrainingLog(model, optimizer, options, step)
    if optimizer is None:
        raise ValueError(
            "A probe is measured around optimizer steps. Give optimizer= too, or leave probe out."
        )
    x, y = _with_labels(probe, inputs)
    x = rereadable(x, inputs)
    needs_y = "gap" in wanted or ("fisher" in wanted and labels == "empirical")
    if needs_y and y is None and has_labels(x, inputs) is False:
        raise ValueError(
            "Quantity 'gap' and empirical labels need the data's labels. Give probe=(x, y), or "
            "other quantities."
        )
    return ProbeLog(model, optimizer, x, y, every, wanted, options, distributed, step)


def _with_labels(probe: Any, inputs: InputNames) -> tuple[Any, Any]:
    """The inputs and the labels of a probe; None where the probe itself may hold them."""
    pair = isinstance(probe, tuple) and len(probe) == 2
    if pair and (inputs in (None, 1) or not isinstance(probe[0], Tensor)):
        return probe
    return probe, None


def _counted(optimizer: object, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer to put hooks on: the given one, or the one inside of a wrapper.

    Wrappers are often subclasses that skip ``Optimizer.__init__``, and so have nowhere to keep a
    hook.
    """
    given, passed = type(optimizer).__name__, []
    while not _takes_hooks(optimizer):
        passed.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None or any(optimizer is wrapper for wrapper in passed):
            raise ValueError(
                f"'optimizer' must be a torch.optim.Optimizer, whose steps are counted, got {given}"
                ". Of a wrapper, give the optimizer inside."
            )
    assert isinstance(optimizer, torch.optim.Optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own = list(underlying(model).parameters())
    # Members of an ensemble are views into what its optimizer holds.
    if not {id(p) for p in own} & {id(p) for p in held} and not _storages(own) & _storages(held):
        raise ValueError(
            f"'optimizer' must train the model, but {given} holds none of its parameters. Give the "
            "optimizer that was made of this model's parameters."
        )
    return optimizer


def _takes_hooks(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and hasattr(
        optimizer, "_optimizer_step_post_hooks"
    )


def _storages(parameters: Iterable[Tensor]) -> set[int]:
    """Addresses of the memory behind the parameters; those on the meta device have none."""
    addresses = {p.untyped_storage().data_ptr() for p in parameters if p.layout == torch.strided}
    return addresses - {0}


def _quantities(chosen: Iterable[str] | None, probe: bool) -> tuple[str, ...]:
    if chosen is None:
        return QUANTITIES if probe else QUANTITIES[:1]
    wanted = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    if not wanted or not all(quantity in QUANTITIES for quantity in wanted):
        raise ValueError(
            f"'quantities' must be some of {', '.join(map(repr, QUANTITIES))}, got {wanted!r}."
        )
    if not probe and wanted != QUANTITIES[:1]:
        raise ValueError(
            f"Without a probe only 'activations' can be measured, got {wanted!r}. Give "
            "probe=(x, y) and optimizer=."
        )
    return wanted
