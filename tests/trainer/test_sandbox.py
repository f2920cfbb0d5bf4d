"""Code that attacks what is around it: the machine, the trainer, the worker, other sessions.

Every attack runs in a session of its own beside a neighbour on the same worker. Afterwards the
attacker's next call must work, the neighbour must have its variable and its file, and the machine
must be what it was. All of it three times: in the machine's sandbox, and, as an ordinary user, in
namespaces made without privileges and with Landlock and seccomp alone.
"""

import asyncio
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sandbox_attacks import ATTACKS, HELP, ROOT, SETTINGS, attack, judge, neighbour_of
from test_tools_python import children

from trainer.tools import PythonTool, _confine, sandbox
from trainer.tools.sandbox import Sandbox, SandboxError


@pytest.fixture(scope="module")
def tool():
    os.environ["SECRET_TOKEN"] = "secret"
    with PythonTool(**SETTINGS) as tool:
        yield tool
    del os.environ["SECRET_TOKEN"]


@pytest.fixture(scope="module")
def neighbour(tool):
    return asyncio.run(neighbour_of(tool))


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(tool, neighbour, name):
    code, expected = ATTACKS[name]
    host = sorted(os.listdir(ROOT)), sorted(children())
    worker = tool._workers[0]._process.pid
    observation, after, beside = asyncio.run(attack(tool, neighbour, code))
    assert judge(observation.text, expected), observation.text
    assert after.endswith("alive 42")
    assert beside == "kept 41"
    assert tool._workers[0]._process.pid == worker, "the worker had to be replaced"
    assert (sorted(os.listdir(ROOT)), sorted(children())) == host
    (zygote,) = children(worker)
    assert len(children(zygote)) == 1  # the neighbour's process
    state = Path(f"/proc/{children(zygote)[0]}/stat").read_text().rpartition(")")[2].split()[0]
    assert state == "T"


def test_the_code_is_not_root_on_this_machine(tool, neighbour):
    (zygote,) = children(tool._workers[0]._process.pid)
    (child,) = children(zygote)
    for pid in (zygote, child):
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert "0" not in fields["Uid"].split() and "0" not in fields["Gid"].split()
        assert not fields["Groups"].strip() or os.geteuid() != 0
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
        assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
    assert int(fields["Uid"].split()[0]) == tool._workers[0].uid


USER = 1234
AS_USER = """
import asyncio, json, os, sys
sys.path[:0] = {paths!r}
from sandbox_attacks import *
from trainer.tools import PythonTool, _confine, sandbox
from trainer.tools.sandbox import Sandbox
box = sandbox.probe() if {namespaces} else Sandbox(None, _confine.landlock_abi(), True)

async def main():
    results = dict()
    with PythonTool(**SETTINGS, sandbox=box) as tool:
        neighbour = await neighbour_of(tool)
        worker = tool._workers[0]._process.pid
        for name, (code, expected) in ATTACKS.items():
            observation, after, beside = await attack(tool, neighbour, code)
            process = tool._workers[0]._process
            same = process is not None and process.pid == worker
            results[name] = observation.text, after, beside, same
            if not same:
                break
        directory = tool._workers[0]._directory
    left = bool(directory) and os.path.exists(directory)
    print(json.dumps([os.getuid(), box.tier, results, left]))

asyncio.run(main())
"""


def as_user(code, folder):
    """The output of Python code run by an ordinary user. Root takes another id for it; and, for
    an interpreter below root's home, a view of the files in which that is open."""
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        drop = f"import os, sys; os.setgroups([]); os.setgid({USER}); os.setuid({USER}); "
        drop += "os.execv(sys.argv[1], sys.argv[1:])"
        outer = [sandbox.probe().bwrap, "--bind", "/", "/", "--dev-bind", "/dev", "/dev"]
        outer += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--die-with-parent"]
        home = Path.home()
        inside = [path for path in sandbox.readable() if Path(path).is_relative_to(home)]
        if inside:
            outer += ["--perms", "0755", "--tmpfs", str(home)]
        for path in inside:
            for parent in reversed(Path(path).parents):
                if parent.is_relative_to(home) and parent != home:
                    outer += ["--perms", "0755", "--dir", str(parent)]
            outer += ["--ro-bind", path, path]
        command = [*outer, sys.executable, "-c", drop, *command]
    os.chmod(folder, 0o777)
    environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def open_folder():
    """A folder that another user reaches: pytest's own are closed."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.mark.parametrize("kind", ["namespaces", "landlock"])
def test_attacks_as_an_ordinary_user(kind, open_folder, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    paths = [str(ROOT), str(ROOT / "tests" / "trainer")]
    code = AS_USER.format(paths=paths, namespaces=kind == "namespaces")
    uid, tier, results, left = json.loads(as_user(code, open_folder).splitlines()[-1])
    assert uid != 0 and tier == {"namespaces": 1, "landlock": 3}[kind] and not left
    wrong = {
        name: (text, after, beside, same)
        for name, (text, after, beside, same) in results.items()
        if not judge(text, ATTACKS[name][1])
        or not after.endswith("alive 42")
        or beside != "kept 41"
        or not same
    }
    assert not wrong
    assert len(results) == len(ATTACKS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory in many processes", "Error: more than 128 MB of memory in all"),
        ("shared memory in many processes", "Error: more than 128 MB of memory in all"),
        ("patient fork bomb", "Error: more than 48 processes and threads"),
        ("a disk full", "Error: more than 8 MB of files, or too many"),
        ("files without end", "Error: more than 8 MB of files, or too many"),
    ],
)
def test_the_watchdog_is_in_time(name, text):
    """With all the time that a loaded machine needs: it is not the wall clock that ends these."""
    with PythonTool(**{**SETTINGS, "timeout": 60}) as tool:
        assert tool.run(HELP + ATTACKS[name][0]).text == text
        assert tool.run("7").text == "7"


# --- The filter, the probe, the floor -------------------------------------------------------------


def test_every_denied_call_is_denied():
    """By number, also of calls that need rights which the code does not have anyway."""
    column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
    numbers = [pair[column] for pair in _confine.DENIED.values() if pair[column] is not None]
    code = f"{HELP}\nprint({{system_call(n, -1, 0, 0, 0, 0, 0) for n in {numbers}}})"
    with PythonTool(workers=1) as tool:
        assert tool.run(code).text == "{'EPERM'}"


@pytest.mark.parametrize(
    ("column", "header"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        (1, "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_numbers_of_system_calls(column, header):
    if not os.path.exists(header):
        pytest.skip(f"{header} is not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text())
    numbers = {name: int(number) for name, number in found}
    for name, pair in _confine.DENIED.items():
        # Headers may be older than the call.
        assert pair[column] is None or numbers.get(name, pair[column]) == pair[column], name
    others = {"ioctl": _confine._IOCTL, "clone": _confine._CLONE, "prctl": _confine._PRCTL}
    for name, pair in {**others, "socketpair": _confine._SOCKETPAIR}.items():
        assert numbers[name] == pair[column]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filters_are_well_formed(machine):
    for program in (_confine.seccomp_filter(machine), _confine.guard_filter(machine, only=7)):
        lines = list(struct.iter_unpack("=HBBI", program))
        assert len(lines) < 4096
        for index, (code, jump, other, _) in enumerate(lines):
            assert code in (0x20, 0x15, 0x35, 0x45, 0x54, 0x06)
            assert code == 0x06 or index + 1 + max(jump, other) < len(lines)
        assert lines[-1][0] == 0x06
    with pytest.raises(OSError, match="no seccomp filter for vax"):
        _confine.seccomp_filter("vax")


@pytest.mark.parametrize(
    ("box", "tier", "line"),
    [
        (Sandbox("bwrap", 7, True), 1, "tier 1 (namespaces, Landlock 7, seccomp, watchdog)"),
        (Sandbox("bwrap", 5, True), 2, "tier 2 (namespaces, Landlock 5, seccomp, watchdog)"),
        (Sandbox("bwrap", 0, False), 2, "tier 2 (namespaces, watchdog)"),
        (Sandbox(None, 4, True), 3, "tier 3 (Landlock 4, seccomp, watchdog)"),
        (Sandbox(None, 3, True), 0, "tier 0 (Landlock 3, seccomp, watchdog)"),
        (Sandbox(None, 7, False), 0, "tier 0 (Landlock 7, watchdog)"),
        (Sandbox(), 0, "tier 0 (watchdog)"),
    ],
)
def test_tiers(box, tier, line):
    assert box.tier == tier
    assert box.describe() == f"python sandbox: {line}"


def test_namespaces_alone_hold_too(tmp_path):
    """Tier 2 at its worst, as with an old kernel: no Landlock and no seccomp inside."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with PythonTool(**SETTINGS, sandbox=Sandbox(sandbox.probe().bwrap)) as tool:
        code = (
            f"{HELP}\nprint(tried(open, {str(secret)!r}), tried(open, '/etc/passwd'),"
            "tried(os.kill, 1, 9), os.path.exists('/proc/2000'), os.getuid() == 0)\n"
            "print(tried(socket.create_connection, ('169.254.169.254', 80)))\n"
            "every(open, [(p + '/x', 'w') for p in ('', '/usr', '/dev', '/dev/shm', sys.prefix)])"
        )
        text = tool.run(code).text
        assert re.fullmatch(r"ENOENT ENOENT did it False False\nENETUNREACH\n(EACCES )?EROFS", text)
        assert tool.run("7").text == "7"


def test_signals_stay_inside_where_landlock_is_too_old_for_it():
    box = Sandbox(sandbox.probe().bwrap, 5, True)
    code = (
        f"{HELP}\nmine = os.getpid()\nfork = os.fork()\nif fork == 0: time.sleep(9)\n"
        "every(os.kill, [(pid, 0) for pid in (-1, 0, 1, os.getppid(), fork)])\n"
        "print(tried(signal.pthread_kill, threading.get_ident(), 0), tried(os.kill, mine, 0))"
    )
    with PythonTool(**SETTINGS, sandbox=box) as tool:
        assert tool.run(code).text == "EPERM\ndid it did it"
        assert tool.run("import os; os.abort()").text.endswith("(SIGABRT)")
        assert tool.run("7").text == "7"


def test_below_the_floor_it_refuses(monkeypatch):
    low = Sandbox(None, 2, False, ("bubblewrap (bwrap) is not installed", "seccomp: none"))
    monkeypatch.setattr(sandbox, "probe", lambda: low)
    with pytest.raises(SandboxError, match=r"bwrap. is not installed; seccomp: none.*apt install"):
        PythonTool()
    assert "bwrap" in sandbox.describe()
    PythonTool(unsafe_no_sandbox=True).close()
    sandbox.permit_unsafe()
    try:
        PythonTool().close()
        with pytest.raises(SandboxError):
            PythonTool(unsafe_no_sandbox=False)
    finally:
        sandbox.permit_unsafe(False)


def test_without_a_sandbox_it_warns_at_every_start(caplog):
    with PythonTool(workers=1, unsafe_no_sandbox=True) as tool:
        assert tool.run("import os\nos.path.exists('/etc/passwd')").text == "True"
        assert tool.sandbox.tier == 0
        os.kill(tool._workers[0]._process.pid, signal.SIGKILL)
        assert tool.run("7").text == "7"
    assert caplog.text.count("HAS NO SANDBOX") == 2


def test_what_can_be_read_is_the_system_and_the_interpreter():
    home, project = Path.home(), ROOT
    for path in map(Path, sandbox.readable()):
        assert path != Path("/") and not home.is_relative_to(path)
        assert not project.is_relative_to(path) or path.is_relative_to("/usr")
        assert path not in (Path("/etc"), Path("/var"), Path("/proc"), Path("/sys"))


def test_bubblewrap_that_fails_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text(
        "#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: str(broken))
    monkeypatch.setattr(sandbox.importlib.util, "find_spec", lambda _: None)
    assert sandbox._find_bwrap() == (
        None,
        f"{broken}: bwrap: setting up uid map: Permission denied",
    )
