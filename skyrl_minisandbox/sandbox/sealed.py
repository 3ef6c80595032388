"""A plain user's launcher runs from a read-only mount of its interpreter.

Whoever is inside can run the program of init once more (`#!/proc/self/exe` as bash, say) and has its file at
/proc/self/exe then, outside of his root (CVE-2019-5736). As root that file belongs to nobody whom a sandbox knows; with
a single id it may be the user's own, and who is root inside could change its mode, or it. So the program is bound onto
itself, read-only, in the launcher's mount namespace, and started anew from there.
"""

from __future__ import annotations

import os
import sys

from skyrl_minisandbox.sandbox import linux

_MARK = "sealed"
# argv holds no secret and no setting: /proc/1/cmdline of every sandbox shows it.
BOOT = "import sys;sys.path.insert(0,sys.argv[1]);from skyrl_minisandbox.sandbox.launcher import main;main()"


def is_sealed() -> bool:
    """Whether this process is the one that was started anew."""
    return sys.argv[-1] == _MARK


def start_anew(keep_fd: int) -> None:
    """Bind the program read-only and execute it again, with every capability that this process has in its user
    namespace. Call in a mount namespace of one's own. Raises `OSError`; does not return."""
    program = os.readlink("/proc/self/exe")
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
    fd = linux.open_tree(program)
    linux.mount_setattr(fd, linux.MOUNT_ATTR_RDONLY)
    linux.move_mount(fd, program)
    os.close(fd)
    linux.keep_capabilities()
    os.set_inheritable(keep_fd, True)
    options = sys.orig_argv[: sys.orig_argv.index("-c")]
    os.execv(program, [*options, "-c", BOOT, sys.argv[1], _MARK])
