"""scripts/bench/training: what a rollout costs a trainer beside its commands and its model."""
