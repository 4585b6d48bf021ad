"""The error that a user can mend."""


class UserError(ValueError):
    """A flag, file, row or directory that cannot be used: one line with its name, its value and the rule.

    Scripts end on it with that line and status 2. Any other error is a fault of code and keeps its traceback.
    """
