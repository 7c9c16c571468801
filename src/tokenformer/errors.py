"""What can go wrong through no fault of the code.

    TokenformerError         a user's mistake or the machine's; the command line prints it and exits with 2
    ├── RecipeError          a recipe that cannot be read or makes no sense
    ├── DataError            text that is missing, empty, unreadable or too little
    ├── TokenizerError       a tokenizer that cannot be loaded or does not fit the model
    ├── GrowthError          an operation on token groups that is not defined
    ├── CheckpointError      a checkpoint that is missing, damaged, in the way or cannot be written
    ├── ConversionError      another format's checkpoint that cannot be read, or a model that it cannot express
    ├── EvaluationError      a task that is unknown or cannot be run
    ├── HubError             the Hugging Face Hub cannot be reached or refuses
    └── MissingExtraError    a package that only some commands need is not installed

Each message says what was asked, what was found and what to do.
"""


class TokenformerError(Exception):
    """Base of all errors above; `said` where another process of the run tells its user."""

    said = False


class RecipeError(TokenformerError):
    """A recipe that cannot be read or makes no sense."""


class DataError(TokenformerError):
    """Text that is missing, empty, unreadable or too little."""


class TokenizerError(TokenformerError):
    """A tokenizer that cannot be loaded or does not fit the model."""


class GrowthError(TokenformerError):
    """An operation on token groups that is not defined."""


class CheckpointError(TokenformerError):
    """A checkpoint that is missing, damaged, in the way or cannot be written."""


class ConversionError(TokenformerError):
    """Another format's checkpoint that cannot be read, or a model that it cannot express."""


class EvaluationError(TokenformerError):
    """A task that is unknown or cannot be run."""


class HubError(TokenformerError):
    """The Hugging Face Hub cannot be reached or refuses."""


class MissingExtraError(TokenformerError):
    """A package that only some commands need is not installed."""


def first_line(error: Exception) -> str:
    """Name an error and the first line of what it says: libraries go on for pages."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
