"""Servers of files on this machine: http with ranges and faults, as much of the hub's API as fsspec needs, and S3."""

import http.server
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHA = "0" * 40  # the only commit of the hub's data set me/set


class FileServer(http.server.ThreadingHTTPServer):
    """Serves a folder. `faults` has for a path what its next answers suffer; `asked` is (method, path, Range)."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.ranges = True

    def gets(self, name: str) -> list[str]:
        """The ranges of the GETs of a file."""
        return [part for method, path, part in self.asked if method == "GET" and path.endswith(name)]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, asked = self.path.partition("?")[0], self.headers.get("Range", "")
        self.server.asked.append((self.command, path, asked))
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults and self.command == "GET" else ""
        if path.startswith("/api/"):
            return self._hub(path)
        file = self.server.folder / re.sub(r"^datasets/me/set/resolve/[^/]+/", "", path.lstrip("/"))
        if fault.isdigit() or not file.is_file():
            return self._answer(int(fault or 404), b"")
        data = file.read_bytes()
        whole, size = data, len(data)
        first = 0
        if self.server.ranges and asked:
            first, last = (int(n) if n else size - 1 for n in asked.removeprefix("bytes=").split("-"))
            if first >= size:
                return self._answer(416, b"")
            data = data[first : last + 1]
        if fault == "wrong":
            data = bytes(len(data))
        if fault == "slow":
            time.sleep(0.3)
        headers = {"Content-Range": f"bytes {first}-{first + len(data) - 1}/{size}"} if data is not whole else {}
        sent = data[: len(data) // 2] if fault == "drop" else data
        if "/resolve/" in path:
            headers |= {"ETag": f'"{file.stat().st_mtime_ns}"', "X-Repo-Commit": SHA}
        self._answer(206 if "Content-Range" in headers else 200, sent, headers | {"Content-Length": str(len(data))})

    def _hub(self, path: str) -> None:
        """/api/datasets/me/set[/revision/NAME | /tree/NAME[/FOLDER]]"""
        if not path.startswith("/api/datasets/me/set"):
            return self._answer(404, b"{}")
        if "/tree/" not in path:
            return self._answer(200, json.dumps({"id": "me/set", "sha": SHA, "siblings": []}).encode())
        below = re.sub(r"^.*/tree/[^/]+/?", "", path)
        pattern = "**/*" if "recursive=true" in self.path.lower() else "*"
        files = sorted(p for p in (self.server.folder / below).glob(pattern) if p.is_file())
        found = [{"type": "file", "oid": f"{p.stat().st_mtime_ns}", "size": p.stat().st_size,
                  "path": str(p.relative_to(self.server.folder))} for p in files]  # fmt: skip
        self._answer(200, json.dumps(found).encode())

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """A FileServer of a folder, in a thread."""
    with FileServer(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """An S3 server with the files of a folder in a bucket; yields the environment that finds it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_CONFIG_FILE": os.devnull}
    names = {"AWS_ACCESS_KEY_ID": "aws_access_key_id", "AWS_SECRET_ACCESS_KEY": "aws_secret_access_key",
             "AWS_ENDPOINT_URL": "endpoint_url", "AWS_DEFAULT_REGION": "region_name"}  # fmt: skip
    client = boto3.client("s3", **{names[key]: value for key, value in env.items() if key in names})
    client.create_bucket(Bucket=bucket)
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        client.upload_file(str(file), bucket, f"data/{file.name}")
    try:
        yield env
    finally:
        server.stop()
