"""The peers of our sandbox, one module a family. None is product code; each is what its own manual says to type."""

from __future__ import annotations

from benches.contender import Contender
from benches.sandbox.peers.engines import Docker, Podman
from benches.sandbox.peers.libraries import Nitrobox, Sandlock
from benches.sandbox.peers.programs import Bubblewrap, Reference
from benches.sandbox.peers.runtimes import Crun, Runc

PEERS: tuple[type[Contender], ...] = (
    Nitrobox, Bubblewrap, Sandlock, Crun, Runc, Podman, Docker, Reference,
)
DEBIAN_PACKAGES = ("gcc", "libc6-dev", "mmdebstrap", "bubblewrap", "crun", "runc", "podman", "docker.io")
