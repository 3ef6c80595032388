"""Everything of base `host` works for an ordinary user too, and what it leaves can be removed by it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import support
from tests.images import index as indexes
from tests.support import needs

BUILD = """
import shutil, sys
from skyrl_minisandbox.images.build import build_image
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.pip_config import PipConfig
from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.images.store import Store
from skyrl_minisandbox.sandbox import Sandbox
where, url, pip = sys.argv[1:4]
recipe = Recipe(
    packages=("tinydep==1.0", "pip==" + pip), workdir="/testbed", python=sys.argv[4] or None,
    commands=("mkdir -p locked && touch locked/x && chmod 0500 locked && rm -r /srv && echo done > made",),
)
store, cache = Store(where + "/store"), Cache(where + "/cache")
sources = Sources(where + "/sources", PipConfig(index_urls=(url,)))
image = build_image(recipe, store=store, cache=cache, sources=sources)
with cache.checkout(image, store) as checkout, Sandbox(checkout.sandbox_spec()) as sandbox:
    told = sandbox.run("id -u; cat made; python -c 'import tinydep; print(tinydep.ANSWER)'; test -e /srv || echo gone")
    print(told.output)
shutil.rmtree(where)  # no mode or owner stands in the way
"""


@needs("rootless")
def test_a_user_builds_and_checks_out_on_base_host(user: support.OrdinaryUser, index: indexes.Index) -> None:
    version, data = indexes.bundled_pip()
    index.add("pip", f"pip-{version}-py3-none-any.whl", data)
    index.add("tinydep", *indexes.wheel("tinydep", "1.0", {"tinydep.py": "ANSWER = 42\n"}))
    python = "" if Path("/usr/bin/python3").exists() else f"{sys.version_info.major}.{sys.version_info.minor}"
    where = user.home / "images"
    done = user.run([user.python, "-c", BUILD, where, index.url, version, python], check=True)
    assert done.stdout.split() == ["0", "done", "42", "gone"]
    assert not where.exists()


@pytest.mark.ci
@needs("rootless", "network", "python3.9")
def test_a_user_gets_an_interpreter_from_a_prefix(user: support.OrdinaryUser) -> None:
    prefix = support.find_python("3.9")
    assert prefix is not None
    program = """
import sys
from skyrl_minisandbox.images import Cache, Recipe, Store, build_image
from skyrl_minisandbox.sandbox import Sandbox
store, cache = Store(sys.argv[1] + "/store"), Cache(sys.argv[1] + "/cache")
recipe = Recipe(python="3.9", packages=("iniconfig==2.0.0",))
image = build_image(recipe, store=store, cache=cache, pythons=[sys.argv[2]])
with cache.checkout(image, store) as checkout, Sandbox(checkout.sandbox_spec()) as sandbox:
    print(sandbox.run("python -c 'import iniconfig, ssl, sys; print(sys.version_info[:2])'", timeout=60).output)
"""
    done = user.run(
        [user.python, "-c", program, user.home / "py39", support.readable_python(prefix)], timeout=300, check=True
    )
    assert done.stdout.startswith("(3, 9)")
