"""``python -m sphereface2`` (what torchrun starts)."""

import sys

from sphereface2.cli import main

if __name__ == "__main__":
    sys.exit(main())
