"""A package index on loopback, with tiny packages made here: what pip and `Sources` see of PyPI, without a network."""

from __future__ import annotations

import contextlib
import ensurepip
import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

JSON = "application/vnd.pypi.simple.v1+json"


class Index:
    """files: (project, file name) -> bytes. `html` makes it an old index. `seen` is what was asked for."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.html = False
        self.seen: list[tuple[str, str]] = []  # (path, Authorization header)
        self.url = ""

    def add(self, project: str, filename: str, data: bytes) -> str:
        """Offer a file; returns its SHA-256."""
        self.files[project, filename] = data
        return hashlib.sha256(data).hexdigest()

    def count(self, ending: str) -> int:
        """How often a path with this ending was asked for."""
        return sum(path.endswith(ending) for path, _ in self.seen)

    def page(self, project: str) -> tuple[str, bytes] | None:
        """Content type and body of a project's page."""
        mine = {name: data for (owner, name), data in self.files.items() if owner == project}
        if not mine:
            return None
        if self.html:
            links = "".join(
                f'<a href="../../files/{name}#sha256={hashlib.sha256(data).hexdigest()}">{name}</a><br/>'
                for name, data in mine.items()
            )
            return "text/html", f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
        files = [
            {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}
            for name, data in mine.items()
        ]
        body = {"meta": {"api-version": "1.1"}, "name": project, "files": files}
        return JSON, json.dumps(body).encode()


@contextlib.contextmanager
def serve() -> Iterator[Index]:
    """An index that answers on loopback until the end of the block."""
    index = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.seen.append((self.path, self.headers.get("Authorization", "")))
            _, kind, *rest = self.path.split("/")
            answer: tuple[str, bytes] | None = None
            if kind == "simple":
                answer = index.page(rest[0])
            elif kind == "files":
                data = next((data for (_, name), data in index.files.items() if name == rest[0]), None)
                answer = ("application/octet-stream", data) if data is not None else None
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", answer[0] if answer else "text/plain")
            self.send_header("Content-Length", str(len(answer[1]) if answer else 0))
            self.end_headers()
            if answer:
                self.wfile.write(answer[1])

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="index")
    thread.start()
    index.url = f"http://127.0.0.1:{server.server_port}/simple"
    try:
        yield index
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def wheel(project: str, version: str, modules: dict[str, str]) -> tuple[str, bytes]:
    """A pure-Python wheel: (file name, bytes)."""
    info = f"{project}-{version}.dist-info"
    files = {
        **modules,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(zipfile.ZipInfo(name, (2021, 1, 1, 0, 0, 0)), text)
    return f"{project}-{version}-py3-none-any.whl", data.getvalue()


def sdist(project: str, version: str, files: dict[str, str]) -> tuple[str, bytes]:
    """A source distribution: (file name, bytes)."""
    data = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=data, mode="wb", mtime=0) as packed,  # the same bytes whenever it is called
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, text in {"PKG-INFO": f"Name: {project}\nVersion: {version}\n", **files}.items():
            member = tarfile.TarInfo(f"{project}-{version}/{name}")
            member.size, member.mtime, member.uid, member.uname = len(text.encode()), 1600000000, 1234, "someone"
            archive.addfile(member, io.BytesIO(text.encode()))
    return f"{project}-{version}.tar.gz", data.getvalue()


def bundled_pip() -> tuple[str, bytes]:
    """The pip wheel that comes with this Python: (version, bytes)."""
    found = next((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    return found.name.split("-")[1], found.read_bytes()
