"""Modules that are taken apart: names, selection, refusals, and everything left as it was found."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from composite_oracles import blocks_by_parameters
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import biasshift as bs
from biasshift.measure import composites, layer_types
from biasshift.measure.sandbox import undisturbed

pytestmark = pytest.mark.filterwarnings("ignore:Too few effective samples")

E = 4
PARTS = [f"attn.{name}_proj" for name in ("q", "k", "v", "out")]


class Attentive(nn.Module):
    def __init__(self, attn: nn.MultiheadAttention | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(E, 2, batch_first=True) if attn is None else attn
        self.gru, self.head = nn.GRU(E, 3, batch_first=True), nn.Linear(3, 3)
        self.double().eval()

    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.mix(x))[0].mean(1))


def probe(examples: int = 3) -> Tensor:
    return torch.randn(examples, 5, E).double()


def assert_right(model: nn.Module, x: Tensor, attn: str = "attn") -> None:
    """The projections' blocks, against the module's own parameters."""
    fishers = bs.unit_fisher(model, x)
    at = {
        f"{attn}.{p}_proj": (f"{attn}.in_proj_weight", f"{attn}.in_proj_bias", i * E)
        for i, p in enumerate("qkv")
    }
    for layer, block in blocks_by_parameters(model, at, dict.fromkeys(at, E), x).items():
        size = block.abs().max()
        assert size > 0 and (fishers[layer].matrix() - block).abs().max() <= 1e-10 * size, layer


# -- names and selection ---------------------------------------------------------------------------


def test_layers_follow_their_owner_and_can_be_selected() -> None:
    model, x = Attentive(), probe()
    every = [*PARTS, "gru.ih_l0", "gru.hh_l0", "head"]
    assert list(layer_types.weight_layers(model)) == every == list(bs.unit_fisher(model, x))
    one = bs.unit_fisher(model, x, layers="attn.k_proj")
    few = bs.unit_fisher(model, x, layers=lambda name, module: name.endswith("hh_l0"), units=[1])
    assert list(one) == ["attn.k_proj"] and few["gru.hh_l0"].mean_q.shape == (1, 3)
    assert list(bs.unit_fisher(model, x, layers=lambda n, m: isinstance(m, nn.Linear))) == every
    by_part = bs.unit_fisher(model, x, units={"attn.q_proj": [0, 2]})
    assert len(by_part["attn.q_proj"].mean_q) == 2 and len(by_part["attn.k_proj"].mean_q) == E
    alone = bs.unit_fisher(
        nn.GRU(2, 3, batch_first=True), torch.randn(4, 5, 2), output=0, class_axis=2
    )
    assert list(alone) == ["ih_l0", "hh_l0"]


def test_an_owner_is_not_a_layer() -> None:
    with pytest.raises(ValueError, match=r"'attn'.*'attn\.q_proj', .*'attn\.out_proj'"):
        bs.unit_fisher(Attentive(), probe(), layers=["attn"])
    with pytest.raises(ValueError, match=r"'attn\.p_proj'.*'attn\.q_proj'"):
        bs.unit_fisher(Attentive(), probe(), layers=["attn.p_proj"])


def test_skip_reaches_into_owners() -> None:
    assert list(bs.unit_fisher(Attentive(), probe(), skip=["attn", "gru.hh_l0"])) == [
        "gru.ih_l0",
        "head",
    ]


def test_check_lists_owner_and_layers() -> None:
    table = bs.check(Attentive(), probe()).set_index("module")
    assert list(table.index) == ["", "attn", *PARTS, "gru", "gru.ih_l0", "gru.hh_l0", "head"]
    assert "taken apart" in table.reason["attn"] and not table.covered["gru"]
    assert (table.error[[*PARTS, "gru.ih_l0", "gru.hh_l0", "head"]] < 1e-12).all()


# -- forwards of somebody's own --------------------------------------------------------------------


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x, x, x, need_weights=False)[0]


class WithOwn(Attentive):
    def mix(self, x: Tensor) -> Tensor:
        return self.attn(x)


def test_a_subclass_that_calls_its_base() -> None:
    assert_right(WithOwn(SelfAttention(E, 2, batch_first=True)), probe())


class ByFunction(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v))


def test_a_subclass_that_does_not() -> None:
    model = WithOwn(ByFunction(E, 2, batch_first=True))
    with pytest.raises(ValueError, match=r"'attn\.q_proj'.*inside a function"):
        bs.unit_fisher(model, probe(), layers=["attn.q_proj"])
    assert "attn.out_proj" in bs.unit_fisher(model, probe(), layers=["attn.out_proj", "head"])


class UsedElsewhere(Attentive):
    """One third of the packed weight is also used in a function."""

    def mix(self, x: Tensor) -> Tensor:
        return super().mix(x) + x @ self.attn.in_proj_weight[E : 2 * E]


def test_rows_that_are_used_in_a_function_too_are_refused() -> None:
    model = UsedElsewhere()
    with pytest.raises(ValueError, match=r"'attn\.k_proj'.*2 uses, but 1 call"):
        bs.unit_fisher(model, probe(), layers=["attn.k_proj"])
    assert set(bs.unit_fisher(model, probe(), layers=["attn.q_proj", "attn.v_proj"])) == {
        "attn.q_proj",
        "attn.v_proj",
    }


def test_tied_weights_are_refused() -> None:
    model = Attentive()
    model.other = nn.MultiheadAttention(E, 2, batch_first=True).double()
    model.other.in_proj_weight = model.attn.in_proj_weight
    model.mix = lambda x: Attentive.mix(model, x) + model.other(x, x, x)[0]
    with pytest.raises(ValueError, match=r"'attn\.k_proj'.*in_proj_weight is tied to.*'other'"):
        bs.unit_fisher(model, probe(), layers=["attn.k_proj"])
    net = nn.RNN(3, 3, num_layers=2, batch_first=True)
    net.weight_hh_l1 = net.weight_hh_l0
    with pytest.raises(ValueError, match=r"'hh_l0' .*cannot be measured"):
        bs.unit_fisher(net, torch.randn(2, 5, 3), layers=["hh_l0"], output=0, class_axis=2)


def test_a_module_that_runs_twice() -> None:
    class Twice(Attentive):
        def mix(self, x: Tensor) -> Tensor:
            return super().mix(super().mix(x).tanh())

    assert_right(Twice(), probe())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint(reentrant: bool) -> None:
    class Checkpointed(Attentive):
        def mix(self, x: Tensor) -> Tensor:
            return checkpoint(super().mix, x, use_reentrant=reentrant)

    model = Checkpointed()
    if reentrant:
        with pytest.raises(ValueError, match=r"'attn\.q_proj'.*checkpoint"):
            bs.unit_fisher(model, probe(), layers=["attn.q_proj"])
    else:
        assert_right(model, probe())


def test_a_parametrized_owner() -> None:
    model, plain, x = Attentive(), Attentive(), probe()
    parametrizations.spectral_norm(model.attn, "in_proj_weight")
    parametrizations.weight_norm(model.gru, "weight_hh_l0")
    vectors = [b.clone() for b in model.buffers()]
    plain.attn.in_proj_weight.data = model.attn.in_proj_weight.detach().clone()
    plain.gru.weight_hh_l0.data = model.gru.weight_hh_l0.detach().clone()
    found, expected = bs.unit_fisher(model, x), bs.unit_fisher(plain, x)
    for layer, fisher in expected.items():
        torch.testing.assert_close(found[layer].matrix(), fisher.matrix())
    assert all(map(torch.equal, vectors, model.buffers()))
    assert parametrize.is_parametrized(model.attn, "in_proj_weight")
    table = bs.check(model, x).set_index("module")
    assert (table.error[[*PARTS, "gru.hh_l0"]] < 1e-10).all(), table.to_string()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weights_that_hooks_compute_before_every_call() -> None:
    model, plain, x = Attentive(), Attentive(), probe()
    nn.utils.weight_norm(model.gru, "weight_hh_l0")
    prune.l1_unstructured(model.attn, "in_proj_weight", amount=0.3)
    with torch.no_grad():
        model.gru.weight_hh_l0_g.mul_(2)
        plain.gru.weight_hh_l0.mul_(2)
        plain.attn.in_proj_weight.mul_(model.attn.in_proj_weight_mask)
    found, expected = bs.unit_fisher(model, x), bs.unit_fisher(plain, x)
    for layer, fisher in expected.items():
        torch.testing.assert_close(found[layer].matrix(), fisher.matrix())
    table = bs.check(model, x).set_index("module")
    assert (table.error[[*PARTS, "gru.hh_l0"]] < 1e-10).all(), table.to_string()


@pytest.mark.parametrize("name", ["gru", "head"])
def test_weights_of_a_functional_call_are_not_the_layers_own(name: str) -> None:
    class Doubled(Attentive):
        def forward(self, x: Tensor) -> Tensor:
            own = getattr(self, name)
            twice = {key: 2 * p for key, p in own.named_parameters()}

            def call(a: Tensor) -> Any:
                return torch.func.functional_call(own, twice, (a,))

            hidden = (call if name == "gru" else self.gru)(self.mix(x))[0].mean(1)
            return (call if name == "head" else self.head)(hidden)

    layers = ["gru.ih_l0", "gru.hh_l0"] if name == "gru" else ["head"]
    for layer in layers:
        with pytest.raises(ValueError, match=rf"'{layer}'.*weights that are not its own"):
            bs.unit_fisher(Doubled(), probe(), layers=[layer])


def test_recurrent_modules_under_autocast() -> None:
    class Mixed(Attentive):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out = super().forward(x)
            return out.float()

    model, x = Mixed().float(), probe(4).float()
    cached = torch.is_autocast_cache_enabled()
    table = bs.check(model, x).set_index("module")
    assert table.covered[[*PARTS, "gru.ih_l0", "gru.hh_l0"]].all(), table.to_string()
    assert (table.error.dropna() < 0.1).all()
    assert torch.is_autocast_cache_enabled() == cached


def test_the_output_projection_is_run_as_pytorch_runs_it() -> None:
    """By its weights: hooks on it never run, and a forward of its own would not either."""
    model, x = Attentive(), probe()
    model.attn.out_proj.register_forward_hook(lambda module, args, output: output * 2)
    hooks = model.attn.out_proj._forward_hooks
    assert_right(model, x)
    with undisturbed(model):
        torch.testing.assert_close(model(x), Attentive()(x))
    assert model.attn.out_proj._forward_hooks is hooks and len(hooks) == 1

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return 2 * super().forward(x)

    model.attn.out_proj = Doubled(E, E).double()
    with pytest.raises(ValueError, match=r"'attn'.*out_proj is not an nn\.Linear"):
        bs.unit_fisher(model, x, uncovered="raise")
    assert "attn.q_proj" not in bs.unit_fisher(model, x, layers=["gru.ih_l0", "head"])


# -- left as found ---------------------------------------------------------------------------------


def state(model: nn.Module) -> list[object]:
    return [
        torch.backends.mha.get_fastpath_enabled(),
        *(kind.forward for kind in composites.COMPOSITES),
        *(sorted(vars(module)) for module in model.modules()),
        *(module._forward_hooks for module in model.modules()),
        [name for name, _ in model.named_modules()],
        list(model.state_dict()),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("fast_path", [True, False])
def test_everything_is_left_as_found(fast_path: bool) -> None:
    model, x = Attentive(), probe()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        before = state(model)
        bs.unit_fisher(model, x)
        bs.activation_moments(model, x)
        bs.check(model, x)
        with bs.bias_shift(model, x):
            pass
        assert state(model) == before
        with pytest.raises(ZeroDivisionError), undisturbed(model):
            assert not torch.backends.mha.get_fastpath_enabled()
            with undisturbed(model):
                model(x)
            assert composites._dispatching_kinds == {*composites.KINDS}
            raise ZeroDivisionError
        assert state(model) == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert not composites._parts and not composites._dispatching_kinds and not composites._at_rest


def test_copies_and_pickles_know_nothing_of_parts() -> None:
    model, x = Attentive(), probe()
    first = bs.unit_fisher(model, x)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.save(model, io.BytesIO())
    assert list(copied.state_dict()) == list(Attentive().state_dict())
    with torch.no_grad():
        model.attn.in_proj_weight.zero_()
    again = bs.unit_fisher(copied, x)
    for layer, fisher in first.items():
        torch.testing.assert_close(again[layer].matrix(), fisher.matrix())
    part = composites.parts(model.attn)["q_proj"]
    assert part is composites.parts(model.attn)["q_proj"] and not part.weight.any()
    owner = weakref.ref(model.attn)
    del model
    gc.collect()
    assert owner() is None


def test_other_models_run_as_ever_meanwhile() -> None:
    model, other, x = Attentive(), Attentive(), probe()
    calls = []
    for part in composites.parts(other.attn).values():
        part.register_forward_hook(lambda *_: calls.append(1))
    with undisturbed(model):
        other(x)
    assert not calls


def test_models_without_composites_change_nothing() -> None:
    forwards = [kind.forward for kind in composites.COMPOSITES]
    with undisturbed(nn.Sequential(nn.Linear(2, 3))):
        assert [kind.forward for kind in composites.COMPOSITES] == forwards
        assert torch.backends.mha.get_fastpath_enabled()


# -- in the user's own passes ----------------------------------------------------------------------


def test_the_optimizer_gives_composites_the_plain_gradient() -> None:
    model, x, y = Attentive().train(), probe(6), torch.arange(6) % 3
    optimizer = bs.optim.UnitNaturalGradient(model, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nn.functional.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        step = (before[name] - p.detach()) / 0.1
        assert torch.allclose(step, gradients[name]) == (not name.startswith("head")), name


def test_a_log_of_training_batches_has_no_parts() -> None:
    model, x = nn.Sequential(Attentive(), nn.ELU()).train(), probe()
    with bs.instrument(model) as log:
        bs.unit_fisher(model, x)
        model(x)
    assert not log.layers.layer.str.contains("proj|_l0").any() and "1" in set(log.layers.layer)
