"""Plain, centered, quasi-diagonal and full unit natural gradient: one family of updates in one
`torch.optim.Optimizer`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)

from biasshift.measure import layer_types
from biasshift.measure.hooks import underlying
from biasshift.optim.curvature import Curvature
from biasshift.optim.recorder import Recorder
from biasshift.optim.running_sums import RunningSums
from biasshift.optim.update_rule import UpdateRule, check, covered, refuse_large


class UnitNaturalGradient(torch.optim.Optimizer):
    """Gradient descent along a center ``r`` and a curvature ``W`` of the incoming activations of
    every unit.

    ``Δw = c⁻¹ W⁻¹ (g − g₀ r)``, ``Δw₀ = g₀/c − rᵀΔw``: center the incoming activations, whiten
    them, then choose the bias so that the step of the weights moves nothing at the center. Hence
    ``rᵀΔw + Δw₀ = g₀/c``. Without a scale c and W are left out.

    ==========  =======  =========================================  ===================================  ===========================
    center      r        scale ``"full"``                           ``"diagonal"``                       ``"none"``
    ==========  =======  =========================================  ===================================  ===========================
    ``"q"``     E_q(a)   W = V: unit natural gradient (Theorem 1)   quasi-diagonal natural gradient      centered gradient
    ``"p"``     E_p(a)   W = Cov_p(a): the unit block of K-FAC      its diagonal                         the centering trick
    ``"none"``  0        W = A/c: no coupling to the bias           diagonal natural gradient            plain gradient
    ==========  =======  =========================================  ===================================  ===========================

    Curvature comes from the training loop's own passes; the loop stays as it is, and has no
    closure. A forward pass counts when the model is in training mode, called as a whole, and its
    loss goes backwards before the step; several of them add up. BatchNorm and dropout take part as
    they are in training, where no example has an error of its own: an approximation. ``c``, ``b``
    and ``A`` (or μ and the second moment) are running sums, from which the centered quantities are
    formed.

    Linear layers and convolutions are covered when they are called as modules and own their
    weights; everything else (norms, embeddings, tied weights, layers never called) takes the plain
    gradient. Units whose δ² is 0, or whose incoming activations do not vary, have no curvature:
    they keep their center and lose the scale, which leaves a dead unit where it is. A layer without
    a bias, or with a frozen one, has nothing to center with: ``Δw = c⁻¹ (W + r rᵀ)⁻¹ g``, which is
    ``A⁻¹ g``.

    Args:
        model: whose forward passes are watched, and all of whose parameters are updated, as one
            group. The wrappers of ``DistributedDataParallel`` are looked through: processes share
            their sums.
        lr: refers to the gradient of the mean loss, whatever ``reduction`` says, and to the
            transformed step: with a scale, ``lr=1`` is a whole natural gradient step.
        momentum: of the transformed updates, as in ``torch.optim.SGD``.
        weight_decay: decoupled, ``w ← (1 − lr·weight_decay) w``, of parameters with more than one
            axis: biases and norms are spared. Added to the gradient it would grow with 1/c, without
            bound as the model becomes sure.
        damping: λ in ``W + λ mean(diag W) I``, unit by unit, which leaves the identity above as it
            is.
        labels: ``"sampled"`` takes one extra backward pass at labels drawn from the model;
            ``"empirical"`` the errors of the user's own backward pass, which make another matrix,
            keep the activations until the step, and must be those of the declared likelihood,
            unscaled: no gradient scaler.
        likelihood: of the labels given the outputs: ``"categorical"`` (logits, classes last),
            ``"gaussian"`` (unit variance: half the squared error, summed over the outputs) or
            ``"bernoulli"`` (logits).
        reduction: of the user's loss over the examples of all passes of a step. A ``"mean"`` over
            accumulated batches needs each loss divided by their number, as ever.
        update_every: steps between two looks at the curvature, and between two factorizations.
        decay: of the running sums from one look to the next; 0 keeps the latest.
        max_dense_inputs: the most inputs of a unit that a full matrix is kept for. Linear layers
            with more keep the examples of the latest look in place of V, and solve with those (by
            iteration where they are many); their c and center are running averages as ever. With
            the center ``"q"``, and in one process; else, and for convolutions, they are refused.
        generator: draws the sampled labels; by default one of its own, with a fixed seed.
        weight_sharing: for convolutions and sequences, as in `biasshift.unit_fisher`.
        kl_clip: shortens a step to where ``lr² Σ gᵀΔ``, about twice the mean divergence between the
            model's answers before and after it, is so large; none is shortened by default. With a
            scale, c goes to 0 as the model becomes sure and 1/c grows without bound: 1e-3 to 1e-2
            keeps such steps in hand.
        unit_damping: adds so much of the layer's mean c to the c of every unit, in the update
            alone. Units that are hardly ever active, as ReLU networks have them, would otherwise
            take unbounded steps. It is a learning rate for each unit: the identity holds with this
            c, and the invariance under shifts is untouched.

    Raises:
        ValueError: for arguments that do not fit, or a layer whose curvature cannot be formed (the
            sentence names it).
        RuntimeError: by the first ``step`` when no forward pass was seen before it.

    >>> model = nn.Linear(1, 1)
    >>> optimizer = UnitNaturalGradient(model, lr=0.5, center="p", scale="none", likelihood="gaussian")
    >>> x = torch.tensor([[99.0], [101.0]])
    >>> for _ in range(20):
    ...     loss = nn.functional.mse_loss(model(x), 2 * x + 1) / 2
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     _ = optimizer.step()
    >>> round(model.weight.item(), 2), round(model.bias.item())  # gradient descent at this rate diverges
    (2.0, 1)

    Source: Theorem 1 of the ELU paper; Ollivier 2015 (quasi-diagonal), Raiko et al. 2012
        (centering), Martens & Grosse 2015 (K-FAC).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        center: str = "q",
        scale: str = "full",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        labels: str = "sampled",
        likelihood: str = "categorical",
        reduction: str = "mean",
        update_every: int = 1,
        decay: float = 0.95,
        max_dense_inputs: int = 1024,
        generator: torch.Generator | None = None,
        weight_sharing: str = "per_example",
        kl_clip: float | None = None,
        unit_damping: float = 0.0,
    ) -> None:
        self.rule = UpdateRule(
            center, scale, labels, likelihood, reduction, weight_sharing, max_dense_inputs
        )
        check(
            model,
            lr,
            momentum,
            weight_decay,
            damping,
            update_every,
            decay,
            max_dense_inputs,
            kl_clip,
            unit_damping,
        )
        root = underlying(model)
        layers = covered(root) if self.rule.needs_sums else {}
        distributed = (
            isinstance(model, nn.parallel.DistributedDataParallel) and dist.get_world_size() > 1
        )
        if scale == "full":
            refuse_large(layers, self.rule, distributed)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
        }
        defaults |= {"kl_clip": kl_clip, "unit_damping": unit_damping}
        super().__init__(model.parameters(), defaults)
        self.update_every, self.decay = update_every, decay
        device = next(model.parameters()).device
        self.generator = generator or torch.Generator(device).manual_seed(
            dist.get_rank() if distributed else 0
        )
        self._layers, self._steps = layers, 0
        self._curvatures: dict[str, Curvature] = {}
        self._recorder = Recorder(root, layers, self.rule, self.generator, distributed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The model's parameters are the only group."""
        if self.param_groups:
            raise ValueError(
                "All parameters of the model make up one group: another would have no forward "
                "passes. Make a new optimizer."
            )
        super().add_param_group(param_group)

    def remove(self) -> None:
        """Takes all hooks off the model; later steps keep the last curvature. Calling it again does
        nothing.
        """
        self._recorder.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and the passes they came from: those of a step that a gradient
        scaler has skipped.
        """
        super().zero_grad(set_to_none)
        self._recorder.forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step along the gradients in ``.grad``.

        Raises:
            RuntimeError: when no forward pass in training mode has been seen.
            ValueError: when a W has no inverse and damping is 0.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor = 1 / self._look()
        updates, group = self._updates(factor), self.param_groups[0]
        params, lr = list(updates), float(group["lr"])
        if group["kl_clip"] is not None:
            updates = within_trust(
                updates,
                [p.grad * factor for p in params if p.grad is not None],
                lr,
                group["kl_clip"],
            )
        steps = with_momentum(updates, group["momentum"], self.state)
        decaying = [p for p in params if p.dim() > 1]
        if group["weight_decay"] and decaying:
            _foreach_mul_(decaying, 1 - lr * group["weight_decay"])
        if params:
            _foreach_add_(params, steps, alpha=-lr)
        self._steps += 1
        self._recorder.due = self._due()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on to the same numbers: the curvature and the
        generator of labels, too.
        """
        curvature = {name: one.sums.saved() for name, one in self._curvatures.items()}
        kind = (self.rule.center, self.rule.scale)
        rest = {
            "member": kind,
            "steps": self._steps,
            "generator": self.generator.get_state(),
            "curvature": curvature,
        }
        return {**super().state_dict(), "biasshift": rest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a ``state_dict`` of the same rule and model.

        Raises:
            ValueError: when it is that of another rule, optimizer or model.
        """
        rest = state_dict.get("biasshift")
        kind = (self.rule.center, self.rule.scale)
        if rest is None or tuple(rest["member"]) != kind:
            of = (
                "another optimizer"
                if rest is None
                else "center={!r}, scale={!r}".format(*rest["member"])
            )
            raise ValueError(
                f"The state is that of {of}, and this is center={kind[0]!r}, scale={kind[1]!r}."
            )
        unknown = [name for name in rest["curvature"] if name not in self._layers]
        if unknown:
            raise ValueError(
                f"The state has the curvature of layer '{unknown[0]}', which this model does not "
                "have."
            )
        super().load_state_dict(
            {name: value for name, value in state_dict.items() if name != "biasshift"}
        )
        self._steps = rest["steps"]
        self.generator.set_state(rest["generator"].cpu())
        self._curvatures = {
            name: self._curvature(name, RunningSums.loaded(one, self._layers[name].weight.device))
            for name, one in rest["curvature"].items()
        }
        self._recorder.references = {
            name: one.sums.reference for name, one in self._curvatures.items()
        }
        self._recorder.due = self._due()

    # -- inside ------------------------------------------------------------------------------------

    def _due(self) -> bool:
        return self._steps % self.update_every == 0 or not self._curvatures

    def _look(self) -> float:
        """Takes in the passes since the last step. Returns what turns the gradients into those of
        the mean loss.
        """
        examples, sums = self._recorder.take()
        for name, new in sums.items():
            if name in self._curvatures:
                self._curvatures[name].add(new, self.decay)
            else:
                self._curvatures[name] = self._curvature(name, new)
        learning = any(layer.weight.grad is not None for layer in self._layers.values())
        if not examples and ((learning and not self._curvatures) or self.rule.reduction == "sum"):
            raise RuntimeError(
                "No forward pass of the model was seen before this step: it must be called as a "
                "whole, in training mode, with gradients "
                "enabled, and return one tensor whose loss goes backwards; the optimizer must be "
                "made before torch.compile runs the model."
            )
        return examples if self.rule.reduction == "sum" else 1.0

    def _curvature(self, name: str, sums: RunningSums) -> Curvature:
        return Curvature(
            name, sums, self.rule, layer_types.dtype_of_sums(self._layers[name].weight)
        )

    def _updates(self, factor: float) -> dict[Tensor, Tensor]:
        """The update of every parameter that has a gradient, before momentum and learning rate."""
        group = self.param_groups[0]
        updates = {
            p: p.grad if factor == 1 else p.grad * factor
            for p in group["params"]
            if p.grad is not None
        }
        for name, curvature in self._curvatures.items():
            layer = self._layers[name]
            weight, bias = layer.weight, layer.bias
            if weight not in updates:
                continue
            g = layer_types.weights(layer, updates[weight]).double()
            g0 = updates[bias].double() if bias is not None and bias in updates else None
            dw, dw0 = curvature.update(g, g0, group["damping"], group["unit_damping"])
            updates[weight] = layer_types.as_weight(layer, dw).to(weight.dtype)
            if bias is not None and dw0 is not None:
                updates[bias] = dw0.to(bias.dtype)
        return updates


# -- momentum of the transformed updates -------------------------------------------------------


def with_momentum(
    updates: dict[Tensor, Tensor], momentum: float, state: dict[Any, Any]
) -> list[Tensor]:
    """The steps to take, in the order of the parameters; ``state`` is the optimizer's, and keeps
    their running sums.
    """
    if not momentum:
        return list(updates.values())
    for p in updates:
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = torch.zeros_like(p)
    buffers = [state[p]["momentum_buffer"] for p in updates]
    if buffers:
        _foreach_mul_(buffers, momentum)
        _foreach_add_(buffers, list(updates.values()))
    return buffers


# -- A trust region ----------------------------------------------------------------------------


def within_trust(
    updates: Mapping[Tensor, Tensor], gradients: Sequence[Tensor], lr: float, most: float
) -> dict[Tensor, Tensor]:
    """The updates times ``min(1, √(most / (lr² Σ gᵀΔ)))``; an infinite or NaN ``Σ gᵀΔ`` keeps its
    updates as they are.

    ``gᵀΔ = ΔᵀFΔ`` for a full natural gradient: ``lr² gᵀΔ`` is, to second order, twice the mean
    divergence between the model's answers before and after the step.

    Source: the step clipping of Ba, Grosse & Martens 2017 (distributed K-FAC).
    """
    moved = lr**2 * sum(
        torch.sum(g * update, dtype=torch.float64)
        for g, update in zip(gradients, updates.values(), strict=True)
    )
    moved = torch.as_tensor(moved)
    scale = torch.where(
        moved > most, (most / moved.clamp(min=torch.finfo(torch.float64).tiny)).sqrt(), 1.0
    )
    return {p: update * scale.to(update.dtype) for p, update in updates.items()}
