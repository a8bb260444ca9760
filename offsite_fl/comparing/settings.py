"""GRID.toml as frozen dataclasses: what is compared, on which model and data, and what it is compared with."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from offsite_fl.comparing.partitions import parse_partition
from offsite_fl.config import TuneConfig, cache_root, check, from_mapping, kebab
from offsite_fl.emulators import parse_emulator
from offsite_fl.errors import ConfigError, DataError, ModelError
from offsite_fl.models.split import Split
from offsite_fl.registry import near
from offsite_fl.strategies.named import make_strategy
from offsite_fl.wire.codecs import CODECS

Baseline = Literal["zero-shot", "alone", "pooled", "uncompressed", "full-lora", "full-fine-tuning"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
HONEST = "none"
PARTS = ("model", "data", "grid", "tune", "tune-for", "test", "baselines")


@dataclass(frozen=True)
class ModelPart:
    """The full model and how it is cut and handed out.

    ``path`` is a folder, a hub id, "smollm2" or "pico" (the small model that `make pico` puts into the cache).
    """

    path: str
    split: str = "2-2"
    calibration_tokens: int = 8192
    bundle_dtype: str = ""

    def __post_init__(self) -> None:
        Split.parse(self.split)
        known = ("", "float32", "bfloat16", "float16")
        check(self.bundle_dtype in known, f"bundle-dtype = {self.bundle_dtype!r}; {near(self.bundle_dtype, known)}")

    def source(self) -> str:
        """What to open."""
        if self.path != "pico":
            return self.path
        folder = cache_root() / "pico"
        if not folder.is_dir():
            raise ModelError(f"the model 'pico' isn't in {folder}: make it once by `make pico`")
        return str(folder)


@dataclass(frozen=True)
class DataPart:
    """Files: one ``<owner>.jsonl`` a domain, ``test``, and ``public`` text for emulators that calibrate.

    ``folder`` is theirs; with ``corpus`` instead they lie in the cache, where `make texts` puts them.
    """

    owners: tuple[str, ...]
    folder: str = ""
    corpus: str = ""
    test: str = "test.jsonl"
    public: str = "public.txt"

    def __post_init__(self) -> None:
        check(bool(self.owners), "data.owners: name at least one")
        check(len(set(self.owners)) == len(self.owners), f"data.owners names one twice: {', '.join(self.owners)}")
        check(bool(self.folder) != bool(self.corpus), "data: give folder or corpus, exactly one of them")

    def file(self, name: str) -> Path:
        """Path of one file; ``DataError`` if it isn't there."""
        folder = Path(self.folder) if self.folder else cache_root() / self.corpus
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing: set data.folder to a folder with your files, or run `make texts`")
        return path

    def owner_files(self) -> list[Path]:
        """One a domain, in the order of ``owners``."""
        return [self.file(f"{owner}.jsonl") for owner in self.owners]


@dataclass(frozen=True)
class Axes:
    """What is combined with what; every list is an axis of the grid. ``rounds`` and ``codec`` are the same for all.

    Of ``attacks`` the word "none" stands for honest clients; here it becomes the empty string.
    """

    strategies: tuple[str, ...]
    emulators: tuple[str, ...]
    partitions: tuple[str, ...] = ("iid",)
    seeds: tuple[int, ...] = (0,)
    clients: tuple[int, ...] = (4,)
    fractions: tuple[float, ...] = (1.0,)
    attacks: tuple[str, ...] = (HONEST,)
    attackers: tuple[int, ...] = (0,)
    attack_package: str = "simulations.attacks"
    rounds: int = 4
    codec: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("strategies", "emulators", "partitions", "seeds", "clients", "fractions", "attacks"):
            values = getattr(self, name)
            check(bool(values), f"grid.{name}: give at least one")
            check(len(set(values)) == len(values), f"grid.{name} names one twice: {', '.join(map(str, values))}")
        object.__setattr__(self, "attacks", tuple("" if name == HONEST else name for name in self.attacks))
        for spec in self.strategies:
            make_strategy(spec)
        for spec in self.emulators:
            parse_emulator(spec)
        for seed in self.seeds:
            check(seed >= 0, f"grid.seeds must be 0 or above, got {seed}")
        for count in self.clients:
            check(count >= 1, f"grid.clients must be at least 1, got {count}")
        for share in self.fractions:
            check(0 < share <= 1, f"grid.fractions must lie above 0 and at most at 1, got {share}")
        check(self.rounds >= 1, f"grid.rounds must be at least 1, got {self.rounds}")
        _ = CODECS[self.codec]
        if any(self.attacks):
            self._check_attackers()

    @property
    def attackers_text(self) -> str:
        """The attackers as messages to clients name them: ``"0,3"``."""
        return ",".join(map(str, self.attackers))

    def _check_attackers(self) -> None:
        """A row "under sign-flip" must not be one of honest clients: an attacker that doesn't exist attacks nobody."""
        check(self.codec == "fp32", "attacks work on plain values: set grid.codec to fp32")
        check(bool(self.attackers), "grid.attackers: name at least one, or leave out grid.attacks")
        fewest = min(self.clients)
        for number in self.attackers:
            known = f"clients are numbered from 0 to {fewest - 1}" + (" at the least" if len(self.clients) > 1 else "")
            check(0 <= number < fewest, f"grid.attackers names client {number}, but {known}")


@dataclass(frozen=True)
class TestPart:
    """How much held-out text is measured on, and every how many rounds."""

    tokens: int = 8192
    every: int = 1

    def __post_init__(self) -> None:
        check(self.tokens >= 1, f"test.tokens must be at least 1, got {self.tokens}")
        check(self.every >= 1, f"test.every must be at least 1, got {self.every}")


@dataclass(frozen=True)
class BaselinePart:
    """Which references run beside the grid, and the learning rates of those that tune other things.

    ``full_lr`` is that of full fine-tuning, ``lora_lr`` and ``lora_rank`` those of LoRA on the full model (``lora_lr``
    0: the grid's rate).
    """

    run: tuple[str, ...] = BASELINES
    full_lr: float = 1e-4
    lora_lr: float = 0.0
    lora_rank: int = 8

    def __post_init__(self) -> None:
        for name in self.run:
            check(name in BASELINES, f"baselines.run: unknown baseline {name!r}; {near(name, BASELINES)}")
        check(self.full_lr > 0, f"baselines.full-lr must be above 0, got {self.full_lr}")
        check(self.lora_lr >= 0, f"baselines.lora-lr can't be negative, got {self.lora_lr}")
        check(self.lora_rank >= 1, f"baselines.lora-rank must be at least 1, got {self.lora_rank}")


@dataclass(frozen=True)
class GridSettings:
    """All of GRID.toml. ``tune_for`` holds, by strategy spec, what that strategy's clients tune with otherwise."""

    model: ModelPart
    data: DataPart
    grid: Axes
    tune: TuneConfig
    tune_for: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    test: TestPart = field(default_factory=TestPart)
    baselines: BaselinePart = field(default_factory=BaselinePart)

    def __post_init__(self) -> None:
        for spec in self.tune_for:
            if spec not in self.grid.strategies:
                raise ConfigError(f"tune-for: {spec!r} isn't in grid.strategies; {near(spec, self.grid.strategies)}")
            self.tune_of(spec, 0)
        every, rounds = self.test.every, self.grid.rounds
        check(
            every >= rounds or rounds % every == 0,
            f"grid.rounds = {rounds} must be a multiple of test.every = {every}, or the last round isn't measured",
        )
        for partition in self.grid.partitions:
            for clients in self.grid.clients:
                parse_partition(partition).check_clients(clients, len(self.data.owners))

    def tune_of(self, strategy: str, seed: int) -> TuneConfig:
        """How clients tune under a strategy. One schedule spans the rounds, where a round's steps are known."""
        more = dict(self.tune_for.get(strategy, {}))
        tune = from_mapping(TuneConfig, _plain(self.tune) | more)
        if tune.max_steps is not None and tune.schedule_steps is None:
            tune = dataclasses.replace(tune, schedule_steps=tune.max_steps * self.grid.rounds)
        return dataclasses.replace(tune, seed=seed, progress=False)

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> GridSettings:
        """From the parsed file; ``ConfigError`` names the part and the key that is wrong."""
        for part in table:
            if part not in PARTS:
                raise ConfigError(f"unknown part [{part}]; {near(part, PARTS)}")
        for part in ("model", "data", "grid"):
            check(part in table, f"the part [{part}] is missing")

        def read(kind: type[Any], part: str) -> Any:
            values = table.get(part, {})
            check(isinstance(values, Mapping), f"[{part}] must be a table")
            return from_mapping(kind, {f"{part}.{key}": value for key, value in values.items()}, f"{part}.")

        return cls(
            read(ModelPart, "model"),
            read(DataPart, "data"),
            read(Axes, "grid"),
            read(TuneConfig, "tune"),
            {spec: dict(values) for spec, values in table.get("tune-for", {}).items()},
            read(TestPart, "test"),
            read(BaselinePart, "baselines"),
        )


def _plain(tune: TuneConfig) -> dict[str, Any]:
    return {kebab(f.name): getattr(tune, f.name) for f in dataclasses.fields(tune)}


def read_grid(path: Path) -> dict[str, Any]:
    """The tables of a grid file, with ``data.folder`` and a model folder made absolute: they are relative to the file.

    ``ConfigError`` if there is no such file or it isn't TOML; what it says is checked by :meth:`GridSettings.of`.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no grid at {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a .toml file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} isn't TOML: {error}") from error
    for part, key in (("data", "folder"), ("model", "path")):
        values = table.get(part)
        value = values.get(key) if isinstance(values, dict) else None
        if isinstance(value, str) and value:
            beside = path.absolute().parent / value
            if key == "folder" or beside.is_dir():
                values[key] = str(beside)  # type: ignore[index]
    return table
