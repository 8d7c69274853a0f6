"""Images in a folder with a sub-folder for each class, decoded when they are asked for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from isobatch.scaling.errors import UserError
from isobatch.trainers.tasks.image_data import Labelled, split

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def from_folder(path: Path, size: int | None) -> Labelled:
    """The images below ``path``, or below its train/ and val/; only their names are read.

    Raises:
        UserError: no size is given, Pillow is missing, or some class has no images.
    """
    if find_spec("PIL") is None:
        raise UserError(f"reading the images in {path} needs Pillow", "pip install '.[tasks]' (the extra tasks)")
    if size is None:
        fix = "give task.args.size, the pixels its images are scaled to"
        raise UserError(f"task.args.data={path} is a folder", fix, "task.args.size")
    root = path / "train" if (path / "train").is_dir() else path
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root} has no sub-folders", "it needs one for each class")
    train, val = _files(root, names), list[tuple[str, int]]()
    if root == path:
        for_training, for_validation = split(len(train))
        train, val = [train[at] for at in for_training], [train[at] for at in for_validation]
    elif (path / "val").is_dir():
        val = _files(path / "val", names)
    return Labelled(Folder(train, size), Folder(val, size), len(names), 3)


def _files(root: Path, names: list[str]) -> list[tuple[str, int]]:
    """All images in the sub-folders ``names`` of ``root``, and the number of the sub-folder."""
    files = list[tuple[str, int]]()
    for label, name in enumerate(names):
        folder = root / name
        found = (
            sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in ENDINGS) if folder.is_dir() else []
        )
        if not found:
            raise UserError(
                f"{folder} has no images ({', '.join(ENDINGS)})", f"the classes are {', '.join(names[:10])}"
            )
        files += [(file, label) for file in found]
    return files


class Folder(Dataset):
    """Images in files, each decoded when it is asked for: uint8 [3, height, width] and a label.

    Args:
        files: of each image its file and its label.
        size: height and width in pixels. Images are scaled and cut to that around their centre.
    """

    def __init__(self, files: list[tuple[str, int]], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import ImageOps

        file, label = self.files[index]
        image = _decoded(file)
        if image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), label


def _decoded(file: str) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {file} can't be read: {error}") from None
