"""Threads that measure their models at the same time: what each would measure alone, and a process
that is as found when all have ended.
"""

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the stance of torch.compile is among what is as found
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs
from biasshift.precision import product_precision
from tests.faults.small import same
from tests.faults.tally import Tally

PATIENCE = 120  # seconds
THREADS = 3


class Mixed(nn.Module):
    """Statistics, dropout that is off, and attention, which is taken apart."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm, self.drop = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.elu(self.norm(self.stem(x))))[:, None]
        return self.head(h + self.attention(h, h, h, need_weights=False)[0]).flatten(1)


def examples(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(40) % 3


def numbers(model: nn.Module, seed: int) -> list[Tensor]:
    """All that can be measured of a model, as tensors."""
    x, y = examples(seed)
    found = [fisher.matrix() for fisher in bs.unit_fisher(model, x, labels="sampled").values()]
    found += [moments.var for moments in bs.activation_moments(model, x).values()]
    with bs.bias_shift(model, x) as shift, torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    found += [layer.total for layer in shift.values()]
    gap = bs.gradient_gap(model, x, y).select_dtypes("number")
    return [*found, torch.from_numpy(gap.to_numpy(copy=True))]


def training(model: nn.Module, seed: int) -> list[Tensor]:
    """A few steps under both logs."""
    x, y = examples(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    with (
        bs.instrument(model, optimizer, probe=(x, y), every=2) as log,
        bs.instrument(model, optimizer) as own,
    ):
        for batch, labels in zip(x.split(8), y.split(8), strict=True):
            optimizer.zero_grad()
            model.train(mode=True)
            model.drop.eval()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
    for table in (log.table(), own.table()):
        values = table.select_dtypes("number").to_numpy(dtype=float, copy=True)
        found.append(torch.from_numpy(values))
    return [*found, *(p.detach() for p in model.parameters())]


def process() -> dict[str, Any]:
    flags = [("generic", "all")]
    flags += [(at, name) for at in ("cuda", "mkldnn") for name in ("all", "matmul", "conv", "rnn")]
    return {
        "flags": [torch._C._get_fp32_precision_getter(*flag) for flag in flags],
        "older flag": torch.get_float32_matmul_precision(),
        "stance": sys.modules["torch._dynamo.eval_frame"]._stance,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "forward": [nn.MultiheadAttention.forward, nn.LSTM.forward, nn.GRUCell.forward],
        "filters": (id(warnings.filters), list(warnings.filters)),
    }


def run_together(*actions: Callable[[], object]) -> None:
    """Runs every action in a thread of its own, and raises what one of them raises."""
    errors: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


PARTS = {"numbers": numbers, "training": training}


def tallies(count: int, seed: int, work: Path, part: str | None = None) -> list[Tally]:
    """``count`` rounds of threads that measure, and as many that train, or those of one part."""
    made = []
    for name in PARTS if part is None else [part]:
        tally = Tally(f"{THREADS} threads at once, {name}")
        seeds = range(THREADS * seed, THREADS * seed + THREADS)
        alone = {seed: PARTS[name](Mixed(seed), seed) for seed in seeds}
        # Flags that differ from those of measurements.
        with product_precision("float32"):
            torch.set_float32_matmul_precision("high")
            for _ in range(count):
                if fault := _differing(PARTS[name], alone):
                    tally.lost.append(fault)
                else:
                    tally.unharmed += 1
        made.append(tally)
    return made


def _differing(measure: Callable, alone: dict[int, list[Tensor]]) -> str:
    """What is not as found, or not what a thread measures alone."""
    models, together = {seed: Mixed(seed) for seed in alone}, dict[int, list[Tensor]]()
    before = process()

    def run(seed: int) -> None:
        together[seed] = measure(models[seed], seed)

    try:
        run_together(*(lambda seed=seed: run(seed) for seed in alone))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    after = process()
    changed = [name for name, value in before.items() if after[name] != value]
    return ", ".join(changed + [f"thread {n}" for n in alone if not _same(together[n], alone[n])])


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """To the bit, NaN included."""
    return same(*([t.nan_to_num(nan=1e300) for t in tensors] for tensors in (found, expected)))
