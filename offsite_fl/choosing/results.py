"""What was measured of one candidate with one seed: frozen data classes, and the lines of JSON that hold them."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from offsite_fl.errors import DataError
from offsite_fl.evaluation import checks

C = TypeVar("C")
Role = Literal["candidate", "uncompressed", "full-fine-tuning"]


@dataclass(frozen=True)
class Built:
    """An emulator before anything is tuned.

    ``bytes`` and ``middle_bytes`` are those of its blocks and of the blocks it stands for, ``verbatim_share`` the share
    of the full model's parameters that leaves unchanged, ``flops_share`` forward FLOPs of the emulated middle against
    the middle. ``seconds`` is what building took, ``peak_bytes`` how much memory it took at its peak beyond what was
    held before (None where the system doesn't tell). ``notes`` say what didn't come out as asked for.
    """

    bytes: int
    middle_bytes: int
    verbatim_share: float
    flops_share: float
    seconds: float
    peak_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnPublicText:
    """Emulator against full model, untuned, on held-out public text, of a classifier on examples.

    Losses are nats per token, or per example, ``hidden_error`` is ``||T - S||^2 / ||T||^2`` behind the middle,
    ``cosine`` and ``norm_ratio`` compare the adapter's gradients on the emulator with those on the full model: over all
    tensors together, and by adapter block in forward order.
    """

    full_loss: float
    emulator_loss: float
    hidden_error: float
    cosine: float
    norm_ratio: float
    cosine_by_block: tuple[float, ...]
    norm_ratio_by_block: tuple[float, ...]


@dataclass(frozen=True)
class RateTried:
    """A learning rate and the emulator's loss on the data owner's validation text; None where tuning diverged."""

    rate: float
    validation_loss: float | None


@dataclass(frozen=True)
class ScaleTried:
    """The plug-in of the update times ``scale``: its loss on held-out public text and on the test data."""

    scale: float
    public_loss: float
    plug_in: float


@dataclass(frozen=True)
class Numbers:
    """One number (a loss, an accuracy) of each network on the test data; None where there is no such network.

    ``zero_shot`` is the untuned full model's, ``without_repair`` that of the plug-in with the repair taken out.
    """

    zero_shot: float
    emulator_zero_shot: float | None
    emulator_tuned: float | None
    plug_in: float
    without_repair: float | None = None


@dataclass(frozen=True)
class Tuned:
    """What tuning gave, in nats per token of the test data, of a classifier per example.

    ``zero_shot`` is the full model's. Of full fine-tuning ``plug_in`` is the tuned full model; it has no emulator.
    ``rate`` is the learning rate that counts, ``seconds`` what tuning at all ``rates`` took. ``without_repair`` is the
    plug-in with the repair taken out (:mod:`offsite_fl.repair`), None where that wasn't asked for. ``accuracy`` has
    shares in [0, 1] where there are classes.
    """

    rate: float
    rates: tuple[RateTried, ...]
    zero_shot: float
    emulator_zero_shot: float | None
    emulator_tuned: float | None
    plug_in: float
    scales: tuple[ScaleTried, ...]
    seconds: float
    without_repair: float | None = None
    accuracy: Numbers | None = None

    @property
    def losses(self) -> Numbers:
        """Those in nats."""
        return Numbers(self.zero_shot, self.emulator_zero_shot, self.emulator_tuned, self.plug_in, self.without_repair)

    @property
    def best_scale(self) -> ScaleTried | None:
        """The scale that does best on public text; None where none but the plain update was tried."""
        return min(self.scales, key=lambda tried: tried.public_loss, default=None)


@dataclass(frozen=True)
class Cell:
    """One candidate (or one of the two references) with one seed.

    ``key`` stands for everything that the numbers depend on. ``candidate`` is what was asked for, ``spec`` what was
    built. ``error`` says why there are no numbers.
    """

    key: str
    role: Role
    candidate: str
    spec: str
    seed: int
    built: Built | None = None
    public: OnPublicText | None = None
    tuned: Tuned | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON's own types; a number that isn't finite becomes null."""
        found: dict[str, Any] = checks.jsonable(dataclasses.asdict(self), "cell")
        return found

    @classmethod
    def from_dict(cls, value: object, where: str = "cell") -> Cell:
        """Read what :meth:`to_dict` wrote; ``DataError`` names the entry that is wrong."""
        return read_plain(cls, value, where)


def read_plain(cls: type[C], value: object, where: str) -> C:
    """Build the data class ``cls`` from JSON by the types of its fields. For a float null stands for NaN."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    needed = [f.name for f in fields if f.default is dataclasses.MISSING]
    found = checks.entries(value, where, needed, [f.name for f in fields if f.name not in needed])
    return cls(**{name: _read(hints[name], entry, f"{where}.{name}") for name, entry in found.items()})


def _read(hint: Any, value: object, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return read_plain(typing.cast("type[Any]", hint), value, where)
    if origin is types.UnionType:
        return None if value is None else _read(args[0], value, where)
    if origin is tuple:
        return tuple(_read(args[0], entry, f"{where}[{i}]") for i, entry in enumerate(checks.items(value, where)))
    if origin is Literal:
        if value not in args:
            raise DataError(f"{where} must be one of {', '.join(args)}, got {value!r}")
        return value
    readers: dict[type, Any] = {
        float: lambda v, w: float(checks.number(v, w)),
        int: checks.whole,
        str: checks.text,
    }
    return readers[hint](value, where)
