"""What a build may reach, and how: resolver, proxies, certificates and the package index of the user.

All of it is there for the time of a build and in no layer: files are bound below a tmpfs, the rest is
environment. Credentials stand in no argv; `scrub` keeps them out of logs.
"""

from __future__ import annotations

import dataclasses
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from skyrl_minisandbox.images.pip_config import PipConfig, scrub
from skyrl_minisandbox.sandbox.spec import Bind

PRIVATE = "/run/minisandbox"
"""Below the tmpfs that a build's sandbox has at /run."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy")
_CERTIFICATES = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO")


@dataclasses.dataclass(frozen=True)
class Access:
    """binds and env for the sandbox of a build step that needs the network; secrets to keep out of its log."""

    binds: tuple[Bind, ...]
    env: Mapping[str, str]
    secrets: tuple[str, ...]

    def scrub(self, text: str) -> str:
        return scrub(text, self.secrets)


def host_access(config: PipConfig, environ: Mapping[str, str] | None = None) -> Access:
    """The access that this machine's user has."""
    environ = os.environ if environ is None else environ
    binds: list[Bind] = []
    env: dict[str, str] = {}
    for path in ("/etc/resolv.conf", "/etc/hosts"):
        if os.path.isfile(path):
            binds.append(Bind(os.path.realpath(path), path))
    for name in _PROXIES:
        for spelling in (name, name.upper()):
            if value := environ.get(spelling):
                env[spelling] = value
    if bundle := _certificates(config, environ):
        inside = f"{PRIVATE}/ca.pem"
        binds.append(Bind(bundle, inside))
        env.update(dict.fromkeys(_CERTIFICATES, inside))
    env.update(_pip(config, binds))
    secrets = (
        config.secrets() + PipConfig(index_urls=tuple(env[key] for key in env if "proxy" in key.lower())).secrets()
    )
    return Access(tuple(binds), env, secrets)


def _certificates(config: PipConfig, environ: Mapping[str, str]) -> str:
    """The CA bundle that this machine trusts; some tools bring one of their own, which a company's proxy is not in."""
    candidates = [config.cert, *(environ.get(name, "") for name in _CERTIFICATES)]
    candidates.append(ssl.get_default_verify_paths().cafile or "")
    candidates += ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"]
    return next((os.path.realpath(path) for path in candidates if path and os.path.isfile(path)), "")


def _pip(config: PipConfig, binds: list[Bind]) -> dict[str, str]:
    """pip's settings as variables; directories of this machine are bound and named by where they lie inside."""
    indexes = [_inside(url, binds, whole_parent=True) for url in config.index_urls]
    links = [_inside(place, binds, whole_parent=False) for place in config.find_links]
    env = {
        "PIP_CONFIG_FILE": os.devnull,
        # For options that begin with `no-`, pip reads a false value as "do not"; a true one would turn them on.
        "PIP_NO_CACHE_DIR": "false",
        "PIP_NO_COMPILE": "false",  # we compile, with hashes instead of time stamps
        "PIP_NO_WARN_SCRIPT_LOCATION": "false",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PIP_DEFAULT_TIMEOUT": f"{config.timeout:.0f}",
        "PIP_RETRIES": "5",
        "PIP_TRUSTED_HOST": " ".join(config.trusted_hosts),
        "PIP_PROXY": config.proxy,
        "PIP_FIND_LINKS": " ".join(links),
        "PIP_INDEX_URL": indexes[0] if indexes else "",
        "PIP_EXTRA_INDEX_URL": " ".join(indexes[1:]),
        "PIP_NO_INDEX": "" if indexes else "1",
    }
    return {key: value for key, value in env.items() if value}


def _inside(place: str, binds: list[Bind], *, whole_parent: bool) -> str:
    """`place` itself, or where it is inside when it is a directory here.

    whole_parent: bind the directory above, because the pages of an index name their files by `../../files/…`.
    """
    if "://" in place and not place.startswith("file:"):
        return place
    path = Path(unquote(urlsplit(place).path)) if place.startswith("file:") else Path(place).absolute()
    if not path.is_dir():
        return place
    source = path.parent if whole_parent and path.parent != Path("/") else path
    target = f"{PRIVATE}/index{len(binds)}"
    binds.append(Bind(str(source.resolve()), target))
    inside = f"{target}/{path.relative_to(source)}" if source != path else target
    return f"file://{inside}" if place.startswith("file:") else inside
