"""The `minisandbox` command: one file per verb, configured by Hydra overrides."""
