"""The one error that a user is meant to read."""


class CellmillError(Exception):
    """Bad input, said in one sentence: what is wrong, where, and how to mend it.

    The command line and the workflow's scripts print its text alone, without a traceback; anything else that is
    raised is a defect of cellmill and keeps its traceback.
    """
