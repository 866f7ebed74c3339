"""`check`: covered layers are compared by a second route, which finds planted errors.

Other layers have a reason, and no model that runs is an error.
"""

import copy
import threading
import warnings
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, CASES, Case, Checkpointed, SequenceFirst, Windows, pristine
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import biasshift as bs
from biasshift.measure import layer_types, likelihoods
from biasshift.measure.options import Options
from biasshift.measure.probe import Batch
from biasshift.verification import reference

DOUBLE = torch.float64
COLUMNS = ["module", "kind", "covered", "reason", "calls", "units", "inputs", "error"]


def rows(
    model: nn.Module, x: Tensor, y: Tensor | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    return bs.check(model, x, y, **options).set_index("module").to_dict("index")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.ELU(), nn.Linear(6, 4), nn.ELU(), nn.Linear(4, 3)
    ).double()


def inputs(examples: int = 9) -> Tensor:
    return torch.randn(examples, 5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE) + 0.5


# -- the second opinion against the tests' own oracle ----------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
def test_the_second_opinion_is_the_oracle(case: Case, weight_sharing: str) -> None:
    model, x, y = case.build()
    x, y = x[:3], y[:3]
    for labels in (None, y):
        blocks = oracles.unit_fishers(model, x, case.likelihood, weight_sharing, labels)
        units = {name: torch.arange(len(block.F)) for name, block in blocks.items()}
        vectors = {
            name: torch.eye(block.F.shape[-1], dtype=DOUBLE).expand_as(block.F)
            for name, block in blocks.items()
        }
        options = Options(
            "expected" if labels is None else "empirical", case.likelihood, weight_sharing
        )
        products = reference.products(
            copy.deepcopy(model), units, vectors, Batch(x, labels), options
        )
        for name, block in blocks.items():
            tolerance = 1e-12 * float(block.F.abs().max())
            torch.testing.assert_close(products[name], block.F, rtol=0, atol=tolerance)


# -- the table -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
def test_every_covered_layer_is_right(case: Case, weight_sharing: str) -> None:
    model, x, y = case.build()
    table = bs.check(model, x, y, likelihood=case.likelihood, weight_sharing=weight_sharing)
    assert list(table.columns) == COLUMNS
    assert table["module"].tolist() == [name for name, _ in model.named_modules()]
    layers = {
        name: module for name, module in model.named_modules() if layer_types.is_covered(module)
    }
    covered = table[table["covered"]].set_index("module")
    assert list(covered.index) == list(layers)
    assert (covered["error"] < 1e-10).all()
    assert (covered["reason"] == "").all() and (covered["calls"] > 0).all()
    for name, module in layers.items():
        units, inputs = covered.loc[name, "units"], covered.loc[name, "inputs"]
        assert (units, inputs) == tuple(module.weight.flatten(1).shape)


def test_calls_are_counted() -> None:
    model, x, _ = BY_NAME["shared"].build()
    assert {name: row["calls"] for name, row in rows(model, x).items()} == {
        "": 1,
        "stem": 1,
        "twice": 2,
        "head": 1,
    }


def test_many_outputs_and_large_layers_are_compared_in_part() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 300), nn.ELU(), nn.Linear(300, 40)).double()
    x = torch.randn(5, 20, dtype=DOUBLE)
    for likelihood in ("categorical", "gaussian", "bernoulli"):
        table = rows(model, x, likelihood=likelihood)
        assert all(0 < table[name]["error"] < 1e-12 for name in ("0", "2"))


def test_a_model_in_single_precision_is_compared_in_double() -> None:
    assert all(
        row["error"] < 1e-12
        for row in rows(mlp().float(), inputs().float()).values()
        if row["covered"]
    )


def test_a_model_that_fixes_its_precision_is_compared_in_it() -> None:
    class Single(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    table = rows(Single(*mlp().float()), inputs().float())
    assert all(1e-12 < row["error"] < 1e-4 for row in table.values() if row["covered"])


def test_batches_are_read_and_the_arguments_checked() -> None:
    model, x = mlp(), inputs()
    y = torch.arange(9) % 3
    assert bs.check(model, [(x[:5], y[:5]), (x[5:], y[5:])]).equals(bs.check(model, x, y))
    for options, word in (
        ({"examples": 0}, "examples"),
        ({"likelihood": "poisson"}, "likelihood"),
        ({"weight_sharing": "reduce"}, "weight_sharing"),
    ):
        with pytest.raises((ValueError, TypeError), match=word):
            bs.check(model, x, **options)


# -- a planted error is seen -----------------------------------------------------------------------


@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
def test_a_wrong_patch_is_seen(monkeypatch: pytest.MonkeyPatch, weight_sharing: str) -> None:
    right = layer_types.patches
    monkeypatch.setattr(layer_types, "patches", lambda *arguments: right(*arguments).flip(-1))
    model, x, _ = BY_NAME["conv-strided"].build()
    table = rows(model, x, weight_sharing=weight_sharing)
    assert table["0"]["error"] > 1e-2 and table["0"]["covered"]


def test_a_wrong_label_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        likelihoods,
        "_expected",
        lambda outputs, likelihood, kept=None: likelihoods.seeds(
            outputs, likelihood, "sampled", None, None
        ),
    )
    table = rows(mlp(), inputs())
    assert all(table[name]["error"] > 1e-2 for name in ("0", "2", "4"))


def test_a_wrong_unit_order_of_a_transposed_convolution_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = layer_types.errors
    monkeypatch.setattr(
        layer_types, "errors", lambda module, delta: right(module, delta).roll(1, -1)
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(100, 3)
    ).double()
    assert rows(model, torch.randn(4, 2, 3, 3, dtype=DOUBLE))["0"]["error"] > 1e-2


# -- why not ---------------------------------------------------------------------------------------


def test_batchnorm_in_training_mode_refuses_every_layer_and_is_named() -> None:
    model, x, _ = BY_NAME["batchnorm-eval"].build()
    table = rows(model.train(), x)
    assert not any(row["covered"] for row in table.values())
    for name in ("0", "1", "4", "5", "6"):
        reason = table[name]["reason"]
        assert "statistics of its batch" in reason and "eval()" in reason
    assert "'1' (BatchNorm2d)" in table["0"]["reason"]
    assert table["2"]["reason"] == "no layer with units"


def test_tied_parameters_are_named_on_both_sides() -> None:
    model = nn.Sequential(
        nn.Linear(5, 5), nn.ELU(), nn.Linear(5, 5), nn.ELU(), nn.Linear(5, 3)
    ).double()
    model[2].weight = model[0].weight
    table = rows(model, inputs())
    assert "'2'" in table["0"]["reason"] and "'0'" in table["2"]["reason"]
    assert not table["0"]["covered"] and not table["2"]["covered"] and table["4"]["error"] < 1e-12


def test_layers_that_do_not_run_or_run_inside_a_function() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 4)
            self.inside = nn.Linear(4, 4)
            self.product = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.elu(self.stem(x))
            h = F.elu(F.linear(h, self.inside.weight, self.inside.bias))
            return self.head(F.elu(h @ self.product.weight.t() + self.product.bias))

    torch.manual_seed(0)
    table = rows(Strange().double(), inputs())
    product = table["product"]
    assert "not called as a module: its weight is used inside a function" in product["reason"]
    assert "not called in the forward pass" in table["unused"]["reason"] and product["calls"] == 0
    for name in ("stem", "inside", "head"):
        assert table[name]["error"] < 1e-12 and table[name]["calls"] == 1


@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
@pytest.mark.parametrize("kind", [Windows, SequenceFirst])
@pytest.mark.parametrize("examples", [1, 4, 6])
def test_windows_and_sequences_are_right(
    kind: type[nn.Module], examples: int, weight_sharing: str
) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(examples, 4, 3, dtype=DOUBLE)
    table = rows(model, x, weight_sharing=weight_sharing)
    assert all(table[name]["error"] < 1e-12 for name in ("inner", "head"))


def test_rows_whose_examples_depend_on_the_batch_are_refused_per_example() -> None:
    class Sorted(Windows):
        def forward(self, x: Tensor) -> Tensor:
            rows = torch.cat([x, x])
            order = rows[:, 0].argsort()
            h = F.elu(self.inner(rows[order]))[order.argsort()]
            return self.head(h[: len(x)] + h[len(x) :])

    torch.manual_seed(0)
    model, x = Sorted().double(), torch.randn(6, 3, dtype=DOUBLE)
    table, expanded = rows(model, x), rows(model, x, weight_sharing="expand")
    reason = table["inner"]["reason"]
    assert "rows" in reason and "12 rows" not in reason  # of the few examples that are checked
    assert not table["inner"]["covered"] and table["head"]["error"] < 1e-12
    assert all(expanded[name]["error"] < 1e-12 for name in ("inner", "head"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    torch.manual_seed(0)
    table = rows(Checkpointed(reentrant).double(), inputs())
    for name in ("stem", "block.0", "block.2"):
        row = table[name]
        assert ("checkpoint" in row["reason"]) == reentrant and row["covered"] != reentrant
        assert reentrant or row["error"] < 1e-12
    assert table["head"]["error"] < 1e-12


@pytest.mark.parametrize(
    ("model", "x", "name", "word"),
    [
        (nn.Sequential(nn.LazyLinear(3)), torch.randn(4, 5), "0", "no shape"),
        (
            nn.Sequential(nn.Linear(5, 3, dtype=torch.complex64)),
            torch.randn(4, 5, dtype=torch.complex64),
            "0",
            "complex64",
        ),
        (nn.Sequential(nn.Bilinear(5, 5, 3)), None, "0", "vector of incoming"),
        (nn.LSTM(5, 3, batch_first=True), torch.randn(4, 6, 5), "", "taken apart"),
        (
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval(),
            torch.randn(3, 5, 4),
            "self_attn",
            "taken apart",
        ),
    ],
    ids=["lazy", "complex", "bilinear", "lstm", "attention"],
)
def test_kinds_that_are_not_covered(
    model: nn.Module, x: Tensor | None, name: str, word: str
) -> None:
    if x is None:
        x, inner = torch.randn(4, 5), model[0]
        model = nn.Module()
        model.add_module("0", inner)
        model.forward = lambda z: inner(z, z)
    table = rows(model, x)
    assert not table[name]["covered"] and word in table[name]["reason"]


def test_weights_of_an_unknown_kind_are_pointed_at() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.offset = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel + self.offset

    table = rows(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), Dense()).double(), inputs())
    assert table["2"]["reason"] == "a kind that is not known: kernel may be the weights of units"
    assert table["1"]["reason"] == "no layer with units" and table["0"]["error"] < 1e-12


# -- it never raises for a model that runs ---------------------------------------------------------


def test_a_function_that_torch_func_cannot_run_is_compared_by_a_loop() -> None:
    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            # depends on the data: no vmap, neither in torch.func nor in the hooks
            return g * (ctx.saved_tensors[0] > 0) if float(g.abs().sum()) >= 0 else g

    class Custom(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](Step.apply(self[0](x)))

    torch.manual_seed(0)
    model = Custom(nn.Linear(5, 6), nn.Linear(6, 3)).double()
    for weight_sharing in ("per_example", "expand"):
        assert all(
            rows(model, inputs(), weight_sharing=weight_sharing)[name]["error"] < 1e-12
            for name in ("0", "1")
        )
    plain = nn.Sequential(copy.deepcopy(model[0]), nn.ReLU(), copy.deepcopy(model[1]))
    assert torch.equal(
        bs.unit_fisher(model, inputs())["0"].matrix(), bs.unit_fisher(plain, inputs())["0"].matrix()
    )


def test_a_flow_of_control_that_depends_on_the_data() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(5, 1)
            self.one = nn.Linear(5, 4)
            self.other = nn.Linear(5, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = []
            for row in x.split(1):
                hidden.append(F.elu(self.one(row) if self.gate(row) > 0 else self.other(row)))
            return self.head(torch.cat(hidden))

    torch.manual_seed(0)
    table = rows(Branches().double(), inputs(), weight_sharing="expand", examples=6)
    assert all(table[name]["error"] < 1e-12 for name in ("one", "other", "head"))
    # one row a call: which example is it?
    assert rows(Branches().double(), inputs())["one"]["covered"] is False


def test_models_that_cannot_be_compared_say_so() -> None:
    class Fixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(4, 5))

    table = rows(Fixed(*mlp()), inputs())
    row = table["0"]
    assert row["covered"] and row["reason"].startswith("not compared: ")
    assert row["error"] != row["error"]
    model = mlp()
    model.lock = threading.Lock()
    reason = rows(model, inputs())["0"]["reason"]
    assert reason.startswith("not compared: the model cannot be copied")
    pristine(model)


def test_outputs_and_inputs_of_other_kinds() -> None:
    class Dictionary(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            outputs = super().forward(x)
            return {"first": outputs, "second": 2 * outputs}

    assert "dict" in rows(Dictionary(*mlp()), inputs())["0"]["reason"]
    chosen = rows(Dictionary(*mlp()), inputs(), output="second")
    assert all(chosen[name]["error"] < 1e-12 for name in ("0", "2", "4"))
    with torch.inference_mode():
        built, x = mlp(), inputs()
        assert "inference_mode" in rows(built, x)["0"]["reason"]
    model = mlp()
    with torch.inference_mode():
        assert all(rows(model, x)[name]["error"] < 1e-12 for name in ("0", "2", "4"))
        assert torch.is_inference_mode_enabled()


def parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(model[0])
    parametrizations.orthogonal(model[2])


def pruned(model: nn.Module) -> None:
    prune.random_unstructured(model[0], "weight", amount=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[2])


@pytest.mark.parametrize("change", [parametrized, pruned])
@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
def test_weights_that_are_made_of_parameters(change: Any, weight_sharing: str) -> None:
    model, x = mlp(), inputs()
    change(model)
    model(x)  # leaves weights behind that cannot be copied
    for labels in (None, torch.arange(9) % 3):
        table = rows(model, x, labels, weight_sharing=weight_sharing)
        assert all(table[name]["error"] < 1e-12 for name in ("0", "2", "4"))
    single = mlp().float()
    change(single)
    single(x.float())
    table = rows(single, x.float(), weight_sharing=weight_sharing)
    assert all(table[name]["error"] < 1e-12 for name in ("0", "2", "4"))


def test_hooks_of_the_user_are_a_part_of_the_model_in_both_routes() -> None:
    model, x = mlp(), inputs()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,))
    model[2].register_forward_hook(lambda module, args, output: output.mul_(3))
    for weight_sharing in ("per_example", "expand"):
        assert all(
            row["error"] < 1e-12
            for row in rows(model, x, weight_sharing=weight_sharing).values()
            if row["covered"]
        )


# -- as found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
def test_the_model_is_left_as_found(weight_sharing: str) -> None:
    model, x, y = BY_NAME["batchnorm-eval"].build()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].weight.requires_grad_(False)
    before = {
        name: (id(t), t._version, t.requires_grad, t.clone())
        for name, t in model.state_dict(keep_vars=True).items()
    }
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    bs.check(model, x, y, weight_sharing=weight_sharing)
    for name, tensor in model.state_dict(keep_vars=True).items():
        identity, value = before[name][:3], before[name][3]
        assert (id(tensor), tensor._version, tensor.requires_grad) == identity
        assert torch.equal(tensor, value)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    pristine(model)


class Doubled(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def spectral(model: nn.Module) -> None:
    parametrizations.spectral_norm(model[0])


def doubled(model: nn.Module) -> None:
    parametrize.register_parametrization(model[0], "weight", Doubled())
    parametrize.register_parametrization(model[0], "weight", Doubled())
    parametrize.register_parametrization(model[0], "bias", Doubled())
    parametrize.register_parametrization(model[4], "bias", Doubled())


def small_convolution() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 4, 2), nn.ELU(), nn.Conv1d(4, 3, 2, bias=False), nn.Flatten(), nn.Linear(9, 3)
    ).double()


@pytest.mark.parametrize("change", [parametrized, spectral, doubled])
@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_parametrized_models_and_their_copies_run_and_train_as_before(
    change: Any, weight_sharing: str, training: bool, kind: str
) -> None:
    """The class of a parametrized layer belongs to all copies of the model."""
    model, x, y = (
        (mlp() if kind == "linear" else small_convolution()),
        inputs(),
        torch.arange(9) % 3,
    )
    x = x if kind == "linear" else x[:, None]
    change(model)
    model.train(training)
    never_checked = copy.deepcopy(model)
    earlier, classes = copy.deepcopy(model), [type(module) for module in model.modules()]
    members = [dict(vars(cls)) for cls in classes]
    table = rows(model, x, weight_sharing=weight_sharing)
    assert all(row["error"] < 1e-12 for row in table.values() if row["units"])
    assert [type(module) for module in model.modules()] == classes
    assert [dict(vars(cls)) for cls in classes] == members
    later = copy.deepcopy(model)
    rows(later, x, weight_sharing=weight_sharing)
    trained = []
    for network in (never_checked, model, earlier, later):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
        trained.append(network.state_dict())
    for state in trained[1:]:
        assert list(state) == list(trained[0])
        assert all(torch.equal(value, trained[0][name]) for name, value in state.items())


@pytest.mark.parametrize("change", [parametrized, spectral, doubled])
@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
def test_the_second_opinion_of_parametrized_weights_is_the_oracle(
    change: Any, weight_sharing: str
) -> None:
    model, plain, x = mlp(), mlp(), inputs(3)
    change(model)
    model.eval()
    with torch.no_grad():
        for layer, parametrized_layer in zip(plain[::2], model[::2], strict=True):
            layer.weight.copy_(parametrized_layer.weight)
            layer.bias.copy_(parametrized_layer.bias)
    blocks = oracles.unit_fishers(plain, x, weight_sharing=weight_sharing)
    units = {name: torch.arange(len(block.F)) for name, block in blocks.items()}
    vectors = {n: torch.eye(b.F.shape[-1], dtype=DOUBLE).expand_as(b.F) for n, b in blocks.items()}
    options = Options(weight_sharing=weight_sharing)
    products = reference.products(copy.deepcopy(model), units, vectors, Batch(x), options)
    for name, block in blocks.items():
        tolerance = 1e-12 * float(block.F.abs().max())
        torch.testing.assert_close(products[name], block.F, rtol=0, atol=tolerance)
