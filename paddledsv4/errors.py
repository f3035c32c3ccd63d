"""The one exception that is meant for a person."""


class UserError(Exception):
    """A mistake in what the user asked for: one sentence with the field, the value and what is legal.

    The command line prints ``error: <message>`` and exits 2; anything else that escapes is a bug and keeps
    its trace.
    """
