"""Errors of training data that are also the builtin kind a caller may expect."""

from __future__ import annotations

from mmlm.errors import InputError

__all__ = [
    "ConversationTooLong",
    "EqualResponses",
    "FastPathRefused",
    "ImageTokenMismatch",
    "MissingField",
    "PictureCountMismatch",
    "PreferenceTooLong",
    "UnusableResponse",
    "WrongFieldType",
]


class ConversationTooLong(InputError, ValueError):  # noqa: N818
    """A conversation has more tokens than a row may have; says how many of them are pictures."""


class FastPathRefused(InputError, ValueError):  # noqa: N818
    """A model or batch for which a fast path of preference training would not be exact."""


class PreferenceTooLong(InputError, ValueError):  # noqa: N818
    """A pair has more tokens than a row may have.

    Attributes:
        id: Of the row.
        n_tokens: Of its longer side, pictures and context included.
        n_image_tokens: How many of them stand for pictures.
        max_length: The limit.
    """

    def __init__(
        self, message: str, *, advice: str = "", id: str = "", n_tokens: int = 0,
        n_image_tokens: int = 0, max_length: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(message, advice=advice)
        self.id, self.n_tokens = id, n_tokens
        self.n_image_tokens, self.max_length = n_image_tokens, max_length


class PictureCountMismatch(InputError, ValueError):  # noqa: N818
    """A row has more or fewer pictures than its prompt has places for; says both numbers."""


class ImageTokenMismatch(InputError, ValueError):  # noqa: N818
    """A row has more or fewer image tokens than its pictures have features; says both numbers."""


class UnusableResponse(InputError, ValueError):  # noqa: N818
    """An answer from which nothing can be learned."""


class EqualResponses(UnusableResponse):
    """Two answers that are the same to the model: such a pair has no gradient."""


class MissingField(InputError, KeyError):  # noqa: N818
    """A row lacks a field; names those it has."""

    def __str__(self) -> str:  # KeyError would print the quoted form
        return str(self.args[0])


class WrongFieldType(InputError, TypeError):  # noqa: N818
    """A field of a row is of another type than it must be."""
