"""Errors a user can cause or meet, each with the exit code of the command that ends with it.

The message of each is one sentence for a person: the file or key, what was found, what was expected, what to do.
"""

from __future__ import annotations


class MpsclError(Exception):
    """Base of every error that is reported as one plain sentence instead of a traceback."""

    exit_code = 1


class ConfigError(MpsclError):
    """A setting, an option or a command line that is invalid."""

    exit_code = 2


class DataError(MpsclError):
    """A volume, a dataset or a checkpoint that is damaged, or not what it claims to be."""

    exit_code = 3


class ClusterError(MpsclError):
    """The Ray cluster cannot provide what was asked for."""

    exit_code = 4


class InsufficientResources(ClusterError):
    """The cluster has no room for workers now, but may have it later."""


class StorageError(MpsclError):
    """A folder or bucket that cannot be read or written, or is full."""

    exit_code = 5


class TrainingError(MpsclError):
    """Training failed: a non-finite loss, or workers that keep failing."""

    exit_code = 6


class Interrupted(MpsclError):
    """Stopped from outside; the same command resumes from the last checkpoint."""

    exit_code = 130
