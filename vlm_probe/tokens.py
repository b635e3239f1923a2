"""The words for axes and token groups, and which position belongs to which group.

Axes, each with one word, in every signature of the package:

- `image`: pictures of a batch; `unit`: what the bootstrap draws, one picture or text;
- `row`: prompts of a batch; `pos`: positions of a padded prompt, from 0;
- `patch`: patch tokens of a picture, row by row from the top left;
- `token`: positions of several prompts, gathered into one list;
- `layer`: blocks of the language model, from 0; layer 3 is `blocks.3.hook_resid_post`;
- `feature`: latents of an SAE; `active`: (token, feature) pairs that are not zero;
- `replicate`: the estimate (index 0), then the bootstrap's redrawings;
- `d_vision`, `d_model`: widths of patch tokens and of the residual stream;
- `vocab`: words of the language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GROUPS = ("image", "text_after_image", "text_only")
"""Token groups: the picture's vectors; the prompt behind them; and, in a second pass
without picture, the prompt with words in the picture's place."""

CONTROLS = ("random_adapter", "noise", "shuffled_images")
"""Control arms: the curve of vectors that know nothing of the picture."""

CONDITIONS = ("model", *CONTROLS)

BACKENDS = ("auto", "hooked", "bridge")
"""How a language model is run: a HookedTransformer, a TransformerBridge, or the first
where it computes the same."""

RESIDENCIES = ("auto", "memory", "streamed")
"""Where SAEs are: all in memory, or read layer by layer; or what the memory allows."""

HOOK_POINTS = ("resid_pre", "resid_mid", "resid_post")
"""Where a block's residual stream is read: before it, between attention and MLP, and
after it."""

RANKINGS = ("activation", "selectivity")
"""What the strongest features of an image are: those of the highest values; or of the
highest values for how seldom they fire."""

ENCODINGS = ("auto", "dense", "screened")
"""How codes are computed: from all pre-activations, or from those that a product in
bfloat16 does not rule out; or the second where the hardware gains by it."""

METRICS = {
    "mse": "mean over tokens and dimensions of (x̂-x)²",
    "fvu": "Σ‖x-x̂‖² / Σ‖x-x̄‖²; 0 perfect, 1 the mean predictor",
    "nmse": "mean over tokens of ‖x-x̂‖² / ‖x‖²",
    "cosine": "mean over tokens of cos(x, x̂)",
    "l0": "mean count of non-zero features",
    "l0_share": "l0 / number of features",
    "norm": "mean over tokens of ‖x‖",
}
"""Every metric with its formula, for a group's tokens x and reconstructions x̂."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt, with room for a picture."""

    ids: tuple[int, ...]
    """Token ids; where the picture goes they are placeholders, never looked at."""
    image: range
    """Positions that the picture's vectors take; empty without picture."""
    special: frozenset[int]
    """Ids that are no words: beginning of text, padding, chat markers."""

    def positions(self, group: str, *, include_special: bool = False) -> list[int]:
        """The positions that belong to a group.

        Args:
            group: One of `GROUPS`.
            include_special: Whether chat markers and the like count among the text;
                the beginning-of-text token never does.

        Returns:
            Positions in order; none if the prompt has no such group.
        """
        check_names("group", [group], GROUPS)
        if group == "image":
            return list(self.image)
        if (group == "text_after_image") != bool(self.image):
            return []
        first = self.image.stop or int(self.ids[0] in self.special)
        return [
            position
            for position in range(first, len(self.ids))
            if include_special or self.ids[position] not in self.special
        ]

    def until(self, stop: int) -> Prompt:
        """The prompt without what comes after a position past its picture."""
        return Prompt(self.ids[:stop], self.image, self.special)


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges: `0-3, 7` for 7, 0, 1, 2, 3."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def check_names(what: str, given: Sequence[str], valid: Sequence[str]) -> None:
    """Refuses names that are not among the valid ones.

    Raises:
        ValueError: Names each unknown one and lists the valid ones.
    """
    unknown = [name for name in given if name not in valid]
    if unknown:
        raise ValueError(
            f"unknown {what} {', '.join(map(repr, unknown))}; valid: {', '.join(valid)}"
        )
