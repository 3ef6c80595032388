"""As `entrypoint`, and only evaluates: the rollouts of `data.val_data` and their figures."""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_minisandbox.training import entrypoint


def main(argv: Sequence[str] | None = None) -> None:
    """See `entrypoint.main`."""
    entrypoint.main(argv, mode="generate")


if __name__ == "__main__":
    main()
