"""A search service for tests: a real HTTP server on this machine that answers from a script."""

import contextlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Service:
    """A search service: it notes what it was asked, and answers from a script of
    (status, body, headers); the last answer is given again and again."""

    def __init__(self):
        self.requests = []
        self.script = [(200, {}, {})]
        service = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                length = int(self.headers.get("content-length", 0))
                body = self.rfile.read(length)
                service.requests.append((self.command, self.path, dict(self.headers), body))
                script = service.script
                step = script.pop(0) if len(script) > 1 else script[0]
                if callable(step):
                    return step(self)
                status, body, headers = step
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def queries(self):
        return [
            dict(urllib.parse.parse_qsl(path.partition("?")[2])) for _, path, *_ in self.requests
        ]
