"""scripts/bench/sandbox: a sandbox beside its floor and its peers."""
