"""Attacks on the python tool, and what must come of them; test_sandbox runs them.

Each runs in a session of its own beside a neighbour on the same worker. The numbers are those of
a list of what tools of this kind must withstand.
"""

import re
from pathlib import Path

from trainer.types import Session

ROOT = Path(__file__).resolve().parents[2]

HELP = """
import ctypes, errno, gc, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def tried(function, *arguments):
    try:
        function(*arguments)
    except BaseException as error:
        return errno.errorcode.get(getattr(error, "errno", None)) or type(error).__name__
    return "did it"
def system_call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) >= 0:
        return "did it"
    return errno.errorcode[ctypes.get_errno()]
def every(function, arguments):
    print(*sorted({tried(function, *a) for a in arguments}))
"""

DIED = r"Error: the process ended without a result( \(SIG\w+\))?"
NO_MORE = r"(BlockingIOError|RuntimeError: can't start new thread|MemoryError|OSError).*"
PROCESSES = r"Error: more than 48 processes and threads"
TIMED_OUT = r"Error: timed out after 1 s"
NOTHING = r"\(no output\)"
# On a loaded machine the second may be over before there is too much of anything.
TOO_MUCH = rf"Error: more than 128 MB of memory in all|{TIMED_OUT}"
KILLED = f"{DIED}|{TIMED_OUT}"

# name: (code, what the observation must be)
ATTACKS = {
    # 1: processes and threads without end
    "fork bomb": ("while True: os.fork()", f"{NO_MORE}|{PROCESSES}|{TIMED_OUT}|{DIED}"),
    "patient fork bomb": (
        "def f():\n while True:\n  try: os.fork()\n  except OSError: pass\nf()",
        f"{PROCESSES}|{TIMED_OUT}",
    ),
    "thread bomb": (
        "while True: threading.Thread(target=time.sleep, args=[9]).start()",
        f"{NO_MORE}|{PROCESSES}|{TIMED_OUT}",
    ),
    "fork at exit": (
        "import atexit\natexit.register(os.fork)\nfor _ in range(4): os.fork()\nsys.exit()",
        NOTHING,
    ),
    # 2: memory
    "memory in one process": (
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        f"MemoryError.*|{TIMED_OUT}",
    ),
    "memory in many processes": (
        "for _ in range(12):\n if os.fork() == 0:\n"
        "  x = bytearray(b'x' * (60 << 20)); time.sleep(9)\ntime.sleep(9)",
        TOO_MUCH,
    ),
    "shared memory in many processes": (
        "import mmap\nfor _ in range(12):\n if os.fork() == 0:\n"
        "  m = mmap.mmap(-1, 60 << 20); m.write(b'x' * (60 << 20)); time.sleep(9)\ntime.sleep(9)",
        TOO_MUCH,
    ),
    "memory that no limit counts": (
        "numbers = {'x86_64': (319, 29, 240), 'aarch64': (279, 194, 180)}[os.uname().machine]\n"
        "print(*{system_call(n, b'x', 1 << 30, 0o1666) for n in numbers})",
        "EPERM",
    ),
    "too much for C": ("np.zeros((1 << 20, 1 << 20))", "MemoryError.*"),
    # 3, 6: time
    "regular expression": ("import re\nre.match('(a+)+$', 'a' * 50 + 'b')", TIMED_OUT),
    "signals ignored": (
        "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        " signal.signal(s, signal.SIG_IGN)\ntime.sleep(9)",
        TIMED_OUT,
    ),
    "a storm of signals": (
        "signal.signal(signal.SIGALRM, lambda *_: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)\ntime.sleep(0.1)",
        f"{NOTHING}|{TIMED_OUT}",
    ),
    # 4, 5: output
    "output without end": ("while True: print('x' * 10**6)", TIMED_OUT),
    "descriptors 1 and 2": (
        "for _ in range(999): os.write(1, b'x' * 999); os.write(2, b'x')",
        NOTHING,
    ),
    # 7: what stays behind
    "daemon": (
        "if os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n"
        "  while True: time.sleep(1)\n os._exit(0)",
        NOTHING,
    ),
    "a thread that goes on": (
        "def burn():\n while True: pass\nthreading.Thread(target=burn, daemon=True).start()",
        NOTHING,
    ),
    # 8: signals to others
    "kill everybody": ("print(tried(os.kill, -1, 9))", f"{KILLED}|EPERM|ESRCH|did it"),
    "kill the parent": (
        "print(tried(os.kill, os.getppid(), 9), tried(os.kill, os.getppid(), 19))",
        "EPERM EPERM",
    ),
    "kill its group": ("os.killpg(0, 9)", DIED),
    "kill what has another id": (
        "every(os.kill, [(pid, 9) for pid in range(1, 300) if pid != os.getpid()])",
        "EPERM ESRCH|EPERM|ESRCH",
    ),
    # 9: other processes' insides
    "trace": (
        "p = os.getppid()\nprint(libc.ptrace(16, p, 0, 0), libc.process_vm_readv(p, 0, 0, 0, 0, 0),"
        " libc.process_vm_writev(p, 0, 0, 0, 0, 0), system_call(438, 3, 0, 0))",
        "-1 -1 -1 EPERM",
    ),
    # 10: /proc
    "the worker in /proc": (
        "every(open, [(f'/proc/{os.getppid()}/{name}', 'rb') for name in"
        " ('environ', 'mem', 'maps', 'cmdline', 'stat', 'auxv')])\n"
        "every(os.listdir, [(f'/proc/{os.getppid()}/{name}',) for name in ('root', 'fd', 'cwd')])",
        "EACCES\nEACCES",
    ),
    "the machine in /proc": (
        "every(open, [(f'/proc/{name}', 'r+') for name in"
        " ('sys/kernel/core_pattern', 'sysrq-trigger', 'kcore', 'self/mem', 'self/oom_adj')])",
        "EACCES( ENOENT)?( EROFS)?",
    ),
    # 11: secrets
    "environment": (
        "print([name for name in os.environ if 'TOKEN' in name or 'KEY' in name],"
        " 'secret' in open('/proc/self/environ').read())",
        r"\[\] False",
    ),
    "files of the user": (
        "every(open, [(p,) for p in ('/etc/passwd', '/etc/shadow', '/root/.netrc', '/home',"
        " '/var/log', '/root/.ssh/id_rsa', '/root/.cache', '/run', '/sys/kernel')])\n"
        "every(os.listdir, [(p,) for p in ('/', '/etc', '/home', '/root', '/var', '/tmp')])",
        "(EACCES|ENOENT)( ENOENT)?\nEACCES( ENOENT)?",
    ),
    "the project": (
        f"every(open, [({str(ROOT / 'pyproject.toml')!r},), ({str(ROOT / 'trainer/cli.py')!r},)])\n"
        f"print(tried(os.listdir, {str(ROOT)!r}))",
        "(EACCES|ENOENT)\n(EACCES|ENOENT)",
    ),
    # 12: network
    "sockets": (
        "every(socket.socket, [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, 1),"
        " (socket.AF_INET, socket.SOCK_DGRAM), (socket.AF_UNIX, 1), (socket.AF_NETLINK, 3),"
        " (socket.AF_INET, socket.SOCK_RAW, 1), (socket.AF_PACKET, 3), (socket.AF_VSOCK, 1),"
        " (38, 5)])\n"
        "print(tried(socket.create_connection, ('169.254.169.254', 80)))",
        "EPERM\nEPERM",
    ),
    "socket pairs": (
        "a, b = socket.socketpair()\na.send(b'x'); print(b.recv(1))\n"
        "every(socket.socketpair, [(socket.AF_UNIX, socket.SOCK_DGRAM), (socket.AF_UNIX, 5)])\n"
        "print(tried(a.connect, '\\0abstract'), tried(a.bind, 'x'))",
        r"b'x'\nEPERM\nEPERM EPERM",
    ),
    # 13: paths
    "links": (
        "os.symlink('/etc/passwd', 'a'); os.symlink('/proc/1/root', 'b'); os.symlink('..', 'c')\n"
        "every(open, [('a',), ('b/etc/passwd',), ('c/x', 'w')])\n"
        "every(os.link, [('/usr/bin/env', 'd'), ('/etc/passwd', 'e')])\n"
        "every(os.listdir, [('c',), ('..',), ('../..',)])",
        "EACCES( ENOENT)?\nE(ACCES|XDEV|PERM|NOENT)( ENOENT)?( EPERM)?( EXDEV)?\nEACCES",
    ),
    "its own directory": (
        "here = os.getcwd()\nos.mkdir('x')\n"
        "every(os.rename, [(here, '/tmp/other'), ('x', '../x'), ('x', '/usr/x')])\n"
        "print(tried(os.rmdir, here), tried(os.symlink, '/usr', here + '2'))\n"
        "os.symlink('/usr', 'usr'); os.chmod('x', 0); os.chmod('.', 0)",
        "E(ACCES|XDEV|BUSY|PERM).*\nE(ACCES|NOTEMPTY) EACCES",
    ),
    # 14: descriptors
    "descriptors": (
        "fds = sorted(map(int, os.listdir('/proc/self/fd')))[:-1]\n"
        "print(fds, [os.readlink(f'/proc/self/fd/{fd}').split(':')[0] for fd in fds])",
        r"\[0, 1, 2, 3, 4\] \['/dev/null', '/dev/null', '/dev/null', 'pipe', 'pipe'\]",
    ),
    "no more descriptors": (
        "f = []\nwhile True: f.append(os.dup(0))",
        r"OSError: \[Errno 24\].*",
    ),
    "watches without end": (
        "fds = []\nfor _ in range(99):\n fds.append(libc.inotify_init())\nprint(min(fds))", "-1",
    ),
    # 15, 49: writing
    "write elsewhere": (
        "every(open, [(p + '/reward', 'w') for p in ('/usr', '/tmp', '/dev/shm', '/dev', '/root',"
        " '/etc', '/var/tmp', '/', '/run', '/proc', sys.prefix)])",
        "EACCES( ENOENT)?( EROFS)?",
    ),
    "a disk full": (
        "for n in range(999): open(str(n), 'wb').write(bytes(1 << 20))",
        rf"Error: more than 8 MB of files.*|OSError: \[Errno 28\].*|{TIMED_OUT}",
    ),
    "files without end": (
        "n = 0\nwhile True:\n n += 1; open(str(n), 'w').close()",
        rf"Error: more than 8 MB of files.*|OSError.*|{TIMED_OUT}",
    ),
    "a sparse file": ("open('x', 'w').truncate(1 << 40)", r"OSError: \[Errno 27\].*"),
    "a deep tree": (
        "for _ in range(3000):\n os.mkdir('d')\n os.chdir('d')",
        f"{NOTHING}|Error: more than 8 MB of files, or too many|{TIMED_OUT}",
    ),
    "the neighbour's directory": (
        "root = os.path.dirname(os.getcwd())\nothers = [f'{root}/call{n}' for n in range(1, 300)]\n"
        "others.remove(os.getcwd())\nevery(os.listdir, [(o,) for o in others])\n"
        "every(open, [(o + '/file', 'r+') for o in others])\n"
        "every(os.rename, [(o, o + 'x') for o in others])",
        "EACCES( ENOENT)?\nEACCES( ENOENT)?\nE(ACCES|XDEV)( ENOENT)?( EXDEV)?",
    ),
    # 16: forged results
    "a forged frame": (
        "os.write(3, b'\\0' * 99)\nos._exit(0)",
        "Error: the process wrote a malformed result",
    ),
    "a frame for the next call": ("os.write(3, b'\\0' * 12 + b'\\0' * 99)", ".*malformed result"),
    "a pickle": (
        "import pickle\nclass E:\n def __reduce__(self): return os.system, ('id',)\n"
        "os.write(3, pickle.dumps(E()) * 9)\nos._exit(0)",
        "Error: the process (wrote a malformed result|ended without a result)",
    ),
    "the frame's writer": (
        "for o in gc.get_objects():\n"
        " if callable(o) and getattr(o, '__name__', '') == 'write_frame':\n"
        "  o.__code__ = (lambda fd, header, body=b'': os.write(fd, b'\\xff' * 99)).__code__",
        f".*malformed result|{DIED}|{NOTHING}",
    ),
    "the request of the next call": (
        "os.set_blocking(4, False)\nprint(tried(os.read, 4, 99))\nos.set_blocking(4, True)",
        "EAGAIN",
    ),
    "the worker's objects": (
        "found = [o for o in gc.get_objects() if type(o).__name__ == 'Zygote']\n"
        "fds = [c.requests for z in found for c in z.sessions.values()]\n"
        "every(os.write, [(fd, b'x') for fd in fds if fd > 4] or [(99, b'')])",
        "EBADF",
    ),
    "the interpreter": (
        "import builtins, json\nos._exit = os.write = os.read = json.dumps = lambda *_: None\n"
        "builtins.len = None\nos.getpid = lambda: 1",
        f".*TypeError.*|{DIED}|{NOTHING}|{TIMED_OUT}",
    ),
    # 17: crashes
    "null pointer": ("ctypes.string_at(0)", DIED),
    "exit": ("os._exit(0)", DIED),
    "abort": ("os.abort()", DIED),
    "deep recursion": (
        "sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        rf"{DIED}|RecursionError.*|MemoryError.*|{TIMED_OUT}|Error: more than 128 MB.*",
    ),
    "deep recursion in C": (
        "sys.setrecursionlimit(10**9)\nx = ()\nfor _ in range(10**6): x = (x,)\nhash(x)",
        rf"{DIED}|{NOTHING}|RecursionError.*|-?\d+|{TIMED_OUT}",
    ),
    "every descriptor closed": ("os.closerange(0, 99)", DIED),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", TIMED_OUT),
    "a vfork that waits": (
        "import signal\nlibc.vfork.restype = ctypes.c_int\n"
        "if libc.vfork() == 0:\n libc.sleep(30)\n libc._exit(0)",
        f"{TIMED_OUT}|{DIED}",
    ),
    # Out of the walls
    "namespaces": (
        "print(*{libc.unshare(n) for n in (0x10000000, 0x20000, 0x40000000)})\n"
        "clone = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]\n"
        "print(system_call(clone, 0x10000011, 0, 0, 0, 0))\n"
        "print(system_call(435, 0, 0))",
        "-1\nEPERM\nENOSYS",
    ),
    "mounts": (
        "print(libc.mount(b'none', b'.', b'tmpfs', 0, None), libc.umount2(b'/proc', 0),"
        " tried(os.chroot, '.'))",
        "-1 -1 EPERM",
    ),
    "another interface to the kernel": (
        "n = {'x86_64': 0x40000000 | 41, 'aarch64': 198}[os.uname().machine]\n"
        "print(system_call(n, 1, 1, 0))",
        "EPERM",
    ),
    "off with the filter": (
        "print(libc.prctl(22, 0, 0, 0, 0), libc.prctl(38, 0, 0, 0, 0), libc.prctl(36, 0, 0, 0, 0),"
        " libc.prctl(1, 0, 0, 0, 0))",
        "-1 -1 -1 -1",
    ),
    "off with the limits": (
        "every(resource.setrlimit, [(n, (-1, -1)) for n in (resource.RLIMIT_AS,"
        " resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)])",
        "EPERM|ValueError",
    ),
    "root": (
        "every(os.setuid, [(0,)])\nevery(os.setgroups, [([0],)])\nprint(os.getuid() == 0)",
        "(EPERM|EINVAL)\nEPERM\nFalse",
    ),
    "a program of its own": (
        "open('x', 'w').write('#!/bin/sh\\necho run'); os.chmod('x', 0o777)\n"
        "print(tried(subprocess.run, ['./x']))",
        "EACCES",
    ),
    "a preloaded library": (
        "print(subprocess.run(['/usr/bin/env', 'LD_PRELOAD=./x.so', '/usr/bin/id', '-u'],"
        " capture_output=True).stdout != b'0\\n')",
        "True",
    ),
    "into a terminal": (
        "import fcntl, termios\nprint(tried(fcntl.ioctl, 0, termios.TIOCSTI, b'x'))", "EPERM",
    ),
    "keep memory": ("print(libc.mlockall(3))", "-1"),
}  # fmt: skip
SETTINGS = {
    "timeout": 1,
    "workers": 1,
    "memory": 128 << 20,
    "file_size": 2 << 20,
    "disk": 8 << 20,
    "processes": 48,
}


def judge(text, expected):
    return re.fullmatch(expected, text, re.DOTALL) is not None


async def attack(tool, neighbour, code):
    """What the attacker saw; then what its next call and the neighbour's say."""
    session = Session([])
    observation = await tool.call(session, HELP + code)
    after = await tool.call(session, "print('alive', 6 * 7)")
    if after.status != "ok":  # what it left in its own process took the next call along, as well
        after = await tool.call(session, "print('alive', 6 * 7)")
    beside = await tool.call(neighbour, "print(open('file').read(), variable)")
    await tool.end(session)
    return observation, after.text, beside.text


async def neighbour_of(tool):
    neighbour = Session([])
    await tool.call(neighbour, "variable = 41\nopen('file', 'w').write('kept')")
    return neighbour
