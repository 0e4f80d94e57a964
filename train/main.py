"""`python -m train.main --variant ti`: train, evaluate, and leave everything in a folder."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once, and worker
# processes, which import this module too, need none of it.
import gc
import mmap
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from convert.command_line import Program, leave, run
from convert.errors import require
from convert.streams import tell
from train.devices.lost_hosts import HostLost, end_at_once, is_one_of_several, watched
from train.flags import parse_flags

_PROGRAM = Program("train.main")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done; 1 training failed; 2 a mistake in what was asked for; 130, 143, 129 or 138 after
        Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, and saved if there was anything to save.
    """
    config = parse_flags(sys.argv[1:] if argv is None else argv)
    if is_one_of_several(config.coordinator):
        joined = mmap.mmap(-1, 1)  # shared by both processes
        return watched(lambda: _run(config, joined), told=lambda number: _why_ended(number, config, joined))
    return _run(config)


def _why_ended(number: int, config, joined: mmap.mmap) -> str:
    """The line of a run of several processes whose process here was ended by a signal."""
    aborted = number == signal.SIGABRT
    if aborted and not joined[0]:
        return (
            f"{_PROGRAM}: error: the other processes of the run were not there within {config.join_timeout} s, or one "
            "of them has ended; --join-timeout waits longer"
        )
    if aborted:
        why = "jax has aborted this process, as it does when another process of the run is lost"
    else:
        full = " (too little memory is one reason)" * (number == signal.SIGKILL)
        why = f"the process was ended by {signal.Signals(number).name}{full}"
    begun = config.output is not None and Path(config.output, "config.json").is_file()
    return f"{_PROGRAM}: error: {why}{f'; --resume {config.output} goes on' * begun}"


def _run(config, joined: mmap.mmap | None = None) -> int:
    # Until the first step, after which `train.loop` turns it on again: hardly anything of what is imported and traced
    # is garbage, and looking for it takes a fifth of the time.
    gc.disable()
    try:
        return run(_PROGRAM, lambda: _train(config, joined), failure=1)
    finally:
        gc.enable()


def _train(config, joined: mmap.mmap | None) -> int:
    require("training", "optax", "orbax", "tensorboardX")  # before anything is read or compiled
    from train.devices import hosts
    from train.devices.process import keep_compiled_programs, keep_freed_memory
    from train.job import prepare
    from train.loop import train

    keep_freed_memory()
    keep_compiled_programs()
    hosts.join_processes(config)
    if joined is not None:
        joined[0] = 1
    try:
        result = train(prepare(config))
    except HostLost as error:
        end_at_once(f"{_PROGRAM}: error: {error}")
    if hosts.is_main():
        tell(result.summary())
    return 0


if __name__ == "__main__":
    leave(main())
