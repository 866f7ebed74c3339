"""Whether covered layers are right: their unit Fisher matrices on a few examples, against those of
the second opinion.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure import layer_types
from biasshift.measure.fisher import measure
from biasshift.measure.hooks import followed_by
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.options import Options
from biasshift.measure.sandbox import undisturbed
from biasshift.verification.reference import has_bias_row, products

Layers = Mapping[str, WeightLayer]

OUTPUTS = 16  # of a model that is compared as it is; of more, COMBINATIONS random ones are
COMBINATIONS = 4
# of blocks that are compared entry by entry; larger ones by their products with VECTORS random
# vectors
PARAMS = 16
VECTORS = 4
SMALL = (
    2**18
    # entries of the blocks of a layer whose units are all compared; of larger ones the first and
    # the
    # last, without blocks
)


@dataclass
class Comparison:
    """The largest relative difference in every layer, and the layers that could not be measured, or
    not be compared, with the reason.
    """

    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    uncompared: dict[str, str] = field(default_factory=dict)


def compared(
    model: nn.Module, layers: Layers, x: Tensor, y: Tensor | None, options: Options
) -> Comparison:
    """Both routes on the same examples, for the model's own labels and for the data's where there
    are some. Spoils the model.
    """
    result = Comparison()
    if not layers:
        return result
    with undisturbed(model):
        outputs = model(x)
    if outputs[0].numel() > OUTPUTS:
        followed_by(model, _combinations(outputs))
        y = None
    for labels in (None,) if y is None else (None, y):
        _compare(
            model,
            {name: layer for name, layer in layers.items() if name not in result.failed},
            x,
            labels,
            options,
            result,
        )
    return result


def _compare(
    model: nn.Module,
    layers: Layers,
    x: Tensor,
    y: Tensor | None,
    options: Options,
    result: Comparison,
) -> None:
    options = replace(options, labels="expected" if y is None else "empirical")
    units = {name: _some_units(layer) for name, layer in layers.items()}
    vectors = {name: _vectors(layer, len(units[name])) for name, layer in layers.items()}
    found: dict[str, Tensor] = {}
    small = [name for name, layer in layers.items() if _is_small(layer)]
    for part, storage in (
        (small, "dense"),
        ([name for name in layers if name not in small], "implicit"),
    ):
        options = replace(
            options,
            layers=part,
            units={name: units[name].tolist() for name in part},
            storage=storage,
        )
        try:
            fishers = (
                {name: measured.fisher for name, measured in measure(model, x, y, options).items()}
                if part
                else {}
            )
            found |= {name: _times(fisher, vectors[name]) for name, fisher in fishers.items()}
        except Exception as error:  # unforeseen, and a row of the table like any other
            result.failed |= dict.fromkeys(part, f"cannot be measured: {error}")
    kept = {name: units[name] for name in found}
    try:
        with undisturbed(model, gradients=True):
            expected = products(
                model, kept, vectors, x, options.likelihood, options.weight_sharing, y
            )
    except Exception as error:  # the second opinion cannot run this model, example by example
        result.uncompared |= dict.fromkeys(found, f"not compared: {type(error).__name__}: {error}")
        return
    for name, product in found.items():
        result.errors[name] = max(
            result.errors.get(name, 0.0),
            _difference(product, expected[name], has_bias_row(layers[name])),
        )


def _combinations(outputs: Tensor) -> "Combinations":
    """A few random ones, of the size of one: all classes are in each, and the passes are few."""
    flat = outputs.flatten(1)
    matrix = torch.randn(
        flat.shape[1], COMBINATIONS, generator=torch.Generator().manual_seed(0)
    ).to(flat)
    size = (flat @ matrix).abs().max()
    return Combinations(matrix / size if size > 0 else matrix)


@dataclass(frozen=True)
class Combinations:
    matrix: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        return outputs.flatten(1) @ self.matrix


def _is_small(layer: WeightLayer) -> bool:
    return layer_types.unit_count(layer) * (layer_types.input_count(layer) + 1) ** 2 <= SMALL


def _some_units(layer: WeightLayer) -> Tensor:
    count = layer_types.unit_count(layer)
    return torch.tensor(
        range(count) if _is_small(layer) else sorted({0, count - 1}), device=layer.weight.device
    )


def _vectors(layer: WeightLayer, units: int) -> Tensor:
    """(units, params, vectors): the identity where blocks are small, so that their entries
    themselves are compared.
    """
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
    products = []
    for v, v0 in zip(vectors[:, :-1].unbind(-1), vectors[:, -1].unbind(-1), strict=True):
        Av = fisher.matvec(v, torch.zeros_like(v0))[0] if fisher.bias else fisher.matvec(v)[0]
        products.append(torch.cat([Av + b * v0[:, None], ((b * v).sum(1) + c * v0)[:, None]], 1))
    return torch.stack(products, -1)


def _difference(found: Tensor, expected: Tensor, bias_row: bool) -> float:
    if not bias_row:
        found, expected = found[:, :-1], expected[:, :-1]
    difference, size = (found - expected).abs().max().item(), expected.abs().max().item()
    return difference / size if size > 0 else (0.0 if difference == 0 else float("inf"))
