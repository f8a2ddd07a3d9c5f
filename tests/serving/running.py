"""`visformer serve` as a process of its own, whose log a test can read."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path


class Running:
    """A server that has been started; `log` are its lines so far."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "visformer", "serve", *arguments, "--port", "0", "--model_threads", "1"],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[dict] = []
        self.text: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        url = self.event("listening")["url"]
        self.port = int(url.rpartition(":")[2])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.text.append(line)
            if line.startswith("{"):
                self.log.append(json.loads(line))

    def events(self, kind: str) -> list[dict]:
        return [one for one in self.log if one["event"] == kind]

    def event(self, kind: str, count: int = 1) -> dict:
        """The `count`th of its kind, once it is there."""
        deadline = time.monotonic() + 180
        while len(self.events(kind)) < count:
            if self.process.poll() is not None:
                self.reader.join(30)
                assert len(self.events(kind)) >= count, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)
        return self.events(kind)[count - 1]

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else {"text": text.decode()}

    def resident(self) -> int:
        """Bytes of memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        """The exit code; all it wrote has been read."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.reader.join(30)
        return code


@contextmanager
def running(*arguments: str):
    server = Running(*arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
