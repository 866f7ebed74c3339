"""The activation functions: closed forms, spelling, and what people read."""

import math
import os
import subprocess
import sys

import pytest
import torch
from scipy.special import erf
from torch import nn

from biasshift.activation_names import (
    LABELS,
    NAMES,
    canonical,
    display_name,
    folder_part,
    is_import_path,
    ordered,
)
from biasshift.activations import (
    ACTIVATIONS,
    SReLU,
    constructor,
    elu,
    lrelu,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def normal_cdf(x: float) -> float:
    return (1 + float(erf(x / math.sqrt(2)))) / 2


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
# name → value and derivative, written by hand
FORMS = {
    "elu": (lambda x: x if x > 0 else math.exp(x) - 1, lambda x: 1 if x > 0 else math.exp(x)),
    "elu:0.5": (
        lambda x: x if x > 0 else 0.5 * (math.exp(x) - 1),
        lambda x: 1 if x > 0 else 0.5 * math.exp(x),
    ),
    "elu:3": (
        lambda x: x if x > 0 else 3 * (math.exp(x) - 1),
        lambda x: 1 if x > 0 else 3 * math.exp(x),
    ),
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "lrelu": (lambda x: x if x > 0 else 0.1 * x, lambda x: 1 if x > 0 else 0.1),
    "lrelu:0.01": (lambda x: x if x > 0 else 0.01 * x, lambda x: 1 if x > 0 else 0.01),
    "srelu": (lambda x: max(x, -1.0), lambda x: float(x > -1)),
    "prelu": (lambda x: x if x > 0 else 0.25 * x, lambda x: 1 if x > 0 else 0.25),
    "selu": (
        lambda x: SELU_SCALE * (x if x > 0 else SELU_ALPHA * (math.exp(x) - 1)),
        lambda x: SELU_SCALE * (1 if x > 0 else SELU_ALPHA * math.exp(x)),
    ),
    "gelu": (lambda x: x * normal_cdf(x), lambda x: normal_cdf(x) + x * density(x)),
    "silu": (
        lambda x: x * sigmoid(x),
        lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
    ),
    "mish": (
        lambda x: x * math.tanh(softplus(x)),
        lambda x: math.tanh(softplus(x)) + x * sigmoid(x) * (1 - math.tanh(softplus(x)) ** 2),
    ),
    "softplus": (softplus, sigmoid),
    "tanh": (math.tanh, lambda x: 1 - math.tanh(x) ** 2),
}
AT = (-30.0, -5.0, -1.5, -0.7, -1e-3, 1e-3, 0.4, 2.0, 18.0)


@pytest.mark.parametrize("name", FORMS)
def test_values_and_derivatives(name):
    value, derivative = FORMS[name]
    module = constructor(name)().double()
    x = torch.tensor(AT, dtype=torch.float64, requires_grad=True)
    y = module(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        y.detach().tolist(), [float(value(at)) for at in AT], atol=1e-9, rtol=0
    )
    expected = [float(derivative(at)) for at in AT]
    torch.testing.assert_close(slope.tolist(), expected, atol=1e-8, rtol=0)


def test_every_name_has_a_closed_form_and_a_label():
    assert set(ACTIVATIONS) <= set(FORMS)
    assert ACTIVATIONS.keys() == LABELS.keys() and len(set(LABELS.values())) == len(LABELS)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0])
def test_elu_is_continuous_and_its_slope_only_for_alpha_1(alpha):
    x = torch.tensor([-1e-9, 1e-9], dtype=torch.float64, requires_grad=True)
    y = elu(alpha)(x)
    assert y.abs().max() < 1e-8
    left, right = torch.autograd.grad(y.sum(), x)[0].tolist()
    assert right == 1 and left == pytest.approx(alpha, abs=1e-7)
    assert (abs(left - right) < 1e-7) == (alpha == 1)
    far = elu(alpha)(torch.tensor(-50.0, dtype=torch.float64))
    assert far.item() == pytest.approx(-alpha, abs=1e-12)


# Closed forms of E f(z), z standard normal.
ROOT = math.sqrt(2 * math.pi)
TAIL = math.exp(0.5) * normal_cdf(-1) - 0.5  # E of exp(z) − 1 where z < 0
MEANS = {
    "elu": 1 / ROOT + TAIL,
    "elu:0.5": 1 / ROOT + 0.5 * TAIL,
    "relu": 1 / ROOT,
    "lrelu": 0.9 / ROOT,
    "lrelu:0.01": 0.99 / ROOT,
    "prelu": 0.75 / ROOT,
    "srelu": -normal_cdf(-1) + density(1),
    "selu": 0.0,  # what its constants are made for
    "gelu": 1 / (2 * math.sqrt(math.pi)),
    "tanh": 0.0,
}


@pytest.mark.parametrize("name", MEANS)
def test_means_under_a_standard_normal(name):
    module = constructor(name)().double()

    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)  # 0 and −1 are among the points
    with torch.no_grad():
        mean = torch.trapezoid(module(z) * torch.exp(-z * z / 2) / ROOT, z).item()
    assert mean == pytest.approx(MEANS[name], abs=1e-7)


def test_the_paper_s_constants():
    assert repr(elu()) == "ELU(alpha=1.0)" and repr(lrelu()) == "LeakyReLU(negative_slope=0.1)"
    assert isinstance(constructor("srelu")(), SReLU)


# -- spelling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelled", "one"),
    [
        ("elu:0.50", "elu:0.5"),
        ("elu:.5", "elu:0.5"),
        ("elu:1", "elu"),
        ("elu:1.0", "elu"),
        ("elu:2.", "elu:2"),
        ("elu:1e-7", "elu:1e-07"),
        ("lrelu:1e-1", "lrelu"),
        ("lrelu:0.30000000000000004", "lrelu:0.30000000000000004"),
        ("torch.nn:ReLU", "torch.nn:ReLU"),
        *((name, name) for name in ACTIVATIONS),
    ],
)
def test_one_spelling(spelled, one):
    assert canonical(spelled) == one == canonical(one)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gleu", r"got 'gleu'\. Did you mean gelu\?"),
        ("Tanh", r"Did you mean tanh\?"),
        ("elu(0.5)", r"It is spelled elu:0\.5\."),
        ("zzz", r"got 'zzz'\.$"),
        ("", r"got ''\.$"),
        ("elu:0", "an α above 0"),
        ("elu:-1", "an α above 0"),
        ("elu:", "an α above 0"),
        ("elu:inf", "must be importable|an α above 0"),
        ("elu:1e999", "an α above 0"),
        ("elu:1_0", "an α above 0"),
        ("elu:\u0661", "an α above 0"),  # a digit, but not one of ours
        ("lrelu:1", "a slope between 0 and 1"),
        ("lrelu:0", "a slope between 0 and 1"),
        ("../../etc/passwd:X", "must be one of"),
        ("os.path:", "must be one of"),
        (":system", "must be one of"),
        ("os:system()", "must be one of"),
        ("os:a.b", "must be one of"),
        ("a b:C", "must be one of"),
        ("o\u017f:system", "must be one of"),  # normalizes to "os"
        ("a:b\n", "must be one of"),
        ("m:" + "x" * 200, "…'"),
        ("x" * 100_000, "…'"),
        ("\x1b[31mred", "\ufffd"),
        (3, "got '3'"),
        (None, "got 'None'"),
        (["elu"], "got"),
    ],
)
def test_other_names_are_refused_in_a_sentence(name, words):
    if name == "elu:inf":  # letters behind the colon are a class of a module named elu
        assert canonical(name) == name
        return
    with pytest.raises(ValueError, match=words) as caught:
        canonical(name)
    text = str(caught.value)
    assert text.startswith("'activation' must ") and len(text) < 260 and text.isprintable()


def test_import_paths_are_text_here():
    before = set(sys.modules)
    for path in ("antigravity:x", "this:that", "torch.nn:ReLU"):
        assert is_import_path(path) and canonical(path) == path
        assert display_name(path) == path and folder_part(path) == path.replace(":", ".")
        with pytest.raises(ValueError, match="a name that biasshift knows"):
            constructor(path)
    assert set(sys.modules) == before
    for other in ("elu", "elu:0.5", 3, None, "a:b:c", "é:b", "a.:b", ".a:b", "a..b:c", "1:b"):
        assert not is_import_path(other)


def test_reading_needs_no_import_machinery(tmp_path):
    """What reads, draws and judges runs does not even load the file that imports."""
    code = (
        "import sys, biasshift.runs, biasshift.runs.reader, biasshift.activation_names\n"
        "assert 'torch' not in sys.modules\n"
        "import biasshift.analysis.verdicts, biasshift.plots, biasshift.report\n"
        "assert 'biasshift.nets.activation_modules' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)


# -- labels ----------------------------------------------------------------------------------------


def test_labels_are_short_printable_and_never_shared():
    names = [
        *ACTIVATIONS,
        "elu:0.5",
        "lrelu:0.01",
        "torch.nn:Hardswish",
        "x" * 10_000,
        "x" * 10_001,
        "a\x01",
        "a\x02",
        "a\ufffd",
        "\x1b[31m",
        3,
        "",
    ]
    labels = [display_name(name) for name in names]
    assert len(set(labels)) == len(names)
    assert all(len(text) <= 40 and text.isprintable() for text in labels)
    assert [display_name(text) for text in labels] == labels  # a label is its own label


def test_the_order_is_the_paper_s_then_the_others():
    assert ordered(reversed(ACTIVATIONS))[:5] == ["elu", "srelu", "lrelu", "relu", "prelu"]
    assert sorted(ordered(ACTIVATIONS)) == sorted(ACTIVATIONS)


def test_every_name_has_a_function():
    assert tuple(ACTIVATIONS) == NAMES == tuple(LABELS)


def test_shared_modules_have_no_state():
    assert constructor("prelu")() is not constructor("prelu")()
    assert isinstance(constructor("prelu")(), nn.PReLU)
