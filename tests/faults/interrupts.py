"""Measurements that are interrupted at any line of Python, of PyTorch's files and ours."""

import ctypes
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._dynamo  # the stance of torch.compile is among what is as found
import torch.nn.functional as F
from torch import nn

import biasshift as bs
from tests.faults.tally import Tally

# The exception is raised by a debugger, or thrown by another thread, or is that of Ctrl-C, which is
# pressed again while the first is on its way up.
KINDS = {
    "trace": "interruption: exception at a line",
    "async": "interruption: exception thrown by a thread",
    "signal": "interruption: Ctrl-C, and again",
}
FLAGS = [("generic", "all")]
FLAGS += [
    (place, name) for place in ("cuda", "mkldnn") for name in ("all", "matmul", "conv", "rnn")
]


# -- what is measured ------------------------------------------------------------------------------


class Net(nn.Module):
    """A bit of everything: statistics, a count, attention, a frozen layer, user's hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ELU()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.calls, self.seen = 0, [torch.zeros(2)]
        self.stem.weight.requires_grad_(False)
        self.norm.eval()
        self.head.register_forward_hook(_nothing)
        self.attention.out_proj.register_forward_hook(_nothing)
        self.act.register_full_backward_hook(_nothing)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen[0].add_(1)
        h = self.act(self.norm(self.stem(x)))[:, None]
        return self.head(h + self.attention(h, h, h, need_weights=False)[0]).flatten(1)


class Still(torch.optim.SGD):
    """Its steps do nothing: an interruption in those of PyTorch leaves gradients switched off."""

    def step(self, closure=None):
        pass


def _nothing(*_: object) -> None:
    pass


X, Y = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


def fisher(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    bs.unit_fisher(model, X)


def gap(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    bs.gradient_gap(model, X, Y)


def shift(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with bs.bias_shift(model, X):
        pass


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    bs.activation_moments(model, X)


def check(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    bs.check(model, X, examples=2)


def probe(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with bs.instrument(model, optimizer, probe=(X, Y), every=1):
        optimizer.step()


def training(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with bs.instrument(model, optimizer):
        model(X)
        optimizer.step()


MEASUREMENTS = (fisher, gap, shift, moments, check, probe, training)
# The user's own training goes on inside: its parameters, counts and random numbers move.
TRAINING = (probe, training)
PARTS = [measure.__name__ for measure in MEASUREMENTS]


def made() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = Still(model.parameters(), lr=0.1)
    F.cross_entropy(model(X), Y).backward()
    return model, optimizer


def state(model: Net, optimizer: torch.optim.Optimizer, trains: bool) -> dict[str, Any]:
    """Everything that must be as found, in a form that compares."""
    modules = dict(model.named_modules())
    found = {
        "hooks": {
            (name, key): {n: id(hook) for n, hook in value.items()}
            for name, module in modules.items()
            for key, value in vars(module).items()
            if "_hooks" in key and isinstance(value, dict)
        },
        "steps": [
            [id(hook) for hook in hooks.values()]
            for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        ],
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "forward": [
            kind.forward
            for kind in (nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell)
        ],
        "own forward": [name for name, module in modules.items() if "forward" in vars(module)],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "parameters": [p.tolist() for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "identities": [(id(p), id(p.grad)) for p in model.parameters()],
        "flags": [torch._C._get_fp32_precision_getter(*flag) for flag in FLAGS],
        "older flags": (torch.get_float32_matmul_precision(), torch._C._get_cudnn_allow_tf32()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "stance": sys.modules["torch._dynamo.eval_frame"]._stance,
        "filters": [list(warnings.filters), id(warnings.filters)],
        "modes of autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "transforms": torch._C._functorch.get_dynamic_layer_stack_depth(),
        "batches": torch._C._dispatch_tls_is_dispatch_key_included("VmapMode"),
        "saved tensors": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
    }
    if not trains:
        found |= {
            "buffers": [b.tolist() for b in model.buffers()],
            "plain attributes": (model.calls, id(model.seen), model.seen[0].tolist()),
            "random state": torch.get_rng_state().tolist(),
        }
    return found


# -- interruptions ---------------------------------------------------------------------------------


class Interrupter:
    """Counts lines, and interrupts at the ``at``-th of them; and again ``again`` lines later.

    It is a trace function: one that raises an exception is gone.
    """

    def __init__(self, kind: str, at: int, again: int) -> None:
        self.kind, self.at, self.again, self.lines, self.where = kind, at, again, 0, ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if event != "line":
            return self
        self.lines += 1
        if self.lines == self.at or (self.kind == "signal" and self.lines == self.at + self.again):
            self.where += f" {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            if self.kind == "trace":
                raise KeyboardInterrupt
            if self.kind == "async":
                thread = ctypes.c_ulong(threading.get_ident())
                error = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)
            else:
                signal.raise_signal(signal.SIGINT)
        return self


def lines(measure: Callable) -> int:
    """How many lines of Python a measurement runs."""
    interrupter = Interrupter("trace", 0, 0)
    for _ in range(3):  # the first ones fill caches
        interrupter.lines = 0
        interrupted(measure, *made(), interrupter)
    return interrupter.lines


def interrupted(
    measure: Callable, model: Net, optimizer: torch.optim.Optimizer, trace: Interrupter
) -> None:
    before = sys.gettrace()
    try:
        sys.settrace(trace)
        measure(model, optimizer)
    finally:
        sys.settrace(before)


def tallies(count: int, seed: int, work: Path, part: str | None = None) -> list[Tally]:
    """``count`` interruptions of all measurements in all ways, or those of one measurement."""
    each = -(-count // (len(KINDS) * len(MEASUREMENTS)))
    made = {kind: Tally(name) for kind, name in KINDS.items()}
    # Other than what blocks set, so that nothing is as found by chance.
    torch.set_float32_matmul_precision("high")
    for measure in MEASUREMENTS:
        if part not in (None, measure.__name__):
            continue
        total = lines(measure)
        for kind, tally in made.items():
            draw = random.Random(f"{seed} {measure.__name__} {kind}")
            for _ in range(each):
                trace = Interrupter(kind, draw.randint(1, total), draw.randint(1, 60))
                if differing := _differing(measure, trace):
                    tally.lost.append(f"{measure.__name__} at{trace.where}: {differing}")
                else:
                    tally.unharmed += 1
    torch.set_float32_matmul_precision("highest")
    return list(made.values())


def _differing(measure: Callable, trace: Interrupter) -> str:
    """The names of what is not as found."""
    torch.set_grad_enabled(True)  # one loss is not to be the next one's
    model, optimizer = made()
    before = state(model, optimizer, measure in TRAINING)
    # Python itself drops exceptions inside of destructors: not every one comes out.
    with suppress(KeyboardInterrupt):
        interrupted(measure, model, optimizer, trace)
        time.sleep(0)  # what was thrown at the very end comes here
    after = state(model, optimizer, measure in TRAINING)
    return ", ".join(name for name, value in before.items() if after[name] != value)
