"""How large a bundle may claim to be before anything of it is believed."""

from __future__ import annotations

from dataclasses import dataclass, fields

from offsite_fl.errors import ConfigError
from offsite_fl.sizes import GB, MB


@dataclass(frozen=True)
class Limits:
    """Upper bounds that :func:`~offsite_fl.bundle.open_bundle` holds a bundle to; sizes in bytes.

    A bundle comes from another party, so every number it declares is compared with these before memory is taken for
    it. The defaults let models of about a hundred gigabytes pass; a site with less room sets its own.

    ``max_bytes`` bounds the whole folder, ``max_file_bytes`` one shard, ``max_header_bytes`` the header of one shard,
    ``max_dim`` one dimension of a tensor and every integer of the network plan, ``max_blocks`` its numbers of layers,
    ``max_parts`` its other counts (heads, experts, labels), ``max_image_side`` the sides in pixels of the images that
    an image processor makes, ``max_depth`` how deep the manifest's JSON is nested.
    """

    max_bytes: int = 256 * GB
    max_file_bytes: int = 32 * GB
    max_manifest_bytes: int = 32 * MB
    max_header_bytes: int = 32 * MB
    max_tokenizer_bytes: int = 256 * MB
    max_tokenizer_files: int = 32
    max_shards: int = 4096
    max_tensors: int = 100_000
    max_dims: int = 8
    max_dim: int = 2**24
    max_blocks: int = 1024
    max_parts: int = 4096
    max_image_side: int = 4096
    max_depth: int = 24

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"limit {field.name} must be at least 1, got {getattr(self, field.name)}")
