"""Plain, centered, quasi-diagonal and full unit natural gradient: one family of updates.

`UnitNaturalGradient` is a `torch.optim.Optimizer`. Hooks record the forward passes of the training
loop (`Recorder`), a `Curvature` per layer turns gradients into updates, and the trust region,
momentum and weight decay make a step of those.
"""

from collections.abc import Callable
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
from biasshift.measure.layer_types import Selection
from biasshift.measure.options import refuse_other_generators
from biasshift.measure.outputs import OutputChoice
from biasshift.optim.curvature import Curvature
from biasshift.optim.recorder import Recorder
from biasshift.optim.running_sums import RunningSums
from biasshift.optim.steps import with_momentum, within_trust
from biasshift.optim.together import add_all
from biasshift.optim.update_rule import (
    CHOICES,
    OutputRule,
    UpdateRule,
    check,
    covered,
    refuse_large,
)
from biasshift.optim.updates import all_updates


class UnitNaturalGradient(torch.optim.Optimizer):
    """Gradient descent with a center ``r`` and a curvature ``W`` of every unit's inputs.

    ``Δw = c⁻¹ W⁻¹ (g − g₀ r)``, ``Δw₀ = g₀/c − rᵀΔw``: center the incoming activations, whiten
    them, then choose the bias so that the step of the weights moves nothing at the center. Hence
    ``rᵀΔw + Δw₀ = g₀/c``. Without a scale c and W are left out.

    | center | r      | scale "full"                 | "diagonal"                | "none"          |
    | ------ | ------ | ---------------------------- | ------------------------- | --------------- |
    | "q"    | E_q(a) | W = V: unit natural gradient | quasi-diagonal gradient   | centered        |
    | "p"    | E_p(a) | W = Cov_p(a): unit K-FAC     | its diagonal              | centering trick |
    | "none" | 0      | W = A/c: no coupling to bias | diagonal natural gradient | plain gradient  |

    The full update with the center q is that of Theorem 1; with the center p it has the block of
    K-FAC for one unit.

    The curvature comes from the training loop's own passes; the loop stays as it is, and needs no
    closure. A forward pass counts when the model is in training mode and called as a whole, and its
    loss goes backwards before the step; several of them add up. BatchNorm and dropout take part as
    they are in training, where no example has an error of its own: an approximation. ``c``, ``b``
    and ``A`` (or μ and the second moment) are running sums, from which the centered quantities are
    formed.

    The work is in the dtype of the weights, but at least float32. A float32 update may differ from
    its definition by ``2 ε inputs / damping`` of its size where W is a matrix, ε = 1.2e-7, else by
    a few ε of its terms. Where ``ε inputs / damping`` passes 0.05, factors are float64.

    Linear layers and convolutions are covered when they are called as modules and own their
    weights. Everything else (norms, embeddings, tied weights, layers never called) takes the plain
    gradient. Units whose δ² is 0, or whose incoming activations do not vary, have no curvature:
    they keep their center and lose the scale, which leaves a dead unit where it is. A layer without
    a bias, or with a frozen one, has nothing to center with: ``Δw = c⁻¹ (W + r rᵀ)⁻¹ g``, which is
    ``A⁻¹ g`` under q.

    Args:
        model: The model whose forward passes are recorded and all of whose parameters are updated,
            as one group. The wrapper ``DistributedDataParallel`` is looked through: its processes
            share their sums.
        lr: Refers to the gradient of the mean loss, whatever ``reduction`` is, and to the
            transformed step: with a scale, ``lr=1`` is a whole natural gradient step.
        center: ``"q"``, ``"p"`` or ``"none"``: which mean of the incoming activations is r.
        scale: ``"full"``, ``"diagonal"`` or ``"none"``: what is kept of W.
        momentum: Of the transformed updates, in [0, 1), as in ``torch.optim.SGD``.
        weight_decay: Decoupled, ``w ← (1 − lr·weight_decay) w``, of parameters with more than one
            axis: biases and norms are spared. Added to the gradient it would grow with 1/c, without
            bound as the model becomes sure.
        damping: λ in ``W + λ mean(diag W) I``, unit by unit, which leaves the identity above as it
            is.
        labels: ``"sampled"`` takes one extra backward pass at labels drawn from the model.
            ``"empirical"`` takes the errors of the user's own backward pass, which make another
            matrix and keep the activations until the step. They must be those of the declared
            likelihood, unscaled: no gradient scaler. Every step finds out whether the mean is over
            all labels, all examples, or those that ``ignore_index`` or a mask has not left out.
            Examples that such a mean leaves out have no part in the curvature either. A
            ``"gaussian"`` mean must be over all examples.
        likelihood: Of the labels given the outputs: ``"categorical"`` (logits, classes last),
            ``"gaussian"`` (unit variance: half the squared error, summed over the outputs) or
            ``"bernoulli"`` (logits).
        reduction: ``"mean"`` or ``"sum"``: of the user's loss over the examples of all passes of a
            step. A mean over accumulated batches needs each loss divided by their number, as ever.
        update_every: Steps between two updates of the curvature, and between two factorizations.
        decay: Of the running sums from one update of the curvature to the next, in [0, 1); 0 keeps
            the latest.
        max_dense_inputs: The most inputs of a unit that a full matrix is kept for. Linear layers
            with more keep the latest examples in place of V, and solve with those, by iteration
            where they are many; their c and center are running averages as ever. That takes the
            center ``"q"`` and a single process; else, and for convolutions, they are refused.
        generator: Draws the sampled labels; by default one of its own, with a fixed seed.
        weight_sharing: ``"per_example"`` or ``"expand"``, for convolutions and sequences, as in
            `biasshift.unit_fisher`.
        kl_clip: The largest ``lr² Σ gᵀΔ`` of a step, about twice the mean divergence between the
            model's answers before and after it; longer steps are shortened, by default none. With a
            scale, c goes to 0 as the model becomes sure and 1/c grows without bound: 1e-3 to 1e-2
            keeps such steps in hand.
        unit_damping: Adds so much of the layer's mean c to the c of every unit, in the update
            alone. Units that are hardly ever active, as ReLU networks have them, would otherwise
            take unbounded steps. It is a learning rate for each unit: the identity holds with this
            c, and the invariance under shifts is untouched.
        class_axis, output: As in `biasshift.unit_fisher`.
        mask: For sampled labels: a function of the model's inputs, and of its argument ``labels``
            or None, that returns True for the positions of the outputs that count.
        uncovered: ``"skip"`` gives layers without a curvature the plain gradient, with one warning
            that names them, and ``"raise"`` makes them an error.
        skip: Names of modules, or a predicate ``(name, module) → bool``: they and all inside of
            them take the plain gradient, without a warning.

    Raises:
        ValueError: If an argument does not fit, or the curvature of a layer cannot be formed; the
            message names the layer.

    >>> model = nn.Linear(1, 1)
    >>> optimizer = UnitNaturalGradient(
    ...     model, lr=0.5, center="p", scale="none", likelihood="gaussian"
    ... )
    >>> x = torch.tensor([[99.0], [101.0]])
    >>> for _ in range(20):
    ...     loss = nn.functional.mse_loss(model(x), 2 * x + 1) / 2
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     _ = optimizer.step()
    >>> round(model.weight.item(), 2), round(model.bias.item())  # plain gradients would diverge
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
        class_axis: int = -1,
        mask: Callable[[Any, Any], Tensor] | None = None,
        output: OutputChoice = None,
        uncovered: str = "skip",
        skip: Selection = None,
    ) -> None:
        self.rule = UpdateRule(
            center, scale, labels, likelihood, reduction, weight_sharing, max_dense_inputs
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "kl_clip": kl_clip,
            "unit_damping": unit_damping,
        }
        self.update_every, self.decay = update_every, decay
        numbers = {
            **defaults,
            "update_every": update_every,
            "decay": decay,
            "max_dense_inputs": max_dense_inputs,
        }
        check(model, **numbers)
        refuse_other_generators(generator)
        root = underlying(model)
        outputs = OutputRule(class_axis, mask, output, uncovered, skip)
        self._layers = covered(root, outputs) if self.rule.needs_sums else {}
        distributed = (
            isinstance(model, nn.parallel.DistributedDataParallel) and dist.get_world_size() > 1
        )
        if scale == "full":
            refuse_large(self._layers, self.rule, distributed)
        super().__init__(model.parameters(), defaults)
        self.generator = generator or torch.Generator(next(model.parameters()).device).manual_seed(
            dist.get_rank() if distributed else 0
        )
        self._model, self._distributed = model, distributed
        self._options = {
            **{name: getattr(self.rule, name) for name in CHOICES},
            **vars(outputs),
            **numbers,
        }
        self._steps = 0
        self._curvatures: dict[str, Curvature] = {}
        self._recorder = Recorder(
            root, self._layers, self.rule, outputs, self.generator, distributed
        )

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of: the model, the arguments, and the ``state_dict``.

        A copy records the copy of the model that is made with it. What it does not have are the
        passes since the last step.
        """
        if self._distributed:
            raise RuntimeError(
                "An optimizer that shares its sums with other processes cannot be copied. Make a "
                "new one of the copied model, and give it this one's state_dict."
            )
        return {
            "model": self._model,
            "options": self._options,
            "state_dict": self.state_dict(),
            "is_recording": self._recorder.is_recording,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "model" not in state:  # PyTorch's own, as its load_state_dict gives
            super().__setstate__(state)
            return
        UnitNaturalGradient.__init__(self, state["model"], **state["options"])
        self.load_state_dict(state["state_dict"])
        if not state["is_recording"]:
            self.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds the model's parameters, as the only group; PyTorch calls it once.

        Raises:
            ValueError: If there is a group already.
        """
        if self.param_groups:
            raise ValueError(
                "All parameters of the model make up one group: another would have no forward "
                "passes. Make a new optimizer."
            )
        super().add_param_group(param_group)

    def remove(self) -> None:
        """Takes all hooks off the model; later steps keep the last curvature.

        A model that gets another optimizer should be freed of this one's hooks, which take time in
        every forward pass. Calling it again does nothing.
        """
        self._recorder.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and the passes they came from.

        The passes of a step that a gradient scaler has skipped are dropped this way, and so have
        no part in the curvature.
        """
        super().zero_grad(set_to_none)
        self._recorder.forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step along the gradients in ``.grad``, and returns the closure's loss.

        Passes since the last step update the curvature first, every ``update_every`` steps.

        Args:
            closure: Computes the loss and its gradients again; not needed.

        Raises:
            RuntimeError: If the curvature needs a forward pass in training mode, and there was
                none.
            ValueError: If a W has no inverse and damping is 0, or a layer was called in a way that
                its sums cannot be formed of.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        factor = 1 / self._take_passes()
        group = self.param_groups[0]
        updates = all_updates(group, self._layers, self._curvatures, self.rule, factor)
        params, lr = list(updates), float(group["lr"])
        if group["kl_clip"] is not None:
            gradients = [p.grad * factor for p in params if p.grad is not None]
            updates = within_trust(updates, gradients, lr, group["kl_clip"])
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
        """Returns what ``load_state_dict`` needs to continue with the same numbers.

        Beside PyTorch's own entries ``"biasshift"`` holds the curvature of every layer, the number
        of steps, and the state of the generator of labels.
        """
        state = {
            "member": (self.rule.center, self.rule.scale),
            "steps": self._steps,
            "generator": self.generator.get_state(),
            "curvature": {name: layer.sums.saved() for name, layer in self._curvatures.items()},
        }
        return {**super().state_dict(), "biasshift": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a ``state_dict`` of the same rule and model.

        Tensors are moved to the devices of the parameters.

        Raises:
            ValueError: If it is that of another rule, optimizer or model.
        """
        saved, rule = state_dict.get("biasshift"), (self.rule.center, self.rule.scale)
        if saved is None or tuple(saved["member"]) != rule:
            owner = (
                "center={!r}, scale={!r}".format(*saved["member"]) if saved else "another optimizer"
            )
            raise ValueError(
                f"The state is that of {owner}, and this optimizer has center={rule[0]!r}, "
                f"scale={rule[1]!r}. Make the optimizer as it was."
            )
        unknown = [name for name in saved["curvature"] if name not in self._layers]
        if unknown:
            raise ValueError(
                f"The state has the curvature of layer '{unknown[0]}', which this model does not "
                "have. Load it for the model it was saved with."
            )
        super().load_state_dict(
            {name: value for name, value in state_dict.items() if name != "biasshift"}
        )
        self._steps = saved["steps"]
        self.generator.set_state(saved["generator"].cpu())
        self._curvatures = {
            name: self._curvature(name, self._loaded(name, sums))
            for name, sums in saved["curvature"].items()
        }
        self._recorder.references.known = {
            name: curvature.sums.reference for name, curvature in self._curvatures.items()
        }
        self._recorder.due = self._due()

    # -- from passes to updates --------------------------------------------------------------------

    def _due(self) -> bool:
        return self._steps % self.update_every == 0 or not self._curvatures

    def _take_passes(self) -> float:
        """Adds the passes since the last step to the curvature. Returns what the gradients are to
        be divided by, to be those of the mean loss.
        """
        examples, sums = self._recorder.take()
        known = [name for name in sums if name in self._curvatures]
        add_all([(self._curvatures[name].sums, sums[name]) for name in known], self.decay)
        for name, new in sums.items():
            if name in known:
                self._curvatures[name].changed()
            else:  # a backward pass may come to the pass once more
                self._curvatures[name] = self._curvature(name, new.own())
        for name in self._curvatures.keys() - self._layers.keys():  # left out since
            del self._curvatures[name]
        learning = any(layer.weight.grad is not None for layer in self._layers.values())
        if not examples and ((learning and not self._curvatures) or self.rule.reduction == "sum"):
            raise RuntimeError(
                "No forward pass of the model was recorded before this step. Call the model as a "
                "whole, in training mode, with gradients enabled, and let the loss of the one "
                "tensor it returns go backwards. Make the optimizer before torch.compile runs the "
                "model."
            )
        return examples if self.rule.reduction == "sum" else 1.0

    def _curvature(self, name: str, sums: RunningSums) -> Curvature:
        dtype = layer_types.dtype_of_sums(self._layers[name].weight)
        return Curvature(name, sums, self.rule, dtype)

    def _loaded(self, name: str, saved: dict[str, Any]) -> RunningSums:
        weight = self._layers[name].weight
        return RunningSums.loaded(saved, weight.device, layer_types.dtype_of_sums(weight))
