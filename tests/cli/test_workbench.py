"""Jobs of a command, run side by side."""

from __future__ import annotations

from concurrent import futures

import pytest

from skyrl_minisandbox.cli import workbench


def test_no_job_starts_once_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The thread that looks at the jobs is late by as much as it can be.
    monkeypatch.setattr(workbench, "wait", lambda pending, return_when: futures.wait(pending))
    started: list[int] = []

    def fails() -> None:
        raise ValueError("the first")

    with pytest.raises(ValueError, match="the first"):
        workbench.in_threads([fails, lambda: started.append(1)], 1, on_error=lambda: None)
    assert started == []
