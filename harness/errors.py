"""The errors that a user can meet, and the exit code that each one ends a command with.

    HarnessError            1   anything that went wrong and has a name
    ├── RecipeError         2   the recipe, an override or the command line is wrong
    ├── DataError           2   a row, a file or a mixture of data is wrong
    ├── ModelError          1   the model, its tokenizer or its adapter is not what the recipe says
    ├── CheckpointError     1   something saved is missing, torn or not what it claims to be
    ├── TeacherError        1   a teacher, or what was kept of it, does not fit
    ├── EvaluationError     1   a model cannot be measured as asked
    ├── ClusterError        1   Slurm or a node does not do what it should
    ├── Stopped            75   ended early on purpose, and can be continued by the same command
    └── LaunchError         2   ranks, backend, run folder and machine do not fit together; asking again in the same way cannot help

A message says where, what was found and what would be right, in that order:
`configs/dpo/x.yaml: train.beta = -0.1; must be > 0 (0.1 is usual)`.
"""


class HarnessError(Exception):
    """Base of every error that is meant for a person; commands print its message without a traceback."""

    exit_code = 1


class RecipeError(HarnessError):
    exit_code = 2


class DataError(HarnessError):
    exit_code = 2


class ModelError(HarnessError):
    pass


class CheckpointError(HarnessError):
    pass


class TeacherError(HarnessError):
    pass


class EvaluationError(HarnessError):
    pass


class ClusterError(HarnessError):
    pass


class Stopped(HarnessError):
    exit_code = 75


class LaunchError(HarnessError):
    exit_code = 2


def first_line(error: BaseException | str) -> str:
    """Of somebody else's message, which may be a page, or nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
