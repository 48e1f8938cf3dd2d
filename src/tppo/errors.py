"""The one exception a user is meant to see."""


class UserError(ValueError):
    """A mistake the user can mend: the message names the file, row or setting and the way out.

    The CLI prints the message without a traceback and exits with status 2.
    """
