"""What the user's mean loss has divided by, and which labels it has left out.

The curvature is made of the errors of single examples. The user's backward pass brings those of a
mean: `Divisor` finds out, at every step, what they are to be multiplied with.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from biasshift.optim.passes import Pass, RecordedCall
from biasshift.optim.update_rule import UpdateRule

# How far targets read off a gradient may leave [0, 1]: half precision gradients have two digits.
SLACK = 0.05
# How far a divisor that labels prove may be from the one it is taken for. Others are refused.
DEVIATION = 0.05
PROOF_ELEMENTS = 2**20  # of the outputs, that a divisor is read off


class Share(NamedTuple):
    """What a pass has of the loss.

    ``counted`` is bool, (batch, *positions), False where the loss leaves a label out; None where it
    leaves out none. ``examples`` are those that count, a fraction where rounding hides which.
    """

    divisor: float
    counted: Tensor | None
    examples: float = math.nan  # where all of them count


class _Labels(NamedTuple):
    """The labels of one pass, and those that its loss may have left out."""

    counted: Tensor  # (batch, *positions), bool
    labels: int
    counted_labels: int
    sure_labels: int  # of those that count, which the model may be sure of or the loss leave out
    examples: int
    counted_examples: int


class Divisor:
    """Finds out from every step's passes what the user's mean loss divides by.

    It may be all labels, as most losses of PyTorch do, or all examples. Where labels were left out,
    as by ``ignore_index`` or a mask, it may be those that remain. With several passes it may also
    be the number of passes times that of each.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        # The divisors that steps so far have not ruled out, for steps that prove nothing.
        self._possible: set[str] | None = None

    def of(self, passes: list[Pass]) -> list[Share]:
        """Returns the share of every pass, in their order.

        The gradient of a negative log-likelihood by the outputs is prediction minus target, divided
        by a number. Where labels are hard, or smoothed, predictions are a linear function of it,
        and its slope proves the number. Other targets at least lie between 0 and 1. Labels were
        left out where the gradient is exactly 0, and rounding cannot be the reason.

        Targets of ``gaussian`` may be anything: there the divisor is the number of examples.

        Raises:
            ValueError: If the loss divides by none of the numbers, or it cannot be told by which.
        """
        outputs = [of_pass.outputs for of_pass in passes if of_pass.outputs is not None]
        labels = [self._labels(output) for output in outputs]
        gaussian = self.rule.likelihood == "gaussian"
        if gaussian or not any(of_pass.counted_labels for of_pass in labels):
            divisors = self._divisors(labels)["examples"]
            return [Share(divisor, None) for divisor in divisors]
        name, divisors = self._divide(outputs, labels)
        if self.rule.reduction == "mean" and "counted" not in name:
            return [Share(divisor, None) for divisor in divisors]
        shares = []
        for divisor, most, of_pass in zip(
            divisors, self._divisors(labels)[name], labels, strict=True
        ):
            # Where an example is a label, the divisor tells how many there are.
            part = divisor / most if of_pass.counted.dim() == 1 else 1.0
            everything = part == 1 and bool(of_pass.counted.all())
            counted = None if everything else of_pass.counted
            shares.append(Share(divisor, counted, part * of_pass.counted_examples))
        return shares

    # -- labels that were left out -----------------------------------------------------------------

    def _labels(self, output: RecordedCall) -> _Labels:
        """A label that was left out has a gradient of exactly 0.

        So has one that the model is sure of, where the gradient is too small for its dtype: it may
        be either.
        """
        a, delta, sure = output.a, output.delta, 0
        categorical = self.rule.likelihood == "categorical"
        of_labels = a[..., 0] if categorical else a
        if delta is None:
            counts = torch.ones_like(of_labels, dtype=torch.bool)
        else:
            counts = delta.any(-1) if categorical else delta != 0
            zero = ~counts
            if zero.any() and not output.overwritten:
                counts[zero] = self._is_rounded(a[zero], delta.dtype, of_labels.numel())
                sure = int((counts & zero).sum())
        rows = counts if categorical else counts.any(-1)
        examples = rows if rows.dim() == 1 else rows.flatten(1).any(1)
        counted = int(counts.sum())
        return _Labels(rows, counts.numel(), counted, sure, len(examples), int(examples.sum()))

    def _is_rounded(self, logits: Tensor, dtype: torch.dtype, divisor: int) -> Tensor:
        """Whether the model is so sure of these labels that their gradients vanish.

        The smallest number of a dtype bounds those of a softmax. A sigmoid near 1 is rounded to 1.
        """
        finest = torch.finfo(dtype)
        if self.rule.likelihood == "categorical":
            if logits.shape[-1] < 2:  # the one class is always right
                return torch.ones_like(logits[..., 0], dtype=torch.bool)
            first, second = logits.topk(2, -1).values.double().unbind(-1)
            return first - second > -math.log(finest.tiny * finest.eps * divisor)
        return logits.double().abs() > -math.log(finest.eps)

    # -- the divisor -------------------------------------------------------------------------------

    def _divisors(self, labels: list[_Labels]) -> dict[str, list[float]]:
        """All numbers that a loss may divide by: for every pass, by their names."""
        if self.rule.reduction == "sum":
            return {"examples": [1.0] * len(labels)}
        divisors = {}
        for name in ("labels", "counted_labels", "examples", "counted_examples"):
            counts = [float(getattr(of_pass, name)) for of_pass in labels]
            divisors[name] = [sum(counts)] * len(counts)
            divisors[f"{name} of each pass"] = [len(counts) * count for count in counts]
        return divisors

    def _divide(
        self, outputs: list[RecordedCall], labels: list[_Labels]
    ) -> tuple[str, list[float]]:
        """Which of the numbers it is, by proof or else by what is possible."""
        divisors = self._divisors(labels)
        # A pass without labels has no part in it.
        some = [i for i, of_pass in enumerate(labels) if of_pass.counted_labels]
        proven = {i: d for i in some if (d := self._proven(outputs[i])) is not None}
        if any(of_pass.sure_labels for of_pass in labels):
            certain = self._divisors(
                [
                    of_pass._replace(counted_labels=of_pass.counted_labels - of_pass.sure_labels)
                    for of_pass in labels
                ]
            )
            for name, numbers in divisors.items():
                for i, d in proven.items():
                    numbers[i] = min(numbers[i], max(certain[name][i], float(round(d))))
        deviations = {
            name: max((abs(d / numbers[i] - 1) for i, d in proven.items()), default=0.0)
            for name, numbers in divisors.items()
        }
        # At the same numbers, the first name.
        names = [name for name in divisors if deviations[name] < DEVIATION]
        if proven and names:
            least = min(deviations[name] for name in names)
            tied = [name for name in names if deviations[name] <= least + 1e-3]
            if len(proven) == len(some):
                # Another number than before is proven, too: losses may change.
                self._possible = (self._possible or set(tied)) & set(tied) or set(tied)
                name = next(name for name in tied if name in self._possible)
                return name, divisors[name]
        open_ = [
            name
            for name in names
            if (self._possible is None or name in self._possible)
            and all(self._is_possible(outputs[i], divisors[name][i]) for i in some)
        ]
        if not open_:
            raise ValueError(
                f"The loss is not a {self.rule.reduction} of {self.rule.likelihood} negative "
                'log-likelihoods, as labels="empirical" needs: its gradient gives targets outside '
                "0 … 1, or another divisor. Give reduction= as in the loss, divide the losses of "
                "accumulated batches by their number, and do not scale or weight it. Else use "
                'labels="sampled".'
            )
        name = open_[0]
        left_out = f"counted_{name}"
        if left_out in open_ and any(
            mine > (1 + DEVIATION) * rest
            for mine, rest in zip(divisors[name], divisors[left_out], strict=True)
        ):
            raise ValueError(
                "The loss leaves labels out, and its targets do not tell whether its mean counts "
                "them. Leave these examples out of the batch, use labels that are not soft, or "
                'labels="sampled".'
            )
        self._possible = set(open_)
        return name, divisors[name]

    def _proven(self, output: RecordedCall) -> float | None:
        """The divisor of hard or smoothed labels: the slope of predictions over their gradients.

        Of each label it reads the classes that are not the target. Their predictions less the
        smoothing, the same for all, are the divisor times the gradients. None where they are not,
        as with other targets, or where predictions are too alike for the two to differ.
        """
        if output.delta is None or output.overwritten:
            return None
        delta, logits = output.delta.flatten(0, -2), output.a.flatten(0, -2)
        kept = delta.any(-1).nonzero()[:, 0]
        kept = kept[:: max(1, kept.numel() * delta.shape[-1] // PROOF_ELEMENTS)]
        delta, logits = delta[kept].double(), logits[kept].double()
        if self.rule.likelihood == "categorical":
            others = torch.ones_like(delta, dtype=torch.bool)
            others.scatter_(1, delta.argmin(1, keepdim=True), False)
            p, slope = logits.softmax(-1)[others], delta[others]
        else:
            others = delta != 0
            p, slope = (logits * delta.sign()).sigmoid()[others], delta[others].abs()
        finest = torch.finfo(output.delta.dtype)
        normal = slope.abs() > finest.tiny  # others have lost digits
        p, slope = p[normal], slope[normal]
        if len(p) < 2 or not p.max() > 1.5 * p.min():
            return None
        tolerance = max(1e-3, 4 * finest.eps)
        divisor = (p / slope).median()
        if ((divisor * slope - p).abs() <= tolerance * p).all():
            return float(divisor)
        if len(p) < 4:
            return None
        about = slope - slope.mean()
        divisor = (about * p).sum() / about.square().sum()
        smoothing = p.mean() - divisor * slope.mean()
        near = ((divisor * slope + smoothing - p).abs() <= tolerance * p).all()
        return float(divisor) if near and smoothing > 0 else None

    def _is_possible(self, output: RecordedCall, divisor: float) -> bool:
        """Whether the targets are probabilities, with this divisor."""
        if output.delta is None or output.overwritten:
            return True
        categorical = self.rule.likelihood == "categorical"
        logits = output.a.double()
        p = logits.softmax(-1) if categorical else logits.sigmoid()
        targets = p - divisor * output.delta.double()
        targets = targets[output.delta.any(-1)]
        if not targets.isfinite().all():  # an overflow, of which no sums are kept
            return True
        in_range = ((targets > -SLACK) & (targets < 1 + SLACK)).all()
        return bool(in_range and (not categorical or ((targets.sum(-1) - 1).abs() < SLACK).all()))
