"""What a program in the sandbox can do, and what it cannot."""

import os
import pathlib
import time

import pytest

from davinci_jax.curation import sandbox
from davinci_jax.curation.sandbox import Limits
from davinci_jax.errors import ConfigError, DataError

# Every program is a process or two.
pytestmark = pytest.mark.slow

QUICK = Limits(wall_seconds=5, cpu_seconds=2)
needs_namespaces = pytest.mark.skipif(
    sandbox.can_isolate() is not None, reason=f"no user namespaces here: {sandbox.can_isolate()}"
)


def run(program, limits=QUICK, **settings):
    return sandbox.run({"program.py": program}, ("program.py",), limits, **settings)


@pytest.fixture(params=["namespaces", "limits"])
def isolation(request):
    if request.param == "namespaces" and sandbox.can_isolate() is not None:
        pytest.skip("no user namespaces here")
    return request.param


def test_output_errors_and_exit_status(isolation):
    outcome = run("import sys; print('é'); print('no', file=sys.stderr); sys.exit(3)", isolation=isolation)
    assert (outcome.status, outcome.code, outcome.output, outcome.errors) == ("failed", 3, "é\n", "no\n")
    assert run("import helper; print(helper.x)", isolation=isolation).status == "failed"
    files = {"program.py": "import sys; sys.path.insert(0, '.'); import helper; print(helper.x)", "helper.py": "x = 7"}
    assert sandbox.run(files, ("program.py",), QUICK, isolation).output == "7\n"


def test_a_program_that_never_ends_is_killed_with_its_children(isolation, tmp_path):
    program = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(47.25)'])"
    started = time.monotonic()
    outcome = run(f"{program}\nprint('on', flush=True)\ntime.sleep(50)", Limits(wall_seconds=2), isolation=isolation)
    assert (outcome.status, outcome.code, outcome.output) == ("timeout", None, "on\n")
    assert time.monotonic() - started < 10
    run(program, isolation=isolation)
    time.sleep(0.2)
    assert [line for line in pathlib.Path("/proc").glob("[0-9]*/cmdline") if b"sleep(47.25)" in _read(line)] == []


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_limits_of_time_memory_and_output(isolation):
    assert run("while True: pass", Limits(wall_seconds=9, cpu_seconds=1), isolation=isolation).code == 128 + 24
    assert "MemoryError" in run("bytearray(3 << 30)", isolation=isolation).errors
    outcome = run("while True: print('x' * 1000)", Limits(wall_seconds=5, file_bytes=10_000), isolation=isolation)
    assert outcome.status == "failed"
    assert len(outcome.output) <= 10_000


def test_environment_holds_nothing_of_the_users(isolation, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    outcome = run("import os; print(sorted(os.environ)); print(os.environ.get('SECRET_KEY'))", isolation=isolation)
    assert "SECRET" not in outcome.output
    assert outcome.output.endswith("None\n")


@needs_namespaces
def test_no_network_not_even_to_this_machine():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
    assert outcome.status == "failed"
    assert "OSError" in outcome.errors or "Error" in outcome.errors


@needs_namespaces
def test_files_are_read_only_and_its_own_vanish(tmp_path):
    target = tmp_path / "precious"
    target.write_text("kept")
    outcome = run(
        f"import pathlib\npathlib.Path('mine').write_text('x')\nprint(pathlib.Path('mine').read_text())\n"
        f"pathlib.Path({str(target)!r}).write_text('lost')"
    )
    assert outcome.output == "x\n"
    assert "Read-only" in outcome.errors
    assert target.read_text() == "kept"
    many = "for n in range(100): open(f'f{n}', 'wb').write(bytes(900_000))"
    assert "No space left" in run(many).errors


@needs_namespaces
def test_other_processes_are_out_of_sight():
    outcome = run("import os; print(len([p for p in os.listdir('/proc') if p.isdigit()]))")
    assert int(outcome.output) <= 3
    assert run(f"import os; os.kill({os.getpid()}, 9)").errors.rstrip().endswith("No such process")


@needs_namespaces
def test_what_is_read_only_cannot_be_undone_from_inside(tmp_path):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
attributes = (ctypes.c_uint64 * 4)(0, 1, 0, 0)
print(libc.syscall(442, -100, b"/", 0x8000, attributes, 32), libc.umount2(b"/proc", 2), libc.sethostname(b"x", 1))
print([line for line in open("/proc/self/status") if line.startswith("CapEff")][0].split()[1].strip("0"))
"""
    assert run(program).output == "-1 -1 -1\n\n"
    nested = "import ctypes; libc = ctypes.CDLL(None); print(libc.unshare(0x10000000 | 0x20000))\n" + program
    target = tmp_path / "precious"
    outcome = run(f"{nested}\nopen({str(target)!r}, 'w')")
    assert not target.exists()
    assert "Error" in outcome.errors


@needs_namespaces
def test_processes_are_bounded_and_gone_afterwards():
    program = """
import os, time
born = 0
try:
    while born < 1000:
        if not os.fork():
            time.sleep(47.75)
        born += 1
except OSError as error:
    print(born, error)
"""
    outcome = run(program, Limits(wall_seconds=6, processes=50))
    assert outcome.status == "ok", outcome
    assert 10 < int(outcome.output.split()[0]) < 310
    time.sleep(0.5)
    inside = [path for path in pathlib.Path("/proc").glob("[0-9]*/cmdline") if b"program.py" in _read(path)]
    assert inside == []


def test_names_of_files_stay_in_the_folder():
    with pytest.raises(ConfigError, match="no plain file name"):
        sandbox.run({"../escape.py": ""}, ("x",))


def test_a_machine_without_namespaces_is_told_never_silently_weaker(monkeypatch, tmp_path):
    refuses = tmp_path / "refuses.py"
    text = sandbox.CHILD.read_text()
    assert "CLONE_NEWUSER | CLONE_NEWNS" in text
    refuses.write_text(text.replace("CLONE_NEWUSER | CLONE_NEWNS", "1 | CLONE_NEWUSER | CLONE_NEWNS"))
    monkeypatch.setattr(sandbox, "CHILD", refuses)
    with pytest.raises(DataError, match="isolation='limits'"):
        run("print(1)")
