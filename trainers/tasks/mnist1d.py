"""Ten shapes on a line of 40 points, and a small convolutional network: shows effects of the batch size in seconds."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from isobatch.trainers.tasks.classify import Classification

TRAIN, VALIDATION = 4000, 1000  # samples
POINTS = 40

# Heights at 12 points, drawn for this task after the digits' strokes from left to right.
SHAPES = np.array(
    [
        [0.3, 0.7, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 0.7, 0.3],
        [0.0, 0.0, 0.1, 0.3, 0.7, 1.0, 1.0, 0.2, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.9, 1.0, 0.7, 0.2, -0.3, -0.7, -1.0, -1.0, -0.9, -0.8, -0.7],
        [0.6, 1.0, 0.9, 0.4, 0.0, -0.2, 0.0, 0.4, 0.9, 1.0, 0.6, 0.1],
        [1.0, 0.6, 0.2, -0.2, -0.6, -0.6, -0.6, -0.6, 0.4, 1.0, -0.8, -1.0],
        [-0.7, -0.9, -0.9, -0.8, -0.2, 0.5, 0.9, 1.0, 0.8, 0.4, 0.0, -0.4],
        [1.0, 0.5, 0.0, -0.5, -0.8, -1.0, -0.9, -0.4, -0.1, -0.2, -0.6, -0.9],
        [0.9, 1.0, 1.0, 1.0, 0.9, 0.6, 0.3, 0.0, -0.3, -0.6, -0.8, -1.0],
        [0.2, 0.9, 0.6, -0.5, -0.9, -0.4, 0.4, 0.9, 0.5, -0.6, -0.9, -0.2],
        [-0.8, -0.4, 0.2, 0.3, 0.1, -0.2, 0.3, 0.8, 1.0, 0.7, 0.1, -0.9],
    ]
)


class Mnist1D(Classification):
    """Classify ten shapes that are stretched, shifted, tilted and noisy.

    The recipe is that of MNIST-1D (Greydanus and Kobak, "Scaling down deep learning with MNIST-1D", 2020,
    arXiv:2011.14439). Shapes and random numbers are different, so results can't be compared with those of the paper.
    The network has three convolutions of ``width`` channels, as in the paper.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        lines, labels = generate(TRAIN + VALIDATION)
        self._train, self._val = (
            TensorDataset(torch.from_numpy(lines[part, None]), torch.from_numpy(labels[part]))
            for part in (slice(TRAIN), slice(TRAIN, None))
        )

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for channels, kernel in ((1, 5), (self.width, 3), (self.width, 3)):
            layers += [nn.Conv1d(channels, self.width, kernel, stride=2, padding=kernel // 2), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(self.width * POINTS // 8, 10))


def generate(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Generate lines (float32 [samples, 40]) and labels (int64 [samples], 0 to 9 in turn), equal on every machine.

    A shape is padded with zeros to 48 to 72 points, rotated by up to 47 of them, sampled at 40 points, scaled by 0.8
    to 1.2, and added to a slope of up to ±0.375, smoothed noise (0.25) and white noise (0.02).
    """
    random = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(samples) % 10
    padded, shift = random.integers(48, 73, (samples, 1)), random.integers(0, 48, (samples, 1))
    scale, slope = random.uniform(0.8, 1.2, (samples, 1)), random.uniform(-0.375, 0.375, (samples, 1))
    along = np.arange(POINTS) / (POINTS - 1)
    lines = scale * _heights(labels, (along * (padded - 1) - shift) % padded) + slope * (2 * along - 1)
    lines += 0.25 * _smooth(random.standard_normal((samples, POINTS + 8)))
    lines += 0.02 * random.standard_normal((samples, POINTS))
    return np.round(lines, 3).astype(np.float32), labels  # rounded: the last bits of sums differ between machines


def _heights(labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the heights of the labels' shapes at ``positions`` [samples, points], interpolated linearly."""
    heights = np.pad(SHAPES, ((0, 0), (1, 2)))
    left = np.minimum(positions.astype(int) + 1, SHAPES.shape[1] + 1)
    share = np.where(left > SHAPES.shape[1], 0.0, positions % 1)
    return np.asarray(heights[labels[:, None], left] * (1 - share) + heights[labels[:, None], left + 1] * share)


def _smooth(noise: np.ndarray) -> np.ndarray:
    """Return a moving average of [samples, points + 8] with binomial weights, whose standard deviation is √2 points."""
    weights = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1]) / 256
    return np.asarray(sum(weight * noise[:, start : start + POINTS] for start, weight in enumerate(weights)))
