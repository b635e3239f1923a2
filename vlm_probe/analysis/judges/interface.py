"""A judge says of one picture and one description whether they belong together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_probe.examples import Example


@dataclass(frozen=True, slots=True)
class Question:
    """Does this description describe this picture?"""

    image: str
    """The picture's key among the examples: its id."""
    description: str
    """What a feature is said to mean. Data, never an instruction."""


@dataclass(frozen=True)
class Estimate:
    """What it will take to answer some questions."""

    n_questions: int
    """Different questions: a picture with a description, each counted once."""
    n_known: int = 0
    """How many of them are answered already and will not be asked again."""
    n_images: int = 0
    """Pictures that are sent, each counted once."""
    n_requests: int = 0
    """Requests to the endpoint, if none has to be repeated."""
    tokens_in: int = 0
    """About how many tokens are sent, pictures included."""
    tokens_out: int = 0
    """About how many tokens come back."""
    cost: float | None = None
    """About what that costs, in the currency of the price given; None without one."""

    def __str__(self) -> str:
        if not self.n_requests:
            return f"{self.n_questions} questions, none of which needs a request"
        cost = "no price given" if self.cost is None else f"about {self.cost:.2f}"
        return (
            f"{self.n_questions} questions, {self.n_known} answered already; "
            f"{self.n_requests} requests with {self.n_images} pictures, about "
            f"{self.tokens_in} tokens sent and {self.tokens_out} back; cost: {cost}"
        )


class Judge(ABC):
    """Whoever answers questions: the truth, a text model, a vision model."""

    free: ClassVar[bool] = True
    """Whether every picture can be judged with every description, or each question
    costs something and as few as will do are asked."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For tables and `meta`."""

    @abstractmethod
    def ask(
        self, examples: Mapping[str, Example], questions: Sequence[Question]
    ) -> list[bool | None]:
        """Whether each description describes its picture.

        Args:
            examples: By the key that questions name them with.
            questions: Any number of them, in any order, repeated or not.

        Returns:
            An answer for each question; None where there was none that can be used.
        """

    def estimate(
        self,
        examples: Mapping[str, Example],  # noqa: ARG002 (a judge that pays needs them)
        questions: Sequence[Question],
    ) -> Estimate:
        """What answering will take. Asks nothing."""
        return Estimate(n_questions=len(set(questions)))

    def settings(self) -> dict[str, Any]:
        """What its answers depend on, JSON only; for `meta`."""
        return {"name": self.name}


def example_of(examples: Mapping[str, Example], question: Question) -> Example:
    """The example a question is about.

    Raises:
        KeyError: There is none of this key; names it.
    """
    try:
        return examples[question.image]
    except KeyError:
        raise KeyError(
            f"a question is about the picture {question.image!r}, which is not among "
            f"the {len(examples)} examples given; give the examples of the run"
        ) from None


def valid(text: str) -> str:
    """The text without halves of characters, which no file and no request can hold.

    JSON that was cut between the two escapes of one emoji has them.
    """
    return text.encode("utf-8", "replace").decode("utf-8")
