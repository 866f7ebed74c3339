"""Recurrent modules step by step: one linear layer per weight matrix, called at every time step.

The weights of a gate are units like any other, shared over time. Net inputs that PyTorch adds up,
those of the input and of the hidden state, are two layers, each with the module's bias for it. That
is how `nn.GRU` needs it, whose reset gate comes between both.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biasshift.measure.parts import LinearPart

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


# -- the linear layers -----------------------------------------------------------------------------


def parts(module: nn.RNNBase) -> dict[str, LinearPart]:
    """Returns ``ih_l0``, ``hh_l0`` and with projections ``hr_l0``, of every layer and direction."""
    return {
        part: _part(module, part, module.bias and not part.startswith("hr"))
        for ending in _endings(module)
        for part in (f"ih_{ending}", f"hh_{ending}", f"hr_{ending}")
        if hasattr(module, f"weight_{part}")
    }


def cell_parts(module: nn.RNNCellBase) -> dict[str, LinearPart]:
    """Returns ``ih`` and ``hh``, for the input and for the hidden state."""
    return {part: _part(module, part, module.bias) for part in ("ih", "hh")}


def _part(module: nn.Module, name: str, bias: bool) -> LinearPart:
    weight = getattr(module, f"weight_{name}")
    key = f"bias_{name}" if bias else None
    return LinearPart(module, f"weight_{name}", key, weight.shape[1], len(weight), 0)


def _endings(module: nn.RNNBase) -> Iterator[str]:
    for layer in range(module.num_layers):
        yield f"l{layer}"
        if module.bidirectional:
            yield f"l{layer}_reverse"


# -- one step --------------------------------------------------------------------------------------


def _lstm(net: Tensor, net_hidden: Tensor, state: State) -> State:
    i, f, g, o = (net + net_hidden).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(net: Tensor, net_hidden: Tensor, state: State) -> State:
    (r, z, n), (hidden_r, hidden_z, hidden_n) = net.chunk(3, -1), net_hidden.chunk(3, -1)
    z = (z + hidden_z).sigmoid()
    n = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
    return (n + z * (state[0] - n),)


def _tanh(net: Tensor, net_hidden: Tensor, state: State) -> State:
    return ((net + net_hidden).tanh(),)


def _relu(net: Tensor, net_hidden: Tensor, state: State) -> State:
    return ((net + net_hidden).relu(),)


Step = Callable[[Tensor, Tensor, State], State]
STEPS: dict[str, Step] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}


# -- whole sequences -------------------------------------------------------------------------------


def recur(
    original: Callable[..., Any],
    parts: dict[str, LinearPart],
    module: nn.RNNBase,
    input: Any,
    hx: Any = None,
) -> Any:
    """Returns what the fused kernel returns, up to rounding, with the parts called as modules.

    Packed and nested sequences, which have no axis of examples, run in the fused kernel.

    Args:
        original: the forward of `nn.LSTM`, `nn.GRU` or `nn.RNN`.
    """
    if not isinstance(input, Tensor) or input.is_nested or input.dim() not in (2, 3):
        return original(module, input, hx)
    batched = input.dim() == 3
    x = input if batched else input.unsqueeze(0)
    x = x.transpose(0, 1) if batched and not module.batch_first else x
    if x.shape[1] == 0:
        return original(module, input, hx)
    state = _first_state(module, x, hx, batched)
    module.check_forward_args(
        x if module.batch_first else x.transpose(0, 1),
        state if module.mode == "LSTM" else state[0],  # pyright: ignore[reportArgumentType]
        None,
    )
    finals = []
    directions = 2 if module.bidirectional else 1
    endings = list(_endings(module))
    for first in range(0, len(endings), directions):
        outputs = []
        for i in range(first, first + directions):
            start = tuple(s[i] for s in state)
            output, final = _one_direction(parts, module.mode, endings[i], x, start)
            outputs.append(output)
            finals.append(final)
        x = torch.cat(outputs, -1)
        if first + directions < len(endings):
            x = F.dropout(x, module.dropout, module.training)
    last = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    if not batched:
        x, last = x.squeeze(0), tuple(s.squeeze(1) for s in last)
    x = x.transpose(0, 1) if batched and not module.batch_first else x
    return x, last if module.mode == "LSTM" else last[0]


def _first_state(module: nn.RNNBase, x: Tensor, hx: Any, batched: bool) -> State:
    """(layers × directions, batch, …) each, as given or zeros."""
    if hx is not None:
        given = tuple(hx) if module.mode == "LSTM" else (hx,)
        return given if batched else tuple(s.unsqueeze(1) for s in given)
    widths = [module.proj_size or module.hidden_size]
    widths += [module.hidden_size] if module.mode == "LSTM" else []
    count = module.num_layers * (2 if module.bidirectional else 1)
    return tuple(x.new_zeros(count, len(x), width) for width in widths)


def _one_direction(
    parts: dict[str, LinearPart], mode: str, ending: str, x: Tensor, state: State
) -> tuple[Tensor, State]:
    """The hidden states (batch, time, …) of one layer in one direction, and its last state."""
    nets = parts[f"ih_{ending}"](x).unbind(1)
    hidden, projection = parts[f"hh_{ending}"], parts.get(f"hr_{ending}")
    backwards = ending.endswith("_reverse")
    outputs = []
    for net in reversed(nets) if backwards else nets:
        state = STEPS[mode](net, hidden(state[0]), state)
        if projection is not None:
            state = projection(state[0]), *state[1:]
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs, 1), state


# -- cells -----------------------------------------------------------------------------------------


def step_cell(
    original: Callable[..., Any],
    parts: dict[str, LinearPart],
    module: nn.RNNCellBase,
    input: Tensor,
    hx: Any = None,
) -> Any:
    """Returns what a cell returns, up to rounding, with its parts called as modules.

    Args:
        original: the forward of `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`.
    """
    lstm = isinstance(module, nn.LSTMCell)
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    given = (tuple(hx) if lstm else (hx,)) if hx is not None else ()
    state = tuple(s if batched else s.unsqueeze(0) for s in given)
    state = state or (x.new_zeros(len(x), module.hidden_size),) * (1 + lstm)
    fits = all(s.shape == (len(x), module.hidden_size) for s in state)
    if input.dim() not in (1, 2) or not fits:
        return original(module, input, hx)  # which raises
    result = STEPS[_cell_mode(module)](parts["ih"](x), parts["hh"](state[0]), state)
    result = result if batched else tuple(s.squeeze(0) for s in result)
    return result if lstm else result[0]


def _cell_mode(module: nn.RNNCellBase) -> str:
    if isinstance(module, nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"
