"""One member of the family of updates: its center, its scale, and how they are estimated."""

from dataclasses import dataclass

from biasshift.measure import likelihoods as label_rules

CHOICES = {
    "center": ("q", "p", "none"),
    "scale": ("full", "diagonal", "none"),
    "labels": ("sampled", "empirical"),
    "likelihood": label_rules.LIKELIHOODS,
    "reduction": ("mean", "sum"),
    "weight_sharing": ("per_example", "expand"),
}


@dataclass(frozen=True)
class Member:
    """One member of the family of updates, and how its curvature is estimated."""

    center: str
    scale: str
    labels: str
    likelihood: str
    reduction: str
    weight_sharing: str
    dense_inputs: int = 2**62  # beyond so many inputs of a unit, the full scale keeps the latest examples in place of its matrices

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}.")

    @property
    def needs_errors(self) -> bool:
        """Whether δ² is read: for the mean under q, or for the scale c."""
        return self.center == "q" or self.scale != "none"

    def keeps_examples(self, inputs: int) -> bool:
        return self.scale == "full" and inputs > self.dense_inputs

    @property
    def needs_sums(self) -> bool:
        return self.needs_errors or self.center == "p"
