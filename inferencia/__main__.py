"""``python -m inferencia``."""

import sys

from inferencia.cli import main

if __name__ == "__main__":
    sys.exit(main())
