"""The one exception that means "your input, not our bug"."""


class InputError(ValueError):
    """Something the user gave is wrong.

    The message is one line that names the file or setting, the value found and the remedy. The
    command-line programs print it without a traceback and exit with status 1.
    """
