"""text_search and image_search over the web, by a provider's key; answers are kept on disk.

    provider = Serper(cache=Cache("runs/serper.sqlite"), limit=RateLimit(5))   # SERPER_API_KEY
    Toolbox([WebTextSearch(provider)])

A provider answers within its budget of seconds or raises. ToolInfraError: the key is refused, the
service is down, slow, at its limit, or answers with something else; such a rollout is not scored.
ToolError: the query itself is refused. The HTTP client is httpx2, which the model hub's client
brings; httpx has the same interface and serves where that is too old (Python 3.10).

The key is put on by the last layer before the socket (`_Signed`): neither the client's log of
requests nor its exceptions hold it, also where a service wants it in the address.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import os
import random
import re
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image
from pydantic import SecretStr

from trainer.retry import retry_after
from trainer.tools._cache import Cache, RateLimit
from trainer.tools.image_search import ImageSearchTool, image_key, result_text
from trainer.tools.protocol import ToolError, ToolInfraError
from trainer.tools.text_search import (
    MAX_RESULT,
    MAX_RESULTS,
    TextSearch,
    bounded,
    check_length,
)
from trainer.types import Observation, Session

try:
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

log = logging.getLogger(__name__)

MAX_BODY = 8 << 20
"""Bytes of one answer; the services' have some ten thousand."""
TRIES = 4
LONGEST_PAUSE = 60.0
"""Seconds that a service's word can silence a provider for: it may say anything."""
PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that may be gone in a second. A search changes nothing, so it may be asked again."""

Result = dict[str, str]
"""title, url, snippet and image, each "" where it is unknown."""


# --- Providers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None


class _Signed(httpx.AsyncBaseTransport):
    """Sends a copy of the request that bears the key. The original, which is what the client logs
    and hangs on its exceptions, never does."""

    def __init__(
        self, inner: httpx.AsyncBaseTransport, headers: dict[str, str], query: dict[str, str]
    ):
        self._inner = inner
        self._headers = headers
        self._query = query

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        headers = request.headers.copy()
        headers.update(self._headers)
        return await self._inner.handle_async_request(
            httpx.Request(
                request.method,
                request.url.copy_merge_params(self._query),
                headers=headers,
                stream=request.stream,
                extensions=request.extensions,
            )
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


class Provider:
    """A search service. Subclasses say how to ask and how to read the answer."""

    name: str
    address: str
    variable: str
    """The environment variable of the key."""

    def __init__(
        self,
        key: str | None = None,
        *,
        address: str | None = None,
        cache: Cache | None = None,
        limit: RateLimit | None = None,
        timeout: float = 10.0,
        budget: float = 30.0,
        proxy: str | None = None,
    ):
        """key: None takes the environment's. address: of the service, in place of its own.
        timeout: seconds of one try. budget: of all tries and waits together.
        Raises ValueError for a missing or unusable key, without showing it."""
        key = os.environ.get(self.variable, "") if key is None else key
        if not key:
            raise ValueError(f"{self.name} needs a key: set {self.variable} or pass key=")
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError(f"the key of {self.name} has characters that no header may carry")
        if timeout <= 0 or budget <= 0:
            raise ValueError(f"timeout and budget must be positive, got {timeout} and {budget}")
        self._key = SecretStr(key)
        self.address = (address or self.address).rstrip("/")
        self.cache = cache
        self.limit = limit
        self.timeout = timeout
        self.budget = budget
        self.proxy = proxy
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: dict[str, asyncio.Task[list[Result]]] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {urllib.parse.urlsplit(self.address).hostname}>"

    async def search(self, query: str, top_k: int = 10) -> list[Result]:
        """At most top_k results for a text. Raises ToolError and ToolInfraError."""
        return await self._cached(["search", query, top_k], lambda: self._text(query, top_k), top_k)

    async def search_image(
        self, key: str, publish: Callable[[], Awaitable[str]], top_k: int = 10
    ) -> list[Result]:
        """At most top_k results for an image. key: what the cache knows it by. publish: makes it
        reachable for the service and returns its address; called only where the cache misses."""

        async def request() -> _Request:
            return self._image(await publish())

        return await self._cached(["image", key], request, top_k)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.aclose()
        if self.cache is not None:
            self.cache.close()

    # What a subclass says.

    def _sign(self, key: str) -> tuple[dict[str, str], dict[str, str]]:
        """The headers and the query parameters that bear the key."""
        raise NotImplementedError

    def _text(self, query: str, top_k: int) -> _Request:
        raise NotImplementedError

    def _image(self, url: str) -> _Request:
        raise ToolInfraError(f"{self.name} has no search by image")

    def _read(self, answer: dict[str, Any]) -> list[Result] | None:
        """The results; None for an answer of another shape than the documented one."""
        raise NotImplementedError

    # The way there and back.

    async def _cached(
        self, what: list[Any], request: Callable[[], Any], top_k: int
    ) -> list[Result]:
        identity = json.dumps([self.name, self.address, *what]).encode()
        key = hashlib.sha256(identity).hexdigest()
        # The rollouts of a group ask the same thing at once: one request serves them all.
        task = self._asking.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            task = self._asking[key] = asyncio.ensure_future(self._answer(key, request))
            task.add_done_callback(lambda done: self._answered(key, done))
        return (await asyncio.shield(task))[:top_k]

    async def _answer(self, key: str, request: Callable[[], Any]) -> list[Result]:
        results = await self._known(key)
        if results is None:
            made = request()
            results = await self._ask(await made if inspect.isawaitable(made) else made)
            if self.cache is not None:
                value = json.dumps(results).encode()
                await asyncio.to_thread(self.cache.put, key, value)
        return results

    def _answered(self, key: str, task: asyncio.Task[list[Result]]) -> None:
        if self._asking.get(key) is task:
            del self._asking[key]
        if not task.cancelled():
            task.exception()  # seen, also where every rollout that asked has been cancelled

    async def _known(self, key: str) -> list[Result] | None:
        value = await asyncio.to_thread(self.cache.get, key) if self.cache is not None else None
        return None if value is None else json.loads(value)

    async def _ask(self, request: _Request) -> list[Result]:
        body = await self._fetch(request)
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise ToolInfraError(
                f"{self.name} answered with {len(body):,} bytes that are not JSON"
            ) from None
        results = self._read(answer) if isinstance(answer, dict) else None
        if results is None:
            raise ToolInfraError(f"{self.name}: unexpected answer: {self._excerpt(body)}")
        return [{name: self._scrub(text) for name, text in one.items()} for one in results]

    async def _fetch(self, request: _Request) -> bytes:
        """The body of a good answer, after as many tries as the budget allows."""
        deadline = time.monotonic() + self.budget
        problem = "no turn within its rate limit"
        for attempt in range(TRIES):
            if self.limit is not None:
                turn = self.limit.reserve(deadline - time.monotonic())
                if turn is None:
                    break
                await asyncio.sleep(turn)
            pause = random.uniform(0.5, 1.0) * 2.0**attempt / 2
            try:
                seconds = max(0.0, min(self.timeout, deadline - time.monotonic()))
                status, headers, body = await asyncio.wait_for(self._send(request), seconds)
            except (TimeoutError, asyncio.TimeoutError, httpx.TimeoutException):
                problem = f"no answer within {seconds:.1f} s"
            except (httpx.HTTPError, OSError) as error:
                problem = type(error).__name__  # its text may hold the address
            else:
                if status == 200:
                    return body
                if status not in PASSING:
                    raise self._refusal(status, body)
                problem = f"HTTP {status}: {self._excerpt(body)}"
                told = retry_after(headers.get("retry-after"))
                if told is not None:
                    pause = max(pause, told)
                    if self.limit is not None and status == 429:
                        self.limit.pause(min(told, LONGEST_PAUSE))
            if attempt == TRIES - 1 or time.monotonic() + pause >= deadline:
                break
            await asyncio.sleep(pause)
        raise ToolInfraError(f"{self.name} failed, try {attempt + 1}: {problem}")

    async def _send(self, request: _Request) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and at most MAX_BODY bytes of one answer."""
        client = self._connect()
        async with client.stream(
            request.method,
            self.address + request.path,
            params=dict(request.query) or None,
            json=request.body,
        ) as response:
            # Asked for as it is: then no small answer can unpack into a large one.
            if response.headers.get("content-encoding", "identity") != "identity":
                raise ToolInfraError(f"{self.name} answered compressed, though not asked to")
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_BODY:
                    raise ToolInfraError(f"{self.name} answered with more than {MAX_BODY:,} bytes")
            return response.status_code, response.headers, bytes(body)

    def _connect(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            # A client of a loop that has ended cannot be closed any more; its sockets go with it.
            self._loop = loop
            self._client = httpx.AsyncClient(
                transport=_Signed(
                    httpx.AsyncHTTPTransport(proxy=self.proxy),
                    *self._sign(self._key.get_secret_value()),
                ),
                headers={"accept": "application/json", "accept-encoding": "identity"},
                timeout=self.timeout,
                trust_env=False,  # no credentials from ~/.netrc
            )
        return self._client

    def _refusal(self, status: int, body: bytes) -> Exception:
        """What a status that will not pass means. Services say 400 for an empty account, too: only
        one that speaks of the query is the policy's fault."""
        excerpt = self._excerpt(body)
        if status in (401, 402, 403):
            return ToolInfraError(
                f"{self.name} refused the key of {self.variable} ({status}): {excerpt}"
            )
        if status in (400, 422) and re.search(r"query|keyword", excerpt, re.IGNORECASE):
            log.warning("%s refused a query (%d): %s", self.name, status, excerpt)
            return ToolError("the search engine does not accept this query")
        return ToolInfraError(f"{self.name} answered HTTP {status}: {excerpt}")

    def _excerpt(self, body: bytes) -> str:
        return ascii(self._scrub(body[:4096].decode("utf-8", "replace"))[:200])

    def _scrub(self, text: str) -> str:
        """Without the key, which a service may echo."""
        key = self._key.get_secret_value()
        return text.replace(key, "***").replace(urllib.parse.quote(key, safe=""), "***")


class Serper(Provider):
    """serper.dev: Google results; `search_image` asks its Google Lens."""

    name = "serper"
    address = "https://google.serper.dev"
    variable = "SERPER_API_KEY"

    def _sign(self, key: str) -> tuple[dict[str, str], dict[str, str]]:
        return {"X-API-KEY": key}, {}

    def _text(self, query: str, top_k: int) -> _Request:
        return _Request("POST", "/search", body={"q": query, "num": top_k})

    def _image(self, url: str) -> _Request:
        return _Request("POST", "/lens", body={"url": url})

    def _read(self, answer: dict[str, Any]) -> list[Result] | None:
        # Without results "organic" is empty or absent; what was asked is always repeated.
        known = "organic" in answer or "searchParameters" in answer
        return _results(answer.get("organic", []), image="imageUrl") if known else None


class SerpApi(Provider):
    """serpapi.com: Google results; `search_image` asks its Google Lens."""

    name = "serpapi"
    address = "https://serpapi.com"
    variable = "SERPAPI_API_KEY"

    def _sign(self, key: str) -> tuple[dict[str, str], dict[str, str]]:
        return {}, {"api_key": key}

    def _text(self, query: str, top_k: int) -> _Request:
        asked = {"engine": "google", "q": query, "num": str(top_k), "output": "json"}
        return _Request("GET", "/search", asked)

    def _image(self, url: str) -> _Request:
        return _Request("GET", "/search", {"engine": "google_lens", "url": url, "output": "json"})

    def _read(self, answer: dict[str, Any]) -> list[Result] | None:
        # No result is an "error" that says so, with status 200.
        if "hasn't returned any results" in str(answer.get("error", "")):
            return []
        for name in ("organic_results", "visual_matches"):
            if name in answer:
                return _results(answer[name], image="thumbnail")
        metadata = answer.get("search_metadata")
        done = isinstance(metadata, dict) and metadata.get("status") == "Success"
        return [] if done and "error" not in answer else None


class BrightData(Provider):
    """brightdata.com's SERP API: Google results, parsed by the service."""

    name = "brightdata"
    address = "https://api.brightdata.com"
    variable = "BRIGHTDATA_API_KEY"

    def __init__(self, key: str | None = None, *, zone: str | None = None, **options: Any):
        """zone: the SERP zone of the account; None takes BRIGHTDATA_ZONE."""
        super().__init__(key, **options)
        self.zone = zone or os.environ.get("BRIGHTDATA_ZONE", "")
        if not self.zone:
            raise ValueError("brightdata needs a zone: set BRIGHTDATA_ZONE or pass zone=")

    def _sign(self, key: str) -> tuple[dict[str, str], dict[str, str]]:
        return {"Authorization": f"Bearer {key}"}, {}

    def _text(self, query: str, top_k: int) -> _Request:
        asked = urllib.parse.urlencode({"q": query, "num": top_k, "brd_json": 1})
        url = f"https://www.google.com/search?{asked}"
        body = {"zone": self.zone, "url": url, "format": "raw"}
        return _Request("POST", "/request", body=body)

    def _read(self, answer: dict[str, Any]) -> list[Result] | None:
        known = "organic" in answer or "general" in answer
        return _results(answer.get("organic", []), snippet="description") if known else None


PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider for provider in (Serper, SerpApi, BrightData)
}


def _results(found: Any, snippet: str = "snippet", image: str = "image") -> list[Result] | None:
    """The results in an answer's array; what is not a string is unknown, what is empty is none."""
    if not isinstance(found, list):
        return None
    names = {"title": "title", "url": "link", "snippet": snippet, "image": image}
    results = []
    for one in found:
        if not isinstance(one, dict):
            continue
        result = {}
        for name, given in names.items():
            value = one.get(given)
            result[name] = value[:MAX_RESULT] if isinstance(value, str) else ""
        if result_text(result):
            results.append(result)
    return results


# --- The tools ------------------------------------------------------------------------------------


class WebTextSearch:
    """text_search that asks a provider."""

    name = "text_search"

    def __init__(
        self,
        provider: Provider,
        *,
        top_k: int = 10,
        max_result: int = MAX_RESULT,
        max_results: int = MAX_RESULTS,
    ):
        """max_result, max_results: characters of one result, and of all together."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.provider = provider
        self.top_k = top_k
        self.max_result = max_result
        self.max_results = max_results

    async def call(self, session: Session, query: str) -> Observation:
        check_length(query)
        query = " ".join(query.split())
        if not query:
            raise ToolError("the query is empty")
        if re.search("[\ud800-\udfff]", query):
            raise ToolError("the query contains a lone surrogate")
        results = await self.provider.search(query, self.top_k)
        texts = [result_text(result) for result in results]
        return Observation(bounded(texts, self.max_result, self.max_results))

    call.__doc__ = TextSearch.call.__doc__  # word for word: the policy knows one text_search

    async def close(self) -> None:
        await self.provider.close()


class WebImageSearch(ImageSearchTool):
    """image_search that asks a provider. Text alone comes back: no address from the web is opened.

    The services take the address of a picture and not the picture, so whoever uses this says how
    image_1 becomes reachable for them.
    """

    def __init__(
        self,
        provider: Provider,
        publish: Callable[[Image], str | Awaitable[str]],
        *,
        top_k: int = 10,
        per_trajectory: int | None = 1,
    ):
        """publish: makes an image reachable and returns its address, plain or async; plain ones
        run in a thread. What it raises is an infrastructure failure."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        super().__init__(per_trajectory)
        self.provider = provider
        self.publish = publish
        self.top_k = top_k

    async def answer(self, session: Session) -> Observation:
        image = session.images[0]

        async def publish() -> str:
            try:
                if inspect.iscoroutinefunction(self.publish):
                    return await self.publish(image)
                return await asyncio.to_thread(self.publish, image)  # type: ignore[arg-type]
            except Exception as error:
                raise ToolInfraError(
                    f"image_1 cannot be published: {type(error).__name__}"
                ) from error

        key = await asyncio.to_thread(image_key, image)
        results = await self.provider.search_image(key, publish, self.top_k)
        return Observation(bounded([result_text(result) for result in results]))

    async def close(self) -> None:
        await self.provider.close()
