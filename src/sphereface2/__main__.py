"""``python -m sphereface2`` (what torchrun starts)."""

from sphereface2.cli import main

if __name__ == "__main__":
    main()
