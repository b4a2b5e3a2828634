"""Runs inside the sandbox: takes the namespaces, hides the machine, sets the limits, then becomes the program.

Started by `davinci_jax.curation.sandbox` as a script of its own, with nothing but the standard library. Reads one JSON
object from standard input: files, arguments, limits, environment, isolation, hidden folders. Writes "ready" or what
went wrong to the descriptor that its first argument names.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
# Inside, the program is an ordinary user: becoming it takes every capability away that the preparation had, so what was
# made read-only cannot be undone.
USER_INSIDE = 1000
# The fewest that the kernel takes for a process namespace, where it takes any (Linux 6.14 and later).
LEAST_PROCESSES = 301

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = kind.encode() if kind else None
    _check(_libc.mount(source.encode(), target.encode(), encoded, flags, options.encode()), f"mount {target}")


def _leave_machine() -> None:
    """New user, mount, network, process and message namespaces; the caller's user becomes the one user in there."""
    user, group = os.getuid(), os.getgid()
    _check(_libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{USER_INSIDE} {user} 1"),
        ("gid_map", f"{USER_INSIDE} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _hide_machine(folder: str, hidden: list[str], size: int, processes: int) -> None:
    """Makes every file system read-only, empties hidden folders and gives `folder` a writable memory of `size`.

    Bounds the processes too, as far as the kernel can: the limit that `_limit` sets does not bind a superuser.
    """
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    attributes = _MountAttributes(set=MOUNT_ATTR_RDONLY)
    _check(
        _libc.syscall(
            SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
        ),
        "mount_setattr",
    )
    for path in hidden:
        if os.path.isdir(path):
            _mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "size=4k")
    try:  # the processes of the machine, with what their environment holds, are none of the program's business
        _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)
        with contextlib.suppress(OSError), open("/proc/sys/kernel/pid_max", "w") as file:
            file.write(str(max(LEAST_PROCESSES, processes)))
    except OSError:  # a container that masks parts of /proc forbids a fresh one
        _mount("tmpfs", "/proc", "tmpfs", MS_NOSUID | MS_NODEV, "size=4k")
    _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size}")


def _limit(limits: dict[str, int]) -> None:
    seconds, file_bytes = limits["cpu_seconds"], limits["file_bytes"]
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, file_bytes, file_bytes),
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_NOFILE, 128, 128),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))


def _write_files(folder: str, files: dict[str, str]) -> None:
    os.chdir(folder)
    for name, text in files.items():
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)


def _supervise(child: int) -> int:
    """Waits for the program, reaping what it leaves behind; returns its exit status as a shell would."""
    while True:
        done, status = os.wait()
        if done == child:
            return os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else 128 + os.WTERMSIG(status)


def _program(request: dict[str, Any]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    _limit(request["limits"])
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execve(request["arguments"][0], request["arguments"], request["environment"])


def main() -> int:
    """Prepares the sandbox, runs the program in it and returns its exit status."""
    report = int(sys.argv[1])
    os.set_inheritable(report, False)
    request = json.load(sys.stdin)
    isolated = request["isolation"] == "namespaces"
    try:
        if isolated:
            _leave_machine()
            inside = os.fork()  # the first process born in the new process namespace is its init
            if inside:
                return _supervise(inside)
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            limits = request["limits"]
            _hide_machine(request["folder"], request["hidden"], limits["disk_bytes"], limits["processes"])
        _write_files(request["folder"], request["files"])
    except OSError as error:
        os.write(report, str(error).encode())
        return 1
    os.write(report, b"ready")
    os.close(report)
    child = os.fork()
    if child:
        return _supervise(child)
    _program(request)
    return 1


if __name__ == "__main__":
    # Not sys.exit: the init of the namespace must not run what the parent registered to run at its end.
    os._exit(main())
