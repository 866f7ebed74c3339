"""The little sets: their shapes, their seeds, and that there is something to learn in them."""

from pathlib import Path

import pytest
import torch

from biasshift import data

SETS = {
    "mnist": (data.synthetic_mnist, (784,), torch.float32, 10),
    "cifar10": (data.synthetic_cifar, (3, 32, 32), torch.uint8, 10),
    "cifar100": (
        lambda **sizes: data.synthetic_cifar(classes=100, **sizes),
        (3, 32, 32),
        torch.uint8,
        100,
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_shapes_are_those_of_the_real_sets(name):
    make, shape, dtype, classes = SETS[name]
    made = make(train=200, valid=20, test=30)
    assert made.x_train.shape == (200, *shape)
    assert made.x_valid.shape == (20, *shape) and made.x_test.shape == (30, *shape)
    assert made.x_train.dtype == dtype and made.y_train.dtype == torch.int64
    assert made.classes == classes and made.y_train.min() >= 0 and made.y_train.max() < classes
    assert made.y_train.unique().numel() > 0.6 * classes
    top = 1 if dtype == torch.float32 else 255
    assert 0 <= made.x_train.min() and 0.8 * top < made.x_train.max() <= top


@pytest.mark.parametrize("name", SETS)
def test_the_seed_decides_and_nothing_else(name):
    make = SETS[name][0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = make(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = make(seed=3)
    assert torch.equal(made.x_train, again.x_train) and torch.equal(made.y_test, again.y_test)
    assert not torch.equal(made.x_train, make(seed=4).x_train)


@pytest.mark.parametrize("name", SETS)
def test_the_classes_can_be_learned(name):
    """By the nearest class mean, on test images; it knows nothing of how the sets are made."""
    made = SETS[name][0](train=1000, test=200)
    x, y = made.x_train.flatten(1).double(), made.y_train
    means = torch.stack([x[y == label].mean(0) for label in range(made.classes)])
    wrong = torch.cdist(made.x_test.flatten(1).double(), means).argmin(1) != made.y_test
    assert wrong.double().mean() < 0.05


def test_a_folder_of_images_is_made_whole(tmp_path):
    sizes = {"classes": 3, "train": 5, "valid": 2, "side": 40}
    made = data.synthetic_imagenet(tmp_path / "deep" / "little", **sizes)
    assert made.classes == 3 and made.train.y.bincount().tolist() == [5, 5, 5]
    assert made.valid.y.bincount().tolist() == [2, 2, 2]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["little"]
    stream = data.ImageStream(made.train, 5, 0, crop=data.Crop(40, 32), workers=0)
    x, _ = next(stream.epoch(1))
    assert x.shape == (5, 3, 32, 32) and x.std() > 0.1
    with pytest.raises(FileExistsError, match="exists already"):
        data.synthetic_imagenet(tmp_path / "deep" / "little")
    again = data.synthetic_imagenet(tmp_path / "again", **sizes)
    for path, twin in zip(made.train.paths, again.train.paths, strict=True):
        assert Path(path).read_bytes() == Path(twin).read_bytes()


def test_an_interrupted_folder_is_not_there(tmp_path, monkeypatch):
    from PIL import Image

    saved = []

    def stop(self, path, **options):
        saved.append(path)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        data.synthetic_imagenet(tmp_path / "little")
    assert list(tmp_path.iterdir()) == []
