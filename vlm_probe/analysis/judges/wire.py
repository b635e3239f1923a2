"""One request to an OpenAI-compatible endpoint, repeated while that may help."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_random_exponential,
)

from vlm_probe.analysis.judges.interface import valid

PASSING = frozenset({408, 409, 425, 429})
"""Status codes below 500 that another attempt may turn into an answer."""

LONGEST_WAIT = 600.0
"""The longest that an endpoint's Retry-After is obeyed, in seconds."""

_BACKOFF = wait_random_exponential(multiplier=1, max=60)
"""Between nothing and 1, 2, 4, ... 60 s: jitter keeps threads from coming at once."""

_SHOWN = 300
"""How much of a refusal is shown, in characters."""


class EndpointError(RuntimeError):
    """The endpoint refused, or gave no answer however often it was asked."""


class Passing(Exception):  # noqa: N818 (not an error yet: it may pass)
    """An attempt failed in a way that may pass."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        """Takes what happened, and how long the endpoint asks to wait, in seconds."""
        super().__init__(what)
        self.retry_after = retry_after


@dataclass
class Wire:
    """Where requests go, and how often they are repeated."""

    client: httpx.Client
    """Shared by threads; follows no redirect, so that the key goes nowhere else."""
    url: str
    """Of the endpoint's chat completions."""
    key: str | None = field(repr=False)
    """Sent as a bearer token; None where the endpoint asks for none."""
    max_retries: int
    """How many times a request is repeated."""
    stopped: threading.Event
    """Once set, nothing is repeated any more and no wait goes on."""
    sleep: Callable[[float], object] | None = None
    """Waits a number of seconds; until `stopped` is set if None."""

    def complete(self, body: dict[str, Any]) -> str | None:
        """What the model wrote; None where it wrote nothing.

        Raises:
            EndpointError: The endpoint refuses such requests; says what it said.
            Passing: It gave no answer in all attempts; says what happened last.
        """
        attempts = Retrying(
            retry=retry_if_exception_type(Passing),
            stop=stop_after_attempt(self.max_retries + 1)
            | stop_when_event_set(self.stopped),
            wait=_wait,
            sleep=self.sleep or sleep_using_event(self.stopped),
            reraise=True,
        )
        return attempts(self._attempt, body)

    def without_key(self, text: str) -> str:
        """The text, should an endpoint repeat the key in it, without the key."""
        return text.replace(self.key, "***") if self.key else text

    def _attempt(self, body: dict[str, Any]) -> str | None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            response = self.client.post(self.url, json=body, headers=headers)
        except httpx.TimeoutException as error:
            raise Passing(
                f"no answer within {self.client.timeout.read} s "
                f"({type(error).__name__})"
            ) from error
        except httpx.RequestError as error:
            said = self.without_key(str(error)) or "no more was said"
            raise Passing(f"{type(error).__name__}: {said}") from error
        status = response.status_code
        if status in PASSING or status >= 500:
            raise Passing(
                f"HTTP {status}: {self._said(response)}",
                _retry_after(response.headers.get("Retry-After")),
            )
        if status != 200:
            hint = {
                401: "; check the key",
                403: "; check the key",
                404: "; check base_url, which often ends in /v1, and the model's name",
            }.get(status, "")
            moved = response.headers.get("Location")
            hint += f"; it points to {moved}, give that as base_url" if moved else ""
            raise EndpointError(
                f"{self.url} refused: HTTP {status}: {self._said(response)}{hint}"
            )
        return _written(response, self._said(response))

    def _said(self, response: httpx.Response) -> str:
        return self.without_key(response.text)[:_SHOWN].strip() or "(empty body)"


def _written(response: httpx.Response, said: str) -> str | None:
    """The text of a chat completion."""
    try:
        content = response.json()["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Passing(f"an answer that is no chat completion: {said}") from error
    if isinstance(content, list):  # some servers give parts, as in a request
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return valid(content) if isinstance(content, str) else None


def _wait(state: RetryCallState) -> float:
    """As long as the endpoint asks for, or a random backoff."""
    failure = state.outcome.exception() if state.outcome else None
    asked = failure.retry_after if isinstance(failure, Passing) else None
    return _BACKOFF(state) if asked is None else min(asked, LONGEST_WAIT)


def _retry_after(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which gives them or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            when = parsedate_to_datetime(header)
        except ValueError:
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return seconds if 0 <= seconds < float("inf") else None
