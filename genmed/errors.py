"""The one exception that means: the user can fix this."""


class GenMedError(Exception):
    """Bad input.

    The message is one line that names the file or argument, says what is wrong and what to do.
    The command line prints it without a traceback and exits with code 2.
    """
