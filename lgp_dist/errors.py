"""The one exception that a person may cause."""


class UserError(ValueError):
    """Something the person at the keyboard can put right.

    Its text is one sentence that names the file, key and value and says what to do. The command line
    prints it alone and exits with status 2; any other exception is a bug and keeps its traceback.
    """
