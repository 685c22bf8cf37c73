"""Inputs of whole networks: crops of the two photographs that come with scikit-learn."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Statistics of ImageNet.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CROPS = 8


def photographs(size: int) -> Tensor:
    """Eight crops: of two photographs the left and the right part, each also mirrored.

    Args:
        size: Height and width of a crop; the shorter side of a photograph is scaled to 8/7 of it.

    Returns:
        (8, 3, size, size), float32, normalised.
    """
    from sklearn.datasets import load_sample_images

    crops = []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        H, W = pixels.shape[2:]
        scale = size * 8 / 7 / min(H, W)
        scaled = F.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True, align_corners=False)
        top = (scaled.shape[2] - size) // 2
        for left in (0, scaled.shape[3] - size):
            crop = scaled[:, :, top : top + size, left : left + size]
            crops += [crop, crop.flip(3)]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    # Neighbours come from different photographs, so that every batch has both.
    order = [0, 4, 2, 6, 1, 5, 3, 7]
    return ((torch.cat(crops) - mean) / std)[order]


def batches(size: int, batch: int, count: int = 4) -> list[Tensor]:
    """Return ``count`` different batches, by rotating through the crops."""
    crops = photographs(size)
    indices = [torch.arange(start * batch + start, start * batch + start + batch) % CROPS for start in range(count)]
    return [crops[index].clone() for index in indices]
