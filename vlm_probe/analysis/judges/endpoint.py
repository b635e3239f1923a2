"""A judge who looks: a vision model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
from tqdm.auto import tqdm

from vlm_probe.analysis.judges.answers import Answers, key_of
from vlm_probe.analysis.judges.crew import done
from vlm_probe.analysis.judges.interface import Estimate, Judge, Question, example_of
from vlm_probe.analysis.judges.prompt import (
    PROMPT,
    PROMPT_VERSION,
    messages,
    quoted,
    read_answer,
)
from vlm_probe.analysis.judges.shown import data_url, picture_as_shown
from vlm_probe.analysis.judges.wire import EndpointError, Passing, Wire
from vlm_probe.examples import Example

_SETTINGS = ("model", "base_url", "prompt", "image_side", "per_request")


@dataclass(frozen=True)
class _Request:
    """Some descriptions for one picture."""

    example: Example
    size: tuple[int, int]
    keys: tuple[str, ...]
    descriptions: tuple[str, ...]


@dataclass(frozen=True)
class EndpointJudge(Judge):
    """A vision model that is shown the picture and the descriptions.

    Works with any server of the protocol's `/chat/completions`, on the net or on this
    machine. Answers are kept on disk as they come, by the content of their question:
    what was answered once is not asked again, by whatever run, also after a kill.
    """

    free: ClassVar[bool] = False

    model: str
    """The model's name, as the endpoint knows it."""
    _: KW_ONLY
    base_url: str
    """Where `/chat/completions` is found, such as http://localhost:8000/v1."""
    cache: str | Path
    """The file that answers are kept in; made if it is not there."""
    key: str | None = field(default=None, repr=False)
    """The key of the endpoint; `OPENAI_API_KEY` of the environment if None, and no key
    is sent where that is not set. It is kept nowhere and shown nowhere."""
    prompt: str = PROMPT
    """The instruction; `PROMPT_VERSION` is the version of ours."""
    image_side: int = 512
    """The longer side of a picture as it is sent, in pixels; never enlarged."""
    per_request: int = 8
    """Descriptions in one request about a picture, at most. They stand in an order
    that knows nothing of whose they are, a picture's own among those of others."""
    concurrency: int = 4
    """Requests under way at once."""
    timeout: float = 60.0
    """How long to wait for the endpoint to say something, in seconds."""
    max_retries: int = 5
    """How many times a request is repeated before all stops."""
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    """Further fields of a request, such as `max_tokens`, as the endpoint knows them."""
    price: tuple[float, float] | None = None
    """What a million tokens cost, sent and received, for the estimate."""
    progress: bool = True
    """Whether to show a bar, on a terminal."""
    sleep: Callable[[float], object] | None = field(default=None, repr=False)
    """How to wait before a repetition; in the usual way if None."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.base_url):
            raise ValueError(
                f"base_url must begin with http:// or https://, given "
                f"{self.base_url!r}; for a server on this machine it is something "
                "like http://localhost:8000/v1"
            )
        if httpx.URL(self.base_url).userinfo:
            raise ValueError(
                "base_url holds a user name or password, which would be shown in "
                "errors and tables; give it as key"
            )
        for name, least in (
            ("image_side", 1),
            ("per_request", 1),
            ("concurrency", 1),
            ("max_retries", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, given {getattr(self, name)}"
                )
        if not self.timeout > 0:
            raise ValueError(f"timeout must be above 0 s, given {self.timeout}")
        self._secret()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    def settings(self) -> dict[str, Any]:
        """What its answers depend on, and the endpoint. Not the key."""
        return {
            "name": self.name,
            **{name: getattr(self, name) for name in _SETTINGS},
            "prompt_version": PROMPT_VERSION if self.prompt == PROMPT else "own",
            "options": dict(self.options),
        }

    def ask(
        self, examples: Mapping[str, Example], questions: Sequence[Question]
    ) -> list[bool | None]:
        """What the model says; see `Judge.ask`.

        Raises:
            EndpointError: The endpoint refused, or gave no answer however often it was
                asked. What was answered is kept.
            OSError: A picture cannot be read.
        """
        with Answers(self.cache) as answers:
            keys, sizes = self._keys(examples, questions)
            missing = self._missing(examples, questions, keys, sizes, answers)
            if missing:
                self._fetch(missing, answers, len(set(keys)))
            known = answers.known(keys)
        return [known[key] for key in keys]

    def estimate(
        self, examples: Mapping[str, Example], questions: Sequence[Question]
    ) -> Estimate:
        """What `ask` will take, of the questions that are not answered yet.

        Four characters are counted as a token, and a picture as OpenAI counts it (85
        tokens, and 170 for each tile of 512 pixels); other models differ.
        """
        with Answers(self.cache) as answers:
            keys, sizes = self._keys(examples, questions)
            missing = self._missing(examples, questions, keys, sizes, answers)
        tokens_in, tokens_out = 0, 0
        for request in missing:
            words = len(self.prompt) + len(quoted(request.descriptions))
            tiles = math.prod(math.ceil(side / 512) for side in request.size)
            tokens_in += math.ceil(words / 4) + 85 + 170 * tiles
            tokens_out += 8 + 2 * len(request.descriptions)
        cost = None
        if self.price is not None:
            cost = (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6
        return Estimate(
            n_questions=len(set(keys)),
            n_known=len(set(keys)) - sum(len(request.keys) for request in missing),
            n_images=len({id(request.example) for request in missing}),
            n_requests=len(missing),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost=cost,
        )

    def forget_unusable(self) -> int:
        """Drops the answers that could not be used; they are asked once more then."""
        with Answers(self.cache) as answers:
            return answers.forget_unusable()

    def _secret(self) -> str | None:
        key = self.key if self.key is not None else os.environ.get("OPENAI_API_KEY")
        key = (key or "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", key):
            raise ValueError(
                "the key holds spaces, line breaks or other characters that no header "
                "takes; it is not shown here"
            )
        return key or None

    def _keys(
        self, examples: Mapping[str, Example], questions: Sequence[Question]
    ) -> tuple[list[str], dict[str, tuple[int, int]]]:
        """The key of each question, and the size of each picture as it is sent.

        A key is made of all that the answer depends on, but not of the endpoint's
        address: the same model may move.
        """
        options = json.dumps(dict(self.options), sort_keys=True)
        asked = key_of(self.model, PROMPT_VERSION, self.prompt, options)
        pictures: dict[str, str] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for q in questions:
            if q.image not in pictures:
                shown = picture_as_shown(example_of(examples, q), self.image_side)
                pictures[q.image] = key_of(repr(shown.size), shown.tobytes())
                sizes[q.image] = shown.size
        keys = [key_of(asked, pictures[q.image], q.description) for q in questions]
        return keys, sizes

    def _missing(
        self,
        examples: Mapping[str, Example],
        questions: Sequence[Question],
        keys: Sequence[str],
        sizes: Mapping[str, tuple[int, int]],
        answers: Answers,
    ) -> list[_Request]:
        """Requests for what has no answer, each question in one of them."""
        known = answers.known(keys)
        by_image: dict[str, dict[str, str]] = {}
        taken: set[str] = set()
        for question, key in zip(questions, keys, strict=True):
            if key not in known and key not in taken:
                taken.add(key)
                by_image.setdefault(question.image, {})[key] = question.description
        requests = []
        for image, asked in by_image.items():
            # By key, which is as good as by chance and the same at every start.
            pairs = sorted(asked.items())
            for start in range(0, len(pairs), self.per_request):
                some = pairs[start : start + self.per_request]
                requests.append(
                    _Request(
                        examples[image],
                        sizes[image],
                        tuple(key for key, _ in some),
                        tuple(words for _, words in some),
                    )
                )
        return requests

    def _fetch(
        self, requests: Sequence[_Request], answers: Answers, n_all: int
    ) -> None:
        """Sends the requests, several at once, and keeps each answer as it comes."""
        stopped = threading.Event()
        limits = httpx.Limits(max_connections=self.concurrency)
        bar = tqdm(
            total=sum(len(request.keys) for request in requests),
            desc="asking",
            disable=None if self.progress else True,
        )
        url = self.base_url.rstrip("/") + "/chat/completions"
        with bar, httpx.Client(timeout=self.timeout, limits=limits) as client:
            wire = Wire(
                client, url, self._secret(), self.max_retries, stopped, self.sleep
            )

            def answer(request: _Request) -> None:
                self._answer(request, wire, answers)

            try:
                for request in done(
                    requests, answer, n=self.concurrency, stopped=stopped
                ):
                    bar.update(len(request.keys))
            except (Passing, EndpointError) as error:
                raise self._gave_up(error, answers, requests, n_all) from error

    def _answer(self, request: _Request, wire: Wire, answers: Answers) -> None:
        shown = picture_as_shown(request.example, self.image_side)
        body = {
            "model": self.model,
            "messages": messages(self.prompt, request.descriptions, data_url(shown)),
            **self.options,
        }
        reply = wire.complete(body)
        answers.keep(
            request.keys,
            read_answer(reply, len(request.keys)),
            model=self.model,
            prompt_version=PROMPT_VERSION if self.prompt == PROMPT else "own",
            descriptions=request.descriptions,
            reply=None if reply is None else wire.without_key(reply),
        )

    def _gave_up(
        self,
        error: Exception,
        answers: Answers,
        requests: Sequence[_Request],
        n_all: int,
    ) -> EndpointError:
        """The error with how far it came."""
        wanted = [key for request in requests for key in request.keys]
        left = len(wanted) - len(answers.known(wanted))
        tried = (
            f"{self.base_url} gave no answer in {self.max_retries + 1} attempts; the "
            f"last: {error}"
            if isinstance(error, Passing)
            else str(error)
        )
        return EndpointError(
            f"{tried}. {n_all - left} of {n_all} questions are answered and kept in "
            f"{self.cache}; begin again with this file, and it goes on from there"
        )
