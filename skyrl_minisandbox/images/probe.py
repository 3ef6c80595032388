"""Whether a directory can hold an overlay upper: told by the kernel, by mounting one."""

from __future__ import annotations

from pathlib import Path

from skyrl_minisandbox.sandbox.spec import SandboxSpec


def try_upper(layer: Path, upper: Path | None) -> None:
    """Open a sandbox over the empty directory `layer` with its upper at `upper`, and write into it.

    Raises what the sandbox raises, `OSError` when the write fails.
    """
    from skyrl_minisandbox.sandbox import Sandbox

    layer.chmod(0o755)
    with Sandbox(SandboxSpec(layers=(layer,), upper=upper)) as sandbox:
        sandbox.write_file("/probe/file", b"x")
