"""Weights are known by their SHA-256, which is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, str]] = WeakKeyDictionary()
"""What was hashed, with the state that it was in."""


def digest(module: nn.Module, read: Callable[[], nn.Module] | None = None) -> str:
    """SHA-256 of a module's weights, hashed again only if they have changed.

    Args:
        module: Whose weights; of a streamed SAE, its outline, which lives on.
        read: Gives the module with its weights, where `module` is an outline.
    """
    state = [
        (name, tensor.data_ptr(), _version(tensor), _sum_of_bits(tensor))
        for name, tensor in module.state_dict().items()
        if not tensor.is_meta  # an outline's, and what it stands for does not change
    ]
    if module not in _KNOWN or _KNOWN[module][0] != state:
        _KNOWN[module] = state, _sha256(read() if read else module)
    return _KNOWN[module][1]


def _sha256(module: nn.Module) -> str:
    found = hashlib.sha256()
    state: dict[str, Tensor] = module.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _version(tensor: Tensor) -> int:
    """How often autograd saw the tensor change."""
    return 0 if tensor.is_inference() else tensor._version


def _sum_of_bits(tensor: Tensor) -> int:
    """Tells of changes through `.data`, which autograd does not count.

    It is read at the speed of memory, some ten times that of SHA-256.
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    begin = -flat.storage_offset() % 8
    words = flat[begin : begin + (len(flat) - begin) // 8 * 8]
    edges = flat[:begin], flat[begin + len(words) :]
    return sum(int(part.sum()) for part in (words.view(torch.int64), *edges))
