"""Why a run must end, and how all of its processes do so together."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object

from minionerec import world
from minionerec.checkpoint import newest_checkpoint
from minionerec.errors import RunError
from minionerec.output import writing


class Failures:
    """What goes wrong in this process, until all know. If it raised by itself, the others would wait for it in their
    next collective.

    Args:
        output_dir: the folder of the run.
    """

    def __init__(self, output_dir: str):
        self.output_dir = output_dir
        self.resumed: str | None = None  # the checkpoint that the run resumed from
        self.problem: str | None = None  # why this process must end the run

    def later(self, problem: str) -> None:
        """Keeps a reason to end the run until `together`."""
        self.problem = self.problem or problem

    def together(self) -> None:
        """Raises RunError in every process if any of them has a reason. All processes must call it."""
        problems = [problem for problem in gather_object([self.problem]) if problem]
        self.problem = None
        if problems:
            raise RunError(problems[0], everywhere=True)

    @contextmanager
    def writing(self, what: str, at_once: bool = False) -> Iterator[None]:
        """While open, a file that cannot be written ends the run: at the next `together`, or `at_once`."""
        try:
            with writing(what):
                yield
        except RunError as error:
            if error.everywhere:
                raise
            problem = f"{error}; {self.how_to_go_on()}"
            if at_once:
                raise RunError(problem) from None
            self.later(problem)

    @contextmanager
    def naming_last_good(self) -> Iterator[None]:
        """While open, a process of the run that is gone ends this one with a line that names the last good
        checkpoint."""

        def what_is_left() -> str:
            return f"the last good checkpoint is {self.last_good()}; {self.again()}"

        world.say_at_the_end(what_is_left)
        try:
            yield
        except RuntimeError as error:
            if not world.lost_a_process(error):
                raise
            raise RunError(f"another process of the run no longer answers; {what_is_left()}") from error
        finally:
            world.say_at_the_end(None)

    def last_good(self) -> str:
        """The newest checkpoint that the run has, or that it resumed from."""
        return newest_checkpoint(self.output_dir) or self.resumed or "none: nothing has been saved yet"

    def how_to_go_on(self) -> str:
        """What is left where a file could not be written, and what to do."""
        return f"the last good checkpoint is {self.last_good()}. Make room, then {self.again()}"

    def again(self) -> str:
        """What the same command does next. True would not find a checkpoint of another folder."""
        if self.resumed and not newest_checkpoint(self.output_dir):
            return "the same command continues from it"
        goes_on = "continues from it" if newest_checkpoint(self.output_dir) else "starts anew"
        return f"the same command with --resume_from_checkpoint True {goes_on}"
