"""A search service for tests: a real HTTP server on this machine that answers from a script."""

import contextlib
import json
import urllib.parse

from local_server import Handler, LocalServer


class SearchHandler(Handler):
    def answer(self):
        service = self.server
        service.requests.append((self.command, self.path, dict(self.headers), self.body()))
        step = service.script.pop(0) if len(service.script) > 1 else service.script[0]
        if callable(step):
            return step(self)
        status, body, headers = step
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(OSError):
            self.send(status, body, headers)

    do_GET = do_POST = answer


class SearchServer(LocalServer):
    """A search service: it notes what it was asked, and answers from a script of
    (status, body, headers) or of functions of the handler; the last is taken again and again."""

    def __init__(self):
        super().__init__(SearchHandler)
        self.requests = []
        self.script = [(200, {}, {})]

    @property
    def queries(self):
        return [
            dict(urllib.parse.parse_qsl(path.partition("?")[2])) for _, path, *_ in self.requests
        ]
