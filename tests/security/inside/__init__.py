"""What runs inside a sandbox and tries to get out. Standard library only: the files are put into the test's layer.

The rows and their verdicts are the isolation probes that `docs/security.md` shows; `common.py` has the rules.
"""
