# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""What all reporters share: the results file, who may write it, and the watchdog over each test.

The text of a reporter follows this one's in the same module, and one line that starts it with its settings. All
state is in closures, and every function of the standard library is taken before a test can replace it: tests
freeze clocks and fake file systems in whatever module attributes they find.
"""

WORST_FIRST = ("ERROR", "FAILED", "XPASS", "XFAIL", "PASSED", "SKIPPED")


def worse(old: "str | None", new: str) -> str:
    """The worse of two verdicts; `old` may be None. A test of which a part was skipped (a subtest, what comes after it)
    is what the rest of it is, as in a log."""
    return new if old is None or WORST_FIRST.index(new) < WORST_FIRST.index(old) else old


class Ledger:
    """The results file. `claim`: this process is the one that reports; `write(record, ...)`: append records, each a
    list of texts; `watch(name)`: a test begins, `watch(None)`: it has ended."""

    def __init__(self, settings):
        self.settings = settings
        self.claimed = False

    def claim(self):
        """Whether this process is the one that reports. The first that asks is, and then nobody else loads this."""
        import errno
        import fcntl
        import glob
        import json
        import os

        path = self.settings["results"]
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        try:
            low = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            return False
        for pattern in self.settings["remove"]:
            for file in glob.glob(pattern):
                try:
                    os.unlink(file)
                except OSError:
                    pass
        for directory in self.settings["remove_directories"]:
            try:
                os.rmdir(directory)
            except OSError:
                pass
        encode = json.JSONEncoder().encode
        os_write, os_open, os_fstat, os_close, getpid = os.write, os.open, os.fstat, os.close, os.getpid
        dupfd, cloexec = fcntl.fcntl, fcntl.F_DUPFD_CLOEXEC
        owner = getpid()

        def out_of_the_way(low):
            # The numbers that tests see stay those that they would see without us.
            try:
                high = dupfd(low, cloexec, 400)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EMFILE):
                    raise
                return low
            os_close(low)
            return high

        descriptor = out_of_the_way(low)
        status = os_fstat(descriptor)
        identity = (status.st_dev, status.st_ino)

        def write(*records):
            nonlocal descriptor
            if getpid() != owner:  # a fork of the tests
                return
            data = "".join([encode(record) + "\n" for record in records]).encode("ascii")
            try:
                try:
                    status = os_fstat(descriptor)
                    ours = (status.st_dev, status.st_ino) == identity
                except OSError:
                    ours = False
                if not ours:  # a test has closed all descriptors, and may have opened others since
                    descriptor = out_of_the_way(os_open(path, flags))
                while data:
                    data = data[os_write(descriptor, data) :]
            except OSError:  # a full disk: what is missing has not passed
                pass

        self.write = write
        self.watch = self._watchdog(path) if self.settings["test_timeout"] else lambda name: None
        self.claimed = True
        return True

    def _watchdog(self, path):
        """A process of its own, nobody's child: a test that holds the interpreter's lock cannot stop it, and tests
        that count threads or wait for children do not see it. It kills this process when a test takes too long."""
        import json
        import os

        limit = self.settings["test_timeout"]
        test_process = os.getpid()
        source, target = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                if os.fork() == 0:
                    _stand_guard(source, test_process, limit, path)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(source)
        encode = json.JSONEncoder().encode
        os_write, getpid = os.write, os.getpid

        def watch(name):
            if getpid() != test_process:
                return
            try:
                os_write(target, (encode(name) + "\n").encode("ascii"))
            except OSError:  # the watchdog is gone
                pass

        return watch


def _stand_guard(source, test_process, limit, path):
    import json
    import os
    import select
    import signal
    import time

    def born():
        """When the process began, in clock ticks: its number may be another's by now."""
        with open(f"/proc/{test_process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19]

    began = born()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    highest = max(source, 2)
    os.closerange(3, source)
    os.closerange(highest + 1, 1024)
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):
            pass
    running, deadline, pending = None, None, b""
    while True:
        rest = None if deadline is None else max(0.0, deadline - time.monotonic())
        if select.select([source], [], [], rest)[0]:
            data = os.read(source, 65536)
            if not data:
                return
            lines = (pending + data).split(b"\n")
            pending = lines.pop()
            if lines:
                running = json.loads(lines[-1].decode("ascii"))
                deadline = None if running is None else time.monotonic() + limit
        elif deadline is not None and time.monotonic() >= deadline:
            with open(path, "a") as file:
                file.write(json.dumps(["timeout", running]) + "\n")
            if born() == began:
                os.kill(test_process, signal.SIGKILL)
            return


def snapshot(names):
    """A function that gives those of `names` that are not what they were when this was called.

    names: "module:attribute" or "module:Class.attribute"; what does not exist in this version is passed over.
    """
    import sys

    known = []
    for name in names:
        module_name, _, path = name.partition(":")
        owner = sys.modules.get(module_name)
        parts = path.split(".")
        for part in parts[:-1]:
            owner = getattr(owner, part, None)
        found = vars(owner).get(parts[-1]) if owner is not None else None
        if found is not None:
            function = _function(found)
            known.append((name, owner, parts[-1], found, function, getattr(function, "__code__", None)))

    def changed():
        return [
            name
            for name, owner, attribute, found, function, code in known
            if owner.__dict__.get(attribute) is not found or getattr(function, "__code__", None) is not code
        ]

    return changed


def _function(found):
    for attribute in ("__func__", "fget"):
        found = getattr(found, attribute, None) or found
    return found
