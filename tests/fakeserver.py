"""A model server that is none: a real child process that does what it is told.

    python -S -E tests/fakeserver.py --port 5800 [options]

It needs nothing but Python and is there some 30 ms after its start (``COMMAND`` is the
beginning of such a command line for tests). Like llama-server it listens at once,
answers everything with 503 "Loading model" while it loads, and prints what it does.

Loading
    --load-seconds N         takes so long; 0 is the default
    --load-until FILE        goes on until there is such a file
    --listen-late            opens the port only when it has loaded
    --answer-late N          /health answers after N seconds, each time
    --memory MB              occupies so much while it loads
    --progress               prints a dot for each per cent, as llama.cpp does

Going wrong
    --crash-on-start TEXT    prints TEXT and exits with 1
    --crash-after-load       exits with 3 as soon as it has loaded
    --crash-when FILE        exits with 3 when there is such a file
    --ignore-term            SIGTERM does nothing
    --grandchild-holds-pipe  a process of its group keeps the output open; like all that
                             it starts, it ignores SIGTERM
    --stray-holds-pipe       so does one that has left its group
    --steal-port             not this process listens but one that is no descendant of
                             it, which answers 200 to everything
    --print TEXT             prints TEXT first
    --flood                  prints without end and without line ends

Answering
    --model NAME             its name; "fake"
    --chunks N               words of a chat's answer; 3
    --chunk-until FILE       the last word of an answer waits until there is such a file

Telling
    --pid-file FILE          one line for each of its processes: ``server 123``,
                             ``grandchild 124``, ``stray 125``, ``thief 126``

``GET /health``, ``/v1/models``, ``/props``; ``POST`` on ``/v1/chat/completions``,
``/v1/completions``, ``/completion``, ``/v1/embeddings``: OpenAI's shapes, streamed
where ``"stream": true`` asks for it. Every JSON answer has a member ``fake``:
``{"model", "pid", "request"}``, the last being the JSON it was sent; in a stream it is
in the first event. Besides:

- ``GET /fake/process``: its argv, folder and environment;
- ``GET /fake/requests``: ``{"total", "active", "most", "gone"}``: requests for answers
  so far, now, at most at once, and those whose client left before the end;
- ``GET /fake/ws``: a websocket that sends back each (small) message;
- ``/fake/echo/…``: any method; the request as it came, as JSON.
"""

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

COMMAND = (sys.executable, "-S", "-E", os.path.abspath(__file__))

# How often a file is looked for, and whether a client is still there.
LOOK_SECONDS = 0.005
MAX_HEAD = 64 * 1024


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="fake")
    for name in ("--load-seconds", "--answer-late"):
        parser.add_argument(name, type=float, default=0.0)
    for name in ("--memory", "--chunks"):
        parser.add_argument(name, type=int, default=3 if name == "--chunks" else 0)
    for name in (
        "--load-until",
        "--crash-on-start",
        "--crash-when",
        "--print",
        "--chunk-until",
        "--pid-file",
    ):
        parser.add_argument(name)
    for name in (
        "--listen-late",
        "--progress",
        "--crash-after-load",
        "--ignore-term",
        "--grandchild-holds-pipe",
        "--stray-holds-pipe",
        "--steal-port",
        "--flood",
    ):
        parser.add_argument(name, action="store_true")
    # Whatever llama-server takes besides is no business of this one.
    return parser.parse_known_args()[0]


def say(text: str) -> None:
    try:
        os.write(2, text.encode("utf-8", "surrogateescape") + b"\n")
    except BrokenPipeError:
        pass  # whoever listened is gone; an orphan lives on


def wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(LOOK_SECONDS)


class Server:
    """What the threads share."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.is_loading = True
        self.memory = b""
        self.lock = threading.Lock()
        self.counts = {"total": 0, "active": 0, "most": 0, "gone": 0}

    def run(self) -> None:
        asked = self.asked
        self.note("server", os.getpid())
        if asked.print:
            say(asked.print)
        if asked.crash_on_start:
            say(asked.crash_on_start)
            sys.exit(1)
        if asked.ignore_term:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if asked.grandchild_holds_pipe:
            self.beget("grandchild", lambda: None)
        if asked.stray_holds_pipe:
            self.beget("stray", os.setsid)
        if asked.steal_port:
            self.beget("thief", self.steal, is_ours=False)
        if asked.crash_when:
            self.start(self.crash_when)
        if asked.flood:
            self.start(self.flood)
        while asked.steal_port:
            signal.pause()
        if not asked.listen_late:
            self.listen()
        self.load()
        if asked.listen_late:
            self.listen()
        self.is_loading = False
        say(f"model loaded: {asked.model}")
        if asked.crash_after_load:
            say("error: it is too heavy")
            os._exit(3)
        while True:
            signal.pause()

    def load(self) -> None:
        asked = self.asked
        say(f"loading model {asked.model}")
        self.memory = os.urandom(1 << 20) * asked.memory
        for _ in range(100):
            if asked.progress:
                os.write(2, b".")
            time.sleep(asked.load_seconds / 100)
        if asked.progress:
            os.write(2, b"\n")
        if asked.load_until:
            wait_for(asked.load_until)

    def crash_when(self) -> None:
        wait_for(self.asked.crash_when)
        say("error: somebody wanted it so")
        os._exit(3)

    def flood(self) -> None:
        while True:
            os.write(1, b"blah " * 2000)

    def note(self, what: str, pid: int) -> None:
        if self.asked.pid_file:
            with open(self.asked.pid_file, "a") as file:
                file.write(f"{what} {pid}\n")

    def beget(self, what: str, act: Callable[[], None], is_ours: bool = True) -> None:
        """Start another process, which has this one's output; it ends by SIGKILL."""
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            if not is_ours and os.fork():
                os._exit(0)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            act()
            self.note(what, os.getpid())
            os.write(writer, b".")
            while True:
                signal.pause()
        os.read(reader, 1)  # it has begun
        if not is_ours:
            os.waitpid(pid, 0)

    def steal(self) -> None:
        os.setsid()
        self.is_loading = False
        self.listen()

    # --- HTTP --------------------------------------------------------------------

    def start(self, target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.asked.host, self.asked.port))
        except OSError as error:
            say(f"error: couldn't bind port {self.asked.port}: {error.strerror}")
            sys.exit(1)
        listener.listen(256)
        say(f"listening on http://{self.asked.host}:{self.asked.port}")
        self.start(self.accept, listener)

    def accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.start(self.converse, connection)

    def converse(self, connection: socket.socket) -> None:
        with connection:
            try:
                while Exchange(self, connection).serve():
                    pass
            except (OSError, ValueError, IndexError):
                pass


class Exchange:
    """One request and its answer."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self.server = server
        self.connection = connection
        self.rest = b""

    def serve(self) -> bool:
        """Whether the connection is good for another."""
        while b"\r\n\r\n" not in self.rest:
            if not self.receive() or len(self.rest) > MAX_HEAD:
                return False
        head, _, self.rest = self.rest.partition(b"\r\n\r\n")
        request, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.target, _ = request.split(" ")
        pairs = [line.partition(":")[::2] for line in lines]
        self.headers = {name.lower(): value.strip() for name, value in pairs}
        self.body = self.read_body()
        self.path = self.target.partition("?")[0]
        self.answer()
        return self.headers.get("connection", "").lower() != "close"

    def receive(self) -> bool:
        data = self.connection.recv(64 * 1024)
        self.rest += data
        return bool(data)

    def take(self, count: int) -> bytes:
        while len(self.rest) < count:
            if not self.receive():
                raise OSError("the client left")
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.take(int(self.headers.get("content-length", 0)))
        body = b""
        while True:
            while b"\r\n" not in self.rest:
                if not self.receive():
                    raise OSError("the client left")
            size, _, self.rest = self.rest.partition(b"\r\n")
            piece = self.take(int(size, 16) + 2)
            if not piece[:-2]:
                return body
            body += piece[:-2]

    def answer(self) -> None:
        server, path = self.server, self.path
        if path == "/health" and server.asked.answer_late:
            time.sleep(server.asked.answer_late)
        if server.is_loading and not path.startswith("/fake/"):
            error = {"message": "Loading model", "type": "unavailable_error"}
            self.send({"error": error | {"code": 503}}, "503 Service Unavailable")
        elif path == "/health" or server.asked.steal_port:
            self.send({"status": "ok"})
        elif path == "/v1/models":
            entry = {"id": server.asked.model, "object": "model", "created": 1}
            self.send({"object": "list", "data": [entry]})
        elif path == "/props":
            self.send({"model_path": server.asked.model, "total_slots": 1})
        elif path == "/fake/process":
            argv, env = sys.argv, dict(os.environ)
            self.send({"argv": argv, "cwd": os.getcwd(), "env": env})
        elif path == "/fake/requests":
            self.send(dict(server.counts))
        elif path == "/fake/ws":
            self.echo_messages()
        elif path.startswith("/fake/echo"):
            body = self.body.decode("latin-1")
            line = {"method": self.method, "target": self.target}
            self.send({**line, "headers": self.headers, "body": body})
        elif self.method == "POST" and path in SHAPES:
            self.generate()
        else:
            error = {"message": "File Not Found", "type": "not_found_error"}
            self.send({"error": error | {"code": 404}}, "404 Not Found")

    def send(self, value: dict[str, Any], status: str = "200 OK") -> None:
        body = json.dumps(value | {"fake": self.witness()}).encode()
        head = (
            f"HTTP/1.1 {status}\r\nServer: fakeserver\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.connection.sendall(head.encode() + body)

    def witness(self) -> dict[str, Any]:
        try:
            request = json.loads(self.body) if self.body else None
        except ValueError:
            request = None
        name = self.server.asked.model
        return {"model": name, "pid": os.getpid(), "request": request}

    # --- answers of a model ------------------------------------------------------

    def generate(self) -> None:
        counts, lock = self.server.counts, self.server.lock
        with lock:
            counts["total"] += 1
            counts["active"] += 1
            counts["most"] = max(counts["most"], counts["active"])
        say(f"{self.method} {self.path}")
        try:
            self.generate_counted()
        except OSError:
            with lock:
                counts["gone"] += 1
            say("the client left")
            raise
        finally:
            with lock:
                counts["active"] -= 1

    def generate_counted(self) -> None:
        request = json.loads(self.body)
        words = [f"word{n} " for n in range(self.server.asked.chunks)]
        count = {"prompt_tokens": 5, "completion_tokens": len(words)}
        usage = {**count, "total_tokens": 5 + len(words)}
        shape = SHAPES[self.path]
        if not request.get("stream") or self.path == "/v1/embeddings":
            self.wait_for_the_last()
            self.send(shape("".join(words), "stop", False) | {"usage": usage})
            return
        self.connection.sendall(
            b"HTTP/1.1 200 OK\r\nServer: fakeserver\r\n"
            b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for number, word in enumerate(words):
            if number == len(words) - 1:
                self.wait_for_the_last()
            extra = {} if number else {"fake": self.witness()}
            self.send_event(json.dumps(shape(word, None, True) | extra))
        self.send_event(json.dumps(shape("", "stop", True)))
        if (request.get("stream_options") or {}).get("include_usage"):
            last = shape("", None, True) | {"choices": [], "usage": usage}
            self.send_event(json.dumps(last))
        if self.path != "/completion":
            self.send_event("[DONE]")
        self.connection.sendall(b"0\r\n\r\n")

    def send_event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.connection.sendall(b"%x\r\n%b\r\n" % (len(event), event))

    def wait_for_the_last(self) -> None:
        path = self.server.asked.chunk_until
        while path and not os.path.exists(path):
            self.connection.settimeout(LOOK_SECONDS)
            try:
                if not self.connection.recv(1, socket.MSG_PEEK):
                    raise OSError("the client left")
                time.sleep(LOOK_SECONDS)  # it has sent the next request already
            except TimeoutError:
                pass
            finally:
                self.connection.settimeout(None)

    # --- websocket (RFC 6455) ----------------------------------------------------

    def echo_messages(self) -> None:
        import base64
        import hashlib

        key = self.headers["sec-websocket-key"]
        salted = key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(salted.encode()).digest()).decode()
        head = (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
        )
        self.connection.sendall(head.encode())
        while True:
            first, length = self.take(2)
            length &= 0x7F
            if length == 126:
                length = int.from_bytes(self.take(2), "big")
            mask = self.take(4)
            masked = self.take(length)
            data = bytes(byte ^ mask[n % 4] for n, byte in enumerate(masked))
            size = bytes([length]) if length < 126 else b"\x7e" + length.to_bytes(2)
            self.connection.sendall(bytes([first]) + size + data)
            if first & 0x0F == 8:
                raise OSError("closed")


def chat(text: str, finish: str | None, is_stream: bool) -> dict[str, Any]:
    part = "delta" if is_stream else "message"
    choice = {part: {"role": "assistant", "content": text}, "finish_reason": finish}
    kind = "chat.completion.chunk" if is_stream else "chat.completion"
    return _answer(kind, {"index": 0, **choice})


def completion(text: str, finish: str | None, is_stream: bool) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return _answer("text_completion", choice)


def _answer(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    ids = {"id": "fake-1", "object": kind, "created": 1, "model": "fake"}
    return {**ids, "choices": [choice]}


def native(text: str, finish: str | None, is_stream: bool) -> dict[str, Any]:
    return {"content": text, "stop": finish is not None}


def embedding(text: str, finish: str | None, is_stream: bool) -> dict[str, Any]:
    entry = {"object": "embedding", "index": 0, "embedding": [0.25, -0.5]}
    return {"object": "list", "model": "fake", "data": [entry]}


SHAPES = {
    "/v1/chat/completions": chat,
    "/v1/completions": completion,
    "/completion": native,
    "/v1/embeddings": embedding,
}


if __name__ == "__main__":
    Server(options()).run()
