"""An interruption at any line leaves everything as found."""

import pytest
import torch
from torch import nn
from torch._C import _functorch as functorch

import biasshift as bs
from tests.faults.alone import run_alone


def test_an_interruption_at_any_line_leaves_everything_as_found(tmp_path):
    run_alone("interrupts", 105, tmp_path)


class Interrupted(nn.Module):
    """Leaves behind what an interruption inside of PyTorch does, at its worst moment."""

    def __init__(self, transforms: str) -> None:
        super().__init__()
        self.transforms, self.stem, self.act = transforms, nn.Linear(3, 2), nn.ELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for kind in self.transforms:
            if kind == "v":
                functorch._vmap_increment_nesting(3, "error")
            elif kind == "g":
                functorch._grad_increment_nesting()
            elif kind == "b":
                torch._C._vmapmode_increment_nesting()
            else:
                torch._C._autograd._saved_tensors_hooks_disable("inside")
        raise KeyboardInterrupt


@pytest.mark.parametrize("transforms", ["v", "g", "vv", "vg", "gv", "gvg", "b", "bb", "s", "svgb"])
def test_transforms_of_functions_do_not_stay_in_force(transforms):
    model, x = Interrupted(transforms), torch.randn(5, 3)
    with pytest.raises(KeyboardInterrupt):
        bs.activation_moments(model, x)
    assert functorch.get_dynamic_layer_stack_depth() == 0
    torch.rand(2)  # fails inside of either vmap
    with torch.autograd.graph.save_on_cpu():  # fails where such hooks are disabled
        model.stem(x).sum().backward()


def test_transforms_around_a_measurement_stay_in_force():
    model, x, depths = nn.Sequential(nn.Linear(3, 2), nn.ELU()), torch.randn(5, 3), []

    def measured(value):
        depths.append(functorch.get_dynamic_layer_stack_depth())
        bs.activation_moments(model, x)
        depths.append(functorch.get_dynamic_layer_stack_depth())
        return value.sum()

    torch.func.grad(measured)(torch.ones(2))
    assert depths == [1, 1]
