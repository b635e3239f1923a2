"""A product in bfloat16 that rules out features, with a margin that is proven.

Whether feature j fires at token x depends on whether x·w + b exceeds its threshold.
Tensor cores and AMX multiply in bfloat16 many times faster than in float32, but with
8 bits. So they decide only what they can: with x = m + d, where m is the mean of the
tokens, and with x̃, w̃ for bfloat16 roundings,

    x·w = m·w + d̃·w̃ + (d - d̃)·w̃ + d·(w - w̃)
       <= m·w + d̃·w̃ + |d - d̃| |w̃| + |d| |w - w̃|            (Cauchy-Schwarz)

Every norm on the right is known, for they are of roundings that were really made, so
this is a bound and no estimate. (Rounding errors of the float32 sums, below
n·2⁻²⁴ Σ|terms| in any order [Higham 2002, section 3.1], are added; four times as much,
since tensor cores truncate.) m·w + b - threshold and the two margins are further
columns of the same bfloat16 product, rounded up: where it is not above zero, the
feature is silent. What is left, little more than what fires, is computed in float32.
Taking out the mean first makes |d|, and so the margin, small where tokens have much in
common.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

_UNIT = 2.0**-24
"""Unit roundoff of float32."""
_SUM = 4 * _UNIT
"""Error of one step of a float32 sum, in hardware that truncates."""
_UP = 1 + 2.0**-7
"""More than rounding to bfloat16 can take from a positive number."""
_BLOCK = 32
"""What the inner dimension of a fast bfloat16 product is a multiple of."""


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are many times faster there than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    amx = torch.cpu._is_amx_tile_supported() and torch.backends.mkldnn.is_available()
    return device.type == "cpu" and amx


class Screen:
    """What screening needs of an encoder: its weights rounded, and turned.

    Beside the encoder's own weights it holds them once more in float32, one row a
    feature, and once in bfloat16. Not for two threads at a time.
    """

    def __init__(self, weight: Float[Tensor, "d_model feature"]) -> None:
        """Rounds the weights, and measures what is lost."""
        d_model, n_features = weight.shape
        extra = -(d_model + 4) % _BLOCK
        self.rows = weight.T.contiguous()
        rounded = torch.zeros(
            d_model + 4 + extra, n_features, dtype=torch.bfloat16, device=weight.device
        )
        rounded[:d_model] = weight
        lost = (weight - rounded[:d_model].float()).norm(dim=0)
        norm = torch.maximum(weight.norm(dim=0), rounded[:d_model].float().norm(dim=0))
        # Norms are sums of d_model terms in float32 themselves.
        grown = _UP * (1 + d_model * _SUM)
        rounded[d_model] = norm * grown
        rounded[d_model + 1] = lost * grown
        self.norm = norm
        self._rounded = rounded

    def of(
        self,
        x: Float[Tensor, "token d_model"],
        bias: Float[Tensor, " feature"],
        least: Float[Tensor, " feature"],
    ) -> Screened:
        """The screening of some tokens.

        Args:
            x: What goes into the encoder.
            bias: Of the encoder.
            least: What product and bias must exceed for a feature to fire.
        """
        d_model = x.shape[1]
        steps = self._rounded.shape[0] * _SUM
        mean = x.mean(0)
        deviation = x - mean
        rounded = torch.zeros(
            len(x), self._rounded.shape[0], dtype=torch.bfloat16, device=x.device
        )
        rounded[:, :d_model] = deviation
        lost = (deviation - rounded[:, :d_model].float()).norm(dim=1)
        spread, norm = deviation.norm(dim=1), x.norm(dim=1)
        grown = _UP * (1 + 2 * steps)
        # Of |w|: what rounding the tokens lost, and what float32 sums may be off by,
        # those of this product and the dense one's that the codes are to equal.
        rounded[:, d_model] = (lost + steps * spread + 2 * steps * norm) * grown
        rounded[:, d_model + 1] = spread * grown  # of |w - w̃|
        rounded[:, d_model + 2 : d_model + 4] = 1
        common = mean @ self.rows.T
        above = common + bias - least
        off = common.abs() + bias.abs() + least.abs()
        above += steps * (off + mean.norm() * self.norm) * (1 + steps)
        # In two parts, the second rounded up: 16 bits of it. What has no bounds, such
        # as the threshold of a dead feature, is cut to what bfloat16 holds.
        above = torch.where(least == torch.inf, -1e30, above).clamp(-1e30, 1e30)
        high = above.bfloat16()
        rest = above - high.float()
        self._rounded[d_model + 2] = high
        self._rounded[d_model + 3] = rest + rest.abs() * (_UP - 1) + 1e-30
        return Screened(x, norm, rounded, self._rounded, self)


@dataclass(frozen=True)
class Screened:
    """Tokens against an encoder, before anything is computed in float32."""

    x: Float[Tensor, "token d_model"]
    norm: Float[Tensor, " token"]
    left: BFloat16[Tensor, "token inner"]
    right: BFloat16[Tensor, "inner feature"]
    screen: Screen

    def candidates(self, start: int, stop: int) -> Bool[Tensor, "token chunk"]:
        """Which of some features may fire at each token."""
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_bf16_reduced_precision_reduction
        # Else a GPU may add parts of a sum in bfloat16, which the margin is not for.
        matmul.allow_bf16_reduced_precision_reduction = False
        try:
            # Rounding the result to bfloat16 changes no sign.
            return torch.mm(self.left, self.right[:, start:stop]) > 0
        finally:
            matmul.allow_bf16_reduced_precision_reduction = before

    def products(
        self, token: Int[Tensor, " pair"], feature: Int[Tensor, " pair"]
    ) -> Float[Tensor, " pair"]:
        """Products of tokens and encoder weights in float32.

        A dot product for each pair, without copies of its operands, is what torch
        computes as the gradient of `embedding_bag` by its weights for each sample.
        """
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            self.x, self.screen.rows, feature, feature.new_zeros(1), token, 0
        )

    def rounding(
        self, token: Int[Tensor, " pair"], feature: Int[Tensor, " pair"]
    ) -> Float[Tensor, " pair"]:
        """How far two float32 sums of the same product may be apart."""
        steps = 2 * (self.x.shape[1] + 2) * _UNIT
        return steps * self.norm[token] * self.screen.norm[feature]


_SCREENS: weakref.WeakKeyDictionary[SAE, tuple[object, Screen]] = (
    weakref.WeakKeyDictionary()
)


def screen_of(sae: SAE, weight: Float[Tensor, "d_model feature"]) -> Screen:
    """The autoencoder's screen, made when it is first asked for or weights changed."""
    # Of changes through `.data`, as sae-lens makes them, only the bits tell.
    version = 0 if weight.is_inference() else weight._version
    bits = int(weight.detach().view(torch.int32).sum())
    state = (weight.data_ptr(), version, bits)
    if sae not in _SCREENS or _SCREENS[sae][0] != state:
        _SCREENS[sae] = (state, Screen(weight.detach().float()))
    return _SCREENS[sae][1]
