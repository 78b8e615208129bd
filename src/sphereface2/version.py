"""The package's version, which everything that it writes is stamped with."""

__version__ = "0.1.0"
