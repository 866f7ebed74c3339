"""Small models and inputs: each case is a construction that has broken a library.

Every model is built in float64 from a fixed seed; inputs have means that are not zero. `pristine`
checks that a model was left as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class FunctionalMLP(nn.Module):
    """Activations called as functions; the second one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.first(x))
        return self.last(F.elu(self.second(h), inplace=True))


class Residual(nn.Module):
    """An identity around two layers, and one around a block of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Linear(5, 6), nn.Linear(6, 4)
        self.down, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.act = nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        h = h + self.down(self.act(self.up(h)))
        return self.head(F.relu(h))


class Shared(nn.Module):
    """One layer, run twice in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        return self.head(F.elu(self.twice(F.elu(self.twice(h)))))


class InplaceResidual(nn.Module):
    """A net input that is added to and rectified in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        net = self.inner(h)
        net += h
        return self.head(net.relu_())


class Keyword(nn.Module):
    """A layer that is called with a keyword: its hooks see no positional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.inner(input=x)))


class Tied(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again, self.head = self.first, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


class Checkpointed(nn.Module):
    """A block whose activations are forgotten and computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.block = nn.Sequential(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 4))
        self.reentrant = reentrant  # None: no checkpoint

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        if self.reentrant is None:
            return self.head(self.block(h))
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))


class Pool(nn.Module):
    """The mean over the positions of (batch, positions, inputs)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Mix(nn.Module):
    """Every position sees the mean over the positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Windows(nn.Module):
    """Positions folded into the axis of examples, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.inner(x.reshape(-1, x.shape[-1])))
        return self.head(h.reshape(len(x), -1, h.shape[-1]).mean(1))


class SequenceFirst(nn.Module):
    """Positions lead inside the model.

    With as many positions as examples the axes have equal sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.inner(x.transpose(0, 1))).mean(0))


class ChangedLater(nn.Module):
    """The incoming activation of `inner` is changed in place after `inner` has read it.

    Trainable only because `inner` is frozen: autograd keeps no copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.inner.requires_grad_(False)
        self.inplace = True  # else the same function without it

    def forward(self, x: Tensor) -> Tensor:
        u = self.stem(x).tanh().clone()
        v = self.inner(u)
        if not self.inplace:
            return self.head(u + v)
        u += v
        return self.head(u)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.ELU(), nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 3))
    for parameter in [*model[0].parameters(), *model[2].parameters()]:
        parameter.requires_grad_(False)
    return model


def normalized_conv() -> nn.Module:
    """BatchNorm with statistics of its own, in eval mode."""
    conv = [nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*conv, nn.Linear(27, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    for norm in (model[1], model[5]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.eval()


def conv_net(head: int, **options: object) -> nn.Module:
    """One convolution of 2 channels and one linear layer of `head` inputs."""
    conv = nn.Conv2d(2, 4, **{"kernel_size": 3, **options})
    return nn.Sequential(conv, nn.ELU(), nn.Flatten(), nn.Linear(head, 3))


@dataclass(frozen=True)
class Case:
    name: str
    factory: Callable[[], nn.Module]
    x_shape: tuple[int, ...]
    likelihood: str = "categorical"
    shared: tuple[str, ...] = ()  # layers that run twice: measured right, or refused with the name
    tokens: bool = False  # one label per position

    def build(self, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
        """Model, inputs and labels; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.factory().double()
            x = torch.randn(self.x_shape, dtype=torch.float64) + 0.7
            with torch.no_grad():
                shape = model(x[:2]).shape[1:]
            n = len(x)
            if self.likelihood == "categorical":
                y = torch.randint(shape[-1], (n, *shape[:-1]))
            elif self.likelihood == "bernoulli":
                y = torch.randint(2, (n, *shape)).double()
            else:
                y = torch.randn(n, *shape, dtype=torch.float64)
        return model, x, y


def _mlp(act: Callable[[], nn.Module], outputs: int = 3) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(5, 6), act(), nn.Linear(6, 5), act(), nn.Linear(5, outputs)
    )


CASES = [
    Case("mlp-elu", _mlp(nn.ELU), (40, 5)),
    Case("mlp-elu-inplace", _mlp(lambda: nn.ELU(inplace=True)), (40, 5)),
    Case("mlp-relu", _mlp(nn.ReLU), (40, 5)),
    Case("mlp-tanh", _mlp(nn.Tanh), (40, 5)),
    Case("mlp-functional", FunctionalMLP, (40, 5)),
    Case(
        "mlp-no-bias",
        lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.ELU(), nn.Linear(6, 3)),
        (40, 5),
    ),
    Case("mlp-frozen", frozen, (40, 5)),
    Case(
        "mlp-layernorm",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.ELU(), nn.Linear(6, 3)),
        (40, 5),
    ),
    Case("mlp-gaussian", _mlp(nn.ELU), (40, 5), "gaussian"),
    Case("mlp-bernoulli", _mlp(nn.ELU), (40, 5), "bernoulli"),
    Case("residual", Residual, (40, 5)),
    Case("residual-inplace", InplaceResidual, (40, 5)),
    Case("keyword", Keyword, (40, 5)),
    Case("shared", Shared, (40, 5), shared=("twice",)),
    Case("tied", Tied, (40, 5), shared=("first", "again")),
    Case(
        "tokens-pooled",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ELU(), Pool(), nn.Linear(5, 3)),
        (24, 4, 3),
    ),
    Case(
        "tokens-labeled",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ELU(), Mix(), nn.Linear(5, 3)),
        (24, 4, 3),
        tokens=True,
    ),
    Case(
        "tokens-inplace",
        lambda: nn.Sequential(nn.Linear(3, 5), nn.ELU(inplace=True), Pool(), nn.Linear(5, 3)),
        (24, 4, 3),
    ),
    Case("conv-plain", lambda: conv_net(64), (24, 2, 6, 6)),
    Case("conv-strided", lambda: conv_net(36, stride=2, padding=1), (24, 2, 6, 6)),
    Case(
        "conv-uneven",
        lambda: conv_net(60, kernel_size=(2, 3), stride=(1, 2), padding=(0, 1)),
        (24, 2, 6, 5),
    ),
    Case("conv-same", lambda: conv_net(100, padding="same", dilation=2), (24, 2, 5, 5)),
    Case("conv-reflect", lambda: conv_net(100, padding=1, padding_mode="reflect"), (24, 2, 5, 5)),
    Case(
        "conv-circular",
        lambda: conv_net(100, padding="same", padding_mode="circular"),
        (24, 2, 5, 5),
    ),
    Case("conv-dilated", lambda: conv_net(36, dilation=2, padding=1), (24, 2, 5, 5)),
    Case("conv-groups", lambda: conv_net(36, groups=2), (24, 2, 5, 5)),
    Case("conv-no-bias", lambda: conv_net(36, bias=False), (24, 2, 5, 5)),
    Case(
        "conv-inplace",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (24, 2, 6, 6),
    ),
    Case(
        "conv1d",
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3, stride=2),
            nn.Tanh(),
            nn.Conv1d(3, 2, 2),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (24, 2, 8),
    ),
    Case(
        "conv3d",
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3)
        ),
        (24, 1, 2, 3, 2),
    ),
    Case("batchnorm-eval", normalized_conv, (24, 2, 5, 5)),
]

BY_NAME = {case.name: case for case in CASES}


HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
]


def pristine(model: nn.Module) -> None:
    """No hook anywhere, and `forward` is the class's."""
    for name, module in model.named_modules():
        for kind in HOOKS:
            assert not getattr(module, kind, None), (name, kind)
        assert "forward" not in module.__dict__
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        assert not getattr(parameter, "_post_accumulate_grad_hooks", None)
