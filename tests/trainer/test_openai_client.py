"""The client of a chat endpoint against a server that misbehaves."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from judge_server import (
    FAST,
    JudgeServer,
    chat,
    client_of,
)

from trainer import openai_client
from trainer.openai_client import (
    Budget,
    BudgetSpent,
    EndpointError,
    OpenAIClient,
    RequestRejected,
    Retry,
)


def test_a_completion_and_what_was_sent():
    with JudgeServer(["hello"]) as server:
        client = client_of(server, api_key="sk-secret")
        completion = chat(client, stop=["x"])
    assert (completion.text, completion.finish_reason) == ("hello", "stop")
    assert (completion.prompt_tokens, completion.completion_tokens) == (100, 20)
    assert completion.attempts == 1 and client.counts == {"ok": 1}
    request = server.requests[0]
    assert request["temperature"] == 0.0 and request["model"] == "judge"
    assert request["max_tokens"] == 8 and request["stop"] == ["x"]
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in repr(vars(client.budget)) + repr(client)


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("reset", "connection"),
        ("hang", "timeout"),
        ("hang in the body", "timeout"),
        ("drip", "timeout"),
        ("500", "http 500"),
        ("503", "http 503"),
        ("429 odd", "http 429"),
        ("garbage", "garbage"),
        ("no completion", "garbage"),
        ("binary", "garbage"),
        ("empty", "garbage"),
        ("deep", "garbage"),
        ("half", "connection"),
        ("not http", "connection"),
        ("huge", "too long"),
    ],
)
def test_a_failure_is_tried_again_and_then_named(step, kind):
    timeout = 0.3 if kind == "timeout" else 10.0
    with JudgeServer([step, step, "fine"]) as server:
        client = client_of(server, timeout=timeout)
        assert chat(client).attempts == 3
        assert client.counts == {kind: 2, "ok": 1}
    with JudgeServer([step]) as server:
        client = client_of(server, timeout=timeout)
        with pytest.raises(EndpointError) as failure:
            chat(client)
        assert failure.value.kind == kind and len(server.requests) == 3
    assert client.budget.calls == 3


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    client = OpenAIClient(url, "judge", retry=FAST)
    with pytest.raises(EndpointError) as failure:
        chat(client)
    assert failure.value.kind == "connection" and client.counts["connection"] == 3


@pytest.mark.parametrize("step", ["400", "401", "404", "redirect"])
def test_a_request_that_is_refused_is_not_sent_again(step):
    with JudgeServer([step]) as server:
        with pytest.raises(RequestRejected, match=f"HTTP {302 if step == 'redirect' else step}"):
            chat(client_of(server))
        assert len(server.requests) == 1


def test_retry_after_is_kept():
    with JudgeServer(["429", "fine"]) as server:
        chat(client_of(server))
        assert 0.2 <= server.times[1] - server.times[0] < 5
    with JudgeServer(["429 date", "fine"]) as server:
        chat(client_of(server, retry=Retry(attempts=2, first=0.0, longest=5.0)))
        assert 0 <= server.times[1] - server.times[0] < 10
    with JudgeServer(["429 long"]) as server:
        began = time.monotonic()
        with pytest.raises(EndpointError, match="429"):
            chat(client_of(server))
        assert time.monotonic() - began < 15 and len(server.requests) == 1


def test_one_429_holds_back_every_request():
    async def both(client):
        await asyncio.gather(
            client.chat([], max_tokens=1), *(client.chat([], max_tokens=1) for _ in range(3))
        )
        await client.close()

    with JudgeServer(["429", "fine"]) as server:
        asyncio.run(both(client_of(server, concurrency=1)))
        assert len(server.requests) == 5
        assert server.times[1] - server.times[0] >= 0.2


def test_waits_double_and_differ():
    client = OpenAIClient("http://localhost:1/v1", "m", retry=Retry(first=1.0, longest=8.0), seed=3)
    error = EndpointError("timeout", "")
    for attempt, most in [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (9, 8.0)]:
        waits = [client._wait(attempt, error) for _ in range(50)]
        assert most / 2 <= min(waits) and max(waits) <= most and len(set(waits)) > 40


def test_no_more_requests_at_a_time_than_the_cap():
    async def many(client):
        await asyncio.gather(*(client.chat([], max_tokens=1) for _ in range(12)))
        await client.close()

    with JudgeServer(["slow"]) as server:
        began = time.monotonic()
        asyncio.run(many(client_of(server, concurrency=4, timeout=5)))
        assert server.most == 4 and time.monotonic() - began >= 0.85


def test_the_time_of_a_request_does_not_run_while_it_queues():
    async def many(client):
        return await asyncio.gather(*(client.chat([], max_tokens=1) for _ in range(8)))

    with JudgeServer(["slow"]) as server:
        client = client_of(server, concurrency=1, timeout=5, retry=Retry(attempts=1, seconds=1.0))
        assert len(asyncio.run(many(client))) == 8  # 2.4 s in all


def test_the_budget_holds():
    with JudgeServer(["fine"]) as server:
        client = client_of(server, budget=Budget(max_calls=2))
        chat(client), chat(client)
        with pytest.raises(BudgetSpent, match="2 of 2 calls"):
            chat(client)
        client = client_of(server, budget=Budget(max_tokens=200))
        chat(client)
        assert client.budget.tokens == 120
        chat(client)
        with pytest.raises(BudgetSpent, match="240 of 200 tokens"):
            chat(client)
        assert len(server.requests) == 4
    with JudgeServer(["slow"]) as server:
        client = client_of(server, timeout=5, budget=Budget(max_seconds=0.2))
        chat(client)
        spent = client.budget.seconds
        time.sleep(0.05)  # idle time is free
        assert client.budget.seconds == spent >= 0.25
        with pytest.raises(BudgetSpent, match="seconds"):
            chat(client)


def test_failed_calls_are_paid_and_tokens_are_estimated_where_nobody_counts():
    with JudgeServer(["500"]) as server:
        client = client_of(server, budget=Budget(max_calls=2))
        with pytest.raises(BudgetSpent):
            chat(client)
        assert len(server.requests) == 2
    with JudgeServer(["fine"], usage=False) as server:
        client = client_of(server)
        chat(client)
        assert client.budget.tokens > 8 and client.budget._reserved == 0


def test_one_client_in_several_loops():
    with JudgeServer(["fine"]) as server:
        client = client_of(server)

        async def ask():
            return (await client.chat([], max_tokens=1)).text

        assert [asyncio.run(ask()) for _ in range(3)] == ["fine"] * 3


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_either_http_package_will_do(package, monkeypatch):
    monkeypatch.setattr(openai_client, "httpx", pytest.importorskip(package))
    retry = Retry(attempts=12, first=0.0)
    steps = ["reset", "half", "garbage", "empty", "huge", "503", "not http"]
    with JudgeServer([*steps, "fine"]) as server:
        client = client_of(server, retry=retry)
        assert chat(client).attempts == len(steps) + 1
    assert client.counts == {"connection": 3, "garbage": 2, "too long": 1, "http 503": 1, "ok": 1}
    with JudgeServer(["hang", "drip", "fine"]) as server:
        client = client_of(server, retry=retry, timeout=0.3)
        assert chat(client).text == "fine" and client.counts["timeout"] >= 2


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", ""])
def test_an_address_that_is_none_is_named(url):
    with pytest.raises(ValueError, match="base_url must look like"):
        OpenAIClient(url, "m")
    with pytest.raises(ValueError, match="give api_key instead") as refused:
        OpenAIClient("http://me:secret@localhost/v1", "m")
    assert "secret" not in str(refused.value)
