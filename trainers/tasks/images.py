"""Images and a small residual network with BatchNorm: MNIST's digits, or your own images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isobatch.scaling.errors import UserError
from isobatch.trainers.tasks.classify import Classification
from isobatch.trainers.tasks.image_data import Labelled, from_arrays, from_folder, mnist, read_npz

Sample = tuple[Tensor, Tensor]


class Images(Classification):
    """Classify images by a ResNet (He et al. 2016, arXiv:1512.03385), initialised as in Goyal et al. 2017.

    Args:
        data: null: 5,000 images of MNIST; a folder with a sub-folder per class, or with train/ and val/ that have
            these; or an .npz file with ``images`` (uint8 [images, height, width] or [images, height, width,
            channels]), ``labels`` (integers from 0) and optionally ``val_images`` and ``val_labels``. Without
            validation data, a fixed fifth is held back.
        size: height and width in pixels to which the images of a folder are scaled.
        shift: maximum random shift of a training image along each axis, in pixels; 0: none.
        width: channels of the first of three stages; each further stage has twice as many.
        blocks: residual blocks per stage.

    Raises:
        UserError: the data doesn't exist, or has another form.
    """

    def __init__(self, data: str | None, size: int | None, shift: int, width: int, blocks: int) -> None:
        if shift < 0 or min(width, blocks, 1 if size is None else size) < 1:
            problem = f"task.args.shift={shift}, width={width}, blocks={blocks}, size={size}"
            raise UserError(problem, "shift has to be 0 or more, the others 1 or more", "task.args")
        self.images, self.shift, self.width, self.blocks = open_images(data, size), shift, width, blocks
        self._train, self._val = self.images.train, self.images.val
        self.augment = self._moved if shift else None

    def model(self) -> nn.Module:
        return resnet(self.images.channels, self.images.classes, self.width, self.blocks)

    def _moved(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return a sample shifted at random, padded with black."""
        image, label = sample
        down, right = torch.randint(2 * self.shift + 1, (2,), generator=generator).tolist()
        bordered = F.pad(image, [self.shift] * 4)
        return bordered[:, down : down + image.shape[1], right : right + image.shape[2]], label

    def _scaled(self, inputs: Tensor) -> Tensor:
        """Convert pixels from 0 to 255 to float32 from -1 to 1."""
        return inputs.float() / 127.5 - 1


def open_images(data: str | None, size: int | None) -> Labelled:
    """Return MNIST if ``data`` is None, else an .npz file, or a folder whose images are scaled to ``size`` pixels.

    Without validation data, a fixed fifth is held back.

    Raises:
        UserError: the data doesn't exist, or has another form.
    """
    path = Path(data or "").expanduser()
    if data is not None and path.is_dir():
        return from_folder(path, size)
    if size is not None:
        problem = f"task.args.size={size} only applies to a folder of images"
        raise UserError(problem, "leave it out", "task.args.size", size)
    if data is None:
        return from_arrays("MNIST", mnist())
    if path.suffix == ".npz" and path.is_file():
        return from_arrays(f"task.args.data={data}", read_npz(path))
    problem = f"task.args.data={data} is neither an .npz file nor a folder with a sub-folder per class"
    raise UserError(problem, "", "task.args.data", data)


def resnet(channels: int, classes: int, width: int, blocks: int) -> nn.Sequential:
    """Return a ResNet of three stages. The stem, the second stage and the third stage halve height and width."""
    layers: list[nn.Module] = [convolution(channels, width, stride=2), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(3):
        for block in range(blocks):
            outputs = width * 2**stage
            layers.append(Block(inputs, outputs, stride=1 if stage == 0 or block else 2))
            inputs = outputs
    head = nn.Linear(inputs, classes)
    nn.init.normal_(head.weight, std=0.01)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class Block(nn.Module):
    """Two convolutions with a shortcut. The last BatchNorm's γ starts at 0, so the block starts as its shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, stride=stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            convolution(outputs, outputs),
            nn.BatchNorm2d(outputs),
        )
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.shortcut(images) + self.body(images))


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias (BatchNorm follows), initialised as in He et al. 2015, arXiv:1502.01852."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
