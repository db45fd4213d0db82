"""What can go wrong, and the exit code each kind ends with.

    EpicError
    ├── ConfigError   2   wrong or contradictory settings
    ├── InputError    3   missing, unreadable or too many bad images; a checkpoint or model that does not serve
    ├── ClusterError  4   cannot reach, authenticate, or get the resources
    ├── RunFailed     5   the job ran and failed
    └── ResultError   6   output incomplete or not matching its schema

A command that is interrupted ends with 130, one that is stopped by SIGTERM with 143. Anything that is not an
`EpicError` is a bug and ends with 1.
"""


class EpicError(Exception):
    """A fault with a known cause. Its message says what is wrong, where, and what to try."""

    exit_code = 1


class ConfigError(EpicError):
    """Settings that are wrong or contradict one another."""

    exit_code = 2


class InputError(EpicError):
    """Images, checkpoints or models that are missing, unreadable or unfit."""

    exit_code = 3


class ClusterError(EpicError):
    """A cluster that cannot be reached, or lacks the resources."""

    exit_code = 4


class RunFailed(EpicError):
    """A job that ran and failed; names the stage and the first cause."""

    exit_code = 5


class ResultError(EpicError):
    """Output that is incomplete or does not match its schema."""

    exit_code = 6


INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143
