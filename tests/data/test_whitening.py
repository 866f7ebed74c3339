"""Contrast normalization and ZCA whitening, and the cache of its result.

Second opinions: the eigenvalues that theory promises, numpy's svd, and the way back.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from biasshift import data
from biasshift.data import whitening
from biasshift.data.cache import cache_folder
from biasshift.data.whitening import Contrast, Whitening, normalize_contrast, whitened


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BIASSHIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(count: int = 400, side: int = 5, seed: int = 0) -> torch.Tensor:
    """Bytes with neighboring pixels alike, as in images."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, 3, side + 2, side + 2, generator=generator)
    return (255 * torch.nn.functional.avg_pool2d(rough, 3, stride=1)).to(torch.uint8)


def covariance(x: torch.Tensor) -> np.ndarray:
    return np.cov(x.flatten(1).double().numpy(), rowvar=False, bias=True)


def test_every_image_has_mean_0_and_norm_55():
    normalized = normalize_contrast(pictures())
    assert normalized.shape == (400, 75) and normalized.dtype == torch.float64
    assert normalized.mean(1).abs().max() < 1e-12
    assert torch.allclose(normalized.norm(dim=1), torch.tensor(55.0, dtype=torch.float64))
    image = pictures()[7].numpy().ravel().astype(float)
    expected = 55 * (image - image.mean()) / (image.std() * np.sqrt(75))
    assert np.allclose(normalized[7], expected)


def test_contrast_and_brightness_do_not_matter():
    x = pictures().double()
    assert torch.allclose(normalize_contrast(x), normalize_contrast(0.3 * x + 20))


def test_an_image_without_contrast_becomes_0():
    flat = torch.full((1, 3, 5, 5), 9, dtype=torch.uint8)
    assert not normalize_contrast(flat).any()
    assert Whitening.fit(pictures()).apply(flat).isfinite().all()


def test_the_whitened_covariance_has_the_eigenvalues_of_theory():
    """λ / (λ + 0.1) for each λ of the normalized images' covariance, on the same eigenvectors."""
    x = pictures()
    values, vectors = np.linalg.eigh(covariance(normalize_contrast(x)))
    rotated = vectors.T @ covariance(Whitening.fit(x).apply(x)) @ vectors
    assert np.diag(rotated) == pytest.approx(values / (values + 0.1), abs=1e-5)
    assert np.abs(rotated - np.diag(values / (values + 0.1))).max() < 1e-5
    assert values.max() > 1 > 0.1 > values.min()  # both ends are there to be seen


def test_the_way_of_zca_is_that_of_numpys_svd():
    x, test = pictures(), pictures(seed=1)
    normalized = normalize_contrast(x).numpy()
    mean = normalized.mean(0)
    _, sizes, rows = np.linalg.svd(normalized - mean)
    matrix = rows.T @ np.diag((sizes**2 / len(x) + 0.1) ** -0.5) @ rows
    expected = (normalize_contrast(test).numpy() - mean) @ matrix
    z = Whitening.fit(x).apply(test)
    assert z.dtype == torch.float32 and z.shape == test.shape
    assert np.abs(z.flatten(1).numpy() - expected).max() < 1e-5
    # Symmetric: of all whitenings the one that changes the images least.
    assert np.allclose(matrix, matrix.T)


def test_the_way_back_gives_the_images():
    fitted, test = Whitening.fit(pictures()), pictures(seed=1)
    z = fitted.apply(test)
    normalized = fitted.invert(z).flatten(1).double()
    assert torch.allclose(normalized, normalize_contrast(test), atol=1e-4)
    assert (fitted.invert(z, Contrast.of(test)) - test).abs().max() < 1e-3


def test_chunks_do_not_matter(monkeypatch):
    x = pictures(50)
    whole = Whitening.fit(x).apply(x)
    monkeypatch.setattr(whitening, "CHUNK", 7)
    monkeypatch.setenv("BIASSHIFT_CACHE", os.devnull)
    assert torch.allclose(Whitening.fit(x).apply(x), whole, atol=1e-5)


def test_a_data_set_is_whitened_by_its_training_images_alone():
    x, y = pictures(), torch.arange(400) % 10
    plain = data.DataSet("plain", 10, x[:300], y[:300], x[300:350], y[300:350], x[350:], y[350:])
    first, second = whitened(plain), whitened(replace(plain, x_test=255 - x[350:]))
    fitted = Whitening.fit(x[:300])
    assert torch.equal(first.x_train, second.x_train)
    assert torch.equal(first.x_train, fitted.apply(x[:300]))
    assert torch.equal(first.x_valid, fitted.apply(x[300:350]))
    assert torch.equal(second.x_test, fitted.apply(255 - x[350:]))
    assert torch.equal(first.y_test, y[350:])
    assert first.x_train.dtype == first.x_test.dtype == torch.float32


def test_a_data_set_without_validation_images_is_whitened_too():
    x, y = pictures(), torch.arange(400) % 10
    plain = data.DataSet("plain", 10, x[:300], y[:300], x[:0], y[:0], x[300:], y[300:])
    assert whitened(plain).x_valid.shape == (0, 3, 5, 5)


@pytest.mark.parametrize(
    ("x", "options", "word"),
    [
        (torch.zeros(0, 4), {}, r"must hold images .*, got \(0, 4\)"),
        (torch.tensor([[1.0, torch.nan]]), {}, "infinite or NaN"),
        (torch.tensor([[1.0, torch.inf]]), {}, "infinite or NaN"),
        (torch.eye(3), {"diagonal": 0.0}, "must be positive"),
        (torch.eye(3), {"scale": -1.0}, "must be positive"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x, options, word, cache):
    with pytest.raises(ValueError, match=word):
        Whitening.fit(x, **options)
    assert not cache.exists()


# -- the cache -------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """How often a spectrum was computed."""
    times, original = [], whitening._spectrum

    def counting(*args):
        times.append(1)
        return original(*args)

    monkeypatch.setattr(whitening, "_spectrum", counting)
    return times


def test_a_spectrum_is_computed_once_for_the_same_images(computed, cache):
    x = pictures(60)
    first, second = Whitening.fit(x), Whitening.fit(x.clone(), diagonal=1.0)
    assert len(computed) == 1 and second.diagonal == 1.0
    assert torch.equal(first.vectors, second.vectors)
    assert [path.suffix for path in cache.iterdir()] == [".npz"]
    changed = x.clone()
    changed[0, 0, 0, 0] ^= 1
    for images in (changed, x.float(), x.flip(0), x.view(60, 75)):
        before = len(computed)
        Whitening.fit(images)
        assert len(computed) == before + 1
    Whitening.fit(x, scale=1.0)
    assert len(computed) == before + 2


def test_the_cache_lies_where_the_data_sets_lie_unless_the_variable_says_otherwise(
    monkeypatch, tmp_path
):
    assert cache_folder(tmp_path) == tmp_path / "cache"
    monkeypatch.delenv("BIASSHIFT_CACHE")
    assert cache_folder(tmp_path / "sets") == tmp_path / "sets" / "cache"
    monkeypatch.setenv("BIASSHIFT_DATA", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named" / "cache"


@pytest.mark.parametrize(
    "damage",
    [
        "empty",
        "half",
        "no end",
        "bit in the numbers",
        "text",
        "longer",
        "objects",
        "other shape",
        "nan",
        "folder",
    ],
)
def test_a_damaged_cache_is_computed_anew_and_replaced(computed, cache, damage, tmp_path):
    x = pictures(60)
    right = Whitening.fit(x)
    (path,) = cache.iterdir()
    good = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    broken = bytearray(good)
    broken[len(good) // 2] ^= 1
    files = {
        "empty": b"",
        "half": good[: len(good) // 2],
        "no end": good[:-1],
        "bit in the numbers": broken,
        "text": b"404",
        "longer": 2 * good,
    }
    if damage in files:
        path.write_bytes(files[damage])
    elif damage == "objects":
        np.savez(path, **arrays | {"mean": np.array([Bomb(tmp_path / "canary")])})
    elif damage == "other shape":
        np.savez(path, **arrays | {"mean": arrays["mean"][:-1]})
    elif damage == "nan":
        np.savez(path, **arrays | {"mean": np.full_like(arrays["mean"], np.nan)})
    else:
        path.unlink()
        path.mkdir()
    again = Whitening.fit(x)
    assert len(computed) == 2
    assert torch.equal(again.mean, right.mean) and torch.equal(again.values, right.values)
    assert not (tmp_path / "canary").exists() and list(cache.iterdir()) == [path]
    if damage != "folder":  # which nobody may simply remove
        Whitening.fit(x)
        assert len(computed) == 2


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, computed):
    x = pictures(60)
    monkeypatch.setenv("BIASSHIFT_CACHE", os.devnull)
    first, second = Whitening.fit(x), Whitening.fit(x)
    assert len(computed) == 2 and torch.equal(first.vectors, second.vectors)


def test_an_interrupted_write_leaves_nothing(monkeypatch, cache):
    def stop(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        Whitening.fit(pictures(60))
    assert list(cache.iterdir()) == []


@pytest.mark.data
def test_the_real_images(data_root):
    """A tenth of CIFAR-10's images is enough to see, and a tenth of the time."""
    if not (data_root / "cifar-10-batches-py").exists():
        pytest.skip(f"no cifar-10-batches-py below '{data_root}'")
    real = data.cifar10(data_root, download=False)
    x = real.x_train[:5000, :, ::2, ::2]
    fitted = Whitening.fit(x)
    z = fitted.apply(x)
    values = np.linalg.eigvalsh(covariance(normalize_contrast(x)))
    assert np.linalg.eigvalsh(covariance(z)) == pytest.approx(values / (values + 0.1), abs=1e-4)
    assert (fitted.invert(z, Contrast.of(x)) - x).abs().max() < 1e-2
    # What whitening is for: neighboring pixels, nearly equal in images, are hardly correlated then.
    before, after = (
        np.corrcoef(images[:, 0, 8, 8].double(), images[:, 0, 8, 9].double())[0, 1]
        for images in (x, z)
    )
    assert before > 0.7 and abs(after) < 0.3
