"""What a mean loss has divided by: the factor between the errors of the user's loss and those of the likelihood."""

from biasshift.optim.passes import Pass
from biasshift.optim.update_rule import Member

SLACK = 0.05  # by which targets read off a gradient may leave [0, 1]: half precision gradients have two digits


class Divisor:
    """Reads off the first passes which of the means the user's loss is, and keeps to it."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self._divides_by: str | None = None

    def of(self, passes: list[Pass]) -> float:
        """The number that a mean loss divides by: the examples, or, as most losses of PyTorch do, all labels of all of them.

        Which of the two is read off the first step: the gradient of a negative log-likelihood by the outputs is prediction
        minus target, divided by that number, and a target lies between 0 and 1. Nothing can be proven for ``gaussian``.
        """
        if self.member.reduction == "sum":
            divisors = {"examples": 1.0}
        else:
            divisors = {"labels": sum(map(self._labels, passes)), "examples": float(sum(one.examples for one in passes))}
        if self._divides_by is None and self.member.likelihood == "gaussian":
            self._divides_by = "examples"
        if self._divides_by is None:
            self._divides_by = next((unit for unit, divisor in divisors.items() if self._is_possible(passes, divisor)), None)
        if self._divides_by is None:
            raise ValueError(
                f'The loss is not a {self.member.reduction} of {self.member.likelihood} negative log-likelihoods, as labels="empirical" '
                "needs: its gradient by the outputs leads to targets outside 0 … 1. Give reduction= as in the loss, divide the losses of "
                'accumulated batches by their number, do not scale it, or use labels="sampled".'
            )
        return divisors[self._divides_by]

    def _labels(self, one: Pass) -> float:
        assert one.outputs is not None
        outputs = one.outputs.a
        return float(outputs.numel() // outputs.shape[-1] if self.member.likelihood == "categorical" else outputs.numel())

    def _is_possible(self, passes: list[Pass], divisor: float) -> bool:
        for one in passes:
            assert one.outputs is not None
            outputs, gradient = one.outputs.a.double(), one.outputs.delta
            if gradient is None or one.outputs.a._version != one.outputs.version:
                continue
            p = outputs.softmax(-1) if self.member.likelihood == "categorical" else outputs.sigmoid()
            targets = p - divisor * gradient.double()
            total = targets.sum(-1) if self.member.likelihood == "categorical" else targets.new_ones(())
            if not ((targets > -SLACK).all() and (targets < 1 + SLACK).all() and ((total - 1).abs() < SLACK).all()):
                return False
        return True
