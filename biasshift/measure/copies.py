"""Examples that come several times in a probe, bit by bit the same."""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor


class Copies:
    """The numbers of examples and of copies among them, batch after batch.

    Of every example a digest of 16 bytes is kept. It is that of all tensors that have as many rows
    as there are examples.

    Attributes:
        examples: how many there were.
        count: how many of them are the same as an earlier one.

    >>> copies = Copies()
    >>> copies.add(torch.tensor([[1.0], [2.0], [1.0]]))
    >>> copies.examples, copies.count
    (3, 1)
    """

    def __init__(self) -> None:
        self.examples = self.count = 0
        self._seen: set[bytes] = set()

    def add(self, x: Any) -> None:
        """Adds a batch: a tensor, or tensors in whatever holds them."""
        examples = len(x)
        own = [_rows(t) for t in _tensors(x) if t.dim() and len(t) == examples]
        self.examples += examples
        for i in range(examples):
            digest = blake2b(digest_size=16)
            for rows in own:
                digest.update(rows[i].data)
            key = digest.digest()
            self.count += key in self._seen
            self._seen.add(key)


def _rows(x: Tensor):
    """The bytes of every row, (rows, bytes), in the memory of the CPU."""
    flat = x.detach().resolve_conj().resolve_neg().cpu().reshape(len(x), -1).contiguous()
    return flat.view(torch.uint8).numpy() if flat.numel() else flat.numpy()


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        for key in sorted(x, key=str):
            yield from _tensors(x[key])
    elif isinstance(x, tuple | list):
        for part in x:
            yield from _tensors(part)
    elif hasattr(x, "tensors"):  # what a model is called with: several tensors, or a dict of them
        yield from x.tensors()
