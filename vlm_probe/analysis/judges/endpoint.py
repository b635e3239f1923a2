"""A judge who looks: a vision model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
from tqdm.auto import tqdm

from vlm_probe.analysis.judges.answers import Answers, key_of
from vlm_probe.analysis.judges.batches import Batch, batches, keys_of
from vlm_probe.analysis.judges.crew import done
from vlm_probe.analysis.judges.interface import Estimate, Judge, Question
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
        url = httpx.URL(self.base_url)
        if url.userinfo or url.query:
            raise ValueError(
                "base_url holds a user name, a password or a query, which would be "
                "shown in errors and tables; give an address alone, and the key as key"
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
            keys, missing = self._open(examples, questions, answers)
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
            keys, missing = self._open(examples, questions, answers)
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

    def _open(
        self,
        examples: Mapping[str, Example],
        questions: Sequence[Question],
        answers: Answers,
    ) -> tuple[list[str], list[Batch]]:
        """The key of each question, and requests for those without an answer."""
        options = json.dumps(dict(self.options), sort_keys=True)
        # Not the endpoint's address: the same model may move.
        asked = key_of(self.model, PROMPT_VERSION, self.prompt, options)
        keys, sizes = keys_of(examples, questions, asked=asked, side=self.image_side)
        known = answers.known(keys)
        missing = batches(
            examples, questions, keys, sizes, known, most=self.per_request
        )
        return keys, missing

    def _fetch(self, requests: Sequence[Batch], answers: Answers, n_all: int) -> None:
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

            def answer(request: Batch) -> None:
                self._answer(request, wire, answers)

            each = done(requests, answer, n=self.concurrency, stopped=stopped)
            try:
                with closing(each):
                    for request in each:
                        bar.update(len(request.keys))
            except (Passing, EndpointError) as error:
                raise self._gave_up(error, answers, requests, n_all) from error

    def _answer(self, request: Batch, wire: Wire, answers: Answers) -> None:
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
        requests: Sequence[Batch],
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
