"""What a labeler or a client is told when a request cannot be done."""

from __future__ import annotations


class Refused(Exception):
    """A request that cannot be done. The message is shown in the page; nothing was changed.

    Args:
        status: the HTTP status code.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
