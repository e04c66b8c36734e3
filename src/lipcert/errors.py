"""The one exception users see: it says what was wrong, where, and what to do."""


class LipcertError(ValueError):
    """Bad input or an unsupported request.

    The message names what was wrong, where (module, file or value) and what to do about it. The
    command line prints it without a traceback and exits with code 2.
    """
