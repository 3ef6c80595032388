"""Inits made ahead: in their namespaces and cgroup, with everything done that no request decides.

Cloning into new namespaces (a network namespace above all), the maps and the mounts that are the same in every sandbox
are most of what making one costs. A launcher that has nothing to do makes one or two inits up to that point; they wait
for a request and the root that comes with it. One is made on the spot when none is left: it goes the same way.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
from typing import Any

from skyrl_minisandbox.sandbox import limits, linux
from skyrl_minisandbox.sandbox.init import run_init
from skyrl_minisandbox.sandbox.mounts import HOST
from skyrl_minisandbox.sandbox.overlay import RANGE_SIZE, Ids, LauncherError

# Two: a fork needs one for the child and one for its parent.
READY_MADE = 2


class Spare:
    """One init that waits. line: where its request goes; owner_end: what its owner will talk to it through."""

    def __init__(
        self, pid: int, pidfd: int, network: str, cgroup: limits.Cgroup, line: socket.socket, owner_end: socket.socket
    ) -> None:
        self.pid, self.pidfd, self.network, self.cgroup = pid, pidfd, network, cgroup
        self._line, self.owner_end = line, owner_end

    def hand_over(self, request: dict[str, Any], fds: list[int]) -> None:
        """Give it its request, and its root and binds as descriptors. Raises `OSError` when it has ended."""
        socket.send_fds(self._line, [json.dumps(request).encode()], fds)
        self._line.close()

    @property
    def alive(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def end(self) -> None:
        """It is not wanted: kill it, and give back what it held."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._line.close()
        self.owner_end.close()


class Spares:
    """The ready-made inits of one launcher, and the way to make them."""

    def __init__(self, ids: Ids, cgroups: limits.Cgroups | None) -> None:
        self._ids, self._cgroups = ids, cgroups
        self._ready: list[Spare] = []
        self._ended: dict[int, Spare] = {}  # killed, but not reaped
        self._count = 0

    @property
    def missing(self) -> bool:
        return len(self._ready) < READY_MADE

    def refill(self) -> None:
        """Make one more. What keeps it from being made keeps a request from being answered, and is told there."""
        try:
            self._ready.append(self._make("none"))
        except (LauncherError, OSError):
            pass

    def take(self, network: str) -> Spare:
        """A ready one, or one made now. Raises `LauncherError` and `OSError`."""
        for spare in list(self._ready):
            if spare.network == network:
                self._ready.remove(spare)
                if spare.alive:
                    return spare
                self.end(spare)
        return self._make(network)

    def reaped(self, pid: int) -> None:
        """A child of the launcher has ended: a spare that was killed, by us or by the machine."""
        spare = self._ended.pop(pid, None) or next((spare for spare in self._ready if spare.pid == pid), None)
        if spare is None:
            return
        if spare in self._ready:
            self._ready.remove(spare)
            spare.end()
        os.close(spare.pidfd)
        spare.cgroup.remove()

    def end(self, spare: Spare) -> None:
        """Kill one that was taken and could not be used."""
        spare.end()
        self._ended[spare.pid] = spare

    def close(self) -> None:
        """End them all and wait for them, so that their cgroups can go."""
        for spare in self._ready:
            self.end(spare)
        self._ready.clear()
        for pid in list(self._ended):
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass
            self.reaped(pid)

    def _make(self, network: str) -> Spare:
        self._count += 1
        cgroup = self._cgroups.create(str(self._count)) if self._cgroups is not None else limits.Cgroup()
        owner_end, init_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        line, their_line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        flags = (linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC
                 | linux.CLONE_NEWUTS)
        if network == "none":
            flags |= linux.CLONE_NEWNET
        pidfd = -1
        try:
            try:
                if self._ids.base is None:
                    pid, pidfd = linux.clone3(flags, cgroup.into)
                else:  # each its own, so that none uses up another's
                    owner = self._ids.base + 1 + self._count % (RANGE_SIZE - 1)
                    pid, pidfd = linux.clone3_as(owner, flags, cgroup.into)
            except OSError as error:
                raise LauncherError(str(error), error.errno or 0, "userns") from error
            if pid == 0:
                self._be_init(init_end, their_line, network, cgroup)
            self._ids.write_maps(pid)
            cgroup.close()
            line.send(b"g")
        except BaseException:
            for end in (owner_end, line):
                end.close()
            if pidfd >= 0:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            cgroup.remove()
            raise
        finally:
            init_end.close()
            their_line.close()
        return Spare(pid, pidfd, network, cgroup, line, owner_end)

    def _be_init(self, sock: socket.socket, line: socket.socket, network: str, cgroup: limits.Cgroup) -> None:
        """In the child: keep only what init needs, wait until the maps are written, go on as init. Never returns."""
        try:
            signal.set_wakeup_fd(-1)
            keep = sorted({0, 1, 2, sock.fileno(), line.fileno(), *cgroup.entries})
            for low, high in itertools.pairwise(keep):
                linux.close_range(low + 1, high - 1)
            linux.close_range(keep[-1] + 1)
            null = os.open(f"{HOST}/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.close(null)
            if line.recv(1) != b"g":
                os._exit(1)
            run_init(sock, line, network=network, single_id=self._ids.base is None, entries=cgroup.entries,
                     cgroup=bool(cgroup))
        finally:
            os._exit(1)
