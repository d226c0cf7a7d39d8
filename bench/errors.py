"""The exceptions a user is meant to see."""


class UserError(Exception):
    """A mistake only the user can mend. Its text is one line that says what is wrong and what to do.

    The command line prints that line and exits with status 2, without a traceback.
    """


class TrajectoryFailed(Exception):
    """Training went wrong by itself: the loss diverged. Its text says at which step and why; the exit status is 1."""
