"""Neuronpedia's API, asked once for each feature.

What was answered is kept on disk, "no description" too. For many features an export is
faster, and does not use up the hourly limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import quote

import requests
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from vlm_probe.analysis.descriptions.database import cache_folder, database, rows_of
from vlm_probe.analysis.descriptions.explanations import best, entry, is_entry
from vlm_probe.analysis.descriptions.interface import (
    Descriptions,
    SaeIdentity,
    Saes,
    check_features,
    identities,
)
from vlm_probe.analysis.descriptions.sources import Source, known_source

_KEY = "NEURONPEDIA_API_KEY"
_KIND = 0x56504150
_SCHEMA = (
    "CREATE TABLE answers (base TEXT, source TEXT, feature INTEGER, description TEXT,"
    " PRIMARY KEY (base, source, feature)) WITHOUT ROWID",
)
_LONGEST_BACKOFF = 30.0
"""Seconds between two tries, where the server does not say how long to wait."""


class NeuronpediaApi(Descriptions):
    """Descriptions from neuronpedia.org, or a server that speaks as it does."""

    def __init__(
        self,
        saes: Saes,
        *,
        cache: str | Path | None = None,
        key: str | None = None,
        base_url: str = "https://www.neuronpedia.org",
        per_second: float = 4.0,
        timeout: float = 30.0,
        attempts: int = 5,
        backoff: float = 1.0,
        patience: float = 120.0,
    ) -> None:
        """Asks nothing yet.

        Args:
            saes: The SAEs that are to be described, by layer; those that do not say
                their Neuronpedia id are left out.
            cache: File in which answers are kept; `neuronpedia.sqlite` among the
                caches if not given.
            key: API key; that of the environment variable NEURONPEDIA_API_KEY if not
                given. Features can be read without one.
            base_url: Where the API is.
            per_second: How many requests there may be in a second.
            timeout: Seconds without a sign of life after which a try has failed.
            attempts: How often a question is asked that fails for now.
            backoff: Seconds before the second try, then twice as many each time; a
                `Retry-After` of the server counts instead.
            patience: Longest `Retry-After` that is waited for, in seconds.

        Raises:
            ValueError: No SAE says its id, one says that of another SAE, or the key or
                a number cannot be used.
        """
        self._saes = identities(saes)
        self._sources = {
            layer: _source(sae)
            for layer, sae in self._saes.items()
            if sae.neuronpedia_id
        }
        if not self._sources:
            raise ValueError(
                "none of the SAEs says its Neuronpedia id, so nothing can be asked of "
                "its API; give an export's folder, a table, or label_from_texts"
            )
        if per_second <= 0 or timeout <= 0 or attempts < 1:
            raise ValueError(
                f"per_second {per_second}, timeout {timeout} and attempts {attempts} "
                "must be above 0"
            )
        key = (key if key is not None else os.environ.get(_KEY, "")).strip()
        if not (key.isascii() and key.isprintable()):
            # Not shown: requests would put it into its own message.
            raise ValueError(f"the API key ({_KEY}) has characters that no key has")
        self._headers = {"x-api-key": key} if key else {}
        self._base = base_url.rstrip("/")
        self._cache = (
            Path(cache) if cache is not None else cache_folder() / "neuronpedia.sqlite"
        )
        self._pause, self._timeout = 1 / per_second, timeout
        self._attempts, self._patience = attempts, patience
        self._backoff = wait_exponential(backoff, max=_LONGEST_BACKOFF)
        self._next = 0.0
        self.name = f"Neuronpedia API {self._base}"

    def of(self, layer: int, features: Sequence[int]) -> dict[int, str | None]:
        """See `Descriptions.of`.

        Raises:
            PermissionError: The server does not take the key, or wants one.
            ConnectionError: A question was not answered, however often it was asked;
                answers so far are kept.
        """
        if layer not in self._sources:
            return dict.fromkeys(int(f) for f in features)
        asked = check_features(layer, features, self._saes[layer].n_features)
        source = self._sources[layer]
        fixed = self._base, str(source)
        query = (
            "SELECT feature, description FROM answers WHERE base = ? AND source = ?"
            " AND feature IN"
        )
        with database(self._cache, _KIND, _SCHEMA) as opened:
            found = dict(rows_of(opened, query, fixed, asked))
            missing = [feature for feature in asked if feature not in found]
            with requests.Session() as session:
                for feature in missing:
                    found[feature] = self._fetch(session, source, feature)
                    opened.execute(
                        "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)",
                        (*fixed, feature, found[feature]),
                    )
        return {feature: found[feature] for feature in asked}

    def layers(self) -> tuple[int, ...]:
        """The layers whose SAE says its Neuronpedia id."""
        return tuple(self._sources)

    def _fetch(
        self, session: requests.Session, source: Source, feature: int
    ) -> str | None:
        url = "/".join(
            (self._base, "api/feature", quote(source.model), quote(source.id))
        )
        url = f"{url}/{feature}"
        trying = Retrying(
            retry=retry_if_exception_type(_NotNowError),
            stop=stop_after_attempt(self._attempts),
            wait=self._wait,
            reraise=True,
        )
        try:
            return trying(self._ask, session, url, source, feature)
        except _NotNowError as error:
            raise ConnectionError(
                f"{url} was asked {self._attempts} times, and last {error}; what was "
                "answered before is kept, so try again later, or use an export"
            ) from error.__cause__

    def _ask(
        self, session: requests.Session, url: str, source: Source, feature: int
    ) -> str | None:
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + self._pause
        try:
            # requests would send the key along wherever a redirect leads.
            answer = session.get(
                url,
                headers=self._headers,
                timeout=self._timeout,
                allow_redirects=False,
            )
        except requests.Timeout as error:
            raise _NotNowError(f"did not answer within {self._timeout:g} s") from error
        except (
            requests.ConnectionError,
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError,
        ) as error:
            raise _NotNowError(
                f"broke off ({type(error).__name__}: {error})"
            ) from error
        status = answer.status_code
        if status == 404:
            return None
        if status in (401, 403):
            had = "did not take the key in" if self._headers else "wants a key in"
            raise PermissionError(
                f"{url} answered {status}: the server {had} {_KEY} (or key=); keys "
                "are given in the account settings of Neuronpedia"
            )
        if status in (408, 429) or status >= 500:
            raise self._busy(answer, url)
        if status != 200:
            beyond = answer.headers.get("Location")
            raise ConnectionError(
                f"{url} answered {status}"
                + (f" and points to {beyond}" if beyond else "")
                + "; is base_url right?"
            )
        return _description(answer, source, feature)

    def _busy(self, answer: requests.Response, url: str) -> Exception:
        wait = _seconds(answer.headers.get("Retry-After"))
        if wait is not None and wait > self._patience:
            return ConnectionError(
                f"{url} answered {answer.status_code} and wants to be asked again in "
                f"{wait:.0f} s, more than patience={self._patience:g}; what was "
                "answered before is kept, so try again then, or use an export"
            )
        return _NotNowError(f"answered {answer.status_code}", wait)

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome and state.outcome.exception()
        told = error.wait if isinstance(error, _NotNowError) else None
        return self._backoff(state) if told is None else told


def _source(sae: SaeIdentity) -> Source:
    """What is asked for an SAE that says its id."""
    source = known_source(sae)
    if source is None:
        named = Source.named(str(sae.neuronpedia_id))
        told = "; ".join(named.differences(sae))
        raise ValueError(
            f"the SAE of layer {sae.layer} gives {named} as its Neuronpedia id, which "
            f"is of another: {told}; leave this layer out"
        )
    return source


class _NotNowError(Exception):
    """What may go better another time."""

    def __init__(self, said: str, wait: float | None = None) -> None:
        super().__init__(said)
        self.wait = wait


def _description(answer: requests.Response, source: Source, feature: int) -> str | None:
    try:
        record = answer.json()
    except (requests.exceptions.JSONDecodeError, RecursionError) as error:
        raise _NotNowError(f"sent what is no JSON, {answer.text[:60]!r}") from error
    if record is None:
        return None
    if not is_entry(record):
        raise _NotNowError(f"sent what is no feature, {answer.text[:60]!r}")
    try:
        told = entry(record, "the answer")
    except ValueError as error:
        raise _NotNowError(f"sent what is no feature ({error})") from error
    if told.feature != feature or not told.source.same_as(source):
        raise _NotNowError(f"sent feature {told.feature} of {told.source}")
    chosen = best(told.explanations)
    return chosen.description if chosen else None


def _seconds(retry_after: str | None) -> float | None:
    """What the header says, a number or a date; None if it says neither."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
