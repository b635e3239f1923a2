"""An autoencoder's codes, computed in chunks of features and kept sparse.

sae-lens computes dense codes: every pre-activation is written to memory, read again by
the activation function, by its mask and by whoever counts, and multiplied with the
whole decoder, though a few in a thousand are not zero. Here pre-activations are made a
chunk of features at a time, in one buffer that stays in the cache; those above the
threshold are picked from it, and only their decoder rows are summed. Codes are those of
sae-lens, up to the rounding of float32 products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor, nn

from vlm_probe.codes.screening import Screen, fast_bfloat16, screen_of
from vlm_probe.codes.sparse import SparseCodes


@torch.no_grad()
def code(
    sae: SAE, x: Float[Tensor, "token d_model"], *, encoding: str = "auto"
) -> tuple[SparseCodes, Float[Tensor, "token d_model"]]:
    """Codes tokens and decodes them again.

    The two are done back to back, since sae-lens keeps the statistics of stateful
    normalizations from one to the other.

    Args:
        sae: The autoencoder.
        x: Activations of the hook point that the autoencoder was trained on.
        encoding: "dense": all pre-activations in the autoencoder's dtype; "screened":
            only those that a product in bfloat16 with a proven margin does not rule
            out (`vlm_probe.codes.screening`); "auto": screened where the hardware has
            fast bfloat16 products and the autoencoder is large enough to gain by it.

    Returns:
        The codes, and the reconstruction in the autoencoder's dtype.

    Raises:
        ValueError: "screened" for an autoencoder whose codes are not cut off at a
            threshold.
    """
    if encoding == "screened":
        _check_screens(sae)
    if not _is_plain(sae):
        dense = sae.encode(x)
        token, feature = dense.nonzero(as_tuple=True)
        codes = _ordered(token, feature, dense[token, feature], *dense.shape)
        return codes, sae.decode(dense)
    inner = sae.process_sae_in(x).contiguous()
    if _has_top_k(sae):
        codes = _top_k(sae, inner)
    else:
        gate = _gate(sae)
        screen = screen_of(sae, gate.weight) if _screens(sae, encoding) else None
        codes = _above_threshold(gate, inner, screen)
    return codes, _decode(sae, codes)


def uses_screening(sae: SAE, encoding: str) -> bool:
    """Whether `code` screens with this autoencoder where it is."""
    return _is_plain(sae) and not _has_top_k(sae) and _screens(sae, encoding)


TILE = {"cpu": 2**23, "cuda": 2**28}
"""Bytes of pre-activations at a time: a CPU's last cache, or a GPU's memory, holds it
with room to spare."""
_LARGE = 8192
"""Features from which on screening gains more than its own steps cost."""
_CROWDED = 1 / 32
"""Share of a chunk's pairs from which on a dense product is faster than going through
candidates one by one: some 0.2 microseconds each, against 0.01 for a pair of a dense
product."""


@dataclass(frozen=True)
class _Gate:
    """When a feature fires: its product with the input and its bias exceed `least`."""

    weight: Float[Tensor, "d_model feature"]
    bias: Float[Tensor, " feature"]
    least: Float[Tensor, " feature"]
    value: Callable[[Tensor, Tensor], Tensor]
    """From products and the features they belong to, the features' activations."""

    def low(self) -> Float[Tensor, " feature"]:
        """What a product must exceed, or a little less: rounding takes none away."""
        slack = 4 * torch.finfo(self.bias.dtype).eps
        return self.least - self.bias - slack * (self.least.abs() + self.bias.abs())


def _is_plain(sae: SAE) -> bool:
    """Whether its codes are computed here, and not by its own `encode`."""
    hooked = any(
        point._forward_hooks or point._forward_pre_hooks
        for point in sae.hook_dict.values()
    )
    if hooked or sae.cfg.reshape_activations != "none":
        return False
    if sae.cfg.architecture() in ("topk", "abstopk"):
        return True
    known = sae.cfg.architecture() in ("standard", "jumprelu", "gated")
    return known and isinstance(sae.activation_fn, nn.ReLU)


def _has_top_k(sae: SAE) -> bool:
    return sae.cfg.architecture() in ("topk", "abstopk")


def _screens(sae: SAE, encoding: str) -> bool:
    if encoding == "auto":
        large = sae.cfg.d_sae >= _LARGE and sae.dtype == torch.float32
        return large and fast_bfloat16(sae.W_enc.device)
    return encoding == "screened"


def _check_screens(sae: SAE) -> None:
    """Refuses an autoencoder that cannot be screened."""
    kind = sae.cfg.architecture()
    reason = None
    if _has_top_k(sae):
        reason = "takes the largest of all features, so none can be ruled out"
    elif not _is_plain(sae):
        reason = "has hooks, or computes its codes in a way of its own"
    elif sae.dtype != torch.float32:
        reason = f"computes in {sae.dtype}, expected torch.float32"
    if reason:
        raise ValueError(
            f"no screened encoding for this autoencoder ({kind}): it {reason}; give "
            'encoding="auto" or "dense"'
        )


def _gate(sae: SAE) -> _Gate:
    if sae.cfg.architecture() == "gated":

        def magnitude(product: Tensor, feature: Tensor) -> Tensor:
            grown = product * sae.r_mag.exp()[feature]
            return (grown + sae.b_mag[feature]).relu()

        return _Gate(sae.W_enc, sae.b_gate, torch.zeros_like(sae.b_gate), magnitude)
    threshold = getattr(sae, "threshold", torch.zeros_like(sae.b_enc))
    return _Gate(
        sae.W_enc,
        sae.b_enc,
        threshold.clamp(min=0),
        lambda product, feature: product + sae.b_enc[feature],
    )


def _above_threshold(
    gate: _Gate, inner: Float[Tensor, "token d_model"], screen: Screen | None
) -> SparseCodes:
    """Codes of an autoencoder whose features fire above a threshold of their own."""
    n_tokens, n_features = len(inner), gate.weight.shape[1]
    low = gate.low()
    screened = None if screen is None else screen.of(inner, gate.bias, gate.least)
    found, n_close = [], 0
    for start, buffer in _chunks(n_tokens, n_features, inner):
        stop = start + buffer.shape[1]
        pairs = None
        if screened is not None:
            pairs = _where(screened.candidates(start, stop))
            if len(pairs[0]) > _CROWDED * buffer.numel():
                pairs = None
        if screened is not None and pairs is not None:
            token, feature = pairs[0], pairs[1] + start
            product = screened.products(token, feature)
            off = product + gate.bias[feature] - gate.least[feature]
            n_close += int((off.abs() <= screened.rounding(token, feature)).sum())
        else:
            torch.mm(inner, gate.weight[:, start:stop], out=buffer)
            token, column = _where(buffer > low[start:stop])
            feature, product = column + start, buffer[token, column]
        value = gate.value(product, feature)
        fires = (product + gate.bias[feature] > gate.least[feature]) & (value != 0)
        found.append((token[fires], feature[fires], value[fires]))
    token, feature, value = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _ordered(token, feature, value, n_tokens, n_features, n_close)


def _top_k(sae: SAE, inner: Float[Tensor, "token d_model"]) -> SparseCodes:
    """Codes of an autoencoder whose k largest features fire, whatever their size."""
    n_tokens, n_features, k = len(inner), sae.cfg.d_sae, sae.cfg.k
    signed = sae.cfg.architecture() == "abstopk"
    norm = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None
    best = inner.new_empty(n_tokens, 0)
    feature = torch.empty(n_tokens, 0, dtype=torch.int64, device=inner.device)
    for start, buffer in _chunks(n_tokens, n_features, inner):
        stop = start + buffer.shape[1]
        torch.mm(inner, sae.W_enc[:, start:stop], out=buffer)
        buffer += sae.b_enc[start:stop]
        if norm is not None:
            buffer *= norm[start:stop]
        size = buffer.abs() if signed else buffer
        _, at = size.topk(min(k, stop - start), dim=1)
        best = torch.cat([best, buffer.gather(1, at)], dim=1)
        feature = torch.cat([feature, at + start], dim=1)
        size = best.abs() if signed else best
        _, kept = size.topk(min(k, size.shape[1]), dim=1)
        best, feature = best.gather(1, kept), feature.gather(1, kept)
    if not signed:
        best = best.relu()
    token, place = best.nonzero(as_tuple=True)
    feature, value = feature[token, place], best[token, place]
    by_feature = torch.argsort(feature, stable=True)
    return _ordered(
        token[by_feature],
        feature[by_feature],
        value[by_feature],
        n_tokens,
        n_features,
    )


def _decode(sae: SAE, codes: SparseCodes) -> Float[Tensor, "token d_model"]:
    """What the codes decode to: the sum of the active features' decoder rows."""
    value = codes.value.to(sae.W_dec.dtype)
    if _has_top_k(sae) and sae.cfg.rescale_acts_by_decoder_norm:
        norm = sae.W_dec.norm(dim=-1)
        value = value / norm[codes.feature]
    begins = codes.l0().cumsum(0).roll(1)
    begins[:1] = 0
    summed = nn.functional.embedding_bag(
        codes.feature, sae.W_dec, begins, mode="sum", per_sample_weights=value
    )
    return sae.run_time_activation_norm_fn_out(summed + sae.b_dec)


def _chunks(
    n_tokens: int, n_features: int, like: Tensor
) -> Iterator[tuple[int, Float[Tensor, "token chunk"]]]:
    """The first feature of each chunk, and a buffer for its products, used again."""
    tile = TILE.get(like.device.type, TILE["cpu"])
    width = tile // max(1, n_tokens * like.element_size()) // 256 * 256
    width = min(max(width, 256), n_features)
    whole = like.new_empty(n_tokens * width)
    for start in range(0, n_features, width):
        columns = min(width, n_features - start)
        yield start, whole[: n_tokens * columns].view(n_tokens, columns)


def _where(mask: Bool[Tensor, "token chunk"]) -> tuple[Tensor, Tensor]:
    """Tokens and columns of what is true."""
    if mask.device.type != "cpu":
        token, column = mask.nonzero(as_tuple=True)
        return token, column
    # NumPy skips what is false many at a time; torch looks at each.
    flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    return flat // mask.shape[1], flat % mask.shape[1]


def _ordered(
    token: Int[Tensor, " active"],
    feature: Int[Tensor, " active"],
    value: Float[Tensor, " active"],
    n_tokens: int,
    n_features: int,
    n_close: int = 0,
) -> SparseCodes:
    """Codes ordered by token; features of a token rise already."""
    if token.device.type == "cpu":
        # Of 16 bits, NumPy sorts by radix.
        small = np.uint16 if n_tokens <= 2**16 else np.int64
        order = torch.from_numpy(np.argsort(token.numpy().astype(small), kind="stable"))
    else:
        order = torch.argsort(token, stable=True)
    return SparseCodes(
        token[order],
        feature[order],
        value[order],
        n_tokens,
        n_features,
        n_close,
    )
