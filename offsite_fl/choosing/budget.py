"""How large the emulator may be, as its owner says it: a share of the middle's bytes, or a size."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from offsite_fl.config import check
from offsite_fl.errors import ConfigError
from offsite_fl.sizes import human_bytes, parse_bytes

_WRITE = "write a share of the middle's bytes as 40% or 0.4, or a size as 40MB"


@dataclass(frozen=True)
class Budget:
    """Exactly one of the two: ``share`` of the middle's bytes, between 0 and 1, or a number of ``bytes``."""

    share: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        check((self.share is None) != (self.bytes is None), "a budget is either a share or a number of bytes")
        check(self.share is None or 0 < self.share < 1, f"budget {self.share!r} isn't between 0 and 1; {_WRITE}")
        check(self.bytes is None or self.bytes > 0, f"a budget of {self.bytes} bytes holds nothing; {_WRITE}")

    @classmethod
    def parse(cls, value: Budget | float | str) -> Budget:
        """A budget from a share (0.4, ``"0.4"``, ``"40%"``) or a size (``"40MB"``).

        A bare number above 1 could be meant as per cent or as bytes and raises ``ConfigError``.

        >>> Budget.parse("40%"), Budget.parse("2KB")
        (Budget(share=0.4, bytes=None), Budget(share=None, bytes=2000))
        """
        if isinstance(value, Budget):
            return value
        text = str(value).strip()
        try:
            number = Decimal(text.removesuffix("%"))
        except InvalidOperation:
            return cls(bytes=_size(text))
        check(number.is_finite(), f"budget {text!r} can't be read; {_WRITE}")
        # Decimal: 33.3 % should read keep=0.333 in a spec.
        return cls(share=float(number / 100 if text.endswith("%") else number))

    @property
    def option(self) -> str:
        """What stands for ``{keep}`` in a candidate: ``keep=0.4`` or ``bytes=41943040``."""
        return f"keep={self.share!r}" if self.bytes is None else f"bytes={self.bytes}"

    def bytes_of(self, middle_bytes: int) -> int:
        """Bytes that the emulator of a middle of ``middle_bytes`` may hold; ``ConfigError`` if that isn't fewer."""
        if self.bytes is None:
            assert self.share is not None
            return round(self.share * middle_bytes)
        check(
            self.bytes < middle_bytes,
            f"a budget of {human_bytes(self.bytes)} leaves nothing to compress: the middle holds "
            f"{human_bytes(middle_bytes)}",
        )
        return self.bytes

    def __str__(self) -> str:
        """For people: ``40%`` or ``40.0 MB``."""
        return f"{100 * self.share:.4g}%" if self.share is not None else human_bytes(self.bytes or 0)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError:
        raise ConfigError(f"budget {text!r} can't be read; {_WRITE}") from None
