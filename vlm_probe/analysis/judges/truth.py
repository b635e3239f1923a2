"""A judge who knows: any function that says what is true of a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlm_probe.analysis.judges.interface import Judge, Question, example_of
from vlm_probe.examples import Example


class TruthJudge(Judge):
    """Ground truth, such as the toy world's."""

    def __init__(
        self, truth: Callable[[Example, str], bool | None], *, name: str = "truth"
    ) -> None:
        """Takes the function.

        Args:
            truth: Whether a description is true of an example; None if that cannot be
                said, such as of a description it does not know.
            name: For tables.
        """
        self._truth = truth
        self._name = name

    @property
    def name(self) -> str:
        """For tables and `meta`."""
        return self._name

    def ask(
        self, examples: Mapping[str, Example], questions: Sequence[Question]
    ) -> list[bool | None]:
        """What the function says of each.

        Raises:
            TypeError: It said something other than True, False or None.
        """
        return [self._one(example_of(examples, q), q) for q in questions]

    def _one(self, example: Example, question: Question) -> bool | None:
        said = self._truth(example, question.description)
        if said is None or isinstance(said, bool):
            return said
        if isinstance(said, np.bool_):
            return bool(said)
        raise TypeError(
            f"the truth of {question.description!r} for the picture "
            f"{question.image!r} is {said!r}; expected True, False, or None if it "
            "cannot be said"
        )
