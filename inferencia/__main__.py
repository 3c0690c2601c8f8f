"""The way in: the command ``inferencia``, and ``python -m inferencia``."""

import gc
import sys


def main() -> int:
    """Run one command; returns the exit code.

    While the program is imported nothing of it is garbage, and looking for some took a
    quarter of the start.
    """
    gc.disable()
    from inferencia.cli import main as run

    gc.freeze()
    gc.enable()
    return run()


if __name__ == "__main__":
    sys.exit(main())
