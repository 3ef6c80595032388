"""Runs in a peer's own virtual environment: driver.py PACKAGE ROOT STATE; a JSON line in, a JSON line out.

Standard library and the peer only.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import itertools
import json
import sys
import threading
import time
from importlib.metadata import version
from typing import Any


class Lacks(Exception):
    """The peer has no such thing."""


class NitroboxBox:
    """A rootfs directory, overlay, network of its own."""

    _numbers = itertools.count()

    def __init__(self, root: str, state: str) -> None:
        nitrobox = importlib.import_module("nitrobox")
        store: Any = importlib.import_module("nitrobox.image.store")
        # For a directory there is no image config to be had, and asking registries for it takes half a minute.
        store.get_image_config = lambda *_, **__: None
        config = nitrobox.SandboxConfig(
            image=root, env_base_dir=f"{state}/envs", rootfs_cache_dir=f"{state}/cache", net_isolate=True,
            memory_max="4g", pids_max="1024",
        )
        self._box: Any = nitrobox.Sandbox(config, name=f"bench-{next(self._numbers)}")
        self.pid = 0
        self.echo()

    def echo(self) -> None:
        output, code = self._box.run("echo peer")
        if output.strip() != "peer" or code:
            raise RuntimeError(f"answered {output!r}, {code}")

    def true(self) -> None:
        self._box.run(["/bin/true"])

    def reset(self) -> None:
        self._box.reset()
        self.echo()

    def close(self) -> None:
        self._box.delete()


class SandlockBox:
    def __init__(self, root: str, state: str) -> None:
        sandlock = importlib.import_module("sandlock")
        pipe, null = sandlock.StdioMode.PIPED, sandlock.StdioMode.NULL
        self._box: Any = sandlock.Sandbox(
            chroot=root, fs_readable=["/"], fs_writable=["/tmp"], max_memory="4G", max_processes=1024
        )
        self._process = self._box.popen(
            ["/bin/bash", "--noprofile", "--norc"], stdin=pipe, stdout=pipe, stderr=null
        )
        self.pid = int(self._process.pid)
        self.echo()

    def _say(self, text: bytes) -> None:
        self._process.stdin.write(text)
        self._process.stdin.flush()
        if self._process.stdout.readline() != b"peer\n":
            raise RuntimeError("the shell did not answer")

    def echo(self) -> None:
        self._say(b"echo peer\n")

    def true(self) -> None:
        self._say(b"/bin/true; echo peer\n")

    def reset(self) -> None:
        raise Lacks("nothing to reset: it has no root of its own")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


BOXES: dict[str, Any] = {"nitrobox": NitroboxBox, "sandlock": SandlockBox}


class Driver:
    def __init__(self, package: str, root: str, state: str) -> None:
        self._package, self._root, self._state = package, root, state
        self._boxes: dict[int, Any] = {}
        self._numbers = itertools.count()

    def answer(self, ask: dict[str, Any]) -> dict[str, Any]:
        verb = ask["verb"]
        if verb == "version":
            return {"version": version(self._package)}
        started = time.perf_counter()
        if verb == "open":
            box = self._make()
            seconds = time.perf_counter() - started
            key = next(self._numbers)
            self._boxes[key] = box
            return {"seconds": seconds, "key": key, "pid": box.pid}
        if verb == "rate":
            self._rate(ask["count"], ask["width"])
        else:
            box = self._boxes.pop(ask["key"]) if verb == "close" else self._boxes[ask["key"]]
            getattr(box, verb)()
        return {"seconds": time.perf_counter() - started}

    def _make(self) -> Any:
        return BOXES[self._package](self._root, self._state)

    def _rate(self, count: int, width: int) -> None:
        left = threading.Semaphore(count)

        def one() -> None:
            while left.acquire(blocking=False):
                self._make().close()

        with concurrent.futures.ThreadPoolExecutor(width) as pool:
            for future in [pool.submit(one) for _ in range(width)]:
                future.result()

    def close(self) -> None:
        for box in self._boxes.values():
            box.close()


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what the peer prints is not an answer
    driver = Driver(*sys.argv[1:4])
    try:
        for line in sys.stdin:
            try:
                answer = driver.answer(json.loads(line))
            except Lacks as error:
                answer = {"error": str(error), "absent": True}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        driver.close()


if __name__ == "__main__":
    main()
