"""The mistakes a user can mend, each with the exit code it ends a script with."""


class UserError(Exception):
    """The run failed (exit 1): a loss that is not a number, a full disk, too little memory."""

    code = 1


class ConfigError(UserError):
    """Usage or configuration (exit 2): an unknown option, a value out of range."""

    code = 2


class MissingError(UserError):
    """A data set or a record is not there, or an image in it cannot be read (exit 3)."""

    code = 3


class RefusedError(UserError):
    """A record is damaged, unfinished, unsafe or of another version (exit 4)."""

    code = 4


def is_out_of_memory(error):
    """Whether memory ran out, of a GPU or of the machine."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError)
            and ("allocate memory" in text or "not enough memory" in text or "ALLOC_FAILED" in text)
        )
    )
