"""A chat server with a policy that is a function: how servers differ can be chosen.

    with AgentServer(lambda messages: "<reason>so</reason>\\n<answer>12</answer>") as server:
        client = OpenAIClient(server.url, "policy")

The policy is given the messages and writes a turn, or goes on with an assistant's message that is
the last one. A token is a character.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from local_server import Handler, LocalServer


class AgentServer(LocalServer):
    def __init__(
        self,
        policy: Callable[[list[dict[str, Any]]], str],
        *,
        continues: bool | None = True,
        stops: str = "eaten and said",
        counts: bool = True,
    ):
        """continues: whether it heeds continue_final_message; None: it refuses the field. stops:
        what becomes of stop strings: "eaten and said" (vLLM), "eaten", "kept" or "ignored".
        counts: whether there is `usage`."""
        super().__init__(AgentHandler)
        self.policy, self.continues, self.stops, self.counts = policy, continues, stops, counts
        self.requests: list[dict[str, Any]] = []
        self.most = 0
        self._active = 0
        self._lock = threading.Lock()
        self.url += "/v1"

    def answer(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """None: refused."""
        going_on = body.get("continue_final_message", False)
        if going_on and self.continues is None:
            return None
        messages = body["messages"]
        text, stopped_by = self.policy(messages), None
        found = [(text.find(s), s) for s in body.get("stop", ()) if s in text]
        if found and self.stops != "ignored":
            at, stopped_by = min(found)
            text = text[: at + len(stopped_by) * (self.stops == "kept")]
        length = body["max_tokens"]
        reason = "length" if len(text) > length else "stop"
        text = text[:length]
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        if self.stops == "eaten and said":
            choice["stop_reason"] = stopped_by if reason == "stop" else None
        answer: dict[str, Any] = {"choices": [choice]}
        if self.counts:
            prompt = sum(len(said(message)) for message in messages)
            prompt += 10 * (not going_on or not self.continues)  # the end of a turn, a new one
            answer["usage"] = {"prompt_tokens": prompt, "completion_tokens": len(text)}
        return answer


def said(message: dict[str, Any]) -> str:
    """The text of a message; an image is one character."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "#") for part in content)


class AgentHandler(Handler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        agent = self.server
        body = json.loads(self.body())
        with agent._lock:
            agent.requests.append(body)
            agent._active += 1
            agent.most = max(agent.most, agent._active)
        answer = agent.answer(body)
        with agent._lock:
            agent._active -= 1
        data = json.dumps(answer or {"error": "unknown field: continue_final_message"}).encode()
        self.send(200 if answer else 422, data)
