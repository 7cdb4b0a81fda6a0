"""The errors a user may meet: one clear line each, exit code 2.

Everything prefgen raises on bad input descends from :class:`PrefgenError`; the command line prints its
message behind ``prefgen: error: `` and nothing else. Say what is wrong, what was got, what is allowed and how
to mend it. An ``assert`` is for our own mistakes and never for a user's.
"""


class PrefgenError(Exception):
    """Anything the user can mend. The message is the whole answer and fits one line."""


class ConfigError(PrefgenError):
    """A configuration key or value, or a command line, that cannot be used."""


class DataError(PrefgenError):
    """A history, shard, image or index that is missing, broken or not what it says it is."""


class CheckpointError(PrefgenError):
    """A checkpoint or stage artefact that is missing, torn, foreign or of another lineage."""


class StepFailedError(PrefgenError):
    """A command of a study's plan ended with an error; its log says more."""
