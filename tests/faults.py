"""A real HTTP proxy in front of an S3 server that fails chosen requests: the seam where the world is simulated."""

import http.client
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_STATUS = {
    "503": "ServiceUnavailable",
    "409": "ConditionalRequestConflict",
    "403": "AccessDenied",
    "507": "XMinioStorageFull",
}


@dataclass
class Fault:
    """Fail `times` requests whose method and key match (any if they are ""); `mode` is one of

    503, 409, 403   answer so, without asking the server; 507: its disk is full
    drop-ack        let the server act, then close the connection without an answer
    drop            close the connection without asking the server
    gone            from now on close every connection without asking the server: to it the caller has died
    gone-after      the same, but let the server act once more
    truncate        send half of the body that the headers announce
    strip           forward without If-None-Match, as a store that ignores conditional writes
    """

    mode: str
    method: str = "PUT"
    key: str = ""
    times: int = 1
    skip: int = 0
    """Matching requests that are answered as they should be, before those that fail."""
    seen: int = 0

    def matches(self, method: str, path: str) -> bool:
        if self.seen >= self.skip + self.times or (self.method and method != self.method):
            return False
        if self.key not in unquote(path):
            return False
        self.seen += 1
        return self.seen > self.skip


class FaultProxy(ThreadingHTTPServer):
    """Forwards to `target`; one PUT at a time, because moto checks If-None-Match and stores in two steps."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target)
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.gone = False
        self.lock, self.put_lock = threading.Lock(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, mode: str, **match: object) -> Fault:
        self.faults.append(Fault(mode, **match))  # type: ignore[arg-type]
        return self.faults[-1]

    def mend(self) -> None:
        """Forward every request from now on."""
        self.faults.clear()
        self.gone = False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each body would wait 40 ms for the acknowledgement of its headers
    server: FaultProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append((self.command, self.path))
            fault = next((f for f in self.server.faults if f.matches(self.command, self.path)), None)
            mode = fault.mode if fault else "drop" if self.server.gone else ""
            self.server.gone |= mode.startswith("gone")
        if mode in _STATUS:
            error = f"<Error><Code>{_STATUS[mode]}</Code><Message>injected</Message></Error>".encode()
            self._answer(int(mode), [("Content-Type", "application/xml")], error, len(error))
            return
        if mode in ("drop", "gone"):
            self.close_connection = True
            return
        headers = {k: v for k, v in self.headers.items() if mode != "strip" or k.lower() != "if-none-match"}
        headers.pop("Expect", None)
        with self.server.put_lock:
            upstream = http.client.HTTPConnection(self.server.target.netloc, timeout=20)
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
        if mode in ("drop-ack", "gone-after"):
            self.close_connection = True
            return
        dropped = {"connection", "transfer-encoding", "content-length", "server", "date"}
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
        length = int(answer.getheader("Content-Length") or len(content))  # of HEAD: without a body
        self._answer(answer.status, kept, content[: len(content) // 2] if mode == "truncate" else content, length)
        self.close_connection |= mode == "truncate"

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass
