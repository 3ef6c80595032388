"""The base `host` shows what is on its lists, and nothing else of the machine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.images import host
from tests.images.conftest import Local, local_recipe
from tests.support import needs


@pytest.fixture
def fake_host(tmp_path: Path) -> Path:
    """A host's tree with things that everybody may read and must not be seen."""
    root = tmp_path / "host"
    files = {
        "etc/passwd": "alice:x:1234:1234:Alice:/home/alice:/bin/zsh",
        "etc/pip.conf": "index-url = https://me:SECRET@x/",
        "etc/resolv.conf": "nameserver SECRET",
        "etc/hosts": "10.0.0.1 SECRET",
        "etc/hostname": "SECRET",
        "etc/ssl/private/key.pem": "SECRET",
        "etc/ssl/certs/ca-certificates.crt": "certificates",
        "etc/ssl/certs/key.pem": "SECRET",
        "etc/ld.so.conf": "include /etc/ld.so.conf.d/*.conf",
        "etc/services": "http 80/tcp",
        "opt/secret": "SECRET",
        "home/alice/notes": "SECRET",
        "usr/local/share/secret": "SECRET",
        "root/.ssh/id": "SECRET",
        "usr/bin/true": "",
        "srv/data": "SECRET",
        "usr/lib/python3/dist-packages/project.py": "SECRET",
        "usr/lib64/python3.13/site-packages/project.py": "SECRET",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "etc/ssl/certs/key.pem").chmod(0o640)
    (root / "bin").symlink_to("usr/bin")
    (root / "lib64").symlink_to("/usr/lib64")
    (root / "lib").mkdir()
    (root / "etc/ssl/certs/local.pem").symlink_to("/usr/local/share/secret")
    (root / "etc/localtime").symlink_to("/usr/share/zoneinfo/UTC")
    return root


def test_etc_is_made_of_what_is_allowed(fake_host: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    binds, keep = host.make_root(made, fake_host)
    texts = {str(path.relative_to(made)): path.read_text() for path in made.rglob("*") if path.is_file()}
    assert not [name for name, text in texts.items() if "SECRET" in text or "alice" in text]
    assert texts["etc/ssl/certs/ca-certificates.crt"] == "certificates"
    assert texts["etc/services"] == "http 80/tcp" and texts["etc/resolv.conf"] == ""
    assert texts["etc/passwd"].startswith("root:x:0:0:") and "user:x:1000:1000" in texts["etc/passwd"]
    assert os.readlink(made / "etc/localtime") == "/usr/share/zoneinfo/UTC"
    assert not os.path.lexists(made / "etc/ssl/certs/local.pem")
    assert os.readlink(made / "bin") == "usr/bin" and os.readlink(made / "lib64") == "usr/lib64"
    packages = ("/usr/lib/python3/dist-packages", "/usr/lib64/python3.13/site-packages")
    assert keep == ("/usr/local", *packages) and all(os.listdir(f"{made}{path}") == [] for path in packages)
    assert binds == ((f"{fake_host}/usr", "/usr"), (f"{fake_host}/lib", "/lib"))  # /lib of this one is not merged
    assert sorted(os.listdir(made / "usr/local")) == ["bin", "etc", "include", "lib", "sbin", "share", "src"]
    assert os.listdir(made / "opt") == [] and os.listdir(made / "root") == []
    assert (made / "tmp").stat().st_mode & 0o7777 == 0o1777


def test_the_facts_of_a_host_are_told_apart() -> None:
    facts = host.facts()
    assert facts["kind"] == "host" and all(facts[key] for key in ("os", "glibc", "packages", "machine"))
    assert host.facts_digest(facts) == host.facts_digest(dict(reversed(facts.items())))
    assert host.facts_digest(facts) != host.facts_digest({**facts, "packages": "other"})


@pytest.fixture
def planted() -> Iterator[dict[str, str]]:
    """A secret that everybody may read, in three places of the real host. path -> secret."""
    secret = secrets.token_hex(16)
    name = f"minisandbox-secret-{secret[:8]}"
    pip_conf = Path("/etc/pip.conf")
    before = pip_conf.read_bytes() if pip_conf.exists() else None
    places = [Path("/usr/local/share") / name, Path("/opt") / name]
    if Path("/usr/lib/python3/dist-packages").is_dir():  # where a later release of a task's own project may lie
        places.append(Path("/usr/lib/python3/dist-packages") / name)
    made_directories = [place.parent for place in places if not place.parent.exists()]
    try:
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(secret)
            place.chmod(0o644)
        pip_conf.write_bytes((before or b"") + f"\n# {secret}\n".encode())
        yield {str(place): secret for place in (*places, pip_conf)}
    finally:
        for place in places:
            place.unlink(missing_ok=True)
        for directory in made_directories:
            directory.rmdir()
        if before is None:
            pip_conf.unlink(missing_ok=True)
        else:
            pip_conf.write_bytes(before)


@needs("root", "overlay")
def test_a_secret_that_everybody_may_read_on_the_host_is_not_readable_inside(
    planted: dict[str, str], local: Local
) -> None:
    from skyrl_minisandbox.sandbox import Sandbox

    image = local.build(local_recipe(local.index))
    (secret,) = set(planted.values())
    with local.cache.checkout(image, local.store) as checkout, Sandbox(checkout.sandbox_spec()) as sandbox:
        assert sandbox.run("git --version && python -c 'import tinydep'", timeout=60).exit_code == 0  # it works at all
        for path in planted:
            assert secret not in sandbox.run(["cat", path], timeout=60).output
        found = sandbox.run(
            f"grep -rl --exclude-dir=proc --exclude-dir=sys {secret} /etc /opt /usr/local /home /root /srv /mnt",
            timeout=60,
        )
        assert found.stdout == b""
        assert sandbox.run("touch /usr/local/share/mine && test -w /usr/local/share/mine", timeout=60).exit_code == 0
        assert sandbox.run("touch /usr/share/mine", timeout=60).exit_code != 0
