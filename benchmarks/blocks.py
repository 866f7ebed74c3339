"""All unit Fisher blocks of a network by every library, exact over the labels, and their oracle.

Only ASDL has the blocks natively. The others have per-example gradients, from which ``F_u = Σ_y p_y
g_u g_uᵀ`` takes a loop over the classes and a few lines. Each peer gets the fastest of these that
we know: the factor ``√p_y`` goes into the loss, so that gradients are never scaled afterwards; one
batched product per layer adds to a matrix made once; whatever is no longer needed is freed;
and the examples come in pieces (``PIECES``, tried out per library and network).
"""

import warnings

import torch
from torch import Tensor, nn

import biasshift as bs

from .harness import Unavailable

Blocks = dict[str, Tensor]  # layer name → (units, params, params), bias last


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear layers and convolutions, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def joined(weight: Tensor, bias: Tensor) -> Tensor:
    """Returns gradients (…, units, params): every unit's weights, and its bias last."""
    return torch.cat([weight.flatten(bias.dim()), bias.unsqueeze(-1)], dim=-1)


def add_outer(blocks: Blocks, name: str, g: Tensor) -> None:
    """Adds ``Σ g_u g_uᵀ`` to the blocks of a layer, over the rows of (rows, units, params)."""
    by_unit = g.transpose(0, 1)
    if name in blocks:
        blocks[name].baddbmm_(by_unit.transpose(1, 2), by_unit)
    else:
        blocks[name] = by_unit.transpose(1, 2) @ by_unit


# -- ours, and the peers: (model, x, pieces) → blocks times the number of examples -----------------


def biasshift(model: nn.Module, x: Tensor, piece: int) -> Blocks:
    """Measures all layers at once, and reads the finished matrices, as peers return them.

    Ours are means over the examples, and become sums in place.
    """
    fishers = bs.unit_fisher(model, x)
    return {name: fisher.matrix().mul_(len(x)) for name, fisher in fishers.items()}


def asdl(model: nn.Module, x: Tensor, piece: int) -> Blocks:
    """Accumulates the unit-wise Fisher matrices that ASDL has."""
    from asdl import (
        FISHER_EXACT,
        LOSS_CROSS_ENTROPY,
        SHAPE_UNIT_WISE,
        FisherConfig,
        get_fisher_maker,
    )

    maker = get_fisher_maker(
        model, FisherConfig(FISHER_EXACT, [SHAPE_UNIT_WISE], LOSS_CROSS_ENTROPY, data_size=1)
    )
    for i in range(0, len(x), piece):
        maker.setup_model_call(model, x[i : i + piece])
        maker.forward_and_backward(accumulate=i > 0)
    blocks = {name: module.fisher.unit.data for name, module in weight_layers(model).items()}
    for module in model.modules():
        module.__dict__.pop("fisher", None)
    return blocks


def backpack(model: nn.Module, x: Tensor, piece: int) -> Blocks:
    """Multiplies per-example gradients, class by class, from one graph of a piece."""
    from backpack import backpack as extensions
    from backpack.extensions import BatchGrad

    names = {module: name for name, module in weight_layers(model).items()}
    blocks: Blocks = {}

    def reduce_and_free(module: nn.Module) -> None:
        if module in names:
            add_outer(
                blocks, names[module], joined(module.weight.grad_batch, module.bias.grad_batch)
            )
            del module.weight.grad_batch, module.bias.grad_batch

    for part in x.split(piece):
        log_p = model(part).log_softmax(-1)
        root = log_p.detach().exp().sqrt()
        for y in range(log_p.shape[1]):
            with extensions(BatchGrad(), extension_hook=reduce_and_free, retain_graph=True):
                (root[:, y] * log_p[:, y]).sum().backward(retain_graph=True)
    model.zero_grad()
    return blocks


def opacus(model: nn.Module, x: Tensor, piece: int) -> Blocks:
    """Multiplies per-example gradients, class by class, each from a forward pass of its own.

    The hooks of Opacus let go of a forward pass after one backward pass.
    """
    blocks: Blocks = {}
    layers = weight_layers(model._module)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    classes = next(reversed(layers.values())).out_features
    for part in x.split(piece):
        for y in range(classes):
            log_p = model(part).log_softmax(-1)[:, y]
            (log_p.detach().mul(0.5).exp() * log_p).sum().backward()
            for name, module in layers.items():
                add_outer(blocks, name, joined(module.weight.grad_sample, module.bias.grad_sample))
                module.weight.grad_sample = module.bias.grad_sample = None
            model.zero_grad()
    return blocks


def torch_func(model: nn.Module, x: Tensor, piece: int) -> Blocks:
    """Multiplies per-example Jacobians of all classes together."""
    from torch.func import functional_call, jacrev, vmap

    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks: Blocks = {}

    def scaled(params: dict[str, Tensor], example: Tensor) -> Tensor:
        log_p = functional_call(model, params, (example[None],))[0].log_softmax(-1)
        return log_p * log_p.detach().mul(0.5).exp()

    for part in x.split(piece):
        g = vmap(jacrev(scaled), in_dims=(None, 0))(params, part)
        for name in weight_layers(model):
            weight, bias = (g.pop(f"{name}.{p}").flatten(0, 1) for p in ("weight", "bias"))
            add_outer(blocks, name, joined(weight, bias))
    return blocks


METHODS = {
    "biasshift": biasshift,
    "ASDL": asdl,
    "BackPACK": backpack,
    "Opacus": opacus,
    "torch.func": torch_func,
}
REASONS = {
    "NNGeometry": "has no unit blocks: its unit-wise matrix is the diagonal plus the bias column",
    "curvlinops": "has no unit blocks: products with the whole matrix, and Kronecker factors",
}


def prepared(method: str, model: nn.Module) -> nn.Module:
    """Returns the model as the library wants it.

    Raises:
        ImportError: If the library is missing.
        Unavailable: If the library has no such matrices.
    """
    if method in REASONS:
        raise Unavailable(REASONS[method])
    if method == "BackPACK":
        from backpack import extend

        return extend(model)
    if method == "Opacus":
        from opacus import GradSampleModule

        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        return GradSampleModule(model, loss_reduction="sum")
    if method == "ASDL":
        import asdl  # noqa: F401

        warnings.filterwarnings("ignore", message="Using a non-full backward hook")
    return model


# -- the judge -------------------------------------------------------------------------------------


def random_vectors(model: nn.Module) -> dict[str, Tensor]:
    """Returns one random vector for every unit.

    A wrong number anywhere in a block shows in its product with one.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = {
        name: joined(m.weight[None], m.bias[None])[0].shape
        for name, m in weight_layers(model).items()
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def oracle(model: nn.Module, x: Tensor, r: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns ``F r`` of every unit in float64, by one backward pass per example and class."""
    wide, layers = model.double().cpu(), weight_layers(model)
    product = {name: torch.zeros_like(v) for name, v in r.items()}
    parameters = [p for m in layers.values() for p in (m.weight, m.bias)]
    for example in x.double().cpu():
        log_p = wide(example[None])[0].log_softmax(-1)
        for value in log_p:
            g = torch.autograd.grad(value, parameters, retain_graph=True)
            for i, name in enumerate(layers):
                row = joined(g[2 * i], g[2 * i + 1])
                product[name] += value.detach().exp() * row * (row * r[name]).sum(-1, keepdim=True)
    return {name: v / len(x) for name, v in product.items()}


def products(result: Blocks, examples: int, r: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns ``F r`` from what a method returned."""
    by_layer = {}
    for name, v in r.items():
        layer = result[name]
        vectors = v.to(layer.device)[:, :, None]
        by_layer[name] = (layer.double() @ vectors)[:, :, 0] / examples
    return by_layer


def worst(computed: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the largest relative error of a layer."""
    return max(
        ((computed[n].cpu().double() - e).norm() / e.norm()).item() for n, e in expected.items()
    )
