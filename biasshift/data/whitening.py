"""Global contrast normalization and ZCA whitening, the preprocessing of the paper's CIFAR
experiments.

The paper names the two and no constants [open]. These are those of the Maxout networks (Goodfellow
et al. 2013, section 5.2), which the papers it compares with share: every image scaled to the
Euclidean norm 55 around its own mean, and 0.1 added to the covariance's diagonal.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Real
from torch import Tensor

from biasshift.data.cache import Arrays, cache_folder, cached, content_key
from biasshift.data.dataset import DataSet

SCALE = 55.0  # Maxout's: with 3,072 pixels their standard deviation becomes 0.99
DIAGONAL = 0.1  # Maxout's
# an image whose pixels are all equal has no contrast to normalize; it becomes 0 and stays so
FLAT = 1e-8
CHUNK = 1000  # images at a time in float64


@dataclass(frozen=True, eq=False)
class Contrast:
    """What contrast normalization takes away from each image: the mean of its pixels, and their
    norm around it.
    """

    mean: Float64[Tensor, "images 1"]
    norm: Float64[Tensor, "images 1"]

    @classmethod
    def of(cls, x: Real[Tensor, "images *inputs"]) -> "Contrast":
        """Measured on images of any dtype, each over all its pixels and channels."""
        flat = x.flatten(1).to(torch.float64)
        mean = flat.mean(1, keepdim=True)
        norm = (flat - mean).norm(dim=1, keepdim=True)
        return cls(mean, torch.where(norm < FLAT, torch.ones_like(norm), norm))


def normalize_contrast(
    x: Real[Tensor, "images *inputs"], scale: float = SCALE
) -> Float64[Tensor, "images inputs"]:
    """Every image with mean 0 and Euclidean norm `scale`, flat.

    >>> normalize_contrast(torch.tensor([[1, 2, 3]]), scale=2**0.5).tolist()
    [[-1.0, 0.0, 1.0]]
    """
    contrast = Contrast.of(x)
    return (x.flatten(1).to(torch.float64) - contrast.mean) * (scale / contrast.norm)


@dataclass(frozen=True, eq=False)
class Whitening:
    """Contrast normalization, then ``(x − mean) (C + diagonal · I)^(−1/2)`` with the covariance
    ``C`` of the training images.

    Directions in which the images vary by much more than `diagonal` come out with variance 1; those
    of eigenvalue λ with ``λ / (λ + diagonal)``. Among all whitening matrices the symmetric one
    changes the images least, so that they stay images.

    Args:
        mean: of the normalized training images.
        values: the eigenvalues λ of their covariance, ascending.
        vectors: its eigenvectors, as columns.
    """

    mean: Float64[Tensor, " inputs"]
    values: Float64[Tensor, " inputs"]
    vectors: Float64[Tensor, "inputs inputs"]
    scale: float = SCALE
    diagonal: float = DIAGONAL

    @classmethod
    def fit(
        cls,
        x: Real[Tensor, "images *inputs"],
        scale: float = SCALE,
        diagonal: float = DIAGONAL,
        root: str | Path | None = None,
    ) -> "Whitening":
        """Fitted on the training images `x`: a minute on one CPU core for CIFAR, kept under the
        hash of the images.

        Args:
            root: the folder of the data sets; the result is kept in `$BIASSHIFT_CACHE`, else in
                `cache/` below it.

        Raises:
            ValueError: there are no images, a pixel is not finite, or `scale` or `diagonal` is not
                positive.
        """
        _refuse_unfit(x, scale, diagonal)
        inputs = x[0].numel()
        shapes = {"mean": (inputs,), "values": (inputs,), "vectors": (inputs, inputs)}
        key = content_key(x.cpu().numpy(), scale)  # the diagonal is added when the result is used
        arrays = cached("whitening", key, shapes, lambda: _spectrum(x, scale), cache_folder(root))
        return cls(
            **{name: torch.from_numpy(array).to(x.device) for name, array in arrays.items()},
            scale=scale,
            diagonal=diagonal,
        )

    def apply(self, x: Real[Tensor, "images *inputs"]) -> Float32[Tensor, "images *inputs"]:
        """The whitened images, in the shape of `x`; computed in float64 on the device of `x`."""
        mean, root = self.mean.to(x.device), self._inverse_root.to(x.device)
        parts = [
            ((normalize_contrast(part, self.scale) - mean) @ root).to(torch.float32)
            for part in x.split(CHUNK)
        ]
        return torch.cat(parts).view(x.shape)

    def invert(
        self, z: Float[Tensor, "images *inputs"], contrast: Contrast | None = None
    ) -> Float32[Tensor, "images *inputs"]:
        """The images that `z` was whitened from, normalized in contrast; with their `contrast`, as
        they were before that.
        """
        mean, root = self.mean.to(z.device), self._root(0.5).to(z.device)
        images = torch.cat(
            [part.flatten(1).to(torch.float64) @ root + mean for part in z.split(CHUNK)]
        )
        if contrast is not None:
            images = images * (contrast.norm / self.scale) + contrast.mean
        return images.to(torch.float32).view(z.shape)

    @cached_property
    def _inverse_root(self) -> Float64[Tensor, "inputs inputs"]:
        return self._root(-0.5)

    def _root(self, power: float) -> Float64[Tensor, "inputs inputs"]:
        # Rounding may leave an eigenvalue a little below 0.
        return (self.vectors * (self.values.clamp(min=0) + self.diagonal) ** power) @ self.vectors.T


def whitened(data: DataSet, root: str | Path | None = None) -> DataSet:
    """The data set with all its images whitened, in float32; fitted on the training images alone.

    Args:
        root: see `Whitening.fit`.
    """
    whitening = Whitening.fit(data.x_train, root=root)
    train, valid, test = (whitening.apply(x) for x in (data.x_train, data.x_valid, data.x_test))
    return replace(data, x_train=train, x_valid=valid, x_test=test)


def _refuse_unfit(x: Tensor, scale: float, diagonal: float) -> None:
    if not len(x):
        raise ValueError("there are no images to fit the whitening on.")
    if not (0 < scale < float("inf") and 0 < diagonal < float("inf")):
        raise ValueError(
            f"scale and diagonal must be positive and finite, got {scale} and {diagonal}."
        )
    if not bool(x.isfinite().all()):
        raise ValueError("an image to fit the whitening on has a pixel that is infinite or NaN.")


def _spectrum(x: Tensor, scale: float) -> Arrays:
    """The mean of the normalized images, and the eigenvalues and eigenvectors of their covariance,
    in float64.
    """

    inputs = x[0].numel()
    mean, covariance = (
        torch.zeros(shape, dtype=torch.float64, device=x.device)
        for shape in ((inputs,), (inputs, inputs))
    )
    for part in x.split(CHUNK):
        mean += normalize_contrast(part, scale).sum(0) / len(x)
    for part in x.split(CHUNK):  # a second time: centering first, nothing cancels
        centered = normalize_contrast(part, scale) - mean
        covariance += centered.T @ centered / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    return {"mean": _array(mean), "values": _array(values), "vectors": _array(vectors)}


def _array(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.cpu().numpy())
