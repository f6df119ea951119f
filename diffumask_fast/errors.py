"""The one exception that users of diffumask-fast need to catch."""


class DiffuMaskError(Exception):
    """Say in one sentence what is wrong and what to do about it."""
