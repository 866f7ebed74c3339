"""Global contrast normalization and ZCA whitening: the preprocessing of the paper's CIFAR images.

The paper names the two and no constants [open]. These are those of the Maxout networks (Goodfellow
et al. 2013, section 5.2), which the papers it compares with share. Every image is scaled to the
Euclidean norm 55 around its own mean, and 0.1 is added to the covariance's diagonal.
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
# An image whose pixels are all equal has no contrast to normalize; it becomes 0 and stays so.
FLAT = 1e-8
CHUNK = 1000  # images at a time in float64


@dataclass(frozen=True, eq=False)
class Contrast:
    """What contrast normalization takes away: every image's mean, and its norm around that.

    An image without contrast has the norm 1 here, and becomes 0 when it is normalized.
    """

    mean: Float64[Tensor, "images 1"]
    norm: Float64[Tensor, "images 1"]

    @classmethod
    def of(cls, x: Real[Tensor, "images *inputs"]) -> "Contrast":
        """Measures the contrast of images of any dtype, each over all its pixels and channels."""
        flat = x.flatten(1).to(torch.float64)
        mean = flat.mean(1, keepdim=True)
        norm = (flat - mean).norm(dim=1, keepdim=True)
        return cls(mean, torch.where(norm < FLAT, torch.ones_like(norm), norm))


def normalize_contrast(
    x: Real[Tensor, "images *inputs"], scale: float = SCALE
) -> Float64[Tensor, "images inputs"]:
    """Returns every image with mean 0 and Euclidean norm `scale`, flat.

    ``scale · (x − mean(x)) / ‖x − mean(x)‖``: neither brightness nor contrast are left. An image
    whose pixels are all equal becomes 0.

    >>> normalize_contrast(torch.tensor([[1, 2, 3]]), scale=2**0.5).tolist()
    [[-1.0, 0.0, 1.0]]
    """
    contrast = Contrast.of(x)
    return (x.flatten(1).to(torch.float64) - contrast.mean) * (scale / contrast.norm)


@dataclass(frozen=True, eq=False)
class Whitening:
    """Contrast normalization, then ``(x − mean) (C + diagonal · I)^(−1/2)``.

    ``C`` is the covariance of the normalized training images, divided by their number.
    A direction of eigenvalue λ comes out with the variance ``λ / (λ + diagonal)``: 1 where the
    images vary by much more than `diagonal`. Among all whitening matrices the symmetric one
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
        """Fits the whitening on the training images `x`: a minute on one CPU core for CIFAR.

        The eigenvalues and eigenvectors are kept on disk under the hash of the images.

        Args:
            x: images of any dtype; the result lies on their device.
            scale: the norm of every image after contrast normalization.
            diagonal: what is added to the covariance's diagonal.
            root: the folder of the data sets; the result is kept in `$BIASSHIFT_CACHE`, else in
                `cache/` below it.

        Raises:
            ValueError: there are no images, a pixel is not finite, or `scale` or `diagonal` is not
                positive.
        """
        if not len(x):
            raise ValueError(f"'x' must hold images to fit the whitening on, got {tuple(x.shape)}.")
        if not (0 < scale < float("inf") and 0 < diagonal < float("inf")):
            raise ValueError(
                f"'scale' and 'diagonal' must be positive and finite, got {scale} and {diagonal}."
            )
        if not bool(x.isfinite().all()):
            raise ValueError("'x' must be finite, got an image with an infinite or NaN pixel.")
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
        """Returns the whitened images in the shape of `x`, computed in float64 on its device.

        Args:
            x: images of any dtype and of the size that the whitening was fitted on; none are
                allowed.
        """
        mean, root = self.mean.to(x.device), self._inverse_root.to(x.device)
        parts = [
            ((normalize_contrast(part, self.scale) - mean) @ root).to(torch.float32)
            for part in x.split(CHUNK)
        ]
        return torch.cat(parts).view(x.shape)

    def invert(
        self, z: Float[Tensor, "images *inputs"], contrast: Contrast | None = None
    ) -> Float32[Tensor, "images *inputs"]:
        """Returns the images that `z` was whitened from, normalized in contrast.

        Args:
            z: what `apply` returned.
            contrast: of the images before `apply`, ``Contrast.of(x)``; with it the images are
                returned as they were.
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
    """Returns the data set with all its images whitened, in float32.

    The whitening is fitted on the training images alone and applied to all three splits.

    Args:
        root: the folder of the data sets, for the cache, see `Whitening.fit`.
    """
    whitening = Whitening.fit(data.x_train, root=root)
    train, valid, test = (whitening.apply(x) for x in (data.x_train, data.x_valid, data.x_test))
    return replace(data, x_train=train, x_valid=valid, x_test=test)


def _spectrum(x: Tensor, scale: float) -> Arrays:
    """The mean of the normalized images, and the eigenvalues and eigenvectors of their covariance,
    in float64.
    """
    mean = torch.zeros(x[0].numel(), dtype=torch.float64, device=x.device)
    covariance = mean.new_zeros(len(mean), len(mean))
    for part in x.split(CHUNK):
        mean += normalize_contrast(part, scale).sum(0) / len(x)
    for part in x.split(CHUNK):  # a second time: centering first, nothing cancels
        centered = normalize_contrast(part, scale) - mean
        covariance += centered.T @ centered / len(x)
    values, vectors = torch.linalg.eigh(covariance)
    spectrum = {"mean": mean, "values": values, "vectors": vectors}
    return {name: np.ascontiguousarray(part.cpu().numpy()) for name, part in spectrum.items()}
