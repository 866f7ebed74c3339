"""Second opinions on the benchmarks: what is timed must be what the name says."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import report, updates, whole
from benchmarks.formulas import LayerBatch, kfac_step, layer_batches, unit_step

PEERS = {"ASDL": "asdl", "curvlinops": "curvlinops"}


@pytest.mark.parametrize("network", updates.NETWORKS)
@pytest.mark.parametrize("name", updates.UPDATES)
def test_an_update_steps_as_its_formula_says(network, name):
    for library, package in PEERS.items():
        if library in name:
            pytest.importorskip(package)
    update, every = updates.UPDATES[name]
    model, ((x, y), *_) = updates.problem(network, small=True)
    assert updates.error(update, every, model.double(), x.double(), y) < 1e-8


def test_every_method_is_timed_beside_sgd(capsys):
    rows = {row["method"]: row for row in updates.costs("MLP", "cpu", repeats=1, small=True)}
    assert set(rows) == {f"MLP: {name}" for name in updates.UPDATES}
    timed = [row for row in rows.values() if "seconds" in row]
    assert len(timed) >= 9 and all(row["seconds"] > 0 and row["error"] < 1e-8 for row in timed)
    assert rows["MLP: SGD"]["steps_of_sgd"] == 1
    assert "MLP: full (q, full), every 10: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "named, taken",
    [
        (("q", "full"), ("p", "full")),
        (("p", "none"), ("q", "none")),
        (("q", "diagonal"), ("q", "full")),
    ],
)
def test_another_update_has_an_error(named, taken):
    model, ((x, y), *_) = updates.problem("CNN", small=True)
    mixed = replace(updates.ours(*named), make=updates.ours(*taken).make)
    assert mixed.labels is updates.drawn_in_single
    assert updates.error(mixed, 1, model.double(), x.double(), y) > 1e-2


def test_other_labels_have_an_error():
    model, ((x, y), *_) = updates.problem("MLP", small=True)
    mixed = replace(updates.ours("q", "none"), labels=updates.given)
    assert updates.error(mixed, 1, model.double(), x.double(), y) > 1e-2


def test_one_class_of_examples_by_hand():
    """One unit with errors ±1 at inputs 1 and 3: c = 1, mean 2, variance 1, A = 5."""
    a, delta = torch.tensor([[[1.0]], [[3.0]]]).double(), torch.tensor([[[1.0]], [[-1.0]]]).double()
    layer = LayerBatch(a, delta, torch.tensor([[7.0]]).double(), torch.tensor([2.0]).double())

    def numbers(step):
        return [part.item() for part in step]

    for center, scale, dw in (("q", "full", 1.5), ("p", "diagonal", 1.5), ("q", "none", 3.0)):
        step = unit_step(layer, center, scale, 1.0)
        assert numbers(step) == pytest.approx([dw, 2 - 2 * dw])
    assert numbers(kfac_step(layer, 0.0, joint=False)) == pytest.approx([7 / 5, 2])
    # [[5, 2], [2, 1]]⁻¹ (7, 2)
    assert numbers(kfac_step(layer, 0.0, joint=True)) == pytest.approx([3, -4])


def test_the_recorded_gradients_are_those_of_autograd():
    model, ((x, y), *_) = updates.problem("CNN", small=True)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    layers = [model[0], model[2], model[4], model[-1]]
    for layer, module in zip(layer_batches(model, x, y, y), layers, strict=True):
        g = torch.einsum("ntu,nti->ui", layer.delta, layer.a) / len(x)
        assert torch.allclose(g, module.weight.grad.flatten(1), atol=1e-6)
        assert torch.allclose(layer.g0, module.bias.grad)


def test_the_table_has_the_cost_in_steps_of_sgd(tmp_path, monkeypatch):
    rows = [
        {"method": "MLP: SGD", "seconds": 0.001, "error": 0.0, "steps_of_sgd": 1.0},
        {"method": "MLP: K-FAC of ASDL", "seconds": 0.0125, "error": 1e-15, "steps_of_sgd": 12.5},
        {"method": "MLP: other", "skipped": "no module"},
    ]
    result = {"question": "updates", "title": "T", "device": "cpu", "gemm_gflops": 1.0}
    result |= {"versions": {}, "commit": "a", "date": "d", "command": "c"}
    (tmp_path / "updates_cpu.json").write_text(json.dumps({**result, "rows": rows}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.table()
    assert "| MLP: SGD | 1.0 ms | 1.0 × | 0e+00 |" in text
    assert "| MLP: K-FAC of ASDL | 12 ms | 12.5 × | 1e-15 |" in text
    assert "| MLP: other | no module |  |  |" in text


@pytest.mark.parametrize("method", whole.METHODS)
def test_a_whole_job_is_done_as_its_definition_says(method):
    try:
        task = whole.prepare(method, "cpu", small=True)
    except ImportError as missing:
        pytest.skip(str(missing))
    assert task.error(task.run()) < (5e-3 if method.endswith("biasshift") else 5e-2)


@pytest.mark.parametrize("job", whole.JOBS)
def test_another_result_of_a_whole_job_has_an_error(job):
    p = whole.problem(whole.CASES["MLP, 256 examples"], True, "cpu").wide()
    right, wrong = whole.exact(job, p), whole.exact(job, p)
    assert whole.worst(right, right) == 0
    wrong["2"] = wrong["2"] * 1.5
    assert whole.worst(wrong, right) == pytest.approx(0.5)


def test_formulas_by_hand_of_one_unit():
    """Errors ±1 at inputs 1 and 3: c = 1, m = μ = 2, V = 1, hence s = 5, k = 1, h = 4/5."""
    block = torch.tensor([[[5.0, 2.0], [2.0, 1.0]]])
    mu, g, g0 = torch.tensor([2.0]), torch.tensor([[7.0]]), torch.tensor([2.0])
    numbers = whole.by_hand("s, k, coupling", block, mu, g, g0, damping=0)
    assert numbers[0].tolist() == pytest.approx([5, 1, 0.8])
    step = whole.by_hand("natural gradient", block, mu, g, g0, damping=0)
    assert step[0].tolist() == pytest.approx([3, -4])
