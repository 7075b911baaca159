"""The errors convlora raises: one family, so that `except ConvloraError` catches them all."""

from __future__ import annotations


class ConvloraError(Exception):
    """A rule of convlora was broken; the message says which, with the value, and what to do."""


class TargetError(ConvloraError):
    """A pattern for layers matched nothing, or matched something that cannot be adapted."""


class RankError(ConvloraError):
    """A rank below 1 or above what a layer's matrix allows."""


class FileError(ConvloraError):
    """A file is missing, unreadable, truncated, of another format, or belongs to another base model."""


class AlbumError(ConvloraError):
    """A folder of photos cannot be used: an image or its camera is missing or unreadable."""


class HubError(ConvloraError):
    """The Hub refused, cannot be reached, or does not hold what was asked for."""
