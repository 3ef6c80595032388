"""Files from the user's package index, verified and cached: source distributions, and the pip wheel for builds.

DIRECTORY/
  PACKAGE/FILENAME     a file whose SHA-256 was right when it was renamed here
  PACKAGE/lock         one download at a time
"""

from __future__ import annotations

import dataclasses
import hashlib
import html.parser
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import requests

from skyrl_minisandbox.errors import InputError, MachineError
from skyrl_minisandbox.images.locks import disk_room, locked
from skyrl_minisandbox.images.pip_config import PipConfig, public_url, scrub

_JSON = "application/vnd.pypi.simple.v1+json"
_ACCEPT = f"{_JSON}, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"  # PEP 691
_TRIES = 3
_SDIST_ENDINGS = (".tar.gz", ".zip", ".tar.bz2", ".tgz", ".tar.xz")


@dataclasses.dataclass(frozen=True)
class _Link:
    """One file of an index. sha256 is empty where the index tells none."""

    filename: str
    url: str
    sha256: str


class Sources:
    """Downloads below one directory; safe for any number of threads and processes.

    directory: made when it does not exist.
    config: where packages come from; default what pip is configured with.
    """

    def __init__(self, directory: str | os.PathLike[str], config: PipConfig | None = None) -> None:
        self.directory = Path(directory).absolute()
        self.config = config or PipConfig.load()

    def sdist(self, package: str, version: str, sha256: str = "", filename: str = "") -> Path:
        """The source distribution of one release.

        sha256: hex; what the file must hash to. filename: which, when a release has several.

        Raises `InputError` when the package, the version or the file does not exist, or is not what `sha256` says;
        `MachineError` when no index answers or the disk is full.
        """
        return self._get(package, version, sha256, filename, _is_sdist)

    def wheel(self, package: str, version: str, sha256: str = "") -> Path:
        """The pure-Python wheel (`…-none-any.whl`) of one release; raises as `sdist` does."""
        return self._get(package, version, sha256, "", _is_any_wheel)

    def _get(
        self, package: str, version: str, sha256: str, filename: str, fits: Callable[[str, str, str], bool]
    ) -> Path:
        folder = self.directory / normalise(package)
        with locked(folder / "lock"):
            if found := _cached(folder, package, version, sha256, filename, fits):
                return found
            links = self._links(package)
            chosen = _choose(links, package, version, sha256, filename, fits)
            return self._download(chosen, folder, f"{package} {version}", sha256)

    # the index

    def _links(self, package: str) -> list[_Link]:
        """Every file that the configured indexes and link directories have for a package."""
        links: list[_Link] = []
        unreachable: list[str] = []
        for place in self.config.find_links:
            links += _local_links(place)
        for index in self.config.index_urls:
            try:
                links += self._index_links(f"{index}/{normalise(package)}/")
            except MachineError as error:
                unreachable.append(error.message)
        mine = [link for link in links if normalise(_project(link.filename)) == normalise(package)]
        if mine:
            return mine
        if unreachable:
            raise MachineError(
                f"package `{package}`: {'; '.join(unreachable)}",
                hint="check the network and pip's settings: `pip config list`, `pip download --no-deps pip`",
            )
        indexes = ", ".join(public_url(url) for url in self.config.index_urls) or "no index (no-index is set)"
        raise InputError(
            f"package `{package}` does not exist on {indexes}",
            hint=f"check its name, and `pip index versions {package}`",
        )

    def _index_links(self, url: str) -> list[_Link]:
        if url.startswith("file:"):
            page = Path(unquote(urlsplit(url).path)) / "index.html"
            return _html_links(page.read_text("utf-8", "replace"), url) if page.is_file() else []
        response = self._request(url, headers={"Accept": _ACCEPT})
        if response is None:
            return []
        if "json" in response.headers.get("Content-Type", ""):
            return [
                _Link(entry["filename"], urljoin(response.url, entry["url"]), entry.get("hashes", {}).get("sha256", ""))
                for entry in response.json()["files"]
            ]
        return _html_links(response.text, response.url)

    def _request(self, url: str, **more: Any) -> requests.Response | None:
        """GET with retries; None for "not found"."""
        host = urlsplit(url).netloc.rpartition("@")[2]
        trusted = {host, host.partition(":")[0]} & set(self.config.trusted_hosts)
        proxies = {"http": self.config.proxy, "https": self.config.proxy} if self.config.proxy else None
        fault = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(0.5 * 2**attempt)  # nothing to wait on: the other side is busy
            try:
                response = requests.get(
                    url,
                    timeout=self.config.timeout,
                    # Only what pip itself is told; without it requests reads REQUESTS_CA_BUNDLE.
                    verify=False if trusted else (self.config.cert or None),
                    proxies=proxies,
                    **more,
                )
            except requests.RequestException as error:
                fault = _cause(error)
                continue
            if response.status_code in (404, 410):
                return None
            if response.ok:
                return response
            fault = f"status {response.status_code} {response.reason}"
            if response.status_code < 500 and response.status_code != 429:
                break
        raise MachineError(
            scrub(f"{public_url(url)} does not answer: {fault}", self.config.secrets()),
            hint="check the network, proxy variables and pip's settings: `pip config list`",
        )

    # files

    def _download(self, link: _Link, folder: Path, what: str, wanted: str) -> Path:
        target = folder / link.filename
        aside = folder / f".{uuid.uuid4().hex[:12]}"
        for old in folder.glob(".*"):  # we hold the lock: these are of dead processes
            old.unlink(missing_ok=True)
        try:
            with disk_room(folder):
                found = self._fetch(link.url, aside)
            for expected, of in ((link.sha256, "the index says"), (wanted, "the recipe says")):
                if expected and found != expected:
                    raise InputError(
                        f"{link.filename} of {what} hashes to sha256:{found}; {of} sha256:{expected}",
                        hint="the index serves another file than was recorded; check where it comes from: "
                        "`pip config list`",
                    )
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
        return target

    def _fetch(self, url: str, aside: Path) -> str:
        """Write the file at `url` to `aside`; returns its SHA-256."""
        known = hashlib.sha256()
        with open(aside, "wb") as file:
            if url.startswith("file:"):
                chunks: Any = [Path(unquote(urlsplit(url).path)).read_bytes()]
            else:
                response = self._request(url)
                if response is None:
                    raise MachineError(f"{public_url(url)} is listed by the index but not there")
                chunks = [response.content]
            for chunk in chunks:
                known.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return known.hexdigest()


def normalise(package: str) -> str:
    """PEP 503's form of a project name."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _project(filename: str) -> str:
    """The project's name in a file name: up to the first `-` that a digit follows (PEP 625 and before)."""
    return re.split(r"-(?=v?\d)", filename, maxsplit=1)[0]


def _version(filename: str, package: str) -> str:
    stem = filename
    for ending in (*_SDIST_ENDINGS, ".whl"):
        stem = stem.removesuffix(ending)
    rest = re.match(r"[-_.]".join(re.escape(part) for part in normalise(package).split("-")), stem, re.IGNORECASE)
    after = stem[rest.end() :].lstrip("-") if rest else re.split(r"-(?=v?\d)", stem, maxsplit=1)[-1]
    return after.partition("-")[0]


def _same_version(one: str, other: str) -> bool:
    """Equal but for what PEP 440 does not tell apart: `1.0` and `1.0.0`, case, a leading `v`, separators."""

    def key(version: str) -> str:
        plain = re.sub(r"[-_]", ".", version.lower().removeprefix("v")).replace(".post", "post").replace(".dev", "dev")
        release = re.match(r"[\d.]*\d|", plain)
        head = release.group(0) if release else ""
        return re.sub(r"(\.0+)+$", "", head) + plain[len(head) :].replace(".", "")

    return key(one) == key(other)


def _is_sdist(filename: str, package: str, version: str) -> bool:
    return filename.endswith(_SDIST_ENDINGS) and _same_version(_version(filename, package), version)


def _is_any_wheel(filename: str, package: str, version: str) -> bool:
    return filename.endswith("-none-any.whl") and _same_version(_version(filename, package), version)


def _cached(
    folder: Path,
    package: str,
    version: str,
    sha256: str,
    filename: str,
    fits: Callable[[str, str, str], bool],
) -> Path | None:
    """A file that is here already; one that does not hash to what is asked is not (it may be of another index)."""
    names = [filename] if filename else sorted(os.listdir(folder))
    for name in names:
        path = folder / name
        if name.startswith(".") or not path.is_file() or not (filename or fits(name, package, version)):
            continue
        if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            continue
        return path
    return None


def _choose(
    links: Sequence[_Link],
    package: str,
    version: str,
    sha256: str,
    filename: str,
    fits: Callable[[str, str, str], bool],
) -> _Link:
    if filename:
        named = [link for link in links if link.filename == filename]
    else:
        named = [link for link in links if fits(link.filename, package, version)]
    if named:
        right = [link for link in named if link.sha256 == sha256] if sha256 else []
        # `.tar.gz` before `.zip`: the same content, and modes are kept.
        return min(right or named, key=lambda link: not link.filename.endswith(".tar.gz"))
    kind = "source distribution" if fits is _is_sdist else "pure-Python wheel"
    have = {_version(link.filename, package) for link in links if link.filename.endswith((*_SDIST_ENDINGS, ".whl"))}
    if any(_same_version(known, version) for known in have):
        wanted = f" named {filename}" if filename else ""
        raise InputError(
            f"{package} {version} has no {kind}{wanted} on the package index",
            hint=f"look at its files: `pip download --no-deps --no-binary :all: {package}=={version}`",
        )
    raise InputError(
        f"package `{package}` has no version {version} on the package index; "
        f"near it: {', '.join(_near(have, version))}",
        hint=f"see `pip index versions {package}`",
    )


def _near(versions: set[str], wanted: str, count: int = 6) -> list[str]:
    """The versions around `wanted` in order."""

    def key(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version))

    ordered = sorted(versions, key=key)
    place = sum(key(version) < key(wanted) for version in ordered)
    start = max(0, min(place - count // 2, len(ordered) - count))
    return ordered[start : start + count]


def _local_links(place: str) -> list[_Link]:
    """The files of a `find-links` directory; pages on the web are left to pip."""
    path = Path(unquote(urlsplit(place).path)) if place.startswith("file:") else Path(place)
    if "://" in place and not place.startswith("file:"):
        return []
    if path.is_file():
        return _html_links(path.read_text("utf-8", "replace"), path.absolute().as_uri())
    if not path.is_dir():
        return []
    return [_Link(name, (path / name).absolute().as_uri(), "") for name in sorted(os.listdir(path))]


class _Anchors(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.targets += [value for name, value in attributes if name == "href" and value]


def _html_links(text: str, base: str) -> list[_Link]:
    """The files of a PEP 503 page."""
    parser = _Anchors()
    parser.feed(text)
    links = []
    for target in parser.targets:
        url, fragment = urldefrag(urljoin(base, target))
        name = unquote(urlsplit(url).path.rpartition("/")[2])
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
        links.append(_Link(name, url, sha256))
    return links


def _cause(error: BaseException) -> str:
    """The innermost reason of a requests error, without the layers of class names around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error) or type(error).__name__
