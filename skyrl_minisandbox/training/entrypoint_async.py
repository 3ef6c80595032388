"""As `entrypoint`, and trains fully asynchronously: generation goes on while the trainer works."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_minisandbox.training import entrypoint


def main(argv: Sequence[str] | None = None) -> None:
    """See `entrypoint.main`."""
    entrypoint.main(argv, mode="async")


if __name__ == "__main__":
    main()
