"""Real inputs for whole networks: crops of the two photographs that come with scikit-learn."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Statistics of ImageNet, by which both networks' inputs are normalised.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CROPS = 8


def photographs(size: int) -> Tensor:
    """Eight different crops: two photographs, left and right part, plain and mirrored.

    Args:
        size: Height and width of a crop; the photographs' shorter side is scaled to 8/7 of it.

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
    # Neighbours differ: a batch of any size sees both photographs.
    order = [0, 4, 2, 6, 1, 5, 3, 7]
    return ((torch.cat(crops) - mean) / std)[order]


def batches(size: int, batch: int, count: int = 4) -> list[Tensor]:
    """Make a few different batches of a size, by rotating through the crops."""
    crops = photographs(size)
    picked = [torch.arange(start * batch + start, start * batch + start + batch) % CROPS for start in range(count)]
    return [crops[indices].clone() for indices in picked]
