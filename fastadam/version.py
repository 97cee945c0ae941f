"""The version of the package: here alone, where the build and every module can read it."""

__version__ = "0.1.0"
