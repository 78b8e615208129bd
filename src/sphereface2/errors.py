"""The one exception that the command line turns into a single sentence."""


class UserError(ValueError):
    """A mistake in what the user gave: a bad file, a wrong option, a missing path.

    The message is one sentence that names the thing and the remedy. The command line prints it
    without a traceback and exits with status 2; library callers catch it as a ``ValueError``.
    """
