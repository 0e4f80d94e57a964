"""`python -m train.main --variant ti`: train, evaluate, and leave everything in a folder."""

# What takes long to import is imported when it is needed: `--help` and wrong flags are answered at once, and worker
# processes, which import this module too, need none of it.
import sys
from collections.abc import Sequence

from train.config import SettingsError
from train.flags import parse_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 if training failed, or 2 for a mistake in what was asked for."""
    config = parse_flags(sys.argv[1:] if argv is None else argv)

    from train.job import prepare
    from train.loop import TrainingFailed, train
    from train.transforms import UnreadableImage

    try:
        result = train(prepare(config))
    except SettingsError as error:
        return _fail(error, status=2)
    except (TrainingFailed, UnreadableImage) as error:
        return _fail(error, status=1)
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    print(result.summary())
    return 0


def _fail(error: object, *, status: int) -> int:
    print(f"train: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
