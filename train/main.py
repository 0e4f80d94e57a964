"""`python -m train.main --variant ti`: train, evaluate, and leave everything in a folder."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once, and worker
# processes, which import this module too, need none of it.
import gc
import sys
from collections.abc import Sequence

from convert.errors import SettingsError
from train.flags import parse_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0 done; 1 training failed; 2 a mistake in what was asked for; 130 or 143 saved after Ctrl-C or
        SIGTERM.
    """
    config = parse_flags(sys.argv[1:] if argv is None else argv)
    # Until the first step, after which `train.loop` turns it on again: hardly anything of what is imported and traced
    # is garbage, and looking for it takes a fifth of the time.
    gc.disable()
    try:
        return _run(config)
    except KeyboardInterrupt:
        return _fail("interrupted before the first step; nothing was to be saved", status=130)
    finally:
        gc.enable()


def _run(config) -> int:
    from convert import ConversionError
    from train.data.bad_images import TooManyBadImages
    from train.data.sources import DataError
    from train.devices import hosts
    from train.devices.process import keep_compiled_programs, keep_freed_memory
    from train.job import prepare
    from train.loop import train
    from train.run.folder import CheckpointError
    from train.run.interruption import Interrupted
    from train.run.meter import TrainingFailed

    try:
        keep_freed_memory()
        keep_compiled_programs()
        hosts.start(config)
        result = train(prepare(config))
    except SettingsError as error:
        return _fail(error, status=2)
    except Interrupted as error:
        return _fail(error, status=error.status)
    except (TrainingFailed, CheckpointError, TooManyBadImages, DataError, ConversionError, OSError) as error:
        return _fail(error, status=1)  # OSError: a full disk, when something else than a checkpoint was written
    if hosts.is_main():
        print(result.summary())
    return 0


def _fail(error: object, *, status: int) -> int:
    print(f"python -m train.main: error: {error}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
