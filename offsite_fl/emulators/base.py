"""The seam behind which every emulator method lives: blocks and a context in, new blocks out.

A method never changes a module of the full model: it copies block by block (:func:`copy_structure`) and replaces what
it must in the copy. How a client rebuilds the result is derived from the blocks themselves (``models.linears``), so a
method hands over modules only.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

from rich.progress import track
from torch import Tensor, nn

from offsite_fl.errors import ConfigError, EmulatorError
from offsite_fl.models.blocks import Blocks, block_list
from offsite_fl.registry import Registry

Batch = dict[str, Tensor]
T = TypeVar("T")
M = TypeVar("M", bound="EmulatorMethod")


@dataclass
class EmulatorBlock:
    """One block that the emulator holds and the index ``origin`` of the full model's block that it was made from."""

    module: nn.Module
    origin: int


@dataclass
class Emulator:
    """Blocks and the places they run at.

    ``layout`` maps a position of the full model to an index of ``blocks``; the forward pass visits the sorted
    positions. Two positions may name the same block (sharing); a position that is absent was dropped. ``notes`` say
    what didn't come out as it was asked for.
    """

    blocks: list[EmulatorBlock]
    layout: dict[int, int]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        used = set(self.layout.values())
        if used != set(range(len(self.blocks))):
            raise EmulatorError(
                f"the emulator's layout names blocks {sorted(used)}, but it holds {len(self.blocks)}: "
                f"every block must run somewhere and every place must name a block"
            )

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions of the full model at which a block runs, in forward order."""
        return tuple(sorted(self.layout))

    def at(self, position: int) -> nn.Module:
        """The module that runs at ``position`` of the full model."""
        return self.blocks[self.layout[position]].module


@dataclass(frozen=True)
class Context:
    """What a method may look at: the full model, where to cut it, and public text.

    ``adapter`` and ``middle`` are disjoint sorted block indices that cover the model. ``calibration`` and
    ``validation`` are batches (``input_ids``, ``attention_mask``, ``labels``, each ``[B, T]`` int64) of public text,
    never of a data owner's; for a classifier ``labels`` are ``[B]``, or not there, and for images there are
    ``pixel_values`` in place of tokens. ``head`` are paths of what is trained outside the blocks. ``device`` is where
    the work is done, the result lies where the model lies. ``workdir`` is where long methods keep what they need to
    resume.
    """

    model: nn.Module
    blocks: Blocks
    adapter: tuple[int, ...]
    middle: tuple[int, ...]
    calibration: tuple[Batch, ...] = ()
    validation: tuple[Batch, ...] = ()
    device: str = "cpu"
    seed: int = 0
    workdir: Path | None = None
    progress: bool = False
    head: tuple[str, ...] = ()

    def block(self, index: int) -> nn.Module:
        """The full model's own block; look, don't touch."""
        return block_list(self.model, self.blocks)[index]

    def need_calibration(self, why: str) -> tuple[Batch, ...]:
        """The calibration batches, or ``EmulatorError`` saying ``why`` they are needed."""
        if not self.calibration:
            raise EmulatorError(f"{why} needs calibration text: give the model owner a few thousand public tokens")
        return self.calibration

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """``items``, with a progress bar on the terminal when the owner asked for progress."""
        if not self.progress:
            return items
        return track(items, description=description, total=total)


class EmulatorMethod(ABC):
    """One way of compressing the middle. Subclasses are frozen dataclasses whose fields are the spec's options.

    The first line of a subclass's docstring is what ``offsite-fl emulators`` prints about it.
    """

    name: ClassVar[str] = ""

    @abstractmethod
    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Return a smaller emulator made from ``emulator``; neither it nor the full model is changed."""

    def __str__(self) -> str:
        """The spec that :func:`~offsite_fl.emulators.parse_emulator` reads back into an equal method."""
        options = ",".join(_spec_options(self))
        return f"{self.name}:{options}" if options else self.name

    def __add__(self, other: EmulatorMethod) -> Chain:
        """``a + b`` compresses with ``a`` and then with ``b``, as ``"a+b"`` does in a spec."""
        return Chain((self, other))


@dataclass(frozen=True)
class Chain(EmulatorMethod):
    """Methods one after the other; made by ``+``."""

    methods: tuple[EmulatorMethod, ...]

    def __post_init__(self) -> None:
        flat: list[EmulatorMethod] = []
        for method in self.methods:
            flat.extend(method.methods if isinstance(method, Chain) else (method,))
        object.__setattr__(self, "methods", tuple(flat))

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Hand the result of each method to the next."""
        notes: tuple[str, ...] = ()
        for method in self.methods:
            emulator = method.compress(replace(emulator, notes=()), context)
            notes += emulator.notes
        return replace(emulator, notes=notes)

    def __str__(self) -> str:
        """The methods' specs joined by ``+``."""
        return "+".join(str(method) for method in self.methods)


METHODS: Registry[type[EmulatorMethod]] = Registry("emulator")


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Decorator that files a frozen dataclass under the ``name`` used in specs.

    One file with this decorator is all a new emulator costs::

        @register("keep-all")
        @dataclass(frozen=True)
        class KeepAll(EmulatorMethod):
            "Keep the middle as it is."

            def compress(self, emulator: Emulator, context: Context) -> Emulator:
                return emulator
    """

    def add(cls: type[M]) -> type[M]:
        params = cls.__dict__.get("__dataclass_params__")
        if params is None or not params.frozen:
            raise ConfigError(
                f"emulator {name!r} must be a frozen dataclass: put @dataclass(frozen=True) below @register"
            )
        METHODS.register(name)(cls)
        cls.name = name
        return cls

    return add


def start(context: Context) -> Emulator:
    """The uncompressed middle as an emulator: references to the full model's blocks, nothing is copied."""
    blocks = [EmulatorBlock(context.block(index), index) for index in context.middle]
    return Emulator(blocks, {index: slot for slot, index in enumerate(context.middle)})


def copy_structure(module: nn.Module) -> nn.Module:
    """A deep copy of ``module`` that shares its parameters and buffers with the original.

    Replacing a child of the copy leaves the original as it is, and no weight is duplicated. Whoever wants to *train*
    the copy must use ``copy.deepcopy`` instead.
    """
    memo: dict[int, Tensor] = {id(t): t for t in _tensors(module)}
    return copy.deepcopy(module, memo)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _spec_options(method: EmulatorMethod) -> Iterator[str]:
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            yield f"{field.name.replace('_', '-')}={_spec_value(value)}"


def _spec_value(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).replace("e+", "e")  # a plus sign would end the method in a chain
    if isinstance(value, tuple):
        return "/".join(_spec_value(item) for item in value)
    return str(value)
