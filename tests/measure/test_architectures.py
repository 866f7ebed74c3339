"""Published architectures, as they come: covered layers are right, and others have a reason.

A few units of each can be measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biasshift as bs
from biasshift.measure.layer_types import named_modules

models = pytest.importorskip("torchvision").models


@dataclass(frozen=True)
class Published:
    name: str
    size: int
    uncovered: dict[str, tuple[int, str]]  # kind: how many, and why
    layers: tuple[str, ...]
    options: dict[str, Any]
    examples: int = 2

    def build(self) -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.name == "vit":
                # the encoder of vit_b_16, at a fifth of its depth and a quarter of its width
                model: nn.Module = models.VisionTransformer(
                    32, 8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768
                )
                # zeros, as it comes: nothing has an error
                nn.init.normal_(model.heads.head.weight, std=0.1)
            else:
                model = getattr(models, self.name)(weights=None, **self.options)
            return model.eval(), torch.randn(self.examples, 3, self.size, self.size)


CASES = [
    Published("resnet18", 64, {}, ("conv1", "layer3.0.downsample.0", "fc"), {}),
    Published("resnet50", 32, {}, ("layer1.0.conv2", "layer2.0.conv1"), {}, examples=1),
    Published("convnext_tiny", 32, {}, ("features.0.0", "features.1.0.block.0"), {}, examples=1),
    Published("mobilenet_v3_small", 64, {}, ("features.1.block.0.0", "features.1.block.1.fc1"), {}),
    Published(
        "densenet121",
        32,
        {},
        ("features.conv0", "features.denseblock1.denselayer2.conv1"),
        {},
        examples=1,
    ),
    Published(
        "vit",
        32,
        {},
        (
            "conv_proj",
            "encoder.layers.encoder_layer_1.self_attention.v_proj",
            "encoder.layers.encoder_layer_1.mlp.0",
        ),
        {},
    ),
    Published(
        "swin_t",
        64,
        {},  # its attention applies the weights of its layers by a function
        ("features.0.0", "features.1.0.attn.qkv", "features.1.0.mlp.0"),
        {},
        examples=1,
    ),
]

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
SLOW = ("resnet50", "convnext_tiny", "densenet121", "swin_t")
published = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case.name in SLOW)) for case in CASES],
    ids=lambda case: case.name,
)


@published
def test_a_published_model_is_checked(case: Published) -> None:
    model, x = case.build()
    table = bs.check(model, x, examples=case.examples)
    assert table["module"].tolist() == list(named_modules(model))
    covered, rest = table[table["covered"]], table[~table["covered"]]
    assert (covered["error"] < 1e-10).all()
    assert (covered["calls"] == 1).all() and (covered["reason"] == "").all()
    assert rest["error"].isna().all() and (rest["reason"] != "").all()
    assert len(covered) == sum(isinstance(m, LAYERS) for m in named_modules(model).values()) - sum(
        number for kind, (number, _) in case.uncovered.items() if "Linear" in kind
    )
    refused = rest[rest["units"] > 0]
    reasons = {kind: (len(rows), rows["reason"].iloc[0]) for kind, rows in refused.groupby("kind")}
    assert reasons == case.uncovered and refused.groupby("kind")["reason"].nunique().eq(1).all()


@published
def test_a_few_units_of_a_published_model(case: Published) -> None:
    model, x = case.build()
    chosen: Callable[[str, nn.Module], bool] = lambda name, module: name in case.layers  # noqa: E731
    fishers = bs.unit_fisher(model, x, layers=chosen, units=[0, 3], labels="sampled", damping=1e-2)
    assert list(fishers) == list(case.layers)
    for fisher in fishers.values():
        used = ~fisher.dead & ~fisher.singular
        assert fisher.mean_q.shape[0] == 2 and bool(fisher.coupling[used].isfinite().all())
