"""What a process does to itself before it runs code that nobody trusts: Landlock, seccomp, limits.

It runs inside the sandbox, so it imports the standard library alone; `sandbox` uses it to probe.

Written here, for no library fits: Landlock's packages on PyPI know no scopes (signals, abstract
sockets: ABI 6) or are weeks old, and seccomp's load libseccomp.so, which a fresh machine may lack.
Both must work in a forked child that imports nothing. Landlock is three system calls
(landlock(7)); the filter is classic BPF: load a word, compare, return (seccomp(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_syscall, _prctl = _libc.syscall, _libc.prctl
_syscall.restype = ctypes.c_long

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38


def prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    if _prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")


def become(uid: int) -> None:
    """Give up root for good. The new ids have no name, no file and no other process."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


# --- Landlock -------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << n for n in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO = (1 << n for n in range(6, 11))
MAKE_BLOCK, MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV = (1 << n for n in range(11, 16))

READ = READ_FILE | READ_DIR
RUN = READ | EXECUTE
USE = READ_FILE | WRITE_FILE
"""Of a device: /dev/null."""
OWN = (
    READ | WRITE_FILE | TRUNCATE | REFER | REMOVE_DIR | REMOVE_FILE
    | MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM
)  # fmt: skip
"""A working directory: everything but to execute what was written there, and device nodes."""
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV


def landlock_abi() -> int:
    """The kernel's version of Landlock's interface; 0 where there is none."""
    return max(0, _syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1)))


def landlock(allowed: Iterable[tuple[str, int]], abi: int) -> None:
    """From now on this process, and what it starts, reaches only the files named, each with the
    rights named; no TCP (ABI 4); no abstract socket and no signal to a process outside (ABI 6).
    A path that does not exist is left out. no_new_privs must be set. Raises OSError."""
    rights = (1 << (13 if abi == 1 else 14 if abi == 2 else 15 if abi < 5 else 16)) - 1
    network = 3 if abi >= 4 else 0
    scopes = 3 if abi >= 6 else 0
    attributes = struct.pack("QQQ", rights, network, scopes)
    # Older kernels refuse a longer struct only where the rest of it is not zero.
    ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    try:
        for path, wanted in allowed:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                granted = wanted & rights
                if not os.path.isdir(f"{path}/."):
                    granted &= _OF_FILES
                rule = struct.pack("=Qi", granted, fd)
                _call(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
            finally:
                os.close(fd)
        _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    finally:
        os.close(ruleset)


def _call(number: int, *arguments: object) -> int:
    result = _syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"system call {number}: {os.strerror(code)}")
    return result


# --- seccomp --------------------------------------------------------------------------------------

# Numbers of x86_64 and of aarch64 (the generic table); None where there is no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # Sockets: also of families that a network namespace does not cut (vsock, netlink, AF_ALG).
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242),
    "bind": (49, 200), "listen": (50, 201),
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # Mounts and namespaces.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "quotactl_fd": (443, 443),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # Large parts of the kernel that such code has no use for.
    "bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "modify_ldt": (154, None), "iopl": (172, None), "ioperm": (173, None), "uselib": (134, None),
    "personality": (135, 92), "mbind": (237, 235), "set_mempolicy": (238, 237),
    # The machine.
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161),
    "setdomainname": (171, 162), "quotactl": (179, 60), "vhangup": (153, 58),
    # Memory that no limit of ours counts, and files without a path that could be executed.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
}  # fmt: skip

_CLONE3, _IOCTL, _CLONE, _SOCKETPAIR, _PRCTL = 435, (16, 29), (56, 220), (53, 199), (157, 167)
_NAMESPACES = 0x7E020000
"""CLONE_NEW* among the flags of clone(2)."""
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Instructions of classic BPF: load a word, compare the accumulator, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_ERRNO = 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16


def seccomp_filter(machine: str | None = None) -> bytes:
    """The filter as an array of struct sock_filter. DENIED fails with EPERM; clone3, whose flags
    a filter cannot see, with ENOSYS (libc then takes clone); foreign architectures are killed.
    Raises OSError for a machine whose numbers are not known here."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no seccomp filter for {machine}")
    column, audit = _ARCHITECTURES[machine]
    refuse = [(_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":  # the x32 interface has the same architecture and other numbers
        program += [(_AT_LEAST, 0, 1, 0x40000000), *refuse]
    for numbers in DENIED.values():
        if numbers[column] is not None:
            program += [(_EQUAL, 0, 1, numbers[column]), *refuse]
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    # No new namespaces; no typing into a terminal (TIOCSTI, TIOCLINUX).
    program += _unless(_CLONE[column], [(_LOAD, 0, 0, _argument(0)), (_ANY_BIT, 0, 1, _NAMESPACES)])
    for request in (0x5412, 0x541C):
        program += _unless(_IOCTL[column], [(_LOAD, 0, 0, _argument(1)), (_EQUAL, 0, 1, request)])
    # A pair of connected Unix streams reaches nobody else, and asyncio needs one.
    for index, value in ((0, 1), (1, 1)):  # AF_UNIX, SOCK_STREAM
        check = [(_LOAD, 0, 0, _argument(index)), (_AND, 0, 0, 0xFF), (_EQUAL, 1, 0, value)]
        program += _unless(_SOCKETPAIR[column], check)
    return _assemble(program)


_SIGNALLING = ((62, 129), (200, 130), (234, 131), (129, 138), (297, 240), (424, 424))
"""kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal."""


def guard_filter(machine: str | None = None, only: int | None = None) -> bytes:
    """A second filter, for the process that has set these: it must remain the reaper of what it
    starts, and must die with the one that watches it. only: the one process that it may signal,
    where neither Landlock nor a namespace keeps signals inside."""
    machine = machine or platform.machine()
    column, audit = _ARCHITECTURES[machine]
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL)]
    program += [(_LOAD, 0, 0, _NUMBER)]
    if only is not None:
        for numbers in _SIGNALLING:
            program += _unless(numbers[column], [(_LOAD, 0, 0, _argument(0)), (_EQUAL, 1, 0, only)])
    for option in (PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG):
        program += _unless(_PRCTL[column], [(_LOAD, 0, 0, _argument(0)), (_EQUAL, 0, 1, option)])
    return _assemble(program)


def _argument(index: int) -> int:
    """Where the low word of an argument lies (both machines are little-endian)."""
    return _ARGUMENTS + 8 * index


def _unless(number: int, check: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """EPERM for the call `number` where the check falls through to its next instruction."""
    body = [*check, (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_LOAD, 0, 0, _NUMBER)]
    return [(_EQUAL, 0, len(body), number), *body]


def _assemble(program: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("=HBBI", *line) for line in [*program, (_RETURN, 0, 0, _ALLOW)])


def seccomp(program: bytes) -> None:
    """Install a filter for this process and what it starts, for good. Raises OSError."""
    lines = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))
    address = ctypes.create_string_buffer(head, len(head))
    zero = ctypes.c_ulong(0)
    mode = ctypes.c_ulong(2)  # SECCOMP_MODE_FILTER
    if _prctl(PR_SET_SECCOMP, mode, ctypes.byref(address), zero, zero) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")


# --- Limits ---------------------------------------------------------------------------------------


def limit(bounds: dict[int, tuple[int, int]]) -> None:
    """Set resource limits, none above what this process may have."""
    for name, (soft, hard) in bounds.items():
        ceiling = resource.getrlimit(name)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(name, (soft, hard))


def first_to_go() -> None:
    """Where memory runs out, the kernel shall not take the trainer."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
