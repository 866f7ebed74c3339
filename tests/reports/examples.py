"""Examples that depend on others, what is taken for a batch, and where examples lie."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import biasshift as bs
from biasshift.optim import UnitNaturalGradient

from . import oracle
from .table import refusal, report, warned


class Mixed(nn.Module):
    """A layer, something that mixes along the first axis, and a head; inputs (rows, columns, 2)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.head = kind, nn.Linear(2, 4), nn.Linear(4, 3)
        if kind in ("LSTM", "GRU", "RNN"):
            self.net = getattr(nn, kind)(4, 4)
        elif kind == "loop over a cell":
            self.net = nn.GRUCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        if hasattr(self, "net") and self.kind != "loop over a cell":
            h = self.net(h)[0]
        elif self.kind == "loop over a cell":
            state, states = h.new_zeros(h.shape[1:]), []
            for step in h:
                state = self.net(step, state)
                states.append(state)
            h = torch.stack(states)
        elif self.kind == "causal attention":
            q = h.transpose(0, 1)
            h = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(0, 1)
        else:
            h = MIXES[self.kind](h)
        return self.head(h)


MIXES = {
    "cumsum(0)": lambda h: h.cumsum(0),
    "h - h[:1]": lambda h: h - h[:1],
    "h - h[-1:]": lambda h: h - h[-1:],
    "batch mean": lambda h: h - h.mean(0),
    "batch maximum": lambda h: h - h.amax(0),
    "previous example": lambda h: h + 0.1 * h.roll(1, 0),
}
KINDS = ["LSTM", "GRU", "RNN", "loop over a cell", "causal attention", *MIXES]


@report("examples that depend on others", *KINDS)
def refused_with_the_place(kind: str) -> tuple[str, re.Pattern]:
    model, x = Mixed(kind).double(), torch.randn(5, 6, 2).double()
    words = r"An example's outputs change with the rest of its batch.* first seen at '(net|head)'"
    return refusal(lambda: bs.unit_fisher(model, x)), re.compile(words)


@report("examples that depend on others", *KINDS)
def check_covers_nothing(kind: str) -> tuple[list, list]:
    model, x = Mixed(kind).double(), torch.randn(5, 6, 2).double()
    table = bs.check(model, x, examples=5)
    rows = table[table.units > 0]
    return [bool(rows.covered.any()), bool(rows.reason.str.contains("rest of its batch").all())], [
        False,
        True,
    ]


@report("examples that depend on others")
def batch_norm_in_training_mode() -> tuple[str, re.Pattern]:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ELU(), nn.Linear(4, 3))
    words = re.compile(r"ValueError.*(rest of its batch|BatchNorm).*", re.DOTALL)
    return refusal(lambda: bs.unit_fisher(model, torch.randn(8, 2))), words


# -- what a batch is -------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double()


def shift(model: nn.Module, probe: object) -> None:
    with bs.bias_shift(model, probe):
        pass


READERS = {
    "unit_fisher": bs.unit_fisher,
    "gradient_gap": bs.gradient_gap,
    "activation_moments": bs.activation_moments,
    "bias_shift": shift,
    "check": bs.check,
}


@report("next(iter(loader))", *((r, kind) for r in READERS for kind in ("list", "tuple")))
def one_batch_in_place_of_batches(variant: tuple[str, str]) -> tuple[str, re.Pattern]:
    reader, kind = variant
    data = TensorDataset(torch.randn(8, 3).double(), torch.randint(3, (8,)))
    batch = next(iter(DataLoader(data, batch_size=8)))
    batch = tuple(batch) if kind == "tuple" else batch
    words = re.compile(r"ValueError.*Give x and y as two arguments, one batch as \[\(x, y\)\]")
    return refusal(lambda: READERS[reader](network(), batch)), words


@report("next(iter(loader))")
def of_a_language_model_and_of_an_autoencoder() -> tuple[list, list]:
    tokens, x = torch.randint(7, (8, 4)), torch.randn(8, 3).double()
    lm = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    said = [
        refusal(lambda: bs.unit_fisher(lm, [tokens, tokens.clone()])),
        refusal(lambda: bs.activation_moments(network(), [x, 3 * x])),
    ]
    return ["Give x and y as two arguments" in text for text in said], [True, True]


@report("next(iter(loader))")
def two_tensors_of_unequal_length_are_two_batches() -> tuple[dict, dict]:
    model, x = network(), torch.randn(8, 3).double()
    fishers = bs.unit_fisher(model, [x[:3], x[3:]])
    found = {name: fisher.matrix() for name, fisher in fishers.items()}
    return found, oracle.all_blocks(model, ["0", "2"], x)


# -- labels that are no tensor ---------------------------------------------------------------------


@report("labels that are no tensor", "list", "array", "tuple")
def become_one_where_they_are_read(kind: str) -> tuple[Tensor, Tensor]:
    model, x, y = network(), torch.randn(8, 3).double(), torch.randint(3, (8,))
    given = {"list": y.tolist(), "array": y.numpy(), "tuple": tuple(y.tolist())}[kind]
    fisher = bs.unit_fisher(model, x, given, labels="empirical")["0"]
    return fisher.matrix(), oracle.all_blocks(model, ["0"], x, y)["0"]


UNREADABLE = {"boxes": [{"boxes": 1}] * 8, "two tensors": [torch.zeros(8)] * 2, "number": 3}


@report("labels that are no tensor", *UNREADABLE)
def are_left_alone_where_nobody_reads_them(name: str) -> tuple[Tensor, Tensor]:
    model, x = network(), torch.randn(8, 3).double()
    fisher = bs.unit_fisher(model, [(x, UNREADABLE[name])])["0"]
    return fisher.matrix(), oracle.all_blocks(model, ["0"], x)["0"]


@report("labels that are no tensor", *UNREADABLE)
def are_refused_where_they_are_read(name: str) -> tuple[str, re.Pattern]:
    model, x = network(), torch.randn(8, 3).double()
    said = refusal(lambda: bs.gradient_gap(model, [(x, UNREADABLE[name])]))
    return said, re.compile(r"ValueError: 'y' must be .*got (list|int)")


# -- where examples lie ----------------------------------------------------------------------------


class Layout(nn.Module):
    """Hands its inner network another order of examples and positions, and puts them back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 3)
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4 positions, 3)
        n, t, _ = x.shape
        if self.kind == "folded":
            h = self.inner(x.flatten(0, 1)).unflatten(0, (n, t))
        elif self.kind == "windows":
            h = self.inner(x.unflatten(1, (2, 2)).flatten(0, 1)).unflatten(0, (n, 2)).flatten(1, 2)
        elif self.kind == "sequence-first":
            h = self.inner(x.transpose(0, 1)).transpose(0, 1)
        elif self.kind == "interleaved":
            h = self.inner(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (t, n)).transpose(0, 1)
        else:  # the examples come in another order
            h = self.inner(x.flatten(0, 1).flip(0)).flip(0).unflatten(0, (n, t))
        return self.head(h.tanh().sum(1))


@report("layouts", "folded", "windows", "sequence-first", "interleaved")
def layers_whose_examples_are_not_in_front(kind: str) -> tuple[dict, dict]:
    model, x = Layout(kind).double(), torch.randn(5, 4, 3).double()
    found = {name: fisher.matrix() for name, fisher in bs.unit_fisher(model, x).items()}
    return found, oracle.all_blocks(model, ["inner.0", "inner.2", "head"], x)


@report("layouts")
def what_is_not_known_is_left_out_by_name() -> tuple[str, re.Pattern]:
    model, x = Layout("flipped").double(), torch.randn(5, 4, 3).double()
    words = re.compile(r"UncoveredWarning.*'inner\.0'.*'inner\.2'")
    return warned(lambda: bs.unit_fisher(model, x)), words


@report("layouts", "skip", "raise", "skip=")
def uncovered_layers(how: str) -> tuple[object, object]:
    """The others are right, a refusal names the layer, and what is skipped is not warned of."""
    model, x = Layout("flipped").double(), torch.randn(5, 4, 3).double()
    if how == "raise":
        said = refusal(lambda: bs.unit_fisher(model, x, uncovered="raise"))
        return said, re.compile(r"ValueError.*'inner\.0'.*first axis is not the axis of examples")
    right = oracle.all_blocks(model, ["head"], x)
    if how == "skip=":
        fishers = bs.unit_fisher(model, x, skip=["inner.0", "inner.2"])
        return {name: fisher.matrix() for name, fisher in fishers.items()}, right
    found = {}
    warned(lambda: found.update(bs.unit_fisher(model, x)))
    return {name: fisher.matrix() for name, fisher in found.items()}, right


# -- masks -----------------------------------------------------------------------------------------


@report("masked positions", "mask", "function", "ignored labels")
def do_not_count(kind: str) -> tuple[dict, dict]:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), None
    x, y = torch.randn(6, 4, 3).double(), torch.randint(3, (6, 4))
    mask = torch.rand(6, 4) > 0.4
    options = {
        "mask": {"mask": mask},
        "function": {"mask": lambda inputs, labels: mask},
        "ignored labels": {"y": y.masked_fill(~mask, -100)},
    }[kind]
    found = {name: fisher.matrix() for name, fisher in bs.unit_fisher(model, x, **options).items()}
    layers = {name: model.get_submodule(name) for name in ("0", "2")}
    return found, {
        name: oracle.blocks(layer, lambda n: model(x[n]), 6, counted=mask)
        for name, layer in layers.items()
    }


@report("masked positions")
def do_not_count_in_a_step() -> tuple[Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 3).double(), torch.randint(3, (30,))
    mask, before = torch.arange(30) >= 8, oracle.present(model[2])
    loss = F.cross_entropy(model(x)[mask], y[mask])
    g = oracle.gradients(loss, model[2].weight, model[2].bias)
    matrix = oracle.all_blocks(model, ["2"], x[mask], y[mask])["2"]
    optimizer = UnitNaturalGradient(model, 1.0, damping=0.03, labels="empirical", decay=0.0)
    F.cross_entropy(model(x), y.masked_fill(~mask, -100)).backward()
    optimizer.step()
    right = oracle.update(matrix, g, "q", "full", 0.03)
    return oracle.moved(model[2], before), right
