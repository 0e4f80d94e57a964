"""The loss of a process of a run is one line."""

import os
import signal
import socket
import subprocess
import sys

import jax
import pytest

from train.devices.lost_hosts import HostLost, is_one_of_several, lost_hosts_explained

_SCRIPT = """
import os, signal, sys, time
from train.devices.lost_hosts import watched

def work():
    {work}

sys.exit(watched(work, told=lambda number: f"x: ended by {{number}}"))
"""


def _free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _watched(work, *, send=None):
    """The exit status, standard output and errors of a process that watches over this."""
    command = [sys.executable, "-c", _SCRIPT.format(work=work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        if send is not None:
            process.send_signal(send)
        out, err = process.communicate(timeout=60)
    return process.returncode, first + out, err


def test_an_aborted_process_is_told_in_a_line():
    assert _watched("os.abort()") == (1, "", "x: ended by 6\n")
    assert _watched("print('fine'); return 0") == (0, "fine\n", "")
    assert _watched("return 3") == (3, "", "")
    assert _watched("os.kill(os.getpid(), signal.SIGKILL)") == (137, "", "x: ended by 9\n")


def test_what_libraries_print_is_passed_on_and_their_page_on_a_lost_process_comes_after_our_line():
    page = "F1130 09:58:31.000835    7262 client.h:80] Terminating process because the JAX distributed service died"
    early = (
        "W1130 11:35:25.033068    5538 preemption_sync_manager.cc:147] no notice from coordination service: UNAVAILABLE"
    )
    other = "E1130 09:58:31.000835    7262 slow_operation_alarm.cc:73] slow"
    prints = "os.write(2, {!r}); time.sleep(0.1); ".format
    ours = "print('ours', file=sys.stderr); "
    work = prints(f"{other}\n".encode()) + prints(f"{page}\nmore\n".encode()) + ours
    assert _watched(f"{work}os.abort()") == (1, "", f"{other}\nours\nx: ended by 6\n{page}\nmore\n")
    assert _watched(f"{prints(f'{early}x'.encode())}os.abort()") == (1, "", f"x: ended by 6\n{early}x")
    assert _watched(f"{work}return 1") == (1, "", f"{other}\nours\n{page}\nmore\n")  # told by the process itself


_JOINS = """
import sys, time
from train.devices.lost_hosts import watched

def work():
    import jax
    jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]), heartbeat_timeout_seconds=10)
    print("joined", flush=True)
    time.sleep(100)
    return 0

sys.exit(watched(work, told=lambda number: f"x: ended by {{number}}"))
"""


def test_where_the_first_process_is_lost_our_line_comes_before_the_page_of_jax():
    script, env = _JOINS.format(port=_free_port()), os.environ | {"JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(number)], stdout=-1, stderr=-1, text=True, env=env)
        for number in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in both] == ["joined\n"] * 2
        both[0].kill()  # and the process that it waits for with it
        error = both[1].communicate(timeout=60)[1]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1].returncode == 1
    assert error.splitlines()[0] == "x: ended by 6"
    assert "JAX distributed service" in error


def test_the_end_is_noticed_where_nobody_is_told_of_ended_processes():
    """A launcher may have SIGCHLD ignored, which its processes inherit."""
    script = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n" + _SCRIPT.format(work="return 3").partition("\n\n")[2]
    script = "import os, signal, sys, time\nfrom train.devices.lost_hosts import watched\n" + script
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 3


def test_signals_are_handed_on_once():
    heeds = (
        "got = []\n    signal.signal(signal.SIGINT, lambda n, _: got.append(n))\n    print('ready', flush=True)\n"
        "    while not got: time.sleep(0.01)\n    time.sleep(0.1)\n    print(len(got))\n    return 5"
    )
    assert _watched(heeds, send=signal.SIGINT) == (5, "ready\n1\n", "")
    assert _watched("print('ready', flush=True); time.sleep(60)", send=signal.SIGTERM) == (143, "ready\n", "")


def test_errors_of_a_lost_connection_are_explained_in_runs_of_several_processes(monkeypatch):
    def fail(message):
        with lost_hosts_explained():
            raise ValueError(message)

    with pytest.raises(ValueError, match=r"^UNKNOWN: Gloo all-reduce failed"):
        fail("UNKNOWN: Gloo all-reduce failed: closed by peer")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        HostLost, match=r"^another process of the run seems to be lost: UNKNOWN: Gloo all-reduce failed: closed"
    ):
        fail("UNKNOWN: Gloo all-reduce failed: closed by peer\nmore")
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):  # of this process's own devices
        fail("RESOURCE_EXHAUSTED: NCCL failed to allocate")
    with pytest.raises(ValueError, match=r"^shapes differ$"):
        fail("shapes differ")


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_are_not_there_are_waited_for_so_long_and_told_in_a_line(process):
    port = _free_port()  # and nobody listens
    command = [sys.executable, "-m", "train.main", f"--coordinator=localhost:{port}", "--num-processes=2"]
    command += [f"--process-id={process}", "--join-timeout=2"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    first = done.stderr.splitlines()[0]
    if process == 0:  # jax aborts, and prints before that
        told = "error: the other processes of the run were not there within 2 s"
        assert (done.returncode, first.partition("train.main: ")[2].startswith(told)) == (1, True), done.stderr
    else:
        told = f"error: cannot join the other processes: nothing answers at localhost:{port} within 2 s (Connection"
        assert (done.returncode, done.stderr.count("\n"), told in first) == (2, 1, True), done.stderr


def test_what_tells_of_several_processes(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert not is_one_of_several(None)
    assert is_one_of_several("localhost:1234")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert not is_one_of_several(None)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert is_one_of_several(None)
