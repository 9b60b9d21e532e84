"""Every error that a user can meet, and the exit code of the command line that goes with it.

A message says what was needed, what there was, and what to do: "KV cache needs 6.2 GiB …; 4.1 GiB left of 8.0. Fits with …".
Exit codes: 0 good, 1 our failure, 2 usage (what the user gave), 3 the budget cannot be met.
"""


class TradespaceError(Exception):
    """Root of all errors raised on purpose. Exit code 1: our failure (or the network's, or the disk's)."""

    exit_code = 1


class InputError(TradespaceError):
    """Something that the user gave is wrong: a flag, a prompt, a file, a name. Exit code 2."""

    exit_code = 2


class CorruptFileError(InputError):
    """A weight or configuration file is truncated, inconsistent or not what its header says."""


class UnsupportedError(InputError):
    """A model, format or option that tradespace knows of but cannot honour to the letter."""


class BudgetError(TradespaceError):
    """The stated memory cannot hold the plan. Carries need and have in bytes so that callers can act. Exit code 3."""

    exit_code = 3

    def __init__(self, message: str, *, need_bytes: int | None = None, have_bytes: int | None = None):
        super().__init__(message)
        self.need_bytes = need_bytes
        self.have_bytes = have_bytes


class DownloadError(TradespaceError):
    """A download failed, was refused, or did not match its checksum. Nothing half-written is left in its place."""


class EngineError(TradespaceError):
    """The engine failed while running; requests in flight carry this as their end."""
