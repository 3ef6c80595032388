"""Where this user's packages come from: what pip would read, read the same way.

Lowest first, as pip has it: global, user, site (the running environment's), the file of PIP_CONFIG_FILE,
then PIP_* variables. URLs may carry credentials: they go out of here only to whoever connects.
"""

from __future__ import annotations

import configparser
import dataclasses
import netrc
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

DEFAULT_INDEX = "https://pypi.org/simple"
"""pip's own default."""


@dataclasses.dataclass(frozen=True)
class PipConfig:
    """index_urls: the main one first, then the extra ones. find_links: directories or URLs of pages with links.

    cert: a CA bundle, empty for the default. timeout: seconds.
    """

    index_urls: tuple[str, ...] = (DEFAULT_INDEX,)
    find_links: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    cert: str = ""
    proxy: str = ""
    timeout: float = 15.0

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> PipConfig:
        """Read pip's configuration files and PIP_* variables."""
        environ = os.environ if environ is None else environ
        values: dict[str, str] = {}
        for path in config_files(environ):
            values.update(_read(path))
        for key in (
            "index-url",
            "extra-index-url",
            "find-links",
            "trusted-host",
            "cert",
            "proxy",
            "timeout",
            "no-index",
        ):
            if found := environ.get("PIP_" + key.upper().replace("-", "_")):
                values[key] = found
        timeout = values.get("timeout") or environ.get("PIP_DEFAULT_TIMEOUT") or values.get("default-timeout") or "15"
        main = [values.get("index-url") or DEFAULT_INDEX]
        if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
            main = []
        urls = main + values.get("extra-index-url", "").split() if main else []
        return cls(
            index_urls=tuple(with_netrc(url.rstrip("/"), environ) for url in urls),
            find_links=tuple(values.get("find-links", "").split()),
            trusted_hosts=tuple(values.get("trusted-host", "").split()),
            cert=values.get("cert", ""),
            proxy=values.get("proxy", ""),
            timeout=float(timeout) if re.fullmatch(r"\d+(\.\d+)?", timeout) else 15.0,
        )

    def secrets(self) -> tuple[str, ...]:
        """Every password and token that a message or a log must not show."""
        found = set()
        for url in (*self.index_urls, *self.find_links, self.proxy):
            parts = urlsplit(url)
            userinfo = parts.netloc.rpartition("@")[0]
            if userinfo:
                user, _, password = userinfo.partition(":")
                found |= {userinfo, password or user}
        return tuple(sorted((text for text in found if len(text) >= 3), key=len, reverse=True))


def config_files(environ: Mapping[str, str]) -> list[Path]:
    """pip's configuration files that exist, lowest precedence first."""
    explicit = environ.get("PIP_CONFIG_FILE", "")
    if explicit == os.devnull:
        return []
    home = environ.get("HOME") or os.path.expanduser("~")
    paths = [Path(base) / "pip/pip.conf" for base in environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if base]
    paths += [Path("/etc/pip.conf"), Path(home) / ".pip/pip.conf"]
    paths += [Path(environ.get("XDG_CONFIG_HOME") or f"{home}/.config") / "pip/pip.conf", Path(sys.prefix) / "pip.conf"]
    if explicit:
        paths.append(Path(explicit))
    return [path for path in paths if path.is_file()]


def _read(path: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, "utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError):
        return {}
    values: dict[str, str] = {}
    for section in ("global", "install"):
        if parser.has_section(section):
            values.update({key.replace("_", "-"): value for key, value in parser.items(section)})
    return values


def with_netrc(url: str, environ: Mapping[str, str]) -> str:
    """The URL with the credentials that ~/.netrc (or NETRC) has for its host, when it has none of its own."""
    parts = urlsplit(url)
    if not parts.hostname or "@" in parts.netloc:
        return url
    file = environ.get("NETRC") or os.path.join(environ.get("HOME") or os.path.expanduser("~"), ".netrc")
    try:
        found = netrc.netrc(file).hosts.get(parts.hostname)
    except (OSError, netrc.NetrcParseError):
        return url
    if found is None:
        return url
    login, _, password = found
    return urlunsplit(parts._replace(netloc=f"{quote(login or '', '')}:{quote(password or '', '')}@{parts.netloc}"))


def public_url(url: str) -> str:
    """The URL without user and password, for messages."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def scrub(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret replaced by `****`."""
    for secret in secrets:
        text = text.replace(secret, "****")
    return text
