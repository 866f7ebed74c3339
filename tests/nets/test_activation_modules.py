"""Activation modules from names, import paths and classes, and networks that are built of them."""

import sys

import pytest
import torch
from torch import nn

import biasshift as bs
from biasshift.activations import ACTIVATIONS
from biasshift.nets import autoencoder, cifar11, imagenet15, mlp
from biasshift.nets.activation_modules import activation_constructor, activation_module

MODULE = """
import torch
from torch import nn

class Squash(nn.Module):
    def forward(self, x):
        return x / (1 + x.abs())

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))
    def forward(self, x):
        return self.scale * x.relu()

class InPlace(nn.Module):
    def forward(self, x):
        return x.relu_()

class NeedsWidth(nn.Module):
    def __init__(self, width):
        super().__init__()

class Fails(nn.Module):
    def __init__(self):
        raise RuntimeError("no luck\\nat all")

class Ends(nn.Module):
    def __init__(self):
        raise SystemExit(3)

class Halves(nn.Module):
    def forward(self, x):
        return x[:, ::2]

class Casts(nn.Module):
    def forward(self, x):
        return x.float()

class Detached(nn.Module):
    def forward(self, x):
        return x.detach()

class Pair(nn.Module):
    def forward(self, x):
        return x, x

class Flat(nn.Module):
    def forward(self, x):
        rows, columns = x.shape
        return x * 1

class NoModule:
    pass

def make():
    return Squash()

one = Squash()
def same():
    return one

parameter = nn.Parameter(torch.ones(()))
def shared():
    module = Scaled()
    module.scale = parameter
    return module

def number():
    return 3

def with_an_argument(width):
    return Squash()

value = 3
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    (tmp_path / "planted_acts.py").write_text(MODULE)
    (tmp_path / "planted_script.py").write_text("raise SystemExit(7)")
    (tmp_path / "planted_broken.py").write_text("import nothing_of_that_name")
    (tmp_path / "planted_wrong.py").write_text("def (:")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("planted_")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["Squash", "Scaled", "InPlace", "make"])
def test_modules_by_import_path(planted, name):
    before = torch.get_rng_state()
    make = activation_constructor(f"planted_acts:{name}")
    assert torch.equal(before, torch.get_rng_state())
    assert isinstance(make(), nn.Module) and make() is not make()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("planted_acts:NeedsWidth", r"take no arguments, got TypeError .*'width'"),
        ("planted_acts:with_an_argument", r"take no arguments, got TypeError .*'width'"),
        ("planted_acts:Fails", r"made without arguments, got RuntimeError \(no luck\)\."),
        ("planted_acts:Ends", r"made without arguments, got SystemExit \(3\)"),
        ("planted_acts:Halves", r"keep shape and dtype, got \(2, 2\) and torch.float32"),
        ("planted_acts:Casts", r"keep shape and dtype, got \(2, 3\) and torch.float32 for .*64"),
        ("planted_acts:Detached", "be differentiable"),
        ("planted_acts:Pair", "keep shape and dtype, got of kind tuple|got the tuple"),
        ("planted_acts:Flat", r"applicable to tensors of shape \(2, 3, 4, 4\)"),
        ("planted_acts:NoModule", "a class of nn.Module, .*, got the type 'NoModule'"),
        ("planted_acts:value", "a class of nn.Module, .*, got .*int"),
        ("planted_acts:one", "be a class, got one module, which layers would share"),
        ("planted_acts:same", "return a new module on every call"),
        ("planted_acts:shared", "return a new module on every call"),
        ("planted_acts:number", "must return an nn.Module, got .*int"),
        ("planted_acts:Nothing", r"'planted_acts' has no 'Nothing'\. Check its spelling"),
        ("planted_script:X", r"be importable, got SystemExit \(7\)"),
        ("planted_broken:X", "be importable, got ModuleNotFoundError .*nothing_of_that_name"),
        ("planted_wrong:X", "be importable, got SyntaxError"),
        ("no_such_module:X", "be importable, got ModuleNotFoundError"),
        ("torch.nn:Linear", "take no arguments"),
        ("torch.nn:LazyLinear", "take no arguments"),
        ("torch.nn:LazyBatchNorm1d", "a lazy module"),
        ("torch.nn:Module", "got NotImplementedError"),
    ],
)
def test_what_was_named_is_checked(planted, path, words):
    with pytest.raises(ValueError, match=words) as caught:
        activation_module(path)
    assert str(caught.value).startswith(f"'activation' '{path}' must ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["os:system", "builtins:eval", "sys:exit", "os:abort", "os:fork"])
def test_functions_that_are_not_of_python_are_not_called(path):
    with pytest.raises(ValueError, match=r"a class of nn\.Module, or a function"):
        activation_module(path)


def test_classes_and_functions():
    assert isinstance(mlp(4, 3, 1, activation=nn.Hardswish)[1], nn.Hardswish)
    net = mlp(4, 3, 2, activation=lambda: nn.Threshold(0.1, 0.0))
    assert net[1] is not net[3] and net[1].threshold == 0.1
    with pytest.raises(ValueError, match="got one module, which layers would share"):
        mlp(4, activation=nn.Tanh())  # pyright: ignore[reportArgumentType]


BUILDERS = {
    "mlp": lambda name, seed=3: mlp(20, 8, 3, activation=name, seed=seed),
    "autoencoder": lambda name, seed=3: autoencoder(name, seed, width=0.05),
    "cifar11": lambda name, seed=3: cifar11(name, seed, 4, width=0.03),
    "imagenet15": lambda name, seed=3: imagenet15(name, seed, 4, width=0.01),
}
# hidden layers that have an activation
ACTIVE = {"mlp": 3, "autoencoder": 6, "cifar11": 10, "imagenet15": 14}


@pytest.mark.parametrize("builder", BUILDERS)
def test_parameters_of_activations_count_and_weights_stay(planted, builder):
    build = BUILDERS[builder]
    relu, prelu = build("relu"), build("prelu")
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in
             (("relu", relu), ("prelu", prelu))}  # fmt: skip
    assert count["prelu"] - count["relu"] == ACTIVE[builder]
    slopes = [module.weight for module in prelu.modules() if isinstance(module, nn.PReLU)]
    assert len(slopes) == ACTIVE[builder] and len({id(slope) for slope in slopes}) == len(slopes)
    for name in [*ACTIVATIONS, "elu:0.5", "lrelu:0.01", "planted_acts:Scaled"]:
        state = build(name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in relu.state_dict().items())


def test_what_constructors_draw_follows_the_seed(planted):
    before = torch.get_rng_state()
    one, again, other = (mlp(4, 3, 2, activation="planted_acts:Scaled", seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert one[1].scale == again[1].scale and one[1].scale != one[3].scale != other[1].scale


@pytest.mark.parametrize("name", [*ACTIVATIONS, "elu:0.5", "torch.nn:Hardswish"])
def test_everything_is_measured_with_each(name):
    """Every layer is covered, and agrees with `torch.func`; all activation modules are measured."""
    model = mlp(6, 5, 2, 3, activation=name, seed=1)
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    table = bs.check(model, x)
    weights = table[table["module"].isin(["0", "2", "4"])] if "module" in table else table
    assert len(weights) >= 3
    assert set(bs.activation_moments(model, x)) == {"1", "3"}
    fishers = bs.unit_fisher(model, x)
    assert list(fishers) == ["0", "2", "4"]
    # the incoming mean of layer "2" is that of the outputs of the activation
    a = model[1](model[0](x))
    torch.testing.assert_close(fishers["2"].mean_p.float(), a.mean(0).detach())
