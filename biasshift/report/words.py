"""What columns of runs are called on the page."""

from collections.abc import Iterable

from biasshift.report.html import distinct, plain

WORDS = {
    # of units and layers
    "mean": "mean activation",
    "var": "variance of the activation",
    "total": "bias shift",
    "own": "bias shift, own part",
    "incoming": "bias shift, incoming part",
    "second_order": "bias shift, second-order part",
    "mean_delta2": "c, mean squared error signal",
    "s": "s, factor of the bias step",
    "k": "k, factor of the mean's correction",
    "k0": "k₀",
    "coupling": "bias coupling h",
    "coupling_corrected": "bias coupling h, without the bias of few samples",
    "effective_samples": "effective samples",
    "reliable": "reliable (1: yes, 0: no)",
    "norm_mean_p": "|μ|, incoming mean under the data",
    "norm_mean_q": "|m|, incoming mean under q",
    "norm_corrected_mean": "|μ − k m|, corrected incoming mean",
    "norm_cov_p": "|Cov(δ², a)|",
    "cov_distance": "|m − μ| in standard deviations of the inputs",
    "cos_gradient": "cosine of gradient and unit natural gradient",
    "cos_centered": "cosine of centered gradient and unit natural gradient",
    "cos_diagonal": "cosine of quasi-diagonal and unit natural gradient",
    "norm_ratio": "|gradient| / |unit natural gradient|",
    "norm_ratio_centered": "|centered gradient| / |unit natural gradient|",
    "norm_ratio_diagonal": "|quasi-diagonal gradient| / |unit natural gradient|",
    "gap_explained": "share of the gradient gap that bias shift explains",
    "mean_in_abs": "|mean incoming activation|, mean over inputs",
    "shift_gradient": "bias shift by the gradient",
    "shift_centered": "bias shift by the centered gradient",
    "shift_natural": "bias shift by the unit natural gradient",
    "own_gradient": "own bias shift by the gradient",
    "own_centered": "own bias shift by the centered gradient",
    "own_natural": "own bias shift by the unit natural gradient",
    # of the network
    "batch_loss": "loss of the batch",
    "seconds": "seconds of training",
    "residual_theorem1": "residual of Theorem 1",
    "residual_identity": "residual of mᵀΔw + Δw₀ = g₀/c",
    "residual_theorem2": "residual of Theorem 2",
    "residual_bookkeeping": "residual of the parts of the bias shift",
    # options
    "lr": "learning rate",
    "batch_norm": "batch normalization",
    "batch_size": "batch size",
    "update_damping": "damping of the update",
    "update_unit_damping": "damping of the update by unit",
    "update_kl_clip": "KL clip of the update",
    "update_every": "steps between updates of the curvature",
    "probe_size": "probe size",
    "exam_size": "examples of an examination",
}


def in_words(name: str) -> str:
    """Returns what a column is called; a name that is not ours stays as it is.

    >>> in_words("lr"), in_words("my_own")
    ('learning rate', 'my_own')
    """
    return WORDS.get(name, name)


def all_in_words(names: Iterable[str]) -> list[str]:
    """Returns what columns are called, each at most 60 characters long and unlike the others."""
    return distinct([plain(in_words(name), 60) for name in names])
