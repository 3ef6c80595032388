"""The process that makes sandboxes: small, exec'd with an empty environment, single-threaded, holding no secret.

It lives in a mount namespace of its own, whose root is a tmpfs with the machine at `/host`. A plain user's launcher
first makes a user namespace in which it has every capability; from there on both go the same way: the overlay is
mounted here, with the launcher's rights (`overlay.py`), and handed as a detached mount to a child made by one clone3
in namespaces of its own, which never had those rights.

The owner's lifeline is the control socket: at its end the launcher exits, and every init with it (PDEATHSIG).
Owner and launcher trust each other: messages between them are JSON, with descriptors beside them.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
from typing import Any

from skyrl_minisandbox.sandbox import limits, linux, processes, sealed, seccomp, wire
from skyrl_minisandbox.sandbox.mounts import HOST, NEW_ROOT
from skyrl_minisandbox.sandbox.overlay import Ids, LauncherError, Mounted, Overlays, map_base
from skyrl_minisandbox.sandbox.spare import Spares
from skyrl_minisandbox.sandbox.watch import Watcher

CONTROL_FD = 3
_MOST_FATES = 10_000  # that are remembered until somebody asks
_REFILL_PAUSE = 10  # milliseconds without a request, then a spare init is made


class _Box:
    """One sandbox, as the launcher knows it."""

    def __init__(self, pid: int, pidfd: int, mounted: Mounted, base: int, cgroup: limits.Cgroup) -> None:
        self.pid, self.pidfd, self.mounted, self.cgroup = pid, pidfd, mounted, cgroup
        self.base = base  # how many of its layers are the image's; those above were frozen
        self.waiting: list[int] = []  # requests that wait for its end
        self.keep = False  # what it wrote becomes a layer then
        self.asking: list[int] = []  # requests to be told why it ended
        self.why = ""


class Launcher:
    """See the module."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._boxes: dict[int, _Box] = {}
        self._exports: dict[int, int] = {}  # helper pid -> request
        self._fates: dict[int, str] = {}  # box -> why it ended, where what ran in it brought that about
        self._watcher = Watcher()
        self._count = 0
        self._ids = Ids(None, (0, 0))
        self._cgroups: limits.Cgroups | None = None
        self.facts: dict[str, Any] = {}

    # Start

    def enter(self) -> None:
        """Take the namespaces that this launcher works in. Raises `LauncherError`."""
        self._ids = Ids(map_base() if os.geteuid() == 0 else None, (os.geteuid(), os.getegid()))
        root_mode = self._ids.base is not None
        try:
            if root_mode:
                linux.unshare(linux.CLONE_NEWNS)
        except PermissionError:
            root_mode = False
        if not root_mode:
            self._ids.base = None
            self._enter_userns()
        try:
            self._cgroups = limits.Cgroups(prefix=HOST)
            self.facts["cgroup"] = ""
        except (limits.NoCgroup, OSError) as error:
            self.facts["cgroup"] = str(error)
        try:
            # Slave, not private: what the machine mounts or unmounts later is seen here too, and nothing of ours there.
            linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
            linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=4m")
            for name in (HOST, "/l", "/s", "/x", NEW_ROOT):
                os.mkdir(f"/tmp{name}", 0o755)
            linux.pivot_root("/tmp", f"/tmp{HOST}")
            os.chdir("/")
        except OSError as error:
            raise LauncherError(f"a private root could not be made: {error}", error.errno or 0, "mounts") from error
        self._overlays = Overlays(self._ids, self._holder_userns() if root_mode else -1, root_mode)
        self._spares = Spares(self._ids, self._cgroups)
        self.facts.update(
            root_mode=root_mode, single_id=self._ids.base is None,
            tmpfs_upper=root_mode or self._overlays.tmpfs_holds_upper(),
            memory_cgroup=bool(self._cgroups and self._cgroups.memory),
            pids_cgroup=bool(self._cgroups and self._cgroups.pids),
            cpu_cgroup=bool(self._cgroups and self._cgroups.cpu),
        )

    def _enter_userns(self) -> None:
        if sealed.is_sealed():
            return
        try:
            linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWNS)
            with open("/proc/self/setgroups", "w") as file:
                file.write("deny")
            # Not as 0: the maps of sandboxes are seen in terms of this namespace, and show the user's true id.
            for name, number in zip(("uid_map", "gid_map"), self._ids.own, strict=True):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(f"{number} {number} 1")
            sealed.start_anew(CONTROL_FD)
        except OSError as error:
            raise LauncherError(
                f"no user namespace can be made here: {error.strerror}", error.errno or 0, "userns"
            ) from error

    def _holder_userns(self) -> int:
        """A descriptor of a user namespace with our map, for id-mapped mounts; -1 where none can be made."""
        read, write = os.pipe()
        try:
            pid, pidfd = linux.clone3(linux.CLONE_NEWUSER)
        except OSError as error:
            raise LauncherError(
                f"no user namespace can be made here: {error.strerror}", error.errno or 0, "userns"
            ) from error
        if pid == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        try:
            self._ids.write_maps(pid)
            return os.open(f"{HOST}/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(write)
            os.waitpid(pid, 0)
            os.close(pidfd)

    # Requests

    def create(self, number: int, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Make a sandbox; the answer and the owner's end of its socket."""
        try:
            return self._create(dict(request))
        except BrokenPipeError:  # a waiting init was killed, by the machine's out-of-memory killer say: once more
            return self._create(request)

    def _create(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        self._count += 1
        held: list[int] = []  # closed at the end
        mounted: Mounted | None = None
        spare = self._spares.take(request["network"])
        try:
            # While that is done, one that was made now gets ready.
            mounted = self._overlays.mount(request, str(self._count))
            held.append(mounted.root)
            for bind in request["binds"]:
                held.append(self._bind(bind))
            if self._cgroups is not None:
                self._cgroups.limit(spare.cgroup, request["limits"])
            if not mounted.on_tmpfs:
                self._watcher.watch(self._count, mounted.upper, request["limits"]["disk"], request["limits"]["inodes"])
            request.update(memory_cgroup=self.facts["memory_cgroup"], pids_cgroup=self.facts["pids_cgroup"])
            del request["layers"]
            spare.hand_over(request, held)
        except BaseException as error:
            self._spares.end(spare)
            self._watcher.forget(self._count)
            if mounted is not None:
                mounted.close()
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise LauncherError(str(error), error.errno or 0) from error
            raise
        finally:
            for fd in held:
                os.close(fd)
        self._boxes[self._count] = _Box(spare.pid, spare.pidfd, mounted, request["base"], spare.cgroup)
        answer = {"box": self._count, "pid": spare.pid, "oom": spare.cgroup.oom_counter.removeprefix(HOST) or None}
        return answer, [spare.owner_end.detach()]

    def _bind(self, bind: dict[str, Any]) -> int:
        """A detached mount of a path of the machine."""
        attributes = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
        attributes |= linux.MOUNT_ATTR_RDONLY if bind["read_only"] else 0
        bind["directory"] = os.path.isdir(HOST + bind["source"])
        try:
            return self._overlays.tree(bind["source"], attributes)
        except OSError as error:
            raise LauncherError(f"bind {bind['source']}: {error.strerror}", error.errno or 0) from error

    def destroy(self, number: int, request: dict[str, Any]) -> None:
        """Kill a sandbox; answered when its init has been reaped. keep: what it wrote becomes a layer."""
        box = self._boxes.get(request["box"])
        if box is None:
            if request.get("keep"):
                raise LauncherError("the sandbox has ended", lacks="sandbox")
            self._answer(number, {"why": self._fates.pop(request["box"], "")})
            return
        box.waiting.append(number)
        box.keep |= bool(request.get("keep"))
        self._kill(box)

    def interrupt(self, key: int) -> None:
        """Have init kill every process inside, whatever else it is doing."""
        if key in self._boxes:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._boxes[key].pidfd, signal.SIGUSR1)

    def fate(self, number: int, key: int) -> None:
        """Why a sandbox ended that nobody ended: "oom", "disk_full", or "" when what ran in it did not bring that
        about. Asked when init's end of the wire is closed, answered when it has been reaped."""
        box = self._boxes.get(key)
        if box is None:
            self._answer(number, {"why": self._fates.get(key, "")})
        else:
            box.asking.append(number)
            self._kill(box)  # an init that hung up and lives on is not ours any more

    def _end_beyond(self) -> None:
        """Kill those whose upper on disk is beyond its limits."""
        for key in self._watcher.over():
            self._boxes[key].why = "disk_full"
            self._kill(self._boxes[key])

    @staticmethod
    def _kill(box: _Box) -> None:
        try:
            signal.pidfd_send_signal(box.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def compare(self, number: int, request: dict[str, Any], out: int) -> None:
        """Write what a sandbox changed into a descriptor, in a child of ours: as a layer, or as a list of paths."""
        box = self._boxes.get(request["box"])
        if box is None:
            raise LauncherError("the sandbox has ended", lacks="sandbox")
        pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                mounted = box.mounted
                uppers = [mounted.upper]
                for path in reversed(mounted.lowers[box.base :]):
                    uppers.append(os.open(f"/{path}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
                base = self._overlays.base_view(mounted.lowers[: box.base])
                os.chroot(HOST)  # where Python finds what the launcher itself does not need to load
                from skyrl_minisandbox.sandbox.difference import Difference

                opaque = "trusted.overlay.opaque" if self._overlays.root_mode else "user.overlay.opaque"
                difference = Difference(uppers, mounted.view, base, opaque)
                if request["verb"] == "export":
                    from skyrl_minisandbox.sandbox.export import export

                    export(difference, out, request["prefix"], self._ids.base, request["max_bytes"],
                           request["max_members"])
                else:
                    difference.write_list(out, request["limit"])
                os._exit(0)
            except OSError as error:
                os._exit(min(error.errno or errno.EIO, 255))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(errno.EIO)
        self._exports[pid] = number

    # The loop

    def serve(self) -> None:
        """Until the owner's end closes."""
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        owner = self._owner_pidfd()
        if owner >= 0:
            poll.register(owner, select.POLLIN)
        watcher = -1
        try:
            while True:
                if watcher != self._watcher.fileno():  # with the first upper on disk, and when it was started anew
                    if watcher >= 0:
                        poll.unregister(watcher)
                    watcher = self._watcher.fileno()
                    poll.register(watcher, select.POLLIN)
                # Not at once: what was just made has the processors to itself.
                ready = poll.poll(_REFILL_PAUSE if self._spares.missing else None)
                if not ready:
                    self._spares.refill()
                for fd, _ in ready:
                    if fd == wake_read:
                        os.read(wake_read, 4096)
                        self._reap()
                    elif fd == watcher:
                        self._end_beyond()
                    elif fd == owner or not self._receive():
                        return
        finally:
            self.close()

    def _owner_pidfd(self) -> int:
        """Tells the owner's end even while a child that it forked holds its end of the socket; -1 where there is none.

        Who made the socket is our parent; while it is, its id is nobody else's.
        """
        pid, _, _ = struct.unpack("3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return -1
        if os.getppid() == pid:
            return fd
        os.close(fd)
        return -1

    def _receive(self) -> bool:
        data, fds, _ = linux.receive_fds(self._sock, 1 << 20, 8)
        if not data:
            return False
        message = json.loads(data)
        number, verb = message["number"], message["verb"]
        try:
            if verb == "create":
                answer, sent = self.create(number, message)
                self._answer(number, answer, sent)
            elif verb == "destroy":
                self.destroy(number, message)
            elif verb == "owner_shift":
                self._answer(number, {"shift": self._overlays.owner_shift(message["path"])})
            elif verb in ("export", "changes"):
                self.compare(number, message, fds[0])
            elif verb == "interrupt":
                self.interrupt(message["box"])
                self._answer(number, {})
            elif verb == "fate":
                self.fate(number, message["box"])
            elif verb == "release":
                self._overlays.release(message["layers"])
                self._answer(number, {})
        except LauncherError as error:
            self._answer(number, {"error": str(error), "errno": error.number, "lacks": error.lacks})
        except OSError as error:
            self._answer(number, {"error": str(error), "errno": error.errno or 0, "lacks": ""})
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _answer(self, number: int, answer: dict[str, Any], fds: list[int] | None = None) -> None:
        data = json.dumps({"number": number, **answer}).encode()
        try:
            socket.send_fds(self._sock, [data], fds or [])
        except (BrokenPipeError, ConnectionResetError):
            pass  # the owner is gone: the loop sees it next
        for fd in fds or ():
            os.close(fd)

    def _reap(self) -> None:
        for pid, status in processes.ended_children():
            number = self._exports.pop(pid, None)
            if number is not None:
                code = os.waitstatus_to_exitcode(status)
                self._answer(number, {"code": code if code >= 0 else errno.EIO})
            self._spares.reaped(pid)
            for key, box in list(self._boxes.items()):
                if box.pid == pid:
                    self._forget(key, box, killed=os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)

    def _forget(self, key: int, box: _Box, killed: bool = False) -> None:
        os.close(box.pidfd)
        self._watcher.forget(key)
        if killed and not box.waiting and not box.why and limits.read_oom_kills(box.cgroup.oom_counter) > 0:
            box.why = "oom"
        if box.why and not box.waiting:
            self._fates[key] = box.why
            if len(self._fates) > _MOST_FATES:
                del self._fates[next(iter(self._fates))]
        kept: dict[str, Any] = {}
        if box.keep:
            try:
                kept = self._overlays.keep(box.mounted.upper, box.mounted.on_tmpfs)
            except OSError as error:
                kept = {"error": f"what it wrote could not be kept: {error}", "errno": error.errno or 0, "lacks": ""}
        box.mounted.close()
        box.cgroup.remove()
        del self._boxes[key]
        for number in box.waiting:
            self._answer(number, {**kept, "why": box.why})
        for number in box.asking:
            self._answer(number, {"why": box.why})

    def close(self) -> None:
        """End every sandbox and wait for them, so that their cgroups can go."""
        for box in self._boxes.values():
            self._kill(box)
        for key, box in list(self._boxes.items()):
            try:
                os.waitpid(box.pid, 0)
            except ChildProcessError:
                pass
            box.waiting.clear()
            self._forget(key, box)
        self._spares.close()
        if self._cgroups is not None:
            self._cgroups.close()


def main() -> None:
    """Run as the exec'd launcher: the control socket is descriptor 3."""
    for number in range(1, signal.NSIG):  # whoever started the owner may have had some ignored (nohup)
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the owner's business
    os.umask(0o022)
    # A pipe for every background process of a sandbox is init's; commands get their own, lower limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    linux.set_name("minisandbox-l")
    sock = socket.socket(fileno=CONTROL_FD)
    sock.set_inheritable(False)
    launcher = Launcher(sock)
    try:
        launcher.enter()
    except LauncherError as error:
        launcher._answer(0, {"error": str(error), "errno": error.number, "lacks": error.lacks})
        return
    # Every init is a copy of this process: what is made once here costs none of them anything, and the collector
    # shall not write to pages that they share.
    seccomp.build_filter(os.uname().machine, single_id=launcher.facts["single_id"])
    gc.collect()
    gc.freeze()
    launcher._answer(0, {"facts": launcher.facts, "max_payload": wire.MAX_PAYLOAD})
    launcher.serve()
