"""`nn.MultiheadAttention` as four linear layers with attention in between."""

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from biasshift.measure.parts import LinearPart, identity

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def parts(module: nn.MultiheadAttention) -> dict[str, LinearPart]:
    """Returns the projections of queries, keys and values; that of the output is a child."""
    widths = (module.embed_dim, module.kdim, module.vdim)
    bias = None if module.in_proj_bias is None else "in_proj_bias"
    return {
        name: LinearPart(
            module,
            "in_proj_weight" if module._qkv_same_embed_dim else f"{name}_weight",
            bias,
            width,
            module.embed_dim,
            i * module.embed_dim,
        )
        for i, (name, width) in enumerate(zip(PROJECTIONS, widths, strict=True))
    }


def why_whole(module: nn.MultiheadAttention) -> str | None:
    """Returns why an attention module cannot be taken apart, or None."""
    output = module._modules.get("out_proj")
    if (
        not isinstance(output, nn.Linear)
        or type(output).forward is not nn.Linear.forward
        or "forward" in vars(output)
    ):
        return "its out_proj is not an nn.Linear, and it reads that layer's weight in a function"
    return None


def attend(
    original: Callable[..., Any],
    parts: dict[str, LinearPart],
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Returns what the module returns, with its projections called as modules.

    What lies between them is PyTorch's own function, masks included, with identity projections.
    The projections get their inputs with the examples in front.

    Args:
        original: the forward of `nn.MultiheadAttention`.
    """
    inputs = (query, key, value)
    if any(t.is_nested for t in inputs) or query.dim() not in (2, 3):
        return original(module, *inputs, *args, **kwargs)
    batched = query.dim() == 3
    turned = batched and not module.batch_first
    with ExitStack() as stack:
        if parametrize.is_parametrized(module):  # computed once for all three
            stack.enter_context(parametrize.cached())
        projected = []
        for part, t in zip(parts.values(), inputs, strict=True):
            t = part(t.transpose(0, 1) if turned else t if batched else t.unsqueeze(0))
            projected.append(t if batched else t.squeeze(0))
    core = _between_projections(module, projected[0])
    mixed, attention = original(core, *projected, *args, **kwargs)
    output = module.out_proj(mixed if batched else mixed.unsqueeze(0))
    if not batched:
        output = output.squeeze(0)
    return output.transpose(0, 1) if turned else output, attention


def _between_projections(module: nn.MultiheadAttention, like: Tensor) -> nn.MultiheadAttention:
    """The same attention with identity matrices for projections, batches first."""
    core = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
    eye = identity(like)
    vars(core).update(vars(module))
    vars(core).update(
        _parameters={f"{name}_weight": eye for name in PROJECTIONS},
        _modules={},
        in_proj_weight=None,
        in_proj_bias=None,
        bias_k=module.bias_k,
        bias_v=module.bias_v,
        out_proj=SimpleNamespace(weight=eye, bias=None),
        batch_first=True,
        _qkv_same_embed_dim=False,
    )
    return core
