"""How the commands of this project read their arguments."""

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and answers a wrong command line with one line on stderr and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)
