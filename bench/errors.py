"""The exceptions a user is meant to see."""


class UserError(Exception):
    """A mistake only the user can mend. Its text is one line that says what is wrong and what to do.

    The command line prints that line and exits with status 2, without a traceback.
    """


class TrajectoryFailed(Exception):
    """Training went wrong by itself: the loss diverged. Its text says at which step and why; the exit status is 1."""


class Stopped(SystemExit):
    """A signal asked a trajectory to stop, and it did so at a checkpoint; the exit status is 75.

    That is EX_TEMPFAIL of sysexits.h, "try again", which schedulers can be told to requeue. It is no Exception: it
    passes through a launcher, which would go on to the next trajectory, and ends the process.
    """

    code = 75

    def __init__(self) -> None:
        super().__init__(self.code)
