"""Any model a researcher brings: right to 1e-9 against `torch.func`, or an error with its name.

Among them are the edge cases that break other libraries.
"""

import copy
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, pristine
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.utils import parametrizations

import biasshift as bs
from biasshift.measure import layer_types

DOUBLE = torch.float64
sharing = pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])


def agree(
    fishers: dict[str, bs.UnitFisher], blocks: dict[str, oracles.Block], tolerance: float = 1e-9
) -> None:
    """Whole matrices, the row of a bias included (it may be 0 exactly, as before a norm), and μ."""
    assert fishers
    for name, fisher in fishers.items():
        block = blocks[name]
        matrix = torch.cat(
            [
                torch.cat([fisher.A, fisher.b[:, :, None]], 2),
                torch.cat([fisher.b, fisher.c[:, None]], 1)[:, None],
            ],
            1,
        )
        torch.testing.assert_close(
            matrix, block.F, rtol=0, atol=tolerance * float(block.F.abs().max())
        )
        mean_p = fisher.mean_p.expand_as(block.mean_p)
        torch.testing.assert_close(
            mean_p, block.mean_p, rtol=0, atol=tolerance * float(block.mean_p.abs().max())
        )


def right(model: nn.Module, x: Tensor, reference: nn.Module | None = None, **options: Any) -> None:
    """Every layer, in both ways of sharing weights.

    ``reference`` is the same function in a form that the oracle can run.
    """
    for weight_sharing in ("per_example", "expand"):
        blocks = oracles.unit_fishers(
            reference or model, x, options.get("likelihood", "categorical"), weight_sharing
        )
        fishers = bs.unit_fisher(model, x, weight_sharing=weight_sharing, **options)
        agree({name.replace("._orig_mod", ""): fisher for name, fisher in fishers.items()}, blocks)


def refused(model: nn.Module, x: Tensor, words: str, **options: Any) -> None:
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=words):
        bs.unit_fisher(model, x, **{"uncovered": "raise", **options})
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}


def left_out(
    model: nn.Module,
    x: Tensor,
    words: dict[str, str],
    reference: nn.Module | dict[str, oracles.Block] | None = None,
    **options: Any,
) -> None:
    """By default one warning says why of every layer, and all other layers are right.

    ``reference`` is the same function in a form that the oracle can run, or what it found.
    """
    with pytest.warns(bs.UncoveredWarning) as caught:
        fishers = bs.unit_fisher(model, x, **options)
    [said] = [str(w.message) for w in caught if w.category is bs.UncoveredWarning]
    for name, why in words.items():
        assert re.search(rf"'{re.escape(name)}' \(\w+\): [^']*{why}", said)
    covered = {n for n, m in model.named_modules() if layer_types.is_covered(m)}
    assert covered - set(fishers) == set(words)
    if not isinstance(reference, dict):
        reference = oracles.unit_fishers(
            reference or model,
            x,
            options.get("likelihood", "categorical"),
            options.get("weight_sharing", "per_example"),
        )
    agree(fishers, reference)
    assert list(bs.unit_fisher(model, x, skip=list(words), **options)) == list(fishers)


def last_layer(model: nn.Module, name: str, x: Tensor) -> dict[str, oracles.Block]:
    """Of a layer that returns the outputs, whatever the model does before it."""
    layer, seen = model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    return {name: oracles.unit_fishers(nn.Sequential(layer), seen[0])["0"]}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.ELU(), nn.Linear(6, 4), nn.ELU(), nn.Linear(4, 3)
    ).double()


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (9, 5)), generator=generator, dtype=DOUBLE) + 0.5


class TwoLayers(nn.Module):
    """``head(elu(stem(x)))``, to be derived from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.stem(x)))


def two_layers(kind: type[nn.Module] = TwoLayers) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


# -- what breaks other libraries -------------------------------------------------------------------

conv = {"in_channels": 2, "out_channels": 4, "kernel_size": 3}
GRID: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 3)), (9, 4)),
    "linear-no-bias": (lambda: nn.Sequential(nn.Linear(4, 3, bias=False)), (9, 4)),
    "linear-positions": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
        (7, 3, 4),
    ),
    "linear-grid-inplace": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.ELU(inplace=True), nn.Flatten(), nn.Linear(30, 3)
        ),
        (7, 2, 3, 4),
    ),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(**conv), nn.ELU(), nn.Flatten(), nn.Linear(36, 3)),
        (7, 2, 5, 5),
    ),
    "conv-no-bias": (
        lambda: nn.Sequential(
            nn.Conv2d(**conv, bias=False), nn.ELU(), nn.Flatten(), nn.Linear(36, 3)
        ),
        (7, 2, 5, 5),
    ),
    "conv-groups": (
        lambda: nn.Sequential(
            nn.Conv2d(**conv, groups=2), nn.ELU(), nn.Flatten(), nn.Linear(36, 3)
        ),
        (7, 2, 5, 5),
    ),
    "conv-dilation": (
        lambda: nn.Sequential(
            nn.Conv2d(**conv, dilation=2), nn.ELU(), nn.Flatten(), nn.Linear(16, 3)
        ),
        (7, 2, 6, 6),
    ),
    "conv-same": (
        lambda: nn.Sequential(
            nn.Conv2d(**conv, padding="same"), nn.ELU(), nn.Flatten(), nn.Linear(64, 3)
        ),
        (7, 2, 4, 4),
    ),
    "elu-inplace": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ELU(inplace=True), nn.Linear(5, 3)),
        (9, 4),
    ),
    "eval": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        ).eval(),
        (9, 4),
    ),
    "instancenorm": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4), nn.Flatten(), nn.Linear(16, 3)
        ),
        (7, 2, 5),
    ),
    "groupnorm": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
        ),
        (7, 2, 5),
    ),
}


GRID |= {
    name: (BY_NAME[name].factory, BY_NAME[name].x_shape)
    for name in ("shared", "mlp-functional", "residual-inplace", "conv-uneven")
}


@pytest.mark.parametrize("name", GRID)
def test_the_grid_of_edge_cases(name: str) -> None:
    torch.manual_seed(0)
    factory, shape = GRID[name]
    right(factory().double(), inputs(*shape))


@pytest.mark.parametrize("name", ["conv", "conv-no-bias", "linear-no-bias"])
def test_the_natural_gradient_of_convolutions_and_without_a_bias(name: str) -> None:
    torch.manual_seed(0)
    factory, shape = GRID[name]
    model, x = factory().double(), inputs(*shape)
    block, fisher = oracles.unit_fishers(model, x)["0"], bs.unit_fisher(model, x, damping=1e-2)["0"]
    g, g0 = torch.randn(block.b.shape, dtype=DOUBLE), torch.randn(block.c.shape, dtype=DOUBLE)
    dw, dw0 = block.natural_gradient(g, g0, 1e-2)
    update = fisher.natural_gradient(g, g0) if block.bias else fisher.natural_gradient(g)
    torch.testing.assert_close(update[0], dw, rtol=1e-8, atol=1e-9)
    if block.bias:
        assert torch.allclose(update[1], dw0, rtol=1e-8, atol=1e-9)
    else:
        assert update[1] is None


# -- convolutions and transposed convolutions of every geometry ------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution with random options, and an input that is large enough."""
    dims, transposed, groups = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel = each(1, 3)
    stride = each(1, 2 if dims == 3 else 3)
    dilation = each(1, 2)
    bias = draw(st.booleans())
    options: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": bias,
    }
    if transposed:
        options["padding"] = each(0, 1)
        options["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        sizes = tuple(2 + p for p in options["padding"])
    else:
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "reflect", "replicate", "circular"])
        )
        options["padding"] = (
            draw(st.sampled_from(["valid", "same", 0, 1]))
            if set(stride) == {1}
            else draw(st.integers(0, 1))
        )
        sizes = tuple(
            d * (k - 1) + 1 + draw(st.integers(1, 2)) for d, k in zip(dilation, kernel, strict=True)
        )
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    torch.manual_seed(draw(st.integers(0, 2**16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(nn, name)(2 * groups, 2 * groups, dtype=DOUBLE, **options), torch.randn(
            2, 2 * groups, *sizes, dtype=DOUBLE
        )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=80)
@given(geometries())
def test_patches_are_what_comes_in(drawn: tuple[nn.Module, Tensor]) -> None:
    """Weights times patches plus bias is the net input.

    A position's patch is the derivative of its net input by the weights.
    """
    layer, x = drawn
    net = layer(x)
    patches, weights = layer_types.patches(layer, x, net.shape), layer_types.weights(layer)
    assert torch.equal(patches, layer_types.patches(layer, x))
    assert torch.equal(layer_types.as_weight(layer, weights), layer.weight)
    assert (
        weights.shape
        == (layer_types.unit_count(layer), layer_types.input_count(layer))
        == (layer.out_channels, patches.shape[-1])
    )
    grouped = weights.unflatten(0, (layer.groups, -1))
    product = torch.einsum("npgi,gui->ngup", patches, grouped).flatten(1, 2)
    product = product if layer.bias is None else product + layer.bias[:, None]
    torch.testing.assert_close(product, net.flatten(2), rtol=0, atol=1e-12)

    # of the last unit
    by_weight = jacrev(lambda w: functional_call(layer, {"weight": w}, (x,)).flatten(2)[0, -1])(
        layer.weight
    )
    by_weight = torch.stack([layer_types.weights(layer, d)[-1] for d in by_weight])
    torch.testing.assert_close(patches[0, :, -1], by_weight, rtol=0, atol=1e-12)


@sharing
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(dims: int, groups: int, weight_sharing: str) -> None:
    """Against sums over units, channels and places written out.

    The oracle of convolutions does not know them.
    """
    torch.manual_seed(0)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer = kind(2, 4, 2, stride=2, padding=1, output_padding=1, dilation=2, groups=groups)
    x = inputs(4, 2, *(2,) * dims)
    model = nn.Sequential(layer, nn.ELU(), nn.Flatten(), nn.LazyLinear(3)).double()
    model(x)
    parameters = dict(model.named_parameters())
    places = list(itertools.product(range(2), repeat=dims))

    def rows(gradient: Tensor) -> Tensor:
        """The inputs of every unit of a gradient (…, channels, units of a group, *kernel)."""
        size, units = 4 // groups, []
        for unit in range(4):
            channels = range(2 // groups * (unit // size), 2 // groups * (unit // size + 1))
            units.append(
                torch.stack(
                    [gradient[(..., c, unit % size, *place)] for c in channels for place in places],
                    -1,
                )
            )
        return torch.stack(units, -2)

    if weight_sharing == "per_example":
        scores = vmap(
            jacrev(lambda p, x_n: functional_call(model, p, x_n[None])[0].log_softmax(-1)),
            (None, 0),
        )(parameters, x)
        score = torch.cat([rows(scores["0.weight"]), scores["0.bias"].unsqueeze(-1)], -1)
        expected = torch.einsum("nk,nkui,nkuj->uij", model(x).softmax(-1), score, score) / len(x)
    else:
        net = layer(x).detach()
        deltas = vmap(jacrev(lambda net_n: model[1:](net_n[None])[0].log_softmax(-1)))(net)
        delta2 = torch.einsum("nk,nku...->nu...", model(x).softmax(-1), deltas.square()).flatten(2)
        by_weight = vmap(jacrev(lambda p, x_n: functional_call(layer, p, x_n[None])[0]), (None, 0))(
            dict(layer.named_parameters()), x
        )
        # (batch, unit, *places, unit, params), and then (batch, units, positions, params)
        patch = torch.cat([rows(by_weight["weight"]), by_weight["bias"].unsqueeze(-1)], -1)
        patch = torch.stack([patch[:, u, ..., u, :].flatten(1, -2) for u in range(4)], 1)
        expected = torch.einsum("nut,nuti,nutj->uij", delta2, patch, patch) / len(x)
        torch.testing.assert_close(
            bs.unit_fisher(model, x)["0"].mean_p.expand(4, -1),
            patch.mean((0, 2))[:, :-1].detach(),
            rtol=0,
            atol=1e-12,
        )
    found = bs.unit_fisher(model, x, weight_sharing=weight_sharing)["0"].matrix()
    expected = expected.detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_the_output_size_of_a_call_decides_its_positions() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), nn.Linear(168, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.elu(self.up(x, output_size=(8, 7))).flatten(1))

    torch.manual_seed(0)
    model, x = Sized().double(), inputs(3, 2, 4, 4)
    for weight_sharing in ("per_example", "expand"):
        assert bs.check(model, x, weight_sharing=weight_sharing)["error"].max() < 1e-12
    before = model.up.weight.detach().clone()
    with bs.bias_shift(model, x) as shift, torch.no_grad():
        model.up.weight += 0.1 * before
    torch.testing.assert_close(shift["up"].total, shift["up"].own, rtol=0, atol=1e-14)


# -- random architectures --------------------------------------------------------------------------


class Residual(nn.Module):
    """A block with its input added."""

    def __init__(self, block: nn.Module, scale: float) -> None:
        super().__init__()
        self.block, self.scale = block, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.block(x)


ACTIVATIONS = [nn.ELU, nn.Tanh, nn.SiLU, nn.LeakyReLU, nn.SELU]


@st.composite
def architectures(draw: st.DrawFn) -> tuple[nn.Module, Tensor, str]:
    """Convolutions or linear layers on positions; norms, residual and shared blocks."""
    convolutional, width = draw(st.booleans()), draw(st.sampled_from([2, 4]))
    torch.manual_seed(draw(st.integers(0, 2**16)))

    def weight_layer() -> nn.Module:
        if not convolutional:
            return nn.Linear(width, width, bias=draw(st.booleans()))
        groups = draw(st.sampled_from([1, 2]))
        mode = draw(st.sampled_from(["zeros", "circular"]))
        return nn.Conv1d(
            width, width, 3, padding=1, groups=groups, bias=draw(st.booleans()), padding_mode=mode
        )

    def activation() -> nn.Module:
        kind, inplace = draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
        return kind() if kind is nn.Tanh else kind(inplace=inplace)

    def norm() -> nn.Module:
        if convolutional:
            layer = nn.BatchNorm1d(width) if draw(st.booleans()) else nn.GroupNorm(2, width)
        else:
            layer = nn.LayerNorm(width)
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        return layer

    def block() -> nn.Module:
        parts = [weight_layer()]
        if draw(st.booleans()):
            parts.append(norm())
        parts.append(activation())
        return nn.Sequential(*parts)

    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        part = block()
        how = draw(st.sampled_from(["plain", "residual", "twice"]))
        blocks += {"plain": [part], "residual": [Residual(part, 0.5)], "twice": [part, part]}[how]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * width, 3)).double().eval()
    shape = (5, width, 4) if convolutional else (5, 4, width)
    x = torch.randn(shape, dtype=DOUBLE) + 0.3
    return model, x, draw(st.sampled_from(["categorical", "gaussian", "bernoulli"]))


@settings(max_examples=40)
@given(architectures())
def test_random_architectures(drawn: tuple[nn.Module, Tensor, str]) -> None:
    model, x, likelihood = drawn
    right(model, x, likelihood=likelihood)


# -- wrapped, compiled, parametrized ---------------------------------------------------------------

compiling = pytest.mark.filterwarnings("ignore")  # of dynamo's own


@compiling
@pytest.mark.parametrize("how", ["model", "in place", "part", "part in place", "function"])
def test_compiled_models(how: str) -> None:
    model, x = mlp(), inputs()
    reference = copy.deepcopy(model)
    measured: Any = model
    if how == "model":
        measured = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "part":
        model[2] = torch.compile(model[2], backend="eager")
    elif how == "part in place":
        model[2].compile(backend="eager")
    else:

        class Compiled(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return torch.compile(super().forward, backend="eager")(x)

        measured = model = Compiled(*model)
    measured(x)
    right(measured, x, reference)
    pristine(reference)
    assert torch.allclose(measured(x), reference(x))


def test_a_model_inside_distributed_data_parallel() -> None:
    model, x = mlp(), inputs()
    right(nn.DataParallel(model), x, model)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        right(wrapped, x, model)
        for _ in range(2):  # its bookkeeping of backward passes is not disturbed
            wrapped(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "change",
    [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm],
)
def test_parametrized_weights(change: Callable[[nn.Module], nn.Module]) -> None:
    """The matrices are those of the weights that the layer runs with."""
    model, x = mlp().eval(), inputs()
    change(model[2])
    plain = mlp()
    with torch.no_grad():
        plain[2].weight.copy_(model[2].weight)
    right(model, x, plain)


def test_spectral_norm_in_training_mode_is_left_as_found() -> None:
    model = mlp()
    parametrizations.spectral_norm(model[2])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    bs.unit_fisher(model, inputs())
    assert before and all(
        torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()
    )


class Renamed(nn.Linear):
    """A forward of its own that does the same, and returns a view."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).view(len(x), -1)


class Normalizing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), self.weight, self.bias)


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.weight > 0), self.bias)


class PaddedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def test_a_forward_of_one_s_own_that_is_the_same_function() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Renamed(5, 6), nn.ELU(inplace=True), nn.Linear(6, 3)).double()
    x = inputs()
    right(model, x)
    reference, original = copy.deepcopy(model), model[2].forward
    model[2].forward = lambda x: original(x)  # as libraries do that move weights between devices
    right(model, x, reference)


@pytest.mark.parametrize(
    "layer", [Normalizing(5, 6), Masked(5, 6)], ids=lambda layer: type(layer).__name__
)
def test_a_forward_of_one_s_own_that_computes_something_else_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.ELU(), nn.Linear(6, 3)).double()
    refused(model, inputs(), r"'0' \(.*\).*its own forward.*Linear")
    left_out(model, inputs(), {"0": "its own forward"})
    with (
        pytest.raises(ValueError, match=r"'0'.*its own forward"),
        bs.bias_shift(model, inputs(), uncovered="raise"),
    ):
        pass
    with (
        pytest.warns(bs.UncoveredWarning, match=r"'0' \(.*\): its own forward"),
        bs.bias_shift(model, inputs()) as shift,
    ):
        pass
    assert list(shift) == ["2"]
    with (
        pytest.raises(ValueError, match=r"Layer '0' .*its own forward"),
        bs.bias_shift(nn.Sequential(layer), inputs()),
    ):
        pass
    padded = nn.Sequential(PaddedConv(1, 2, 3), nn.Flatten(), nn.Linear(50, 3)).double()
    refused(padded, inputs(4, 1, 5, 5), "'0'.*Conv2d")
    left_out(padded, inputs(4, 1, 5, 5), {"0": "its own forward.*Conv2d"})


@pytest.mark.parametrize("zeros", [[0], [0, 4], [0, 2, 4], [1]])
def test_inputs_of_zeros_do_not_hide_what_a_layers_own_forward_computes(zeros: list[int]) -> None:
    """Such as those of a padding: for them |w| · 0 is w · 0."""

    class Absolute(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.abs(), self.bias)

    x = inputs(5, 3)
    x[zeros] = 0
    model = nn.Sequential(Absolute(3, 4, bias=False), nn.ELU(), nn.Linear(4, 2)).double()
    left_out(model, x, {"0": "its own forward"})
    with (
        pytest.warns(bs.UncoveredWarning, match="'0' .*its own forward"),
        bs.bias_shift(model, x) as shift,
    ):
        pass
    assert list(shift) == ["2"]


def test_a_layer_that_turns_into_another_function_between_two_measurements() -> None:
    model, x = nn.Sequential(Masked(5, 6), nn.ELU(), nn.Linear(6, 3)).double(), inputs()
    with torch.no_grad():
        model[0].weight.abs_()  # as long as they are positive, all weights count
    options = {"probe": x, "every": 1, "quantities": "bias_shift"}
    log = bs.instrument(model, torch.optim.SGD(model.parameters(), lr=1.0), **options)
    with bs.bias_shift(model, x) as shift:
        pass
    assert list(shift) == ["0", "2"]
    with (
        pytest.warns(bs.UncoveredWarning, match="'0' .Masked.: its own forward"),
        bs.bias_shift(model, x) as shift,
    ):
        take_step(log.optimizer, model, -1.0)
    assert list(shift) == ["2"] and set(log.table().layer) == {"2"}
    take_step(log.optimizer, model, 1.0)  # nothing is said again
    log.remove()
    assert log.table().step.tolist() == [1, 1, 1, 2, 2, 2]


def take_step(optimizer: torch.optim.Optimizer, model: nn.Module, size: float) -> None:
    """Adds a number to all parameters."""
    for p in model.parameters():
        p.grad = torch.full_like(p, -size)
    optimizer.step()


@pytest.mark.parametrize("quantities", [None, "bias_shift"])
def test_a_log_of_a_model_with_a_forward_of_one_s_own(quantities: str | None) -> None:
    model, x = nn.Sequential(Normalizing(5, 6), nn.ELU(), nn.Linear(6, 3)).double(), inputs()
    y, optimizer = torch.arange(9) % 3, torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(bs.UncoveredWarning) as caught:
        log = bs.instrument(model, optimizer, probe=(x, y), every=1, quantities=quantities)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        log.remove()
    [said] = [str(w.message) for w in caught if w.category is bs.UncoveredWarning]
    assert "'0' (Normalizing): its own forward" in said and "'2'" not in said
    table = log.table()
    assert set(table.layer) - {"1"} == {"2"} and table.step.max() == 2
    assert table[table.layer == "2"].total.notna().any()


# -- weights with more than one use ----------------------------------------------------------------


class UsedTwice(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.stem(x)) + F.elu(F.linear(x, self.stem.weight)))


class Autoencoder(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.elu(self.stem(x)), self.stem.weight.t())


class Substituted(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(functional_call(self.stem, {"weight": self.other}, (x,))))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (UsedTwice, "used inside a function"),
        (Autoencoder, "used inside a function"),
        (Substituted, "not its own"),
    ],
)
def test_hidden_uses_of_a_weight_are_refused(kind: type[nn.Module], words: str) -> None:
    refused(two_layers(kind), inputs(), f"'stem'.*{words}")
    if kind is Autoencoder:  # which has no other layer
        refused(two_layers(kind), inputs(), f"'stem'.*{words}", uncovered="skip")
    else:
        model = two_layers(kind)
        left_out(model, inputs(), {"stem": words}, last_layer(model, "head", inputs()))


def tied(what: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 5, dtype=DOUBLE),
        nn.ELU(),
        nn.Linear(5, 5, dtype=DOUBLE),
        nn.ELU(),
        nn.Linear(5, 3, dtype=DOUBLE),
    )
    if what == "weight":
        model[2].weight = model[0].weight
    elif what == "bias":
        model[2].bias = model[0].bias
    elif what == "transposed":
        model[2].weight = nn.Parameter(model[0].weight.data.t())
    else:
        parametrizations.weight_norm(model[0])
        parametrizations.weight_norm(model[2])
        model[2].parametrizations.weight.original1 = model[0].parametrizations.weight.original1
    return model


@pytest.mark.parametrize("what", ["weight", "bias", "transposed", "parametrized"])
def test_tied_parameters_are_refused_with_both_names(what: str) -> None:
    model = tied(what)
    refused(model, inputs(), "'0' .*tied to that of '2'")
    refused(model, inputs(), "'2' .*tied to that of '0'", layers=["2", "4"], uncovered="skip")
    words = {"0": "its .* is tied to that of '2'", "2": "its .* is tied to that of '0'"}
    left_out(model, inputs(), words, last_layer(model, "4", inputs()))
    assert list(bs.unit_fisher(model, inputs(), layers=["4"])) == ["4"]


def test_the_second_name_of_a_layer_leads_to_the_first() -> None:
    model = BY_NAME["tied"].factory().double()
    refused(
        model,
        inputs(),
        "'again' is 'first' under another name",
        layers=["again"],
        uncovered="skip",
    )
    assert list(bs.unit_fisher(model, inputs())) == ["first", "head"]


class Tokens(nn.Module):
    """A language model in small: every position sees those before it."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(F.elu(self.inner(h + 0.3 * h.cumsum(-2))))


def test_a_head_tied_to_an_embedding() -> None:
    torch.manual_seed(0)
    x = torch.randint(6, (5, 3))
    model = Tokens(tie=True).double()
    refused(model, x, "'head'.*tied to that of 'embed'")
    alone = bs.unit_fisher(model, x, layers=["inner"])
    assert list(alone) == ["inner"]
    with pytest.warns(bs.UncoveredWarning, match="'head' .*tied to that of 'embed'"):
        fishers = bs.unit_fisher(model, x)
    assert list(fishers) == ["inner"]
    assert torch.equal(fishers["inner"].matrix(), alone["inner"].matrix())


# -- outputs with positions ------------------------------------------------------------------------


@sharing
@pytest.mark.parametrize("axes", [(3,), (2, 2)])
def test_labels_on_any_leading_axes(axes: tuple[int, ...], weight_sharing: str) -> None:
    """Position by position; one pass per class over all positions would mix their labels."""
    torch.manual_seed(0)
    model, x = Tokens().double(), torch.randint(6, (5, *axes))
    table = bs.check(model, x, weight_sharing=weight_sharing, examples=5)
    assert table["error"].max() < 1e-12
    fisher = bs.unit_fisher(model, x, weight_sharing="expand", layers=["head"])["head"]
    p = model(x).softmax(-1)
    variance = (p * (1 - p)).flatten(1, -2).sum(1).mean(0)  # of every label, over all positions
    assert torch.allclose(fisher.c, variance, rtol=1e-12)


def test_one_class_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 1)).double()
    refused(model, inputs(), "bernoulli")
    right(model, inputs(), likelihood="bernoulli")


# -- examples that are not apart -------------------------------------------------------------------


class Centered(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        return self.head(h - h.mean(0))


class Normalized(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.batch_norm(self.stem(x), None, None, training=True))


class Dropping(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.stem(x), 0.3))


class Noisy(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x) * np.random.rand())


class Counting(TwoLayers):
    """Its outputs depend on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return super().forward(x) * self.count


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Centered, "change with the rest of its batch.*'head'"),
        (Normalized, "change with the rest of its batch.*'head'"),
        (Dropping, r"random numbers.*'head'.*eval\(\)"),
        (Noisy, "by the call.*'head'"),
        (Counting, "by the call"),
    ],
)
def test_coupled_or_random_functions_are_refused(kind: type[nn.Module], words: str) -> None:
    model = two_layers(kind)
    for uncovered in ("raise", "skip"):  # no layer of such a model can be measured
        refused(model, inputs(), words, uncovered=uncovered)
        refused(model, inputs(), words, uncovered=uncovered, weight_sharing="expand")
    assert not any(bs.check(model, inputs())["covered"])
    assert all(float(buffer) == 0 for buffer in model.buffers())


class Cumulative(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.stem(x)).cumsum(0))


class FromTheEnd(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.stem(x)).flip(0).cumsum(0).flip(0))


class RelativeToTheFirst(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        return self.head(h - h[:1])


class RelativeToTheLast(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        return self.head(h - h[-1:])


class RelativeToTheOneBefore(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        return self.head(torch.cat([h[:1], h[1:] - h[:-1]]))


class BetweenTheEnds(TwoLayers):
    """The first and the last example are right, those in between are mixed with one another."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        return self.head(torch.cat([h[:1], h[1:-1] - h[1:-1].mean(0), h[-1:]]) if len(h) > 4 else h)


class SmoothedOverExamples(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        kernel = x.new_tensor([[[0.0, 1.0, 0.5]]])
        return self.head(F.conv1d(F.elu(self.stem(x)).T[:, None], kernel, padding=1)[:, 0].T)


class Recurrent(TwoLayers):
    """PyTorch's recurrent layers have time in front, by default."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.recurrent = kind(6, 6, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(F.elu(self.stem(x)))[0])


class Causal(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x)).transpose(0, 1)
        return self.head(F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(0, 1))


class Even(TwoLayers):
    """Runs on an even number of examples only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(F.elu(self.stem(x)).unflatten(0, (-1, 2))).flatten(0, 1))

    def mixed(self, pairs: Tensor) -> Tensor:
        return pairs


class Pairs(Even):
    def mixed(self, pairs: Tensor) -> Tensor:
        return pairs - pairs.mean(1, keepdim=True) / 2


class Siamese(Even):
    """The product with the example half a batch away, which reversing the batch does not change."""

    def mixed(self, pairs: Tensor) -> Tensor:
        h = pairs.flatten(0, 1)
        return (h * h.roll(len(h) // 2, 0)).unflatten(0, (-1, 2))


class Neighbors(TwoLayers):
    """A graph's nodes for examples: one size, as its neighborhoods are fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("neighborhoods", torch.eye(8) + torch.eye(8).roll(1, 0) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neighborhoods @ F.elu(self.stem(x)))


class OnlyEight(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixed(F.elu(self.stem(x)).reshape(8, 6)))

    def mixed(self, h: Tensor) -> Tensor:
        return h


class OnlyEightAveraged(OnlyEight):
    def mixed(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class OnlyEightCumulative(OnlyEight):
    def mixed(self, h: Tensor) -> Tensor:
        return h.cumsum(0)


def depend_on_each_other(model: nn.Module, x: Tensor) -> bool:
    """Whether some example's outputs have a derivative by another example's input."""
    jacobian = torch.autograd.functional.jacobian(model, x)
    examples = jacobian.dim() - x.dim()
    axes = [axis for axis in range(jacobian.dim()) if axis not in (0, examples)]
    influences = jacobian.abs().amax(axes)
    return bool((influences - influences.diag().diag()).any())


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Cumulative, (8, 5)),
        (Cumulative, (2, 5)),
        (FromTheEnd, (8, 5)),
        (RelativeToTheFirst, (8, 5)),
        (RelativeToTheFirst, (2, 5)),
        (RelativeToTheLast, (8, 5)),
        (RelativeToTheOneBefore, (8, 5)),
        (BetweenTheEnds, (8, 5)),
        (SmoothedOverExamples, (8, 5)),
        (Recurrent, (8, 4, 5)),
        (lambda: Recurrent(nn.GRU, bidirectional=False), (8, 8, 5)),
        (lambda: Recurrent(nn.RNN, num_layers=2), (5, 6, 5)),
        (Causal, (5, 6, 5)),
        (Causal, (8, 8, 5)),
        (Pairs, (8, 5)),
        (Siamese, (8, 5)),
        (Neighbors, (8, 5)),
        (OnlyEightAveraged, (8, 5)),
        (OnlyEightCumulative, (8, 5)),
    ],
)
@sharing
def test_examples_that_depend_on_some_of_their_batch_are_refused(
    kind: Callable[[], nn.Module], shape: tuple[int, ...], weight_sharing: str
) -> None:
    model, x = two_layers(kind), inputs(*shape)
    assert depend_on_each_other(model, x)
    options = {"layers": ["stem", "head"], "weight_sharing": weight_sharing}
    refused(model, x, "change with the rest of its batch", **options)
    refused(model, x, "change with the rest of its batch", **options, uncovered="skip")


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Even, (8, 5)),
        (OnlyEight, (8, 5)),
        (TwoLayers, (1, 5)),
        (TwoLayers, (2, 5)),
        (TwoLayers, (3, 5)),
        (TwoLayers, (3, 4, 5)),
    ],
)
def test_independent_examples_of_any_size_of_batch_are_measured(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = two_layers(kind), inputs(*shape)
    assert not depend_on_each_other(model, x)
    right(model, x, two_layers())


def test_a_recurrent_model_with_its_examples_in_front_is_right() -> None:
    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM, batch_first=True).double(), inputs(5, 4, 5)
    assert not depend_on_each_other(model, x)
    table = bs.check(model, x, examples=5).set_index("module")
    assert table.covered[["stem", "head"]].all() and table.error[["stem", "head"]].max() < 1e-12


class Experts(nn.Module):
    """Every example goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 2)
        self.experts = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        h = x.new_zeros(len(x), 4)
        for i, expert in enumerate(self.experts):
            rows = (p.argmax(-1) == i).nonzero()[:, 0]
            if len(rows):
                h = h.index_add(0, rows, expert(x[rows]) * p[rows, i : i + 1])
        return self.head(F.elu(h))


class EveryExpert(Experts):
    """The same function: both layers run on every example."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        chosen = (p.argmax(-1, keepdim=True) == torch.arange(2)) * p
        return self.head(
            F.elu(sum(chosen[:, i : i + 1] * e(x) for i, e in enumerate(self.experts)))
        )


def test_experts_that_see_some_examples() -> None:
    model, x = two_layers(Experts), inputs(20, 5)
    why = "how often it is called depends on the other examples"
    refused(model, x, rf"'experts\.\d' .*{why}")
    words = {"experts.0": why, "experts.1": "it sees 16 rows for 20 examples"}
    left_out(model, x, words, two_layers(EveryExpert))
    table = bs.check(model, x, weight_sharing="expand", examples=8)
    assert table["error"].max() < 1e-12 and table["covered"].sum() == 4


class Squeezing(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.stem(x)).squeeze()).reshape(-1, 3)


class OneSize(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.stem(x)).reshape(9, 6))


@pytest.mark.parametrize("kind", [Squeezing, OneSize])
def test_models_that_cannot_run_on_one_example(kind: type[nn.Module]) -> None:
    plain = two_layers()
    fishers = bs.unit_fisher(two_layers(kind), inputs())
    agree(fishers, oracles.unit_fishers(plain, inputs()))


# -- models that write into their input ------------------------------------------------------------


class Shifting(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(2.0))


class ShiftingUnseen(TwoLayers):
    """The version of a tensor does not count what happens to its ``data``."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.sub_(0.5).div_(2.0)
        return super().forward(x)


class ShiftingAtTheEnd(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward((x - 0.5) / 2.0)
        with torch.no_grad():
            x.zero_()
        return outputs


class ShiftingByAHook(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda module, args: args[0].sub_(0.5).div_(2.0))


class InPlaceFirst(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.ELU(inplace=True), *mlp())


writing = pytest.mark.parametrize(
    "kind", [Shifting, ShiftingUnseen, ShiftingAtTheEnd, ShiftingByAHook, InPlaceFirst]
)


def written_to(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The model, and the same function of an input that stays what it is."""
    if kind is InPlaceFirst:
        return InPlaceFirst(), nn.Sequential(nn.ELU(), *mlp())

    class Apart(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - 0.5) / 2.0)

    return two_layers(kind), two_layers(Apart)


@contextmanager
def untouched(*tensors: Tensor) -> Iterator[None]:
    before = [(tensor.clone(), tensor._version, tensor.requires_grad) for tensor in tensors]
    yield
    for tensor, (values, version, requires_grad) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert (tensor._version, tensor.requires_grad) == (version, requires_grad)


@writing
def test_models_that_write_into_their_input_are_measured_on_the_probe_as_it_is(
    kind: type[nn.Module],
) -> None:
    model, plain = written_to(kind)
    x, y = inputs(), torch.arange(9) % 3
    with untouched(x):
        right(model, x, plain)
        right(model, x, plain, batch_size=4)
        assert bs.check(model, x)["error"].max() < 1e-12
        assert bs.check(model, x, weight_sharing="expand")["error"].max() < 1e-12
        agree(bs.unit_fisher(model, [x[:4], x[4:]]), oracles.unit_fishers(plain, x))
        implicit = bs.unit_fisher(model, x, storage="implicit", memory_budget=1)
        dense = bs.unit_fisher(plain, x)
        for name, fisher in implicit.items():  # the probe is read again
            torch.testing.assert_close(fisher.k, dense[name].k, rtol=1e-6, atol=1e-9)
        pd.testing.assert_frame_equal(
            bs.gradient_gap(model, x, y), bs.gradient_gap(plain, x, y), rtol=1e-9
        )


@writing
def test_means_on_a_probe_that_the_model_writes_into(kind: type[nn.Module]) -> None:
    model, plain = written_to(kind)
    x = inputs()

    def update(network: nn.Module) -> None:
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(1.1).add_(0.01)

    parts = oracles.bias_shifts(copy.deepcopy(plain), x, update)
    with untouched(x):
        with bs.bias_shift(model, x) as shift:
            pass
        assert all(not change.total.any() for change in shift.values())
        means = [bs.activation_moments(model, batch) for batch in (x, x, [x[:2], x[2:]])]
        expected = bs.activation_moments(plain, x)
        for moments in means:
            for name, of_module in moments.items():
                torch.testing.assert_close(of_module.mean, expected[name].mean)
        with bs.bias_shift(model, x) as shift:
            update(model)
    for name, change in shift.items():
        torch.testing.assert_close(change.total, parts[name]["total"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(change.incoming, parts[name]["incoming"], rtol=1e-9, atol=1e-12)


@writing
def test_a_log_s_probe_stays_what_it_is(kind: type[nn.Module]) -> None:
    model, _ = written_to(kind)
    x, y = inputs(), torch.arange(9) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with untouched(x, y), bs.instrument(model, optimizer, probe=(x, y), every=1) as log:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x.clone()), y).backward()
            optimizer.step()
    table = log.table()
    first = table[table.step == 1].drop(columns="step").reset_index(drop=True)
    last = table[table.step == 3].drop(columns="step").reset_index(drop=True)
    pd.testing.assert_frame_equal(first, last, check_exact=True)
    assert not table["total"].dropna().any()


# -- models that differentiate inside their forward pass -------------------------------------------


class Forces(nn.Module):
    """The negative gradient of an energy, which is that of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.energy = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)
        self.scale = nn.Linear(5, 3)

    def forces(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(self.act(self.stem(x))).sum()
        return -torch.autograd.grad(energy, x, create_graph=torch.is_grad_enabled())[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.forces(x))


class ForcesByBackward(Forces):
    def forces(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(self.act(self.stem(x))).sum()
        energy.backward(inputs=[x])
        return -x.grad


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [Forces, ForcesByBackward])
def test_models_that_differentiate_inside_their_forward_pass(
    kind: type[Forces], frozen: bool
) -> None:
    model, x = two_layers(kind).requires_grad_(not frozen), inputs()
    energy = nn.Sequential(model.stem, model.act, model.energy)
    act = model.act(model.stem(x)).detach()
    mean, var = oracles.activation_statistics(act, 1)
    with torch.no_grad():
        for moments in (
            bs.activation_moments(model, x),
            bs.activation_moments(model, x, batch_size=4),
        ):
            assert list(moments) == ["act"] and moments["act"].count == 9
            torch.testing.assert_close(moments["act"].mean, mean)
            torch.testing.assert_close(moments["act"].var, var)
            assert not moments["act"].mean.requires_grad

    def update(network: nn.Module) -> None:
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(1.1)

    parts = oracles.bias_shifts(copy.deepcopy(energy), x, update)
    # the layer behind the gradient sees it as its input
    forces = model.forces(x).detach()
    scale = nn.Sequential(model.scale)
    agree(
        {"0": bs.unit_fisher(model, x, layers=["scale"])["scale"]},
        oracles.unit_fishers(scale, forces),
    )
    if kind is Forces:
        words = "a gradient that the forward pass takes"
        refused(model, x, f"'(stem|energy)'.*{words}")
        with pytest.warns(bs.UncoveredWarning, match=f"'stem' .*{words}.*'energy' .*{words}"):
            fishers = bs.unit_fisher(model, x)
        assert list(fishers) == ["scale"]
        agree({"0": fishers["scale"]}, oracles.unit_fishers(scale, forces))
    else:  # as if detached
        assert bs.unit_fisher(model, x)["stem"].dead.all()
    assert bs.check(model, x).set_index("module").error["scale"] < 1e-12
    with bs.bias_shift(model, x, batch_size=5) as shift:
        update(model)
    for name, of_energy in (("stem", "0"), ("energy", "2")):
        for part, value in parts[of_energy].items():
            measured = getattr(shift[name], part)
            torch.testing.assert_close(measured, value, rtol=1e-9, atol=1e-12)
            assert not measured.requires_grad


class ForcesOfPositions(Forces):
    """The gradient reads the view of a weight that the layer has made for its own product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.energy = nn.Linear(1, 4), nn.Linear(20, 1)

    def forces(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(self.act(self.stem(x[:, :, None])).flatten(1)).sum()
        return -torch.autograd.grad(energy, x, create_graph=torch.is_grad_enabled())[0]


class ForcesOfAConvolution(ForcesOfPositions):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.stem = nn.Conv1d(1, 4, 1), nn.Identity()

    def forces(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(self.act(self.conv(x[:, None])).flatten(1)).sum()
        return -torch.autograd.grad(energy, x, create_graph=torch.is_grad_enabled())[0]


@pytest.mark.parametrize(
    "change", [None, parametrizations.weight_norm, parametrizations.orthogonal]
)
@pytest.mark.parametrize("kind", [Forces, ForcesOfPositions, ForcesOfAConvolution])
def test_weights_that_a_gradient_in_the_forward_pass_reads(
    kind: type[nn.Module], change: Callable[[nn.Module], nn.Module] | None
) -> None:
    """A layer's one call is on the graph, and yet not the only use of its weight."""
    model, x = two_layers(kind), inputs()
    name = "conv" if kind is ForcesOfAConvolution else "stem"
    if change is not None:
        change(model.get_submodule(name))
    words = {name: "a gradient that the forward pass takes", "energy": "a gradient"}
    scale = last_layer(model, "scale", x)
    left_out(model, x, words, scale)
    refused(model, x, f"'{name}' .*{words[name]}", layers=[name, "scale"])


def test_an_error_of_the_model_s_own_is_raised_once() -> None:
    class Fails(TwoLayers):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        bs.activation_moments(two_layers(Fails), inputs())
    assert Fails.calls == 1


# -- the user's own flags, modes and hooks ---------------------------------------------------------


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
)
def test_modes_around_a_measurement(context: Callable[[], Any]) -> None:
    model, x = mlp().float(), inputs().float()
    expected = bs.unit_fisher(model, x)
    with context():
        fishers = bs.unit_fisher(model, x.clone())
    assert all(torch.equal(fishers[name].matrix(), expected[name].matrix()) for name in expected)


@pytest.mark.parametrize(
    ("backend", "value"),
    [
        ("cuda.matmul", "tf32"),
        ("cudnn.conv", "ieee"),
        ("mkldnn.matmul", "bf16"),
        ("legacy", "medium"),
        ("all", "tf32"),
    ],
)
def test_precision_flags_of_both_generations(backend: str, value: str) -> None:
    flags = [
        (torch.backends.cuda, "matmul"),
        (torch.backends.cudnn, "conv"),
        (torch.backends.cudnn, "rnn"),
        (torch.backends.mkldnn, "matmul"),
    ]

    def state() -> list[str]:
        return [
            torch.backends.fp32_precision,
            *(getattr(module, name).fp32_precision for module, name in flags),
        ]

    found, model, x = state(), mlp().float(), inputs().float()
    expected = bs.unit_fisher(model, x)["2"].matrix()
    try:
        if backend == "legacy":
            torch.set_float32_matmul_precision(value)
        elif backend == "all":
            torch.backends.fp32_precision = value
        else:
            module, name = backend.split(".")
            getattr(getattr(torch.backends, module), name).fp32_precision = value
        before = state()
        assert torch.equal(bs.unit_fisher(model, x)["2"].matrix(), expected)
        assert state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = found[0]
        for (module, name), precision in zip(flags, found[1:], strict=True):
            getattr(module, name).fp32_precision = precision
    assert state() == found and torch.get_float32_matmul_precision() == "highest"


def test_backward_hooks_of_the_user_rest_and_come_back() -> None:
    """They may change gradients, which the model's function knows nothing of."""
    model, x, seen = mlp(), inputs(), []
    expected = bs.unit_fisher(model, x)
    handle = model[1].register_full_backward_hook(
        lambda module, before, after: (seen.append(1), (3 * before[0],))[1]
    )
    model[3].register_full_backward_pre_hook(lambda module, after: (2 * after[0],))
    fishers = bs.unit_fisher(model, x)
    assert not seen and all(
        torch.equal(fishers[name].matrix(), expected[name].matrix()) for name in expected
    )
    model(x).sum().backward()
    assert seen == [1] and len(model[1]._backward_hooks) == len(model[3]._backward_pre_hooks) == 1
    handle.remove()
    assert not model[1]._backward_hooks
    inplace = nn.Sequential(nn.Linear(5, 6), nn.ELU(inplace=True), nn.Linear(6, 3)).double()
    inplace[0].register_full_backward_hook(lambda *_: None)  # a training step with it raises
    assert list(bs.unit_fisher(inplace, x)) == ["0", "2"]


def test_forward_hooks_of_the_user_belong_to_the_function() -> None:
    """A hook that scales a layer's net inputs scales what the next layers see, not its weights."""
    model, x = mlp(), inputs()
    model[2].register_forward_hook(lambda module, args, output: output.mul_(3))
    model[4].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    for weight_sharing in ("per_example", "expand"):
        assert bs.check(model, x, weight_sharing=weight_sharing)["error"].max() < 1e-12


def test_parameters_made_in_inference_mode_are_an_error_with_their_name() -> None:
    with torch.inference_mode():
        model = mlp()
    refused(model, inputs(), r"'0\.weight'.*inference_mode")
    assert list(bs.activation_moments(model, inputs())) == ["1", "3"]


def test_weights_that_are_not_floating_are_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3)).double()
    model.register_parameter(
        "scale", nn.Parameter(torch.ones(1, dtype=torch.int8), requires_grad=False)
    )
    assert list(bs.unit_fisher(model, inputs())) == ["0", "2"] and not model.scale.requires_grad
    model[2].weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    refused(model, inputs(), "'2'.*int8")


def test_weights_that_are_not_here_are_refused() -> None:
    model = mlp()
    model[2].weight = nn.Parameter(model[2].weight.detach().flatten())
    refused(model, inputs(), "'2'.*sharded")
    refused(mlp().to("meta"), inputs().to("meta"), r"'0\.weight'.*meta")


def test_outputs_without_gradients_are_refused() -> None:
    class Detached(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    refused(two_layers(Detached), inputs(), "no gradients")


def test_buffers_that_the_model_changes_in_eval_mode() -> None:
    class Caching(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            outputs = super().forward(x)
            self.last = outputs.detach()[-1]
            return outputs

    model = two_layers(Caching).eval()
    calls, last = model.calls, model.last
    bs.unit_fisher(model, inputs())
    bs.activation_moments(model, inputs())
    assert model.calls is calls and model.last is last and float(calls) == 0 and not last.any()


def test_sparse_buffers() -> None:
    """The neighbors of a graph's nodes, for example."""

    class Graph(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("neighbors", torch.eye(5).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.sparse.mm(self.neighbors, x.T).T)

    right(two_layers(Graph), inputs(), two_layers())


def test_half_precision_and_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    x = inputs(6, 2, 5, 5)
    expected = bs.unit_fisher(model, x)
    strided = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for name, fisher in bs.unit_fisher(strided, x.to(memory_format=torch.channels_last)).items():
        torch.testing.assert_close(fisher.matrix(), expected[name].matrix(), rtol=1e-12, atol=1e-12)
    for name, fisher in bs.unit_fisher(model.bfloat16(), x.bfloat16()).items():
        assert fisher.c.dtype == torch.bfloat16 and torch.allclose(
            fisher.c.double(), expected[name].c, rtol=0.1
        )


# -- sampled labels and their standard error -------------------------------------------------------


@sharing
@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_the_standard_error_of_sampled_labels(likelihood: str, weight_sharing: str) -> None:
    """Its square is the variance of mean_delta2 over repetitions, in the mean.

    The estimates lie around the exact value.
    """
    model, x = mlp(), inputs(12, 5)
    exact = bs.unit_fisher(model, x, likelihood=likelihood)["2"].c
    fishers = []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        options = {
            "likelihood": likelihood,
            "weight_sharing": weight_sharing,
            "generator": generator,
            "layers": ["2"],
        }
        fishers.append(
            bs.unit_fisher(model, x, labels="sampled", draws=4, batch_size=5, **options)["2"]
        )
    estimates = torch.stack([fisher.c for fisher in fishers])
    errors = torch.stack([fisher.standard_error for fisher in fishers])
    spread = estimates.std(0)
    assert bool(((estimates.mean(0) - exact).abs() < 5 * spread / 10).all())
    # 5 standard errors of a spread of 100
    torch.testing.assert_close(errors.square().mean(0).sqrt(), spread, rtol=0.35, atol=0)


def test_the_standard_error_merges_and_knows_its_limits() -> None:
    model, x = mlp(), inputs(12, 5)

    def measure(part: Tensor, **options: Any) -> bs.UnitFisher:
        return bs.unit_fisher(model, part, layers=["2"], **options)["2"]

    assert not measure(x).standard_error.any()  # nothing was drawn
    # one draw does not show its spread
    assert bool(measure(x, labels="sampled").standard_error.isnan().all())
    halves = [
        measure(part, labels="sampled", draws=3, generator=torch.Generator().manual_seed(i))
        for i, part in enumerate(x.split(6))
    ]
    together = (halves[0] + halves[1]).standard_error
    torch.testing.assert_close(
        together, torch.stack([h.standard_error / 2 for h in halves]).square().sum(0).sqrt()
    )
    torch.testing.assert_close(halves[0].damped(1.0).standard_error, halves[0].standard_error)
    many = measure(x, labels="sampled", draws=400)
    assert bool(((many.c - measure(x).c).abs() < 5 * many.standard_error).all())
    with pytest.raises(ValueError, match="draws"):
        measure(x, labels="sampled", draws=0)
