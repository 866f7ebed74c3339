"""Recurrent modules are measured as one layer per weight matrix, with units shared over time."""

from typing import Any

import pytest
import torch
from composite_oracles import blocks_by_parameters, blocks_by_positions
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import biasshift as bs
from biasshift.measure.composites import parts
from biasshift.measure.sandbox import undisturbed

pytestmark = pytest.mark.filterwarnings("ignore:Too few effective samples")

B, T, INPUTS, HIDDEN = 3, 4, 5, 3


class Recurrent(nn.Module):
    """A recurrent module between two linear layers; every one of its results is used."""

    def __init__(self, kind: type[nn.RNNBase], given: bool = False, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(2, INPUTS)
        self.net = kind(INPUTS, HIDDEN, **options)
        directions = 2 if self.net.bidirectional else 1
        self.states, self.given = self.net.num_layers * directions, given
        self.start = nn.Linear(INPUTS, self.states * (self.net.proj_size or HIDDEN))
        self.start_c = nn.Linear(INPUTS, self.states * HIDDEN)
        self.head = nn.Linear(directions * (self.net.proj_size or HIDDEN), 3)
        for p in self.parameters():
            nn.init.normal_(p, std=0.6)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        hx = self.start(x[:, 0]).unflatten(-1, (self.states, -1)).transpose(0, 1)
        if self.net.mode == "LSTM":
            c = self.start_c(x[:, 0]).unflatten(-1, (self.states, -1)).transpose(0, 1)
            hx = (hx.contiguous(), c.contiguous())
        turned = x if self.net.batch_first else x.transpose(0, 1)
        out, last = self.net(turned, hx if self.given else None)
        out = out if self.net.batch_first else out.transpose(0, 1)
        lasts = last if isinstance(last, tuple) else (last,)
        extra = sum(s.sin().sum((0, 2)) for s in lasts)
        return self.head(out).tanh().mean(1) + extra[:, None] * torch.tensor([1.0, -1, 0.5]).to(x)


CASES = {
    "rnn": Recurrent(nn.RNN, batch_first=True),
    "rnn-relu": Recurrent(nn.RNN, nonlinearity="relu"),
    "lstm": Recurrent(nn.LSTM, batch_first=True),
    "lstm-deep": Recurrent(nn.LSTM, given=True, num_layers=2, bidirectional=True),
    "lstm-without-bias": Recurrent(nn.LSTM, bias=False, batch_first=True),
    "lstm-projected": Recurrent(
        nn.LSTM, given=True, proj_size=2, num_layers=2, bidirectional=True, batch_first=True
    ),
    "gru": Recurrent(nn.GRU),
    "gru-deep": Recurrent(nn.GRU, given=True, num_layers=2, bidirectional=True, batch_first=True),
    "gru-dropout": Recurrent(nn.GRU, num_layers=2, dropout=0.5, batch_first=True),
}


def places(net: nn.Module) -> dict[str, tuple[str, str | None, int]]:
    own = dict(net.named_parameters())
    return {
        f"net.{name.removeprefix('weight_')}": (
            f"net.{name}",
            f"net.{name.replace('weight', 'bias')}"
            if name.replace("weight", "bias") in own
            else None,
            0,
        )
        for name in own
        if name.startswith("weight")
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("labels", ["expected", "empirical"])
def test_blocks_are_those_of_the_parameters(name: str, labels: str) -> None:
    model, x, y = CASES[name], torch.randn(B, T, 2).double(), torch.tensor([0, 2, 1])
    fishers = bs.unit_fisher(model, x, y, labels=labels)
    at = places(model.net)
    assert [layer for layer in fishers if layer.startswith("net.")] == list(parts_of(model))
    assert set(at) == set(parts_of(model))
    units = {layer: len(model.get_parameter(weight)) for layer, (weight, _, _) in at.items()}
    found = blocks_by_parameters(model, at, units, x, y if labels == "empirical" else None)
    for layer, block in found.items():
        size = block.abs().max()
        assert size > 0 and (fishers[layer].matrix() - block).abs().max() <= 1e-10 * size, layer


def parts_of(model: Recurrent) -> list[str]:
    return [f"net.{name}" for name in parts(model.net)]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_states_are_those_of_the_fused_kernel(name: str) -> None:
    model = CASES[name]
    for x in (torch.randn(B, T, 2).double(), torch.randn(1, 1, 2).double()):
        fused = model(x).detach()
        with undisturbed(model):
            torch.testing.assert_close(model(x), fused, rtol=1e-12, atol=1e-14)
    x = torch.randn(T, INPUTS).double()  # without an axis of examples
    fused = model.net(x)
    with undisturbed(model):
        torch.testing.assert_close(model.net(x), fused, rtol=1e-12, atol=1e-14)


def gru_nets(model: Recurrent, x: Tensor) -> tuple[Tensor, dict]:
    """One direction of one layer of a GRU, written out."""
    net, a = model.net, model.embed(x)
    incoming = a @ net.weight_ih_l0.T + net.bias_ih_l0
    h, hidden, outputs = a.new_zeros(len(a), HIDDEN), [], []
    for t in range(a.shape[1]):
        own = h @ net.weight_hh_l0.T + net.bias_hh_l0
        hidden.append((h, own))
        (r, z, n), (hr, hz, hn) = incoming[:, t].split(HIDDEN, -1), own.split(HIDDEN, -1)
        z = torch.sigmoid(z + hz)
        h = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * h
        outputs.append(h)
    out = torch.stack(outputs, 1)
    extra = h.sin().sum(1)[:, None] * torch.tensor([1.0, -1, 0.5]).to(x)
    layers = {"net.ih_l0": [(a, incoming)], "net.hh_l0": hidden}
    return model.head(out).tanh().mean(1) + extra, layers


def test_positions_are_summed_up_under_expand() -> None:
    model, x = CASES["gru"], torch.randn(B, T, 2).double()
    torch.testing.assert_close(gru_nets(model, x)[0], model(x))
    fishers = bs.unit_fisher(model, x, weight_sharing="expand")
    for layer, block in blocks_by_positions(lambda z: gru_nets(model, z), x).items():
        assert (fishers[layer].matrix() - block).abs().max() <= 1e-10 * block.abs().max(), layer


@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
@pytest.mark.parametrize("name", ["lstm-projected", "gru-deep", "rnn-relu"])
def test_recurrent_modules_are_checked(name: str, weight_sharing: str) -> None:
    model = CASES[name]
    table = bs.check(model, torch.randn(B, T, 2), weight_sharing=weight_sharing)
    rows = table[table.module.isin(parts_of(model))]
    assert len(rows) == len(parts_of(model)) and rows.covered.all()
    assert (rows.error < 1e-10).all(), rows.to_string()
    assert set(rows.calls) == {1, T}


class Cells(nn.Module):
    """A cell that the model itself calls at every step."""

    def __init__(self, kind: type[nn.RNNCellBase], **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.head = kind(2, HIDDEN, **options), nn.Linear(HIDDEN, 3)
        for p in self.parameters():
            nn.init.normal_(p, std=0.6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.net(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    "model",
    [
        Cells(nn.RNNCell),
        Cells(nn.RNNCell, nonlinearity="relu", bias=False),
        Cells(nn.LSTMCell),
        Cells(nn.GRUCell),
    ],
    ids=["tanh", "relu", "lstm", "gru"],
)
def test_cells(model: Cells) -> None:
    x = torch.randn(B, T, 2).double()
    fused = model(x).detach()
    with undisturbed(model):
        torch.testing.assert_close(model(x), fused, rtol=1e-12, atol=1e-14)
    fishers, at = bs.unit_fisher(model, x), places(model.net)
    assert list(fishers) == ["net.ih", "net.hh", "head"]
    units = {layer: len(model.get_parameter(weight)) for layer, (weight, _, _) in at.items()}
    for layer, block in blocks_by_parameters(model, at, units, x).items():
        assert (fishers[layer].matrix() - block).abs().max() <= 1e-10 * block.abs().max(), layer


# -- updates ---------------------------------------------------------------------------------------


def test_the_bias_shift_of_an_update() -> None:
    model, x = Recurrent(nn.LSTM, batch_first=True), torch.randn(6, T, 2).double()
    with torch.no_grad():
        a = model.embed(x).flatten(0, 1)
        before = model.net.weight_ih_l0.clone(), model.net.bias_ih_l0.clone()
        with bs.bias_shift(model, x) as shift:
            for p in model.net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        dw, dw0 = model.net.weight_ih_l0 - before[0], model.net.bias_ih_l0 - before[1]
    own = dw @ a.mean(0) + dw0
    torch.testing.assert_close(shift["net.ih_l0"].own, own)
    torch.testing.assert_close(shift["net.ih_l0"].total, own)
    hidden = shift["net.hh_l0"]
    torch.testing.assert_close(hidden.total, hidden.own + hidden.incoming + hidden.second_order)
    assert hidden.incoming.abs().min() > 0


def test_gradients_and_a_table_during_training() -> None:
    model, x, y = Recurrent(nn.GRU), torch.randn(6, T, 2).double(), torch.arange(6) % 3
    with torch.no_grad():
        mean = model.embed(x).flatten(0, 1).mean(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, (x, y), every=1) as log:
        nn.functional.cross_entropy(model(x), y).backward()
        g, g0 = model.net.weight_ih_l0.grad.clone(), model.net.bias_ih_l0.grad.clone()
        optimizer.step()
    table = log.table()
    rows = table[(table.step == 1) & (table.layer == "net.ih_l0") & (table.unit >= 0)]
    expected = -(g @ mean + g0)
    shift = torch.tensor(rows.shift_gradient.to_numpy()).double()
    torch.testing.assert_close(shift, expected, rtol=1e-5, atol=1e-8)
    own = torch.tensor(rows.own.to_numpy()).double()
    torch.testing.assert_close(own, 0.1 * expected, rtol=1e-4, atol=1e-8)


# -- what cannot be measured -----------------------------------------------------------------------


class Packed(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        lengths = torch.full((len(x),), T - 1)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(pad_packed_sequence(self.net(packed)[0], batch_first=True)[0].mean(1))


def test_packed_sequences_run_and_are_left_out() -> None:
    model, x = Packed(nn.LSTM, batch_first=True), torch.randn(B, T, 2).double()
    with pytest.raises(ValueError, match=r"'net\.ih_l0'.*packed sequence"):
        bs.unit_fisher(model, x, layers=["net.ih_l0"])
    fishers = bs.unit_fisher(model, x, layers=["embed", "head"])
    at = {"embed": ("embed.weight", "embed.bias", 0)}
    block = blocks_by_parameters(model, at, {"embed": INPUTS}, x)["embed"]
    assert (fishers["embed"].matrix() - block).abs().max() <= 1e-10 * block.abs().max()


class Alone(Recurrent):
    """Every example is run alone, without an axis of examples."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([self.net(self.embed(one))[0].mean(0) for one in x]))


def test_sequences_without_an_axis_of_examples() -> None:
    model, x = Alone(nn.GRU, batch_first=True), torch.randn(B, T, 2).double()
    with pytest.raises(ValueError, match=r"'net\.ih_l0'.*cannot be measured"):
        bs.unit_fisher(model, x, layers=["net.ih_l0"])
    at = places(model.net)
    fishers = bs.unit_fisher(model, x[:1], layers=list(at))
    units = {layer: len(model.get_parameter(weight)) for layer, (weight, _, _) in at.items()}
    for layer, block in blocks_by_parameters(model, at, units, x[:1]).items():
        assert (fishers[layer].matrix() - block).abs().max() <= 1e-10 * block.abs().max(), layer


def test_hidden_states_of_a_wrong_size_are_errors_as_ever() -> None:
    net = nn.GRU(2, HIDDEN, batch_first=True)
    with undisturbed(net), pytest.raises(RuntimeError, match="hidden size"):
        net(torch.randn(B, T, 2), torch.zeros(1, 1, HIDDEN))
    cell = nn.LSTMCell(2, HIDDEN)
    with undisturbed(cell), pytest.raises(RuntimeError):
        cell(torch.randn(B, 2), (torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)))
