"""Layers in tables, on one line, and in files that may be damaged."""

import json
import struct

import pytest
import torch
from torch import nn

import biasshift as bs
from biasshift import UnitFisher

NUMBERS = ("s", "k", "k0", "coupling", "c", "mean_p", "mean_q", "effective_samples", "reliable")


def measured(kind: str) -> UnitFisher:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.ELU(), nn.Flatten()), 8
    head = {"dense": 36, "implicit": 36}[kind.split("-")[0]]
    model = nn.Sequential(*model, nn.Linear(head, 3))
    sharing = "expand" if kind.endswith("expand") else "per_example"
    layer = "3" if kind.endswith("linear") else "0"
    options = {"labels": "sampled", "draws": 2, "tolerance": 1e-4} if layer == "3" else {}
    return bs.unit_fisher(
        model,
        torch.randn(40, 2, 4, 4),
        storage=kind.split("-")[0],
        weight_sharing=sharing,
        batch_size=x,
        damping=1e-2,
        units={"0": [0, 2, 3]},
        **options,
    )[layer]


KINDS = [f"{s}-{k}" for s in ("dense", "implicit") for k in ("linear", "conv", "expand")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_loaded_to_the_last_bit(kind, tmp_path):
    fisher = measured(kind)
    fisher.save(tmp_path / "layer.safetensors")
    loaded = UnitFisher.load(str(tmp_path / "layer.safetensors"))
    for name in ("damping", "bias", "dtype", "name", "labels", "tolerance", "max_iterations"):
        assert getattr(loaded, name) == getattr(fisher, name)
    for name in (*NUMBERS, "standard_error", "A"):
        torch.testing.assert_close(
            getattr(loaded, name), getattr(fisher, name), rtol=0, atol=0, equal_nan=True
        )
    together, expected = loaded + fisher, fisher + fisher
    torch.testing.assert_close(together.c, expected.c)
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_a_probe_that_is_read_again_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.ELU(), nn.Linear(4, 3))
    fisher = bs.unit_fisher(model, torch.randn(50, 6), storage="implicit", memory_budget=100)["0"]
    with pytest.raises(ValueError, match="'0' reads its samples again"):
        fisher.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["dense-conv", "implicit-conv", "implicit-linear"])
def test_damage_anywhere_is_one_sentence_that_names_the_file(kind, tmp_path):
    path = tmp_path / "layer.safetensors"
    measured(kind).save(path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole), (60,), generator=generator).tolist()
    damaged = [whole[:n] for n in (0, 7, 100, len(whole) // 2, len(whole) - 1)]
    damaged += [b"not at all", whole + b"more"]
    damaged += [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in places]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"layer\.safetensors' must be a file"):
            UnitFisher.load(path)


def rewritten(whole: bytes, change) -> bytes:
    """The file with other options, and the checksum that fits them: a forgery."""
    import zlib

    from safetensors.torch import load, save

    size = struct.unpack("<Q", whole[:8])[0]
    metadata = json.loads(whole[8 : 8 + size])["__metadata__"]
    tensors, fields = load(whole), json.loads(metadata["fields"])
    change(fields, tensors)
    text = json.dumps(fields)
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, crc)
    return save(tensors, {"biasshift": "1", "fields": text, "checksum": f"{crc:08x}"})


FORGERIES = {
    "damping": lambda f, t: f.update(damping=-1),
    "no damping": lambda f, t: f.pop("damping"),
    "examples": lambda f, t: f.update(examples=0),
    "dtype": lambda f, t: f.update(dtype="torch.load"),
    "storage": lambda f, t: f.update(storage=["dense"]),
    "name": lambda f, t: f.update(name=3),
    "tolerance": lambda f, t: f.update(tolerance="x"),
    "labels": lambda f, t: f.update(labels="mine"),
    "weight": lambda f, t: t["weight"].neg_(),
    "nan": lambda f, t: t["first"].fill_(torch.nan),
    "shape": lambda f, t: t.update(total=t["total"][..., :1].contiguous()),
    "more": lambda f, t: t.update(more=torch.ones(1)),
    "less": lambda f, t: t.pop("weight_squares"),
    "kernel": lambda f, t: f["parts"][0].update(kernel=[3, 2]),
    "groups": lambda f, t: f["parts"][0].update(groups=0),
    "stride": lambda f, t: f["parts"][0].update(stride=[10**12, -1]),
    "units": lambda f, t: t["part.0.units"].add_(100),
    "kind": lambda f, t: f["parts"][0].update(kind="pickle"),
    "delta": lambda f, t: f["parts"][0].update(delta=10**9),
    "fields": lambda f, t: f.clear(),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_numbers_that_do_not_fit_each_other_are_refused(what, tmp_path):
    path = tmp_path / "layer.safetensors"
    measured("implicit-conv").save(path)
    path.write_bytes(rewritten(path.read_bytes(), lambda f, t: None))
    UnitFisher.load(path)
    path.write_bytes(rewritten(path.read_bytes(), FORGERIES[what]))
    with pytest.raises(ValueError, match=r"layer\.safetensors' must be a file"):
        UnitFisher.load(path)


def test_other_files_and_missing_ones(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"not written by UnitFisher"):
        UnitFisher.load(tmp_path / "other")
    torch.save({"x": 1}, tmp_path / "pickle")
    with pytest.raises(ValueError, match=r"'.*pickle' must be a file"):
        UnitFisher.load(tmp_path / "pickle")
    with pytest.raises(FileNotFoundError):
        UnitFisher.load(tmp_path / "nothing")


def test_the_table_has_a_row_per_unit_and_the_numbers_of_the_properties():
    fisher = measured("dense-conv")
    table = fisher.table()
    assert table.unit.tolist() == [0, 1, 2]
    flags = ("dead", "singular", "bias_inert", "imprecise", "reliable")
    for name in ("s", "k", "k0", "coupling", "mean_delta2", "effective_samples", *flags):
        assert table[name].tolist() == getattr(fisher, name).tolist()
    assert all(table[name].dtype == bool for name in flags)


def test_a_line_and_a_page_solve_nothing_large_and_never_raise():
    fisher = measured("dense-conv")
    line = repr(fisher)
    assert "UnitFisher('0', 3 units × 4 inputs, 40 examples" in line and "\n" not in line
    assert "reliable 0 of 3" in line
    assert "_factors" not in vars(fisher)
    assert "coupling" in fisher._repr_html_() and "&#x27;0&#x27;" in fisher._repr_html_()
    flat = UnitFisher.from_samples(torch.ones(5, 2), torch.rand(5, 1), name="<b>")
    assert "singular" not in repr(flat)  # which takes a solve
    assert "<b>" not in flat._repr_html_() and "singular 1, reliable 0 of 1" in repr(flat)
    few = UnitFisher.from_samples(torch.randn(2, 3), torch.rand(2, 1))
    assert "covariance" in few._repr_html_()
    samples = torch.randn(300, 3), torch.rand(300, 4)
    fisher = UnitFisher.from_samples(*samples)
    assert "reliable at most 4 of 4" in repr(fisher)
    middle = fisher.effective_samples.double().median()
    assert f"effective samples {middle:.0f}, reliable" in repr(fisher)
    fisher.table()
    assert f"reliable {int(fisher.reliable.sum())} of 4" in repr(fisher)


def test_a_line_counts_dead_units():
    delta2 = torch.rand(300, 4)
    delta2[:, 1:] = 0
    fisher = UnitFisher.from_samples(torch.randn(300, 3), delta2)
    size = fisher.effective_samples[0].item()
    assert f"effective samples {size:.0f}, dead 3, reliable at most 1 of 4" in repr(fisher)
    dead = UnitFisher.from_samples(torch.randn(300, 3), 0 * delta2)
    assert "', dead 4, reliable 0 of 4" in repr(dead)
