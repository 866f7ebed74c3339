"""Whether covered layers are right: their unit Fisher matrices against those of the reference.

Both routes measure the same few examples.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure import layer_types
from biasshift.measure.fisher import measure
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.likelihoods import aligned_labels
from biasshift.measure.options import Options
from biasshift.measure.outputs import chosen_output
from biasshift.measure.probe import Batch
from biasshift.measure.sandbox import forward, undisturbed
from biasshift.progress import SILENT, Progress
from biasshift.verification.reference import has_bias_row, products

Layers = Mapping[str, WeightLayer]

OUTPUTS = 16  # of a model that is compared as it is; of more, COMBINATIONS random ones are
COMBINATIONS = 4
# Blocks of up to PARAMS rows are compared entry by entry, larger ones by their products with
# VECTORS random vectors.
PARAMS = 16
VECTORS = 4
# Entries of the blocks of a layer whose units are all compared; of larger ones the first and the
# last, without blocks.
SMALL = 2**18


@dataclass
class Comparison:
    """The largest relative difference in every layer, and the reasons where there is none.

    ``failed`` are layers that raised an error while they were measured, and ``uncompared`` those
    that the reference cannot run.
    """

    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    uncompared: dict[str, str] = field(default_factory=dict)


def compare_layers(
    model: nn.Module,
    layers: Layers,
    batch: Batch,
    options: Options,
    progress: Progress = SILENT,
) -> Comparison:
    """Measures layers by both routes on the same examples, and returns how far they differ.

    Labels are the model's own, and then the data's where there are some. The model is changed: hand
    in a copy.

    Args:
        layers: those that are covered, by name.
        batch: the examples. Their labels and mask are not used where a model has more than 16
            outputs, which random combinations replace.
        progress: what examples that both routes are done with are reported to.
    """
    result = Comparison()
    if not layers:
        return result
    with undisturbed(model):
        returned = forward(model, batch.x)
    outputs = options.outputs(returned, len(batch.x))
    if outputs[0].numel() > OUTPUTS:
        matrix, choice = _combinations(outputs), options.output
        model.register_forward_hook(
            lambda module, args, returned: chosen_output(returned, choice).flatten(1) @ matrix
        )
        batch = Batch(batch.x)
        options = replace(options, class_axis=-1, output=None)
    elif batch.y_in_call and options.likelihood == "categorical":
        y = aligned_labels(outputs, batch.y, getattr(returned, "loss", None))
        batch = batch._replace(y=y, y_in_call=False)
    rules = ("expected",) if batch.y is None else ("expected", "empirical")
    progress.begin(len(rules) * len(batch.x), "examples")
    for labels in rules:
        remaining = {name: layer for name, layer in layers.items() if name not in result.failed}
        own = replace(options, labels=labels, mask=None)
        _compare(model, remaining, batch, own, result, progress)
    return result


def _compare(
    model: nn.Module,
    layers: Layers,
    batch: Batch,
    options: Options,
    result: Comparison,
    progress: Progress,
) -> None:
    units = {name: _compared_units(layer) for name, layer in layers.items()}
    vectors = {name: _vectors(layer, len(units[name])) for name, layer in layers.items()}
    measured: dict[str, Tensor] = {}
    small = [name for name, layer in layers.items() if _is_small(layer)]
    large = [name for name in layers if name not in small]
    for names, storage in ((small, "dense"), (large, "implicit")):
        kept = {name: units[name].tolist() for name in names}
        options = replace(
            options, layers=names, units=kept, storage=storage, mask=lambda x, y: batch.mask
        )
        options = options if batch.mask is not None else replace(options, mask=None)
        try:
            probe = [(batch.x, batch.y)]
            layers_measured = measure(model, probe, None, options, warn=False) if names else {}
            measured |= {n: _times(m.fisher, vectors[n]) for n, m in layers_measured.items()}
        except Exception as error:  # unforeseen, and a row of the table like any other
            result.failed |= dict.fromkeys(names, f"cannot be measured: {error}")
    units = {name: units[name] for name in measured}
    try:
        with torch.no_grad():  # parametrized recurrent modules copy weights that they compute
            plain = copy.deepcopy(model)  # what `products` changes would not fit the model put back
        # Weights are changed in the modules as they are, without the parts of the other route.
        expand = options.weight_sharing == "expand"
        with undisturbed(plain, gradients=True, apart=expand):
            expected = products(plain, units, vectors, batch, options, progress)
    except Exception as error:  # the reference cannot run this model, example by example
        why = f"not compared: {type(error).__name__}: {error}"
        result.uncompared |= dict.fromkeys(measured, why)
        return
    for name, product in measured.items():
        error = _difference(product, expected[name], has_bias_row(layers[name]))
        result.errors[name] = max(result.errors.get(name, 0.0), error)


def _combinations(outputs: Tensor) -> Tensor:
    """A few random ones, of the size of one: all classes are in each, and the passes are few."""
    flat, generator = outputs.flatten(1), torch.Generator().manual_seed(0)
    matrix = torch.randn(flat.shape[1], COMBINATIONS, generator=generator).to(flat)
    size = (flat @ matrix).abs().max()
    return matrix / size if size > 0 else matrix


def _is_small(layer: WeightLayer) -> bool:
    return layer_types.unit_count(layer) * (layer_types.input_count(layer) + 1) ** 2 <= SMALL


def _compared_units(layer: WeightLayer) -> Tensor:
    count = layer_types.unit_count(layer)
    units = range(count) if _is_small(layer) else sorted({0, count - 1})
    return torch.tensor(units, device=layer.weight.device)


def _vectors(layer: WeightLayer, units: int) -> Tensor:
    """(units, params, vectors): the identity for small blocks, so that entries are compared."""
    params = layer_types.input_count(layer) + 1
    if params <= PARAMS:
        columns = torch.eye(params).repeat(units, 1, 1)
    else:
        columns = torch.randn(units, params, VECTORS, generator=torch.Generator().manual_seed(0))
    if not has_bias_row(layer):
        columns[:, -1] = 0
    return columns.to(layer.weight)


def _times(fisher: UnitFisher, vectors: Tensor) -> Tensor:
    """The whole matrix, what a bias would meet included, times vectors."""
    b, c = fisher.b, fisher.c
    columns = []
    for v, v0 in zip(vectors[:, :-1].unbind(-1), vectors[:, -1].unbind(-1), strict=True):
        Av = fisher.matvec(v, torch.zeros_like(v0))[0] if fisher.bias else fisher.matvec(v)[0]
        columns.append(torch.cat([Av + b * v0[:, None], ((b * v).sum(1) + c * v0)[:, None]], 1))
    return torch.stack(columns, -1)


def _difference(product: Tensor, expected: Tensor, bias_row: bool) -> float:
    if not bias_row:
        product, expected = product[:, :-1], expected[:, :-1]
    difference, size = (product - expected).abs().max().item(), expected.abs().max().item()
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))
