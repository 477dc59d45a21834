"""The one exception that reaches a user.

A command catches :class:`UserError`, prints its message as a single line on stderr and exits with
code 2. The message says what was wrong, what was given, what is allowed, and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong input, explained in one line for the person who gave it."""


@contextmanager
def reading(source: object, remedy: str) -> Iterator[None]:
    """Turn whatever the content of a file makes a block raise into an error of one line.

    The one boundary of a reader: nobody can list what decoders raise on damaged bytes. The
    original error stays its cause, for the log.

    Parameters
    ----------
    source : object
        The file that the block reads, or several of them in words.
    remedy : str
        How to get a whole one: ``make it again with ...``.

    Raises
    ------
    UserError
    """
    try:
        yield
    except UserError:  # the block has said what is wrong
        raise
    except FileNotFoundError as error:
        raise UserError(f"{source} does not exist; correct the path") from error
    except MemoryError as error:
        raise UserError(
            f"{source} asks for more memory than there is ({brief(error)}); {remedy}, or use a "
            "machine with more memory"
        ) from error
    except Exception as error:
        raise UserError(f"{source} is damaged or incomplete ({brief(error)}); {remedy}") from error


def brief(error: BaseException) -> str:
    """Return the message of an error on one line, with its kind where that says more."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, (KeyError, IndexError, TypeError, AttributeError)) or not text:
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text
