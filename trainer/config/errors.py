"""The one error that is the user's to mend: bad recipe, arguments or data."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the recipe, the arguments or the data, told in one line.

    The message names the key or ``file:line:field``, the offending value and the remedy.
    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class RunError(Exception):
    """A run that could not go on (non-finite losses in a row, a bad checkpoint), told in one line; exit 1."""

    exit_code = 1
