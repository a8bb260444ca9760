"""Random crops: inside the image, of the published areas and shapes, brought to the model's size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from offsite_fl.data.augment import AREA, RATIO, augmented, final_size, random_box
from offsite_fl.data.images import ImageTransform
from offsite_fl.errors import ConfigError
from tests.pico_classifiers import SIDE, make_image_processor


def test_crops_keep_to_area_and_shape():
    draw = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(400):
        left, upper, right, lower = random_box(200, 100, draw)
        assert 0 <= left < right <= 200 and 0 <= upper < lower <= 100
        shares.append((right - left) * (lower - upper) / 20000)
        ratios.append((right - left) / (lower - upper))
    assert min(shares) > AREA[0] * 0.9 and max(shares) <= 1
    assert min(ratios) > RATIO[0] * 0.95 and max(ratios) < RATIO[1] * 1.05
    # log-uniform: as many crops are wide as are high, up to those that don't fit
    assert abs(np.mean([r > 1 for r in ratios]) - 0.5) < 0.15


@pytest.mark.parametrize(("width", "height", "box"), [(100, 2, (48, 0, 51, 2)), (2, 100, (0, 48, 2, 51))])
def test_where_no_crop_fits_it_is_the_middle(width, height, box):
    class Largest:
        def uniform(self, low, high):
            return high

    left, upper, right, lower = random_box(width, height, Largest())  # type: ignore[arg-type]
    assert (right - left, lower - upper) == (box[2] - box[0], box[3] - box[1])
    assert abs(left - box[0]) <= 1 and abs(upper - box[1]) <= 1


def test_a_crop_fills_the_models_size_and_isnt_resized_again():
    """Of an image that is red on the left and blue on the right a crop holds no third colour but at the seam."""
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:, :20, 0], pixels[:, 20:, 2] = 255, 255
    transform = ImageTransform(make_image_processor())
    for row in range(20):
        found = augmented(Image.fromarray(pixels), transform, "crop-flip", 0, 0, row)
        assert found.shape == (3, SIDE, SIDE)
        assert torch.all(found[1] == -1)  # green stays 0 everywhere
        assert found.std(dim=1).abs().max() < 1e-6  # each column is one colour


def test_sizes():
    processor = make_image_processor()
    assert final_size(processor) == (SIDE, SIDE)
    processor.size = {"shortest_edge": 10}
    with pytest.raises(ConfigError, match="augment = 'flip'"):
        final_size(processor)
    processor.do_center_crop, processor.crop_size = True, {"height": 6, "width": 7}
    assert final_size(processor) == (6, 7)
    assert math.isclose(AREA[0], 0.08) and AREA[1] == 1
