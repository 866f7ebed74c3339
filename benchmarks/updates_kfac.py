"""Training loops with the K-FAC of two peers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[Tensor, Tensor], None]


def asdl_loop(model: nn.Module, every: int, rate: float, damping: float, decay: float) -> Step:
    """Returns a step with ASDL's K-FAC.

    Weights and biases are apart, and factors are running averages that start from 0.
    """
    from asdl import KfacGradientMaker, PreconditioningConfig

    config = PreconditioningConfig(
        preconditioner_upd_interval=every,
        curvature_upd_interval=every,
        data_size=1,
        damping=damping,
        ema_decay=1 - decay,
    )
    maker = KfacGradientMaker(model, config, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def step(x: Tensor, y: Tensor) -> None:
        config.data_size = len(x)
        optimizer.zero_grad()
        maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
        maker.forward_and_backward()
        optimizer.step()

    return step


def curvlinops_loop(model: nn.Module, every: int, rate: float, damping: float) -> Step:
    """Returns a step with curvlinops' K-FAC: a linear operator, with plain SGD around it.

    It is of the latest batch alone, for which it goes through the model once more.
    """
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=rate)
    inverse, steps = None, 0

    def step(x: Tensor, y: Tensor) -> None:
        nonlocal inverse, steps
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if steps % every == 0:
            kfac = KFACLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                params,
                [(x, y)],
                check_deterministic=False,
                seed=steps,
                num_per_example_loss_terms=1,
                separate_weight_and_bias=False,
                num_data=len(x),
            )
            inverse = KFACInverseLinearOperator(kfac, damping=damping, use_heuristic_damping=True)
        for p, update in zip(params, inverse @ [p.grad for p in params], strict=True):
            p.grad = update
        optimizer.step()
        steps += 1

    return step
