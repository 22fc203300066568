"""How much of everything the server takes: the bounds of its memory and of everybody's time."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Limits"]

MIB = 2**20

_MAY_BE_ZERO = ("grace", "pictures", "prompt_tokens", "stops")


@dataclass(frozen=True)
class Limits:
    """What one request may cost, and how many there may be.

    The pictures of all requests under way are in memory: at most ``requests`` times
    ``megapixels`` times 3 MB.

    Attributes:
        requests: Requests under way at the same time, waiting ones included; one more gets a 429.
        body_mib: Largest body of a request in MiB.
        pictures: Most pictures in a request.
        megapixels: Most pixels of all pictures of a request, in millions.
        max_tokens: Longest answer in tokens that may be asked for; also the limit of a request that
            does not say.
        prompt_tokens: Longest prompt in tokens, pictures included; 0 for what the model can hold.
        stops: Most stop sequences of a request.
        timeout: Longest time for an answer in seconds, waiting included; then a 504.
        body_timeout: Longest time for a body to arrive in seconds; then a 408.
        fetch_timeout: Longest time for all remote pictures of a request in seconds.
        grace: After SIGTERM, running requests get so many seconds to end.
    """

    requests: int = 64
    body_mib: int = 20
    pictures: int = 8
    megapixels: int = 16
    max_tokens: int = 512
    prompt_tokens: int = 0
    stops: int = 16
    timeout: float = 120.0
    body_timeout: float = 30.0
    fetch_timeout: float = 10.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: For a value out of range.
        """
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            least = 0 if name in _MAY_BE_ZERO else 1e-9
            if not least <= value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")

    @property
    def body_bytes(self) -> int:
        """Largest body in bytes."""
        return self.body_mib * MIB

    @property
    def pixels(self) -> int:
        """Most pixels of all pictures of a request."""
        return self.megapixels * 1_000_000
