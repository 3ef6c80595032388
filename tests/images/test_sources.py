"""What comes from the index is what was recorded, and what does not come is said clearly."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import InputError, MachineError
from skyrl_minisandbox.images.pip_config import PipConfig, scrub
from skyrl_minisandbox.images.sources import Sources
from tests.images import index as indexes
from tests.support import needs


@pytest.fixture
def sources(index: indexes.Index, tmp_path: Path) -> Sources:
    for version in ("0.9", "1.0", "1.1", "2.0rc1"):
        index.add("tiny-lib", *indexes.sdist("tiny_lib", version, {"a.py": version}))
    index.add("tiny-lib", *indexes.wheel("tiny_lib", "1.2", {"a.py": "1.2"}))
    return Sources(tmp_path / "sources", PipConfig(index_urls=(index.url,), timeout=5))


@pytest.mark.parametrize("html", [False, True], ids=["PEP 691", "PEP 503"])
def test_an_sdist_is_fetched_once_and_verified(index: indexes.Index, sources: Sources, html: bool) -> None:
    index.html = html
    wanted = index.files["tiny-lib", "tiny_lib-1.0.tar.gz"]
    path = sources.sdist("Tiny.Lib", "1.0", hashlib.sha256(wanted).hexdigest())
    assert path.read_bytes() == wanted and path.name == "tiny_lib-1.0.tar.gz"
    asked = len(index.seen)
    assert sources.sdist("tiny_lib", "1.0") == path
    assert len(index.seen) == asked


def test_a_version_may_be_written_another_way(sources: Sources) -> None:
    assert sources.sdist("tiny-lib", "1.0.0").name == "tiny_lib-1.0.tar.gz"
    assert sources.sdist("tiny-lib", "2.0.rc1").name == "tiny_lib-2.0rc1.tar.gz"


def test_a_version_that_does_not_exist_is_told_with_those_near_it(sources: Sources) -> None:
    with pytest.raises(InputError) as caught:
        sources.sdist("tiny-lib", "1.0.5")
    assert caught.value.message == (
        "package `tiny-lib` has no version 1.0.5 on the package index; near it: 0.9, 1.0, 1.1, 1.2, 2.0rc1"
    )


def test_a_release_without_an_sdist_is_told_as_such(sources: Sources) -> None:
    with pytest.raises(InputError, match=r"tiny-lib 1\.2 has no source distribution"):
        sources.sdist("tiny-lib", "1.2")


def test_a_package_that_does_not_exist_is_the_users_input(sources: Sources) -> None:
    with pytest.raises(InputError, match=r"package `nothing-here` does not exist on http://127\.0\.0\.1"):
        sources.sdist("nothing-here", "1.0")


def test_a_file_other_than_the_recorded_one_is_refused_and_not_kept(sources: Sources) -> None:
    with pytest.raises(InputError, match=r"hashes to sha256:.*the recipe says sha256:000"):
        sources.sdist("tiny-lib", "1.0", "0" * 64)
    assert [name for name in os.listdir(sources.directory / "tiny-lib") if name != "lock"] == []


def test_a_download_other_than_the_index_says_is_refused(index: indexes.Index, sources: Sources) -> None:
    index.html = True
    page = index.page("tiny-lib")
    assert page is not None
    index.page = lambda project: page  # type: ignore[method-assign]
    index.files["tiny-lib", "tiny_lib-1.0.tar.gz"] += b"more"
    with pytest.raises(InputError, match="the index says"):
        sources.sdist("tiny-lib", "1.0")


def test_an_index_that_is_down_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # a port that nobody answers on
        url = f"http://user:hunter2@127.0.0.1:{sock.getsockname()[1]}/simple"
        monkeypatch.setattr("skyrl_minisandbox.images.sources.time.sleep", lambda seconds: None)
        with pytest.raises(MachineError) as caught:
            Sources(tmp_path, PipConfig(index_urls=(url,), timeout=1)).sdist("tiny-lib", "1.0")
    assert "does not answer" in caught.value.message and "pip config list" in caught.value.hint
    assert "hunter2" not in caught.value.render()


def test_credentials_of_the_index_are_sent_and_not_told(index: indexes.Index, sources: Sources, tmp_path: Path) -> None:
    url = index.url.replace("http://", "http://someone:s3cret@")
    private = Sources(tmp_path / "private", PipConfig(index_urls=(url,)))
    private.sdist("tiny-lib", "1.0")
    assert all(header.startswith("Basic ") for _, header in index.seen)
    with pytest.raises(InputError) as caught:
        private.sdist("nothing-here", "1")
    assert "s3cret" not in caught.value.render()


def test_a_directory_of_files_serves_without_any_index(tmp_path: Path) -> None:
    name, data = indexes.sdist("tinylib", "0.1", {"a.py": ""})
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / name).write_bytes(data)
    config = PipConfig(index_urls=(), find_links=(str(tmp_path / "links"),))
    assert Sources(tmp_path / "s", config).sdist("tinylib", "0.1").read_bytes() == data


def test_pips_files_and_variables_are_read_in_pips_order(tmp_path: Path) -> None:
    (tmp_path / ".config/pip").mkdir(parents=True)
    low = "[global]\nindex-url = https://low/simple\ncert = /low.pem\ntimeout = 7\n"
    (tmp_path / ".config/pip/pip.conf").write_text(low)
    high = "[global]\nindex_url = https://high/simple/\nextra-index-url =\n  https://x/s\n  https://y/s\n"
    (tmp_path / "mine.conf").write_text(high)
    environ = {"PIP_CONFIG_FILE": str(tmp_path / "mine.conf"), "HOME": str(tmp_path)}
    config = PipConfig.load(environ)
    assert config.index_urls == ("https://high/simple", "https://x/s", "https://y/s")
    assert config.cert == "/low.pem" and config.timeout == 7
    assert PipConfig.load({**environ, "PIP_INDEX_URL": "https://env/simple"}).index_urls[0] == "https://env/simple"
    off = PipConfig.load({**environ, "PIP_CONFIG_FILE": os.devnull})
    assert off == PipConfig()


def test_credentials_of_a_netrc_are_used(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine idx.test login someone password s3cret\n")
    environ = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "https://idx.test/simple"}
    config = PipConfig.load(environ)
    assert config.index_urls == ("https://someone:s3cret@idx.test/simple",)
    assert (
        scrub("GET https://someone:s3cret@idx.test/simple/x", config.secrets()) == "GET https://****@idx.test/simple/x"
    )


@needs("network")
def test_the_users_own_index_has_a_real_package(tmp_path: Path) -> None:
    sources = Sources(tmp_path)
    recorded = "2d91e135bf72d31a410b17c16da610a82cb55f6b0477d1a902134b24a455b8b3"
    path = sources.sdist("iniconfig", "2.0.0", recorded)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == recorded
    with pytest.raises(InputError, match=r"no version 99\.0.*near it: .*2\.0\.0"):
        sources.sdist("iniconfig", "99.0")
