"""A client of one OpenAI-compatible chat endpoint: bounded in calls, tokens, time and bytes.

Whatever a server does (refuses, hangs, answers 500, drips, stops in the middle) ends as a
`Completion` or an `EndpointError` within `Retry.seconds`.

httpx, because a request must be given up as a whole: urllib's timeout is one per read, so a server
that drips a byte a second holds a thread for ever, and a thread cannot be cancelled. It is what
huggingface_hub speaks HTTP with, so it is here wherever transformers is: as httpx, or from version
2 of the hub on as its successor httpx2, which has the same names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from trainer.retry import retry_after

try:
    import httpx2 as httpx
except ImportError:
    import httpx

log = logging.getLogger(__name__)

MAX_RESPONSE = 1 << 20
"""Bytes of a response that are read; a longer one is garbage."""


class EndpointError(Exception):
    """The endpoint gave no completion. `kind` is short and stable, for counts: "connection",
    "timeout", "http 500", "garbage", "too long", "wait", "rejected", "budget"."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class RequestRejected(EndpointError):
    """The server refuses the request itself (400, 401, 404, ...): the same will not pass later."""

    def __init__(self, status: int, message: str):
        super().__init__("rejected", message)
        self.status = status


class BudgetSpent(EndpointError):
    """A limit of the budget is reached: nothing was sent."""

    def __init__(self, message: str):
        super().__init__("budget", message)


@dataclass(frozen=True)
class Retry:
    """When a failed request is sent again: after 408, 425, 429, 5xx, a timeout, a broken connection
    or a response that is no completion."""

    attempts: int = 5
    first: float = 0.5
    """Seconds before the second attempt, doubled for each further one; the wait is drawn between
    half of that and all of it, so that clients that failed together do not come back together."""
    longest: float = 30.0
    """Seconds; a server that asks for more (Retry-After) is given up."""
    seconds: float = 180.0
    """For a completion, all attempts and waits together."""

    def __post_init__(self):
        if self.attempts < 1 or min(self.first, self.longest) < 0 or self.seconds <= 0:
            raise ValueError(
                f"{self}: attempts must be at least 1, seconds positive, waits not negative"
            )


@dataclass
class Budget:
    """What a client may spend in its life, and what it has spent. None: no limit."""

    max_calls: int | None = None
    """Requests sent, failed ones included."""
    max_tokens: int | None = None
    """Of prompts and completions, as the server counts them; where it does not, a token is four
    bytes of prompt and every token of the completion that was asked for."""
    max_seconds: float | None = None
    """Of wall clock during which at least one request was under way."""
    calls: int = 0
    tokens: int = 0
    _reserved: int = field(default=0, repr=False)
    _busy: float = field(default=0.0, repr=False)
    _active: int = field(default=0, repr=False)
    _since: float = field(default=0.0, repr=False)

    @property
    def seconds(self) -> float:
        return self._busy + (time.monotonic() - self._since if self._active else 0.0)

    def take(self, tokens: int) -> None:
        """Reserve a call of about so many tokens; BudgetSpent where it does not fit."""
        for name, spent, more, limit in (
            ("calls", self.calls, 1, self.max_calls),
            ("tokens", self.tokens + self._reserved, tokens, self.max_tokens),
            ("seconds", self.seconds, 0, self.max_seconds),
        ):
            if limit is not None and (spent + more > limit or spent >= limit):
                raise BudgetSpent(f"{spent:.0f} of {limit:.0f} {name} are spent")
        self.calls += 1
        self._reserved += tokens
        if self._active == 0:
            self._since = time.monotonic()
        self._active += 1

    def give_back(self, reserved: int, spent: int) -> None:
        """The call is over."""
        self._reserved -= reserved
        self.tokens += spent
        self._active -= 1
        if self._active == 0:
            self._busy += time.monotonic() - self._since


@dataclass(frozen=True)
class Completion:
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    attempts: int
    seconds: float
    """From the first attempt on, waits between attempts included."""
    stopped_by: str | None = None
    """The stop string that ended it, "" where the server says that none did, None where it does
    not say (vLLM: stop_reason; SGLang: matched_stop)."""
    counted: bool = True
    """Whether the tokens are the server's count, and not an estimate."""


class OpenAIClient:
    """Chat completions of one model behind one address.

    base_url: up to and including the version ("http://localhost:8000/v1"). concurrency: requests
    under way at a time. timeout: seconds of one attempt as a whole. api_key: sent as a bearer
    token; it is in no message and no repr.

    May be used from any event loop, one at a time: connections belong to a loop and are opened
    again in the next. `counts` says what happened: attempts by outcome ("ok", "timeout", ...).
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        retry: Retry | None = None,
        budget: Budget | None = None,
        seed: int | None = None,
    ):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must look like http://localhost:8000/v1, got {base_url!r}")
        if parts.username or parts.password:  # it would stand in every message
            raise ValueError("base_url holds a user's name or password; give api_key instead")
        if concurrency < 1 or not timeout > 0:
            raise ValueError(
                f"concurrency must be at least 1 and timeout positive, got {concurrency}, {timeout}"
            )
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.retry = retry or Retry()
        self.budget = budget or Budget()
        self.timeout = timeout
        self.concurrency = concurrency
        self.counts: Counter[str] = Counter()
        self._key = api_key
        # A judge on this machine is not to be looked for behind a proxy.
        self._trust_env = parts.hostname not in ("localhost", "127.0.0.1", "::1")
        self._random = random.Random(seed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: Any = None
        self._slots: asyncio.Semaphore
        self._not_before = 0.0

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        response_format: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> Completion:
        """One completion. extra: further fields of the request (stop, seed, top_p, ...).

        Raises RequestRejected at once, BudgetSpent before anything is sent, and EndpointError with
        the last failure where the attempts or the time are used up.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            **({} if response_format is None else {"response_format": response_format}),
            **extra,
        }
        # A policy may write a lone surrogate, at which a server's tokenizer breaks: "?" instead.
        text = json.dumps(body, ensure_ascii=False, allow_nan=False)
        content = text.encode("utf-8", "replace")
        http = self._open()
        async with self._slots:  # kept while it waits: what comes back is not more than what failed
            began = time.monotonic()
            attempt = 0
            while True:
                attempt += 1
                try:
                    parts = await self._attempt(http, content, max_tokens, began)
                except (RequestRejected, BudgetSpent):
                    raise
                except EndpointError as error:
                    wait = self._wait(attempt, error)
                    late = time.monotonic() + wait >= began + self.retry.seconds
                    if attempt >= self.retry.attempts or late:
                        raise EndpointError(error.kind, f"{error} (attempt {attempt})") from None
                    await asyncio.sleep(wait)
                else:
                    return Completion(*parts[:4], attempt, time.monotonic() - began, *parts[4:])

    def _wait(self, attempt: int, error: EndpointError) -> float:
        backoff = min(self.retry.longest, self.retry.first * 2 ** min(attempt - 1, 30))
        wait = backoff * (0.5 + 0.5 * self._random.random())
        asked = getattr(error, "retry_after", None)
        if asked is None:
            return wait
        if asked > self.retry.longest:
            return float("inf")
        return max(wait, asked)

    async def _attempt(
        self, http: Any, content: bytes, max_tokens: int, began: float
    ) -> tuple[str, str | None, int, int, str | None, bool]:
        """(text, finish reason, tokens of the prompt, of the completion, what stopped it, whether
        the server counted) of one request."""
        end = began + self.retry.seconds
        while (wait := self._not_before - time.monotonic()) > 0:  # the server asked for a rest
            if time.monotonic() + wait >= end:
                raise EndpointError("wait", f"the server asks to wait {wait:.0f} s more")
            await asyncio.sleep(wait)
        estimate = len(content) // 4 + max_tokens
        self.budget.take(estimate)
        spent, outcome = 0, "cancelled"
        try:
            left = max(0.001, min(self.timeout, end - time.monotonic()))
            try:
                status, headers, raw = await asyncio.wait_for(self._send(http, content), left)
            except (TimeoutError, asyncio.TimeoutError, httpx.TimeoutException):
                spent = estimate  # the server may have worked all the same
                raise EndpointError("timeout", f"no answer within {left:.1f} s") from None
            except (httpx.HTTPError, OSError) as error:
                raise EndpointError("connection", f"{type(error).__name__}: {error}") from None
            self._check(status, headers, raw)
            text, reason, prompt, completion, stopped_by = _completion(raw)
            counted = prompt is not None and completion is not None
            prompt = len(content) // 4 if prompt is None else prompt
            completion = max_tokens if completion is None else completion
            spent, outcome = prompt + completion, "ok"
            return text, reason, prompt, completion, stopped_by, counted
        except EndpointError as error:
            outcome = error.kind
            raise
        finally:
            self.counts[outcome] += 1
            self.budget.give_back(estimate, spent)

    async def _send(self, http: Any, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.base_url}/chat/completions"
        async with http.stream("POST", url, content=content, headers=headers) as response:
            raw = bytearray()
            # Not decompressed: a small body may be a large text.
            async for piece in response.aiter_raw():
                raw += piece
                if len(raw) > MAX_RESPONSE:
                    raise EndpointError("too long", f"the response is past {MAX_RESPONSE} bytes")
            return response.status_code, response.headers, bytes(raw)

    def _check(self, status: int, headers: Mapping[str, str], raw: bytes) -> None:
        if status == 200:
            return
        excerpt = ascii(raw[:200].decode("utf-8", "replace"))
        if status in (408, 425, 429) or status >= 500:
            error = EndpointError(f"http {status}", f"HTTP {status}: {excerpt}")
            asked = retry_after(headers.get("retry-after"))
            if asked is not None:
                error.retry_after = asked  # type: ignore[attr-defined]
                if asked <= self.retry.longest:  # for every request: they share the server
                    self._not_before = max(self._not_before, time.monotonic() + asked)
            raise error
        raise RequestRejected(status, f"HTTP {status} from {self.base_url}: {excerpt}")

    def _open(self) -> Any:
        loop = asyncio.get_running_loop()
        if self._http is None or self._loop is not loop:
            # What another loop opened cannot be closed in this one; its sockets go with it.
            self._loop = loop
            self._slots = asyncio.Semaphore(self.concurrency)
            limits = httpx.Limits(
                max_connections=self.concurrency, max_keepalive_connections=self.concurrency
            )
            self._http = httpx.AsyncClient(
                timeout=httpx.Timeout(self.timeout),
                limits=limits,
                trust_env=self._trust_env,
                follow_redirects=False,
            )
        return self._http

    async def close(self) -> None:
        http, self._http = self._http, None
        if http is not None and self._loop is asyncio.get_running_loop():
            with contextlib.suppress(Exception):
                await http.aclose()


def _completion(raw: bytes) -> tuple[str, str | None, int | None, int | None, str | None]:
    """The parts of a chat completion; EndpointError("garbage") for anything else."""
    try:
        body = json.loads(raw)
        choice = body["choices"][0]
        text = choice["message"]["content"]
        reason = choice.get("finish_reason")
        stopped_by = choice.get("stop_reason", choice.get("matched_stop", ...))
        usage = body.get("usage") or {}
        prompt, completion = (usage.get(f"{name}_tokens") for name in ("prompt", "completion"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        excerpt = ascii(raw[:100].decode("utf-8", "replace"))
        raise EndpointError(
            "garbage", f"the response is no chat completion ({type(error).__name__}): {excerpt}"
        ) from None
    if text is None:  # a model that thought and said nothing
        text = ""
    if not isinstance(text, str):
        raise EndpointError("garbage", f"the content is a {type(text).__name__}, not a text")
    counted = [n if isinstance(n, int) and n >= 0 else None for n in (prompt, completion)]
    if stopped_by is ...:
        stopped_by = None
    elif not isinstance(stopped_by, str):  # null, or the id of a token that ends a turn
        stopped_by = ""
    return text, reason if isinstance(reason, str) else None, *counted, stopped_by
