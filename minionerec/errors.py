"""The two ways a command ends badly, and the list that gathers what is wrong with its input."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class InputError(Exception):
    """Input that cannot be used. Carries every problem found, one line each, naming the place and the remedy.
    `everywhere`: all processes of the run raise it."""

    def __init__(self, problems: str | list[str], everywhere: bool = False):
        self.everywhere = everywhere
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunError(Exception):
    """A run that cannot continue, in one line that says what is left and what to do. `everywhere`: all processes of the
    run raise it."""

    def __init__(self, message: str, exit_code: int = 1, everywhere: bool = False):
        self.exit_code, self.everywhere = exit_code, everywhere
        super().__init__(message)


class Problems(list[str]):
    """What is wrong with a run's input, gathered so that it can be reported together.

    `add` and `attempt` gather; `check` raises InputError when there is anything to report.
    """

    def add(self, problem: str) -> None:
        self.append(problem)

    def attempt(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """`function(*args, **kwargs)`, or None when it raises InputError, whose problems are kept."""
        try:
            return function(*args, **kwargs)
        except InputError as error:
            self.extend(error.problems)
            return None

    def check(self) -> None:
        if self:
            raise InputError(self)
