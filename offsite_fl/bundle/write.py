"""Write a bundle: shard by shard into a folder beside the target, checked, then renamed into place."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from offsite_fl.bundle.files import discard, plain_size, sha256_of, sync_tree
from offsite_fl.bundle.limits import Limits
from offsite_fl.bundle.manifest import (
    DTYPE_BYTES,
    FORMAT_VERSION,
    KINDS,
    MANIFEST,
    PROCESSOR_CONFIG,
    FileEntry,
    Manifest,
    ShardEntry,
    TensorEntry,
    digest_of,
    kind_of,
)
from offsite_fl.bundle.read import Bundle, open_bundle
from offsite_fl.bundle.verify import DTYPE_NAMES, FOLDERS, check_tensors, outward_keys
from offsite_fl.errors import BundleError
from offsite_fl.models.network import NetworkPlan, expected_tensors
from offsite_fl.models.processors import TYPE_KEY, Processor, known_image_processors
from offsite_fl.sizes import MB, parse_bytes

SHARD_BYTES = 256 * MB
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What loading a tokenizer leaves in its settings: where it came from. None of it may leave the house.
_ORIGIN_KEYS = {"name_or_path", "is_local", "local_files_only", "cache_dir", "trust_remote_code", "revision", "token"}
_ALLOWED_SUFFIXES = (".json", ".txt", ".model", ".jinja")


def write_bundle(
    out: str | os.PathLike[str],
    plan: NetworkPlan,
    tensors: Mapping[str, torch.Tensor],
    processor: Processor,
    *,
    shard_bytes: int | str = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> Bundle:
    """Write the network of ``plan`` with ``tensors`` and ``processor`` into the folder ``out`` and open it.

    ``out`` appears whole or not at all: everything is written into a folder beside it, verified as a data owner would
    verify it, and renamed. An existing bundle at ``out`` is replaced; any other folder with content is refused.

    Parameters
    ----------
    out
        Folder of the new bundle; its parents are made.
    plan
        The network; :func:`~offsite_fl.models.network.expected_tensors` of it says which tensors there must be.
    tensors
        Slot name to tensor, on any device. A second name for the storage of a tensor that is written anyway (a tied
        head) is left out when the network doesn't ask for it. At most one shard is copied at a time.
    processor
        The tokenizer, or the image processor of a model for images, saved in its own format, without the name or path
        that it was loaded from.
    shard_bytes
        Bound of one shard; a larger tensor gets a shard of its own. An int or text like ``"256MB"``.
    dtype
        Cast floating tensors to this dtype; packed weights and their scales keep theirs. None keeps all.

    Raises
    ------
    BundleError
        If tensors are missing, unknown or don't fit the plan, or ``out`` can't be used. Nothing is left behind.
    """
    out = Path(os.path.abspath(out))
    bound = parse_bytes(shard_bytes) if isinstance(shard_bytes, str) else shard_bytes
    if bound < 1:
        raise BundleError(f"shard_bytes must be at least 1, got {bound}")
    if dtype is not None and dtype not in FLOATS:
        raise BundleError(f"dtype {dtype} isn't possible for a bundle; choose float32, float16 or bfloat16")
    check_target(out)
    wanted = _entries(plan, tensors, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = _beside(out, "writing")
    stage.mkdir()
    try:
        shards = [_write_shard(stage, *part, tensors, wanted) for part in _parts(wanted, bound)]
        files = _write_processor(stage, processor)
        form = FORMAT_VERSION if plan.head or files[0].file == PROCESSOR_CONFIG else 1
        data = Manifest(plan.to_json(), tuple(shards), tuple(files), format_version=form).to_bytes()
        (stage / MANIFEST).write_bytes(data)
        sync_tree(stage)
        bundle = open_bundle(stage, limits=_generous(wanted), digest=digest_of(data))
        _publish(stage, out)
    except BaseException as error:
        discard(stage)
        if isinstance(error, OSError):
            raise BundleError(f"bundle {out} can't be written: {error}") from error
        raise
    return replace(bundle, path=out)


def check_target(out: Path) -> None:
    """``BundleError`` unless a bundle can be written to ``out``: not there, empty, or a bundle to replace."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise BundleError(f"{out} is in the way: it isn't a folder; give another name for the bundle")
    if any(out.iterdir()) and not looks_like_bundle(out):
        raise BundleError(f"{out} holds something that isn't a bundle; it won't be overwritten, give another folder")


def looks_like_bundle(folder: Path) -> bool:
    """Whether a folder has the outer form of a bundle: a manifest with our keys, and nothing but its folders."""
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    ours = isinstance(raw, dict) and {"format_version", "shards"} <= set(raw)
    return ours and {entry.name for entry in folder.iterdir()} <= {MANIFEST, *FOLDERS}


def _entries(
    plan: NetworkPlan, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, TensorEntry]:
    """What will be written, by slot name; checks it against the plan before anything is written."""
    expected = expected_tensors(plan)
    entries = {}
    for name in tensors.keys() - _tied(expected, tensors):
        tensor = tensors[name]
        if tensor.is_meta:
            raise BundleError(f"tensor {name!r} is on the meta device: it has no values to write")
        free = name in expected and expected[name].dtype is None and tensor.is_floating_point()
        kept = dtype if free and dtype is not None else tensor.dtype
        if kept not in DTYPE_NAMES:
            raise BundleError(f"tensor {name!r} has dtype {kept}; a bundle can hold {', '.join(DTYPE_BYTES)}")
        entries[name] = TensorEntry(DTYPE_NAMES[kept], tuple(tensor.shape))
    check_tensors(entries, expected, "the new bundle")
    return entries


def _tied(expected: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names that the network doesn't ask for because they are a second name of a tensor that it does."""
    extra = {name: tensors[name] for name in tensors.keys() - expected.keys()}
    if not extra:
        return set()
    # Kept alive together: memory that is freed in between could make two tensors look like one.
    kept = [tensors[name] for name in expected.keys() & tensors.keys()]
    storages = {_storage(tensor) for tensor in kept}
    return {name for name, tensor in extra.items() if tensor.numel() and _storage(tensor) in storages}


def _storage(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same view of the same memory."""
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _parts(wanted: Mapping[str, TensorEntry], bound: int) -> Iterator[tuple[str, int, list[str]]]:
    """Cut the tensors of each kind into shards of at most ``bound`` bytes: (kind, number from 1, slot names)."""
    for kind in KINDS:
        part: list[str] = []
        number, size = 1, 0
        for name in sorted(name for name in wanted if kind_of(name) == kind):
            if part and size + wanted[name].bytes > bound:
                yield kind, number, part
                part, number, size = [], number + 1, 0
            part.append(name)
            size += wanted[name].bytes
        if part:
            yield kind, number, part


def _write_shard(
    stage: Path,
    kind: str,
    number: int,
    names: Sequence[str],
    tensors: Mapping[str, torch.Tensor],
    wanted: Mapping[str, TensorEntry],
) -> ShardEntry:
    entries = {name: wanted[name] for name in names}
    dtypes = {text: dtype for dtype, text in DTYPE_NAMES.items()}
    # Copies, because safetensors refuses tensors that share memory; they live until the end of this function.
    copies = {
        name: tensors[name].detach().to("cpu", dtypes[entry.dtype], copy=True, memory_format=torch.contiguous_format)
        for name, entry in entries.items()
    }
    name = f"shards/{kind}-{number:05d}.safetensors"
    path = stage / name
    path.parent.mkdir(exist_ok=True)
    save_file(copies, path)
    return ShardEntry(name, plain_size(path, str(stage)), sha256_of(path, str(stage)), kind, entries)


def _write_processor(stage: Path, processor: Processor) -> list[FileEntry]:
    if isinstance(processor, BaseImageProcessor):
        return [_write_image_processor(stage, processor)]
    return _write_tokenizer(stage, processor)


def _write_image_processor(stage: Path, processor: BaseImageProcessor) -> FileEntry:
    config = json.loads(processor.to_json_string())
    # The backend is each party's own business: files name the class without it.
    config[TYPE_KEY] = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if config[TYPE_KEY] not in known_image_processors():
        raise BundleError(f"{type(processor).__name__} is no image processor of transformers: a bundle can't carry it")
    for key in [*outward_keys(config), *(k for k in config if k in _ORIGIN_KEYS or k.startswith("_"))]:
        config.pop(key, None)
    path = stage / PROCESSOR_CONFIG
    path.parent.mkdir()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return FileEntry(PROCESSOR_CONFIG, plain_size(path, str(stage)), sha256_of(path, str(stage)))


def _write_tokenizer(stage: Path, tokenizer: PreTrainedTokenizerBase) -> list[FileEntry]:
    folder = stage / "tokenizer"
    # One template file beside or inside the configuration would do; inside keeps the folder flat.
    tokenizer.save_pretrained(str(folder), save_jinja_files=False)
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    for key in [*outward_keys(config), *(k for k in config if k in _ORIGIN_KEYS or k.startswith("_"))]:
        config.pop(key, None)
    settings.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in _ALLOWED_SUFFIXES or path.parent != folder:
            raise BundleError(
                f"the tokenizer {type(tokenizer).__name__} saves {path.relative_to(folder)}, which a bundle can't "
                f"carry; only files ending in {', '.join(_ALLOWED_SUFFIXES)} leave"
            )
        entries.append(FileEntry(f"tokenizer/{path.name}", plain_size(path, str(stage)), sha256_of(path, str(stage))))
    return entries


def _generous(wanted: Mapping[str, TensorEntry]) -> Limits:
    """The default limits, stretched to the owner's own tensors: limits protect receivers, not the writer."""
    total = sum(entry.bytes for entry in wanted.values())
    defaults = Limits()
    largest = max((size for entry in wanted.values() for size in entry.shape), default=1)
    return Limits(
        max_bytes=max(defaults.max_bytes, 2 * total),
        max_file_bytes=max(defaults.max_file_bytes, 2 * total),
        max_dim=max(defaults.max_dim, largest),
    )


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}-{uuid.uuid4().hex[:8]}")


def _publish(stage: Path, out: Path) -> None:
    """Rename ``stage`` to ``out``; an old bundle there steps aside first and comes back if the rename fails."""
    if not out.exists():
        stage.rename(out)
        return
    aside = _beside(out, "old")
    out.rename(aside)
    try:
        stage.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    discard(aside)
