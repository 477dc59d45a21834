"""The one exception that reaches a user.

A command catches :class:`UserError`, prints its message as a single line on stderr and exits with
code 2. The message says what was wrong, what was given, what is allowed, and the remedy.
"""


class UserError(ValueError):
    """Wrong input, explained in one line for the person who gave it."""
