"""Runs the training command in processes of their own that start quickly: what they import is imported already."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.train.runner_imports"])


class Run:
    """`python -m train.main` with flags, on the shrunk model; what it prints goes to a file."""

    def __init__(self, flags, log, *, devices=1, file_limit=None):
        self._log = log
        args = (list(map(str, flags)), str(log), devices, file_limit)
        self._process = _context.Process(target=_main, args=args)
        self._process.start()

    @property
    def output(self):
        return self._log.read_text() if self._log.exists() else ""

    def wait(self, timeout=900):
        """The exit status; negative: the signal that ended it."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running after {timeout} s: {self.output}"
        return self._process.exitcode

    def wait_for(self, condition, timeout=900):
        """Return as soon as the condition holds or the run has ended; whether it still runs."""
        end = time.monotonic() + timeout
        while self._process.is_alive() and not condition():
            assert time.monotonic() < end, f"not seen after {timeout} s: {self.output}"
            time.sleep(0.002)
        return self._process.is_alive()

    def send(self, number):
        os.kill(self._process.pid, number)


def _main(flags, log, devices, file_limit):
    import jax

    import train.loop
    from tests import compilation
    from tests.small_model import shrink
    from train.main import main

    shrink(dict.__setitem__)
    train.loop.draw_curves = lambda *_: None  # it takes seconds
    os.environ["XLA_FLAGS"] = compilation.xla_flags(devices=devices)
    jax.config.update("jax_platforms", "cpu")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if file_limit is not None:  # not for what is printed, of which Orbax's threads make much when they fail
        printer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
        output = printer.stdin.fileno()
    os.dup2(output, 1)
    os.dup2(output, 2)
    if file_limit is not None:  # like a full disk: writing beyond it is an error of the system
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    status = main(flags)
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()  # as at the end of Python; otherwise the other processes of the run miss this one
    sys.stdout.flush()
    if file_limit is not None:
        os.close(1)
        os.close(2)
        printer.stdin.close()
        printer.wait()
    os._exit(status)  # as in a shell: nothing of multiprocessing comes after it
