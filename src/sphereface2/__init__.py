"""SphereFace2: deep face recognition trained by binary classification."""

__version__ = "0.1.0"
