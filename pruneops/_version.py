"""The version, in the one place that the package metadata and `pruneops.__version__` both read."""

__version__ = "0.1.0"
