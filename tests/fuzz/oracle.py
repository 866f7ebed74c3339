"""The definitions, example by example, with plain autograd by the parameters themselves.

Nothing here comes from the package. A unit's Fisher matrix is the mean over the examples of
``E_y g gᵀ``, where g is the gradient of ``ln p(y)`` by the unit's own weights and bias: what
autograd puts into ``weight.grad`` and ``bias.grad``. Incoming means are gradients too: those of a
layer's summed output by its own weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from .generation import Case, called, copied, repeatable
from .parts import Checkpoint

Rows = dict[str, Tensor]  # by layer


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions, by PyTorch's names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)}


def plain(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with every parametrized weight as a parameter, and without checkpoints.

    All parameters are trainable, and nobody's backward hooks are called. Layers without a bias get
    one that is 0: its gradient tells the mean squared error.
    """
    for module in list(model.modules()):
        if isinstance(module, Checkpoint):
            module.off = True
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                if (buffer := module._buffers.pop(name, None)) is not None:
                    module.register_parameter(name, nn.Parameter(buffer))
        module._backward_hooks.clear()
    for layer in layers_of(model).values():
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(units_of(layer)))
    return model.to(dtype).requires_grad_(True)


def units_of(layer: nn.Module) -> int:
    """The number of units."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@dataclass(frozen=True)
class Slot:
    """Units with parameters of their own: which, and which rows of them."""

    layer: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    start: int = 0
    units: int | None = None  # all from the start, by default

    def gradient(self, got: Iterator[Tensor | None]) -> Tensor:
        """(units, params), of the gradients by the parameters, which may be None."""
        g, g0 = [
            None if p is None else _or_zeros(next(got), p)[self.start :][: self.units]
            for p in (self.weight, self.bias)
        ]
        assert g is not None
        return by_unit(self.layer, g, g0)


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """The units of layers, and those inside attention and recurrent modules, by name."""
    slots = {n: Slot(m, m.weight, m.bias) for n, m in layers_of(model).items()}
    for prefix, m in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
            for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                d = m.embed_dim
                slots[dot + part] = Slot(m, m.in_proj_weight, m.in_proj_bias, i * d, d)
        if isinstance(m, nn.RNNBase):
            for key, weight in m._parameters.items():
                if key.startswith("weight_"):
                    part = key.removeprefix("weight_")
                    slots[dot + part] = Slot(m, weight, m._parameters.get(f"bias_{part}"))
    return slots


def by_unit(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(units, params) of what has the shapes of a layer's parameters."""
    if isinstance(layer, _ConvTransposeNd):
        rows = []
        size = layer.in_channels // layer.groups
        for unit in range(layer.out_channels):
            group, place = divmod(unit, layer.out_channels // layer.groups)
            rows.append(weight[group * size : (group + 1) * size, place].reshape(-1))
        weight = torch.stack(rows)
    weight = weight.reshape(len(weight), -1)
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def label_terms(
    out: Tensor, y: Tensor | None, likelihood: str, mask: Tensor | None = None
) -> Iterator[tuple[float, Tensor]]:
    """Weights w and functions ℓ of one example's outputs with ``E_y g gᵀ = Σ w ∇ℓ ∇ℓᵀ``.

    ℓ is ln p(y) of one label, and w its probability; labels of several positions are independent.
    With labels y, ℓ is the logarithm of their probability, and the only term.
    """
    if y is not None:
        yield 1.0, log_likelihood(out, y, likelihood, mask)
    elif likelihood == "categorical":
        counted = out if mask is None else out[mask]
        for log_p in counted.reshape(-1, out.shape[-1]).log_softmax(-1):
            for log_p_y in log_p:
                yield float(log_p_y.detach().exp()), log_p_y
    elif likelihood == "gaussian":
        for f in out.flatten():
            yield 1.0, -0.5 * (f - (f.detach() + 1)) ** 2  # the error of size 1, its variance
    else:
        for f in out.flatten():
            p = float(f.detach().double().sigmoid())
            yield p, F.logsigmoid(f)
            yield 1 - p, F.logsigmoid(-f)


def log_likelihood(out: Tensor, y: Tensor, likelihood: str, mask: Tensor | None = None) -> Tensor:
    """``ln p(y)`` of all labels that count, up to a constant."""
    if likelihood == "categorical":
        log_p = out.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
        return log_p.sum() if mask is None else (log_p * mask).sum()
    if likelihood == "gaussian":
        return -0.5 * (out - y.to(out)).square().sum()
    return -F.binary_cross_entropy_with_logits(out, y.to(out), reduction="sum")


@dataclass
class Seen:
    """What one layer has seen in all examples."""

    incoming: Tensor | float = 0.0  # Σ of the incoming activations, (units, inputs), float64
    net: Tensor | float = 0.0  # Σ of the net inputs, (units,)
    positions: int = 0
    largest: float = 0.0  # incoming activation
    patches: list[Tensor] = field(default_factory=list)  # (positions, units, inputs) of each call


class Oracle:
    """All definitions for one case.

    Args:
        dtype: that the model runs in; sums are float64.
        size: examples that the model runs on together.
    """

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64, size: int = 1) -> None:
        self.case, self.dtype, self.size = case, dtype, size
        built = case.build()
        self.biased = {n: m.bias is not None for n, m in layers_of(built.model).items()}
        self.model, self.drawn = plain(built.model, dtype), built.drawn
        self.layers, self.slots = layers_of(self.model), slots_of(self.model)
        x = case.x.detach()
        self.x = x.to(dtype) if x.is_floating_point() else x

    # -- Fisher matrices ---------------------------------------------------------------------------

    def fishers(self, labels: str, sharing: str = "per_example") -> dict[str, Tensor]:
        """The unit Fisher matrices of all layers, as `full_fishers`, without biases they lack."""
        return {
            name: F if self.biased.get(name, True) else F[:, :-1, :-1]
            for name, F in self.full_fishers(labels, sharing).items()
        }

    def full_fishers(self, labels: str, sharing: str = "per_example") -> dict[str, Tensor]:
        """The unit Fisher matrices of all layers, (units, inputs + 1, inputs + 1), bias last."""
        expand = sharing == "expand"
        totals: dict[str, Tensor] = {}
        for i in range(len(self.x)):
            y = self.case.y[i : i + 1] if labels == "empirical" else None
            if self.case.mask is not None and not self.case.mask[i].any():
                continue  # nothing of this example counts
            rows = self._expanded_rows(i, y) if expand else self._rows(i, y)
            for name, row in rows.items():
                F_n = torch.einsum("rui,ruj->uij", row, row)
                totals[name] = totals.get(name, 0.0) + F_n / len(self.x)
        return totals

    def _rows(self, i: int, y: Tensor | None) -> Rows:
        """√w times the gradients of one example's terms by each unit's parameters."""
        parameters = [
            p for slot in self.slots.values() for p in (slot.weight, slot.bias) if p is not None
        ]
        rows: dict[str, list[Tensor]] = {name: [] for name in self.slots}
        with self._copied_inputs():
            out = self._output(i)
            for w, term in label_terms(out, y, self.case.likelihood, self._mask(i)):
                got = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                of_parameters = iter(got)
                for name, slot in self.slots.items():
                    rows[name].append(w**0.5 * slot.gradient(of_parameters).double())
        return {name: torch.stack(row) for name, row in rows.items()}

    def _expanded_rows(self, i: int, y: Tensor | None) -> Rows:
        """√w δ ã of every position by itself, the errors by zeros that are added to net inputs."""
        zeros: list[tuple[str, Tensor]] = []

        def add_zeros(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
                zeros.append((name, torch.zeros_like(out, requires_grad=True)))
                return out + zeros[-1][1]

            return hook

        with self._recording(patches=True) as seen:
            handles = [
                m.register_forward_hook(add_zeros(n), prepend=True) for n, m in self.layers.items()
            ]
            with self._copied_inputs():
                out = self._output(i)
            for handle in handles:
                handle.remove()
        rows: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        for w, term in label_terms(out, y, self.case.likelihood, self._mask(i)):
            got = torch.autograd.grad(
                term, [z for _, z in zeros], retain_graph=True, allow_unused=True
            )
            calls = dict.fromkeys(self.layers, 0)
            for (name, z), delta in zip(zeros, got, strict=True):
                layer = self.layers[name]
                delta = torch.zeros_like(z) if delta is None else delta
                a = seen[name].patches[calls[name]]
                calls[name] += 1
                a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
                axis = 1 if isinstance(layer, _ConvNd) else -1
                d = delta.movedim(axis, -1).reshape(-1, a.shape[1]).double()
                rows[name].append(w**0.5 * d[..., None] * a)
        return {name: torch.cat(row) for name, row in rows.items() if row}

    # -- what layers see ---------------------------------------------------------------------------

    def seen(self) -> dict[str, Seen]:
        """Sums of the incoming activations and net inputs of every layer over all examples."""
        with self._recording() as seen:
            for i in range(len(self.x)):
                self.forward(self.x[i : i + 1])
        return seen

    def coupling(self, size: int) -> float:
        """By how much an example's outputs change with the others of a batch of this size.

        Relative to the largest output; random models count as coupled.
        """
        most = 0.0
        for start in range(0, len(self.x), size):
            x = self.x[start : start + size]
            whole = self.forward(x, 1)
            alone = torch.cat([self.forward(x[i : i + 1], 2 + i) for i in range(len(x))])
            most = max(most, float((whole - alone).abs().max() / whole.abs().max()))
        return most

    def forward(self, x: Tensor, seed: int = 0) -> Tensor:
        """The outputs of some examples together, classes last."""
        with torch.no_grad(), repeatable(seed):
            return self._outputs(x)

    def _output(self, i: int) -> Tensor:
        """Those of one example, (1, …)."""
        start = i - i % self.size
        return self._outputs(self.x[start : start + self.size])[i - start : i - start + 1]

    def _outputs(self, x: Tensor) -> Tensor:
        """What the model returns, classes last."""
        with slow_attention():
            return called(self.model, x).movedim(self.case.class_axis, -1)

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        """Of the mean negative log-likelihood of an example, by every parameter."""
        parameters = list(self.model.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        for i in range(len(self.x)):
            with self._copied_inputs():
                out = self._outputs(self.x[i : i + 1])
                y = self.case.y[i : i + 1]
                loss = -log_likelihood(out, y, self.case.likelihood, self._mask(i))
                got = torch.autograd.grad(loss, parameters, allow_unused=True)
            for t, g in zip(total, got, strict=True):
                t += 0.0 if g is None else g / len(self.x)
        return dict(zip(parameters, total, strict=True))

    def _mask(self, i: int) -> Tensor | None:
        return None if self.case.mask is None else self.case.mask[i : i + 1]

    # -- hooks -------------------------------------------------------------------------------------

    @contextmanager
    def _copied_inputs(self) -> Iterator[None]:
        """Layers read copies: a later change in place would invalidate what they have kept."""
        handles = [
            m.register_forward_pre_hook(copied, with_kwargs=True) for m in self.layers.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _recording(self, patches: bool = False) -> Iterator[dict[str, Seen]]:
        seen = {name: Seen() for name in self.layers}

        def hook(name: str) -> Callable:
            def record(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
                a = (args[0] if args else kwargs["input"]).detach()
                with torch.enable_grad():
                    net = module.forward(a)
                    axis = 1 if isinstance(module, _ConvNd) else -1
                    of_units = net.movedim(axis, -1).flatten(0, -2)
                    by_weight = torch.autograd.grad(net.sum(), module.weight, retain_graph=True)
                    s = seen[name]
                    s.incoming = s.incoming + by_unit(module, by_weight[0], None).double()
                    s.net = s.net + of_units.detach().double().sum(0)
                    s.positions += len(of_units)
                    s.largest = max(s.largest, float(a.abs().max()) if a.numel() else 0.0)
                    if patches:
                        s.patches.append(_patches(module, of_units))

            return record

        handles = [
            m.register_forward_hook(hook(n), prepend=True, with_kwargs=True)
            for n, m in self.layers.items()
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _patches(module: nn.Module, of_units: Tensor) -> Tensor:
    """The incoming activations of every position: the gradient of its net inputs by the weight."""
    patches = []
    for net in of_units:
        g = torch.autograd.grad(net.sum(), module.weight, retain_graph=True)[0]
        patches.append(by_unit(module, g, None).double())
    return torch.stack(patches)


@contextmanager
def slow_attention() -> Iterator[None]:
    """PyTorch's fused transformer layers call no modules."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _or_zeros(g: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p) if g is None else g
