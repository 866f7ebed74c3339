"""Optimizers inside of others: whose steps are seen, and what is said of those that are not."""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs

from .table import refusal, report, warned


class Lookahead(torch.optim.Optimizer):
    """Without ``super().__init__``; moves back half the way every second step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state, self.defaults, self.count = {}, {}, 0
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.count += 1
        return loss


class Accelerated(torch.optim.Optimizer):
    """As accelerate's: attributes and steps are those of the optimizer inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.gradient_state = optimizer, None

    @property
    def param_groups(self) -> list:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> dict:
        return self.optimizer.state

    @property
    def defaults(self) -> dict:
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class Delegating:
    """No optimizer of PyTorch at all, as warm-up schedules are written."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


class Sharpness(torch.optim.Optimizer):
    """SAM, as it is widely written."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    def second_step(self) -> None:
        self.base.step()


WRAPPERS = {"Lookahead": Lookahead, "accelerate": Accelerated, "no optimizer": Delegating}


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double()
    return model, torch.randn(8, 3).double(), torch.randint(3, (8,))


@report("wrapped optimizers", *WRAPPERS)
def total_shift_of_the_second_step(name: str) -> tuple[dict, dict]:
    model, x, y = network()
    optimizer = WRAPPERS[name](torch.optim.SGD(model.parameters(), lr=0.1))
    with bs.instrument(model, optimizer, probe=(x, y), every=1) as log:
        for _ in range(2):
            with torch.no_grad():
                before = {"0": model[0](x).mean(0), "2": model(x).mean(0)}
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    table = log.table()
    table = table[(table.step == 2) & (table.unit >= 0)].sort_values("unit")
    found = {n: torch.tensor(table[table.layer == n]["total"].to_numpy()) for n in ("0", "2")}
    with torch.no_grad():
        after = {"0": model[0](x).mean(0), "2": model(x).mean(0)}
    return found, {n: after[n] - before[n] for n in after}


@report("wrapped optimizers", "with a probe", "without a probe")
def another_models_optimizer(how: str) -> tuple[str, re.Pattern]:
    model, x, y = network()
    stale = torch.optim.SGD(network()[0].parameters(), lr=0.1)
    probe = (x, y) if how == "with a probe" else None
    said = refusal(lambda: bs.instrument(model, stale, probe=probe))
    return said, re.compile(r"ValueError: 'optimizer' must train the model, but SGD holds none")


@report("wrapped optimizers", "SAM", "by hand")
def no_step_seen(kind: str) -> tuple[str, re.Pattern]:
    model, x, y = network()
    sam = Sharpness(model.parameters())
    optimizer = sam if kind == "SAM" else torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        with bs.instrument(model, optimizer, probe=(x, y), every=1):
            for _ in range(2):
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if kind == "SAM":
                    sam.second_step()
                else:
                    with torch.no_grad():
                        for p in model.parameters():
                            p -= 0.1 * p.grad

    return warned(train), re.compile(r"RuntimeWarning: .*no step of \w+ was seen")


@report("wrapped optimizers")
def the_optimizer_inside_of_SAM() -> tuple[Tensor, Tensor]:
    """The remedy that the warning names."""
    model, x, y = network()
    sam = Sharpness(model.parameters())
    with torch.no_grad():
        before = model[0](x).mean(0)
    with bs.instrument(model, sam.base, probe=(x, y), every=1) as log:
        F.cross_entropy(model(x), y).backward()
        sam.second_step()
    table = log.table()
    rows = table[(table.step == 1) & (table.layer == "0") & (table.unit >= 0)].sort_values("unit")
    return torch.tensor(rows["total"].to_numpy()), model[0](x).mean(0) - before
