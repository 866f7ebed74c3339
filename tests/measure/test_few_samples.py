"""One warning per call where samples are too few or repeated, and what is flagged without it."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_messages import faults
from torch import nn

import biasshift as bs
from biasshift import FewSamplesWarning
from biasshift.measure.copies import Copies


def net(width: int = 6, depth: int = 1) -> nn.Module:
    torch.manual_seed(0)
    hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.ELU())]
    return nn.Sequential(nn.Linear(3, width), nn.ELU(), *hidden, nn.Linear(width, 3))


def said(measure) -> list[str]:
    """The warnings of samples, in full; other warnings are errors as everywhere."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("error")
        warnings.simplefilter("always", FewSamplesWarning)
        measure()
    assert all(w.filename == __file__ or "biasshift" in w.filename for w in seen)
    for w in seen:
        assert not list(faults(str(w.message)))
    return [str(w.message) for w in seen]


def test_one_warning_names_layers_numbers_and_the_remedy():
    x, model = torch.randn(40, 3), net()
    (message,) = said(lambda: bs.unit_fisher(model, x))
    fishers = bs.unit_fisher(model, x)
    for name in ("2", "4"):
        n = fishers[name].effective_samples.median().item()
        units = len(fishers[name].c)
        assert (
            f"Layer '{name}' has {n:.0f} (median of its units) for 6 inputs, and {units} of {units}"
            in message
        )
    assert "fisher.reliable" in message and "more examples" in message
    assert not fishers["2"].reliable.any()


def test_many_layers_are_three_and_a_number():
    model = net(depth=8)
    (message,) = said(lambda: bs.unit_fisher(model, torch.randn(40, 3)))
    assert message.count("Layer '") == 3 and "And 6 more layers have too few." in message


def test_enough_samples_are_silent_and_units_short_of_them_are_flagged_alone():
    model, x = net(), torch.randn(2000, 3)
    assert not said(lambda: bs.unit_fisher(model, x))
    assert not said(lambda: bs.gradient_gap(model, x, torch.randint(3, (2000,))))
    with torch.no_grad():  # one unit that hardly ever has an error
        model[0].weight[0], model[0].bias[0] = 9.0, -60.0
    model[1] = nn.ReLU()
    assert not said(lambda: bs.unit_fisher(model, x))
    fisher = bs.unit_fisher(model, x)["0"]
    assert not fisher.reliable[0] and fisher.reliable[1:].any()


def test_the_gap_warns_once_and_check_never():
    model, x, y = net(), torch.randn(40, 3), torch.randint(3, (40,))
    assert len(said(lambda: bs.gradient_gap(model, x, y))) == 1
    assert not said(lambda: bs.check(model, x))


def test_a_log_warns_on_entry_alone():
    model, x, y = net(), torch.randn(40, 3), torch.randint(3, (40,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        with bs.instrument(model, optimizer=optimizer, probe=(x, y), every=1) as log:
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        table = log.table()
        rows = table[table.unit >= 0]
        assert set(rows.reliable.dropna()) <= {0.0, 1.0} and (rows.reliable == 0).any()

    assert len(said(train)) == 1


def test_it_can_be_silenced_by_its_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", bs.FewSamplesWarning)
        bs.unit_fisher(net(), torch.randn(40, 3))


@pytest.mark.parametrize("batch_size", [None, 300])
def test_copies_are_told_and_count_once_in_the_judgement(batch_size):
    model, x = net(), torch.randn(500, 3)
    once = bs.unit_fisher(model, x)["2"].effective_samples.median()
    twice = torch.cat([x, x])[torch.randperm(1000)]
    (message,) = said(lambda: bs.unit_fisher(model, twice, batch_size=batch_size))
    assert message.startswith("Too few different examples. Of 1000 examples 500 are copies")
    few = x[:50].repeat(20, 1)
    (message,) = said(lambda: bs.unit_fisher(model, few, batch_size=batch_size))
    assert message.startswith("Too few effective samples") and "950 are copies" in message
    assert once > 60  # alone they are enough
    assert not said(lambda: bs.unit_fisher(model, torch.cat([x, x[:4]])))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.long, torch.bool]
)
def test_rows_of_every_dtype_are_told_bit_by_bit(dtype):
    rows = (torch.arange(24).view(6, 4) % 7).to(dtype)
    rows = rows if dtype != torch.bool else torch.eye(6).bool()
    copies = Copies()
    copies.add(rows)
    assert copies.count == 0
    copies.add(rows[[0, 5]].clone())
    copies.add(rows.T.contiguous().T[:1])
    assert (copies.examples, copies.count) == (9, 3)


def test_signs_and_single_bits_differ_and_all_tensors_of_an_example_count():
    copies = Copies()
    copies.add(torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], [1.0000001, 2.0]]))
    assert copies.count == 0
    several = Copies()
    x, mask = torch.zeros(3, 2), torch.tensor([[1], [2], [1]])
    several.add(Named({"ids": x, "mask": mask, "scale": torch.tensor(3.0)}))
    assert (several.examples, several.count) == (3, 1)


class Named(dict):
    """A dict batch, as long as its examples are many."""

    def __len__(self) -> int:
        return len(self["ids"])


def test_tokens_repeat_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    tokens = torch.randint(5, (400, 2))
    (message,) = said(lambda: bs.unit_fisher(model, tokens))
    assert f"{400 - len(tokens.unique(dim=0))} are copies" in message
