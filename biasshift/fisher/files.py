"""Unit Fisher matrices in a file: tensors and their names, in the format of safetensors.

Nothing in a file is executed. Its numbers are checked against each other and against a checksum
before anything is made of them.
"""

import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biasshift.atomic import replacing
from biasshift.fisher import packed
from biasshift.fisher.convolution import Geometry, Maps
from biasshift.fisher.example_vectors import ExampleVectors
from biasshift.fisher.held import HeldSums
from biasshift.fisher.moments import WeightedSums
from biasshift.fisher.samples import STORAGES, ImplicitSums, Samples

LAYOUT = "1"
DTYPES = {str(d): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
LABELS = ("given", "expected", "sampled", "empirical")
OPTIONS = ("damping", "bias", "name", "labels", "tolerance", "max_iterations")
MOMENTS = ("total", "weight", "weight_squares", "weight_rounding", "first")
GEOMETRY = ("units", "groups", "kernel", "stride", "dilation", "flipped")


class Refused(Exception):
    """What is wrong with a file, as a clause; never shown by itself."""


# -- writing ---------------------------------------------------------------------------------------


def save(fisher: Any, path: str | os.PathLike[str]) -> None:
    """Writes a layer's sums and options to a file.

    Raises:
        ValueError: for samples that are read again from the probe.
    """
    from safetensors.torch import save_file

    sums = fisher.sums
    fields: dict[str, Any] = {name: getattr(fisher, name) for name in OPTIONS}
    fields |= {"dtype": str(fisher.dtype), "storage": fisher.storage}
    fields |= {"examples": sums.examples, "positions": sums.positions}
    tensors = {name: getattr(sums, name) for name in ("reference", *MOMENTS)}
    if fisher.label_noise is not None:
        tensors["label_noise"] = fisher.label_noise
    if isinstance(sums, WeightedSums):
        tensors |= {f"second.{i}": block for i, block in enumerate(sums.second)}
    else:
        fields |= {"memory_budget": sums.memory_budget, "parts": []}
        tensors["squares"] = sums.squares
        for i, part in enumerate(sums.parts):
            described, own = _taken_apart(fisher.name, part)
            fields["parts"].append(described)
            tensors |= {f"part.{i}.{name}": x for name, x in own.items()}
    # memory of its own for each: views of one tensor would be refused
    tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, x in tensors.items()}  # fmt: skip
    text = json.dumps(fields)
    metadata = {"biasshift": LAYOUT, "fields": text, "checksum": _checksum(text, tensors)}
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata)


def _taken_apart(name: str, part: object) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A part of the samples as options and tensors."""
    if isinstance(part, Samples):
        return {"kind": "samples"}, {"a": part.a, "delta2": part.delta2}
    if isinstance(part, ExampleVectors):
        return {"kind": "vectors"}, {"vectors": part.vectors, "delta": part.delta}
    if not isinstance(part, Maps):
        raise ValueError(
            f"Layer '{name}' reads its samples again from the probe, and cannot be saved. Raise "
            "memory_budget, or choose units=."
        )
    described = {name: getattr(part.geometry, name) for name in GEOMETRY}
    described |= {"kind": "maps", "squared": part.squared}
    described |= {"maps": len(part.maps), "delta": len(part.delta)}
    tensors = {f"maps.{i}": a for i, a in enumerate(part.maps)}
    tensors |= {f"delta.{i}": delta for i, delta in enumerate(part.delta)}
    return described, {**tensors, "units": part.units}


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


# -- reading ---------------------------------------------------------------------------------------


def load(kind: type, path: str | os.PathLike[str], device: torch.device | str) -> Any:
    """Returns what `save` has written.

    Raises:
        ValueError: when the file is damaged, or another one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if "biasshift" not in metadata:
                raise Refused("it was not written by UnitFisher.save")
            if metadata["biasshift"] != LAYOUT:
                raise Refused("it is of another version")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = metadata.get("fields", "")
        if metadata.get("checksum") != _checksum(text, tensors):
            raise Refused("its checksum is another one")
        return kind(**_made(json.loads(text), _Tensors(tensors, torch.device(device))))
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        why = str(error).strip().split("\n")[0].removesuffix(".") or type(error).__name__
        raise _unreadable(path, why) from error
    except Refused as damaged:
        raise _unreadable(path, str(damaged)) from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _unreadable(path, "its entries do not fit each other") from error


def _unreadable(path: str | os.PathLike[str], why: str) -> ValueError:
    return ValueError(
        f"'{os.fspath(path)}' must be a file of UnitFisher.save ({why}). Save the layer again."
    )


class _Tensors:
    """The tensors of a file, taken by name, each with the shape and dtype it must have."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device):
        self.tensors, self.device = tensors, device

    def take(self, name: str, *shape: int | None, dtypes: tuple = (torch.float64,)) -> Tensor:
        """Returns a tensor and forgets it; None stands for any size of an axis."""
        x = self.tensors.pop(name)
        fits = x.dim() == len(shape) and all(
            size in (None, n) for size, n in zip(shape, x.shape, strict=True)
        )
        if not fits or x.dtype not in dtypes or (x.is_floating_point() and not x.isfinite().all()):
            raise Refused(f"'{name}' does not fit")
        return x.to(self.device)


def _made(fields: dict[str, Any], tensors: _Tensors) -> dict[str, Any]:
    """The fields of a layer, checked."""
    units, inputs = tensors.tensors["first"].shape
    shared = tensors.tensors["reference"].dim() == 1
    wide = (inputs,) if shared else (units, inputs)
    sums: dict[str, Any] = {name: _count(fields[name]) for name in ("examples", "positions")}
    shapes = {"reference": wide, "total": wide, "first": (units, inputs)}
    for name in ("reference", *MOMENTS):
        sums[name] = tensors.take(name, *shapes.get(name, (units,)))
    if any((sums[name] < 0).any() for name in ("weight", "weight_squares", "weight_rounding")):
        raise Refused("sums of squares are negative")
    noise = tensors.take("label_noise", units) if "label_noise" in tensors.tensors else None
    storage = _chosen(fields["storage"], STORAGES)
    if storage == "dense":
        rows = packed.zeros(units, inputs, torch.device("cpu"))
        second = [
            tensors.take(f"second.{i}", *block.shape, dtypes=(torch.float64, torch.float32))
            for i, block in enumerate(rows)
        ]
        made = WeightedSums(**sums, second=second)
    else:
        sums["squares"] = tensors.take("squares", units, inputs)
        budget, parts = _count(fields["memory_budget"]), _list(fields["parts"])
        put = _put_together
        held = tuple(put(i, part, tensors, units, inputs) for i, part in enumerate(parts))
        kinds = {type(part) for part in held}
        if storage == "auto" and (Maps in kinds or len(kinds) > 1):
            raise Refused("its samples are of another kind")
        kind = HeldSums if storage == "auto" else ImplicitSums
        made = kind(**sums, parts=held, memory_budget=budget)
    if tensors.tensors:
        raise Refused(f"'{next(iter(tensors.tensors))}' is one tensor too many")
    options = {name: fields[name] for name in OPTIONS}
    if not (isinstance(options["bias"], bool) and isinstance(options["name"], str)):
        raise Refused("its options have other types")
    _chosen(options["labels"], LABELS)
    dtype = DTYPES[_chosen(fields["dtype"], tuple(DTYPES))]
    return {**options, "sums": made, "dtype": dtype, "label_noise": noise}


def _put_together(
    i: int, part: dict[str, Any], tensors: _Tensors, units: int, inputs: int
) -> Samples | ExampleVectors | Maps:
    """One part of the samples, checked."""

    def take(name: str, *shape: int | None, dtypes=(torch.float64, torch.float32)) -> Tensor:
        return tensors.take(f"part.{i}.{name}", *shape, dtypes=dtypes)

    kind = _chosen(part["kind"], ("samples", "vectors", "maps"))
    if kind == "samples":
        a = take("a", None, inputs)
        return Samples(a, take("delta2", units, len(a)))
    if kind == "vectors":
        vectors = take("vectors", units, None, inputs)
        return ExampleVectors(vectors, take("delta", units, vectors.shape[1]))
    kernel, stride, dilation = (
        tuple(map(_count, _list(part[name]))) for name in ("kernel", "stride", "dilation")
    )
    units_of_all, groups = _count(part["units"]), _count(part["groups"])
    geometry = Geometry(units_of_all, groups, kernel, stride, dilation, _flag(part["flipped"]))
    axes, taps = len(kernel), math.prod(kernel)
    fits = 1 <= axes <= 3 and axes == len(stride) == len(dilation)
    if not fits or inputs % taps or geometry.units % geometry.groups:
        raise Refused("the geometry of a convolution does not fit")
    shape = (None, inputs // taps * geometry.groups, *[None] * axes)
    maps = tuple(take(f"maps.{k}", *shape) for k in range(_count(part["maps"])))
    places = [geometry.places(a) for a in maps]
    if any(min(own) < 1 or len(a) != len(maps[0]) for a, own in zip(maps, places, strict=True)):
        raise Refused("the maps of a convolution do not fit")
    squared, batch = _flag(part["squared"]), len(maps[0])
    positions = sum(map(math.prod, places))
    passes = () if squared else (None,)
    delta = tuple(
        take(f"delta.{k}", *passes, batch, units, positions) for k in range(_count(part["delta"]))
    )
    index = take("units", units, dtypes=(torch.int64,))
    known = (index >= 0).all() and (index < geometry.units).all() and (index.diff() > 0).all()
    if not known or (squared and len(delta) != 1):
        raise Refused("the units of a convolution do not fit")
    return Maps(geometry, maps, delta, squared, index)


def _checked(accepts: Callable[[Any], bool], value: Any) -> Any:
    if not accepts(value):
        raise Refused(f"{value!r:.20} is no value of an option")
    return value


def _count(value: Any) -> int:
    return _checked(lambda x: type(x) is int and 0 < x < 2**63, value)


def _flag(value: Any) -> bool:
    return _checked(lambda x: type(x) is bool, value)


def _list(value: Any) -> list:
    return _checked(lambda x: type(x) is list, value)


def _chosen(value: Any, choices: tuple[str, ...]) -> str:
    return _checked(lambda x: type(x) is str and x in choices, value)
