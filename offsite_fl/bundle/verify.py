"""The checks between a manifest that reads well and a bundle that can be trusted to be what it says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from offsite_fl.bundle.files import plain_size, read_plain, sha256_of
from offsite_fl.bundle.limits import Limits
from offsite_fl.bundle.manifest import FLOAT_DTYPES, MANIFEST, PROCESSOR_CONFIG, Manifest, TensorEntry, show
from offsite_fl.bundle.shards import check_shard
from offsite_fl.errors import BundleError, ModelError
from offsite_fl.models.network import NetworkPlan, TensorSpec, expected_tensors
from offsite_fl.models.processors import IMAGE_TASKS, TYPE_KEY, known_image_processors

FOLDERS = ("shards", "tokenizer", "processor")
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
# Keys of tokenizer_config.json that name other files or code. transformers would follow them out of the bundle.
_OUTWARD = re.compile(r"auto_map|custom_.*|.*_files?")
# Integers of a transformers config that say how often something is repeated, which costs time and memory to build.
_LAYERS = re.compile(r"(?:n|num|max|encoder|decoder)_(?:.*_)?layers?|(?:.*_)?(?:layers|depths?)")
_PARTS = re.compile(r"(?:num_.*|n_heads?|.*experts?.*)(?<!_size)")


def outward_keys(config: dict[str, Any]) -> list[str]:
    """Keys of a tokenizer configuration that point out of its folder or to code."""
    return sorted(key for key in config if _OUTWARD.fullmatch(key))


def verify_files(folder: Path, manifest: Manifest, limits: Limits, where: str, *, hashes: bool = True) -> None:
    """Check that ``folder`` holds exactly the files of ``manifest``, with its sizes, hashes and tensor headers."""
    listed = {MANIFEST, *(entry.file for entry in manifest.entries())}
    extra = sorted(set(_found(folder, where)) - listed)
    if extra:
        raise BundleError(f"{where}: {show(extra[0])} is in the folder but not in the manifest; remove it")
    for entry in manifest.entries():
        size = plain_size(folder / entry.file, where)
        if size != entry.bytes:
            what = "truncated" if size < entry.bytes else "too long"
            raise BundleError(f"{where}: {entry.file} is {what}: it has {size} bytes, the manifest says {entry.bytes}")
    if hashes:
        for entry in manifest.entries():
            if sha256_of(folder / entry.file, where) != entry.sha256:
                raise BundleError(f"{where}: {entry.file} has been changed: its SHA-256 isn't the manifest's")
    for shard in manifest.shards:
        check_shard(folder / shard.file, shard, limits, where)


def _found(folder: Path, where: str) -> Iterator[str]:
    """Relative names of everything in the folder; links and foreign folders are refused."""
    for entry in os.scandir(folder):
        if entry.is_symlink():
            raise BundleError(f"{where}: {show(entry.name)} is a link; a bundle holds ordinary files only")
        if entry.name in FOLDERS and entry.is_dir():
            yield from (f"{entry.name}/{inner.name}" for inner in os.scandir(entry.path))
        else:
            yield entry.name


def check_processor_files(folder: Path, manifest: Manifest, limits: Limits, where: str) -> None:
    """Check that the tokenizer's or image processor's configuration is JSON and points to nothing outside the bundle.

    An image processor must be one of transformers' own and make images of no more than ``limits.max_image_side``.
    """
    name = manifest.processor_config
    sizes = {entry.file: entry.bytes for entry in manifest.files}
    data = read_plain(folder / name, sizes[name], where)
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: {name} isn't JSON: {show(str(error))}") from error
    if not isinstance(config, dict):
        raise BundleError(f"{where}: {name} must hold a JSON object")
    outward = outward_keys(config)
    if outward:
        raise BundleError(f"{where}: {name} carries {show(outward[0])}, which points to other files or code")
    if name == PROCESSOR_CONFIG:
        _check_image_processor(config, limits, where)


def _check_image_processor(config: dict[str, Any], limits: Limits, where: str) -> None:
    kind = config.get(TYPE_KEY)
    if not isinstance(kind, str) or kind not in known_image_processors():
        raise BundleError(f"{where}: {TYPE_KEY} {show(kind)} is no image processor of transformers")
    # Any number may become a side in pixels, whatever its key is; ConvNeXt's processor divides its sides by one.
    share = config.get("crop_pct")
    limit = limits.max_image_side * (share if isinstance(share, (int, float)) and 0 < share < 1 else 1)
    for key, value in config.items():
        for number in _numbers(value):
            if not abs(number) <= limit:
                raise BundleError(
                    f"{where}: the image processor has {show(key)} = {show(number)}, the limit is {limit:g}"
                )
    side, patches = (max(map(abs, _numbers_of(config, part)), default=1) for part in ("size", "patches"))
    if patches * side**2 > limits.max_image_side**2:
        raise BundleError(
            f"{where}: the image processor makes {patches} patches of up to {side} x {side} pixels of an image, the "
            f"limit is {limits.max_image_side} x {limits.max_image_side} pixels in all"
        )


def _numbers_of(config: dict[str, Any], part: str) -> Iterator[int | float]:
    """The numbers under all keys that have ``part`` in their name."""
    return _numbers([value for key, value in config.items() if part in key])


def _numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a JSON value, however deep they lie."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, (int, float)):
            yield found
        elif isinstance(found, (dict, list)):
            left += found.values() if isinstance(found, dict) else found


def check_plan(manifest: Manifest, limits: Limits, where: str) -> NetworkPlan:
    """Read the network plan and check that the manifest's tensors are exactly those that its network needs."""
    _check_numbers(manifest.plan, limits, where)
    blocks = manifest.plan.get("layout")
    if isinstance(blocks, list) and len(blocks) > limits.max_blocks:
        raise BundleError(f"{where}: {len(blocks)} blocks are declared, the limit is {limits.max_blocks}")
    try:
        plan = NetworkPlan.from_json(manifest.plan)
        expected = expected_tensors(plan)
    except Exception as error:  # foreign data reaches many constructors; all their complaints mean the same here
        text = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        raise BundleError(f"{where} describes a network that can't be built here: {text}") from error
    check_tensors(manifest.tensors(), expected, where)
    images = plan.task in IMAGE_TASKS
    if images != (manifest.processor_config == PROCESSOR_CONFIG):
        raise BundleError(
            f"{where} is for {plan.task} and comes with {manifest.processor_config}: models for images need an image "
            "processor, all others a tokenizer"
        )
    if (plan.head or images) and manifest.format_version < 2:
        raise BundleError(f"{where} has format 1, which knows neither a head nor images: it must be 2")
    return plan


def check_tensors(declared: dict[str, TensorEntry], expected: dict[str, TensorSpec], where: str) -> None:
    """Check names, shapes and dtypes of ``declared`` tensors against what a network needs."""
    for what, names in (
        ("lacks", expected.keys() - declared.keys()),
        ("has unknown", declared.keys() - expected.keys()),
    ):
        if names:
            raise BundleError(
                f"{where} {what} {len(names)} tensor(s) of its network, for example {show(sorted(names)[0])}"
            )
    for name, spec in expected.items():
        entry = declared[name]
        if entry.shape != spec.shape:
            raise BundleError(f"{where}: {name} has shape {list(entry.shape)}, its network needs {list(spec.shape)}")
        allowed = FLOAT_DTYPES if spec.dtype is None else (DTYPE_NAMES[spec.dtype],)
        if entry.dtype not in allowed:
            raise BundleError(f"{where}: {name} has dtype {entry.dtype}, its network needs {' or '.join(allowed)}")


def _check_numbers(value: Any, limits: Limits, where: str, key: str = "plan") -> None:
    """Refuse integers that would make transformers build something absurd, before it is asked to build anything."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, limits, where, name)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, limits, where, key)
    elif type(value) is int:
        layers, parts = _LAYERS.fullmatch(key), _PARTS.fullmatch(key)
        most = limits.max_blocks if layers else limits.max_parts if parts else limits.max_dim
        if abs(value) > most:
            raise BundleError(f"{where}: the network plan has {show(key)} = {show(value)}, the limit is {most}")
