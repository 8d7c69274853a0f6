"""Test the shipped tasks: their data, their errors, and that they train the same on any number of ranks."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from isobatch.conf.compose import compose
from isobatch.scaling.errors import UserError
from isobatch.scaling.rules import Recipe
from isobatch.trainers.optim.make import make_optimizer
from isobatch.trainers.tasks.images import Images
from isobatch.trainers.tasks.losses import checked
from isobatch.trainers.tasks.mnist1d import generate
from isobatch.trainers.tasks.task import make_task, open_data
from isobatch.trainers.tasks.text import LIBRARY, Text, Windows, open_corpus
from tests.support.harness import ROUNDING, Runs, distance

TASKS = ["images", "mnist1d", "text"]


def task_of(*overrides: str) -> Any:
    return make_task(compose(overrides))


def images(data: Path, size: int | None = None, shift: int = 0) -> Images:
    return Images(str(data), size, shift, width=4, blocks=1)


def text(data: Path, length: int = 8) -> Text:
    return Text(str(data), length, width=8, depth=1, heads=2, dropout=0.1)


@pytest.mark.parametrize("name", TASKS)
def test_yaml_matches_the_task(name: str) -> None:
    """Its train_samples match the data, its arguments are valid, and a model takes one batch of the data."""
    config = compose([f"task={name}"])
    task: Any = make_task(config)
    assert len(open_data(task, config)) == config.task.train_samples
    torch.manual_seed(0)
    model = task.model()
    batch = default_collate([task.val_data()[row] for row in range(4)])
    loss, units, _ = checked(task.loss(model, batch), 4)
    assert units == 4 * (config.task.units_per_sample or 1)
    guessing = {"text": 256}.get(name, 10)  # an untrained model gives all classes the same probability
    assert loss.item() / units == pytest.approx(np.log(guessing), rel=0.1)
    assert set(config.task.tuned) >= {"sgd", "adamw"}


def test_units_of_a_sample_are_its_length() -> None:
    assert compose(["task=text", "task.args.length=32"]).task.units_per_sample == 32


@pytest.mark.parametrize(
    ("samples", "named"),
    [
        ([torch.zeros(2), torch.zeros(3)], "[2] and [3]"),
        ([{"x": torch.zeros(2), "y": 1}, {"x": torch.zeros(3), "y": 1.5}], "{x: [2], y: number} and {x: [3]"),
        ([{"x": 1, "y": 1}, {"x": 1}], "{x: number, y: number} and {x: number}"),
        ([Image.new("L", (2, 2))] * 2, "PIL"),
    ],
    ids=["tensors", "dicts", "keys", "images"],
)
def test_samples_that_cannot_be_batched_are_rejected(samples: list[Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        task_of("task=digits").collate(samples)
    assert "collate(samples)" in error.value.fix
    assert named in error.value.problem
    assert ("torch.from_numpy" in error.value.fix) == (named == "PIL")


def test_memory_that_runs_out_in_a_batch_is_no_matter_of_shapes() -> None:
    with pytest.raises(RuntimeError, match="alloc"):
        task_of("task=digits").collate([(torch.zeros(1).expand(1 << 45), 0), (torch.zeros(1).expand(1 << 45), 1.5)])


class Foreign:
    """A task with the method names of other trainers."""

    def model(self) -> None: ...

    def train_data(self) -> None: ...

    def loss(self, model: Any, batch: Any) -> None: ...

    def evaluate(self, model: Any, batch: Any) -> None: ...

    def validation_data(self) -> None: ...

    def collate_fn(self) -> None: ...


def test_methods_of_other_trainers_are_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    make_task(compose(["task=custom", f"task._target_={__name__}.Foreign"]))
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 3
    assert notes[0].endswith("Foreign.validation_data; did you mean val_data?")
    assert notes[1].endswith("Foreign.collate_fn; did you mean collate?")
    assert "no val_data()" in notes[2]


class Native(Foreign):
    """A task whose helpers have such names; its constructor sets methods."""

    def __init__(self) -> None:
        self.collate, self.val_data = self.collate_fn, self.validation_data

    def validation_data(self) -> None: ...

    def collate_fn(self) -> None: ...

    def parameter_groups(self) -> None: ...

    def model(self) -> None:
        return self.parameter_groups()


def test_helpers_that_a_task_uses_are_no_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    make_task(compose(["task=custom", f"task._target_={__name__}.Native"]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["mnist1d", "text"])
def test_two_ranks_train_as_one(runs: Runs, name: str) -> None:
    """The tasks have dropout and tied weights, and the ranks uneven shares."""
    short = (
        f"task={name}",
        "batch.global_size=15",
        "duration=3st",
        "lr.peak=0.1",
        "lr.warmup=0",
        "evaluate.every=null",
    )
    short += ("task.args.width=16", "task.args.length=16", "task.train_samples=null") if name == "text" else ()
    one, two = runs(1, *short), runs(2, *short, "batch.per_gpu=4")
    assert one.ends[0]["step"] == two.ends[1]["step"] == 3
    assert distance(one.weights(), two.weights()) < ROUNDING
    assert not [event for event in two.events() if "warning" in event["event"]]


def test_images_train(runs: Runs) -> None:
    run = runs(2, "task=images", "batch.global_size=64", "duration=3st", "lr.peak=0.1", "task.args.width=4")
    assert [end["state"] for end in run.ends] == ["finished"] * 2
    assert 0 < run.metrics()[-1]["val/accuracy"] < 1


def test_mnist_is_split_deterministically() -> None:
    """The splits share no image, have all digits, and are the same each time."""
    first, second = (task_of("task=images") for _ in range(2))
    pixels, labels = first.train_data().tensors
    held_back = first.val_data().tensors
    assert pixels.shape == (4000, 1, 28, 28)
    assert held_back[0].shape == (1000, 1, 28, 28)
    assert pixels.dtype == torch.uint8
    assert (labels.bincount() + held_back[1].bincount()).tolist() == [500] * 10
    assert torch.equal(pixels, second.train_data().tensors[0])
    assert not {image.numpy().tobytes() for image in pixels} & {image.numpy().tobytes() for image in held_back[0]}


def test_shifted_image_follows_the_generator() -> None:
    image = torch.zeros(1, 9, 9, dtype=torch.uint8)
    image[0, 4, 4] = 255
    augment = task_of("task=images", "task.args.shift=2").augment

    def place(seed: int) -> tuple[int, ...]:
        moved, label = augment((image, torch.tensor(3)), torch.Generator().manual_seed(seed))
        assert moved.shape == image.shape
        assert moved.dtype == image.dtype
        assert label == 3
        return tuple(moved.nonzero()[0].tolist())

    places = {place(seed) for seed in range(300)}
    assert places == {(0, y, x) for y in range(2, 7) for x in range(2, 7)}
    torch.manual_seed(99)
    assert place(5) == place(5)
    assert not task_of("task=images", "task.args.shift=0").has("augment")


def save(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def test_an_npz_file_gives_images(tmp_path: Path) -> None:
    """The images have colours and another size, with and without validation data."""
    pixels, labels = np.random.default_rng(0).integers(0, 256, (10, 12, 20, 3), np.uint8), np.arange(10) % 3
    task = images(save(tmp_path, images=pixels, labels=labels))
    assert (len(task.train_data()), len(task.val_data())) == (8, 2)
    assert task.model()(torch.zeros(2, 3, 12, 20)).shape == (2, 3)
    with_val = images(save(tmp_path, images=pixels, labels=labels, val_images=pixels[:4], val_labels=labels[:4]))
    image, label = with_val.train_data()[7]
    assert torch.equal(image, torch.from_numpy(pixels[7]).permute(2, 0, 1))
    assert label == 1
    assert (len(with_val.train_data()), len(with_val.val_data())) == (10, 4)
    without_val = save(tmp_path, images=pixels, labels=labels, val_images=pixels[:0], val_labels=labels[:0])
    assert images(without_val).val_data() is None


GREY, LABELS = np.zeros((6, 5, 5), np.uint8), np.arange(6) % 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": GREY}, "has the arrays images; it needs images and labels"),
        ({"images": GREY, "labels": LABELS, "val_images": GREY}, "val_images and val_labels"),
        ({"images": GREY / 255, "labels": LABELS}, "images are float64 .6, 5, 5.; they have to be uint8"),
        ({"images": GREY[0], "labels": LABELS}, "have to be uint8 .* .images, height, width."),
        ({"images": np.zeros((6, 3, 5, 5), np.uint8), "labels": LABELS}, "with 1 to 4 channels"),
        ({"images": GREY, "labels": LABELS[:4]}, "labels are int64 .4.; they have to be integers of shape .6."),
        ({"images": GREY, "labels": LABELS / 1}, "labels are float64"),
        ({"images": GREY, "labels": LABELS + 1}, "labels go from 1 to 2 with 2 different values"),
        ({"images": GREY, "labels": LABELS, "val_images": GREY, "val_labels": LABELS + 1}, "val_labels has class 2"),
        ({"images": GREY, "labels": LABELS, "val_images": GREY[:, 1:], "val_labels": LABELS}, r"\[1, 4, 5\]"),
        ({"images": GREY[:0], "labels": LABELS[:0]}, "no images"),
        ({"images": np.array([None] * 6), "labels": LABELS}, "can't be read as an .npz file: Object arrays"),
    ],
)
def test_arrays_that_are_not_images_are_rejected(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        images(save(tmp_path, **arrays))


def test_files_that_are_not_images_are_rejected(tmp_path: Path) -> None:
    broken = save(tmp_path, images=GREY, labels=LABELS)
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UserError, match=r"can't be read as an .npz file"):
        images(broken)
    with pytest.raises(UserError, match=r"is neither an .npz file nor a folder"):
        images(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match="size=28 only applies to a folder of images"):
        images(save(tmp_path, images=GREY, labels=LABELS), size=28)
    with pytest.raises(UserError, match="shift=-1"):
        task_of("task=images", "task.args.shift=-1")


def folder_of(root: Path, **classes: int) -> Path:
    """Return a folder of images whose red channel is their class."""
    for at, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (10 + number, 8), (at * 100, 7, 0)).save(root / name / f"{number}.png")
    return root


def test_a_folder_gives_images(tmp_path: Path) -> None:
    both = folder_of(tmp_path / "both", cats=6, dogs=4)
    (both / ".hidden").mkdir()
    (both / "cats" / "notes.txt").write_text("no image")
    task = images(both, size=6)
    assert (len(task.train_data()), len(task.val_data()), task.images.classes) == (8, 2, 2)
    assert not {file for file, _ in task.train_data().files} & {file for file, _ in task.val_data().files}
    for image, label in (task.train_data()[row] for row in range(8)):
        assert image.shape == (3, 6, 6)
        assert image[:, 0, 0].tolist() == [100 * label, 7, 0]
    split = tmp_path / "split"
    folder_of(split / "train", cats=2, dogs=3)
    assert images(split, size=6).val_data() is None
    folder_of(split / "val", cats=1, dogs=1)
    assert (len(images(split, size=6).train_data()), len(images(split, size=6).val_data())) == (5, 2)


def test_invalid_folders_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give task.args.size"):
        images(folder_of(tmp_path / "a", cats=5))
    (tmp_path / "a" / "cats" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"the image .*0\.png can't be read"):
        list(images(tmp_path / "a", size=6).train_data())
    with pytest.raises(UserError, match="has no sub-folders"):
        images(tmp_path / "a" / "cats", size=6)
    with pytest.raises(UserError, match="dogs has no images"):
        images(folder_of(tmp_path / "b", cats=1, dogs=0), size=6)
    folder_of(tmp_path / "c" / "train", cats=1, dogs=1)
    folder_of(tmp_path / "c" / "val", cats=1)
    with pytest.raises(UserError, match="dogs has no images"):
        images(tmp_path / "c", size=6)


def test_windows_cover_the_text(tmp_path: Path) -> None:
    """Each byte is predicted once, except the first of each part and the last few, which fill no window."""
    words = bytes(np.random.default_rng(0).integers(0, 256, 1000, np.uint8))
    (tmp_path / "words.txt").write_bytes(words)
    task = text(tmp_path / "words.txt", length=9)
    for data, part in ((task.train_data(), words[:900]), (task.val_data(), words[900:])):
        windows = list(data)
        assert all(window.shape == (10,) for window in windows)
        read = bytes(windows[0][:1].tolist()) + b"".join(bytes(window[1:].tolist()) for window in windows)
        assert read == part[: len(read)]
        assert 0 <= len(part) - len(read) < 9


def test_large_text_is_memory_mapped(tmp_path: Path) -> None:
    """The file is larger than memory. Pickling the data doesn't copy its bytes either."""
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(1 << 40)
        file.seek(-9, 2)
        file.write(b"the  end.")
    task = text(tmp_path / "huge.txt")
    assert len(task.train_data()) > 1e11
    windows = Windows(open_corpus(str(tmp_path / "huge.txt")), (1 << 40) - 9, 1 << 40, 8)
    assert bytes(windows[0].tolist()) == b"the  end."
    sent = pickle.dumps(windows)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[0], windows[0])  # noqa: S301  it was made here


def test_the_standard_library_has_one_length() -> None:
    corpus = open_corpus(None)()
    assert corpus.shape == (LIBRARY,)
    assert np.array_equal(corpus, open_corpus(None)())
    assert b"import" in corpus.tobytes()


def test_invalid_texts_are_rejected(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("")
    with pytest.raises(UserError, match=r"short.txt can't be mapped into memory: .*empty"):
        text(short)
    short.write_text("too short")
    with pytest.raises(UserError, match=r"has only 9 bytes, too few for task.args.length=9"):
        text(short, length=9)
    assert text(short, length=8).val_data() is None
    with pytest.raises(UserError, match=r"nothing.txt doesn't exist"):
        text(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match="heads has to divide width"):
        task_of("task=text", "task.args.heads=5")


def test_hugging_face_model_takes_text(tmp_path: Path) -> None:
    """Hugging Face's models return an object with logits."""

    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    (tmp_path / "words.txt").write_text("a word, and another word")
    task = text(tmp_path / "words.txt")
    model = task.model().eval()
    batch = torch.stack(list(task.train_data()))
    plain = task.loss(model, batch)
    wrapped = task.loss(lambda tokens: Output(model(tokens)), batch)  # type: ignore[arg-type]
    assert (plain[0].item(), plain[1]) == (wrapped[0].item(), wrapped[1])
    assert task.summarise({"loss": (plain[1] * np.log(2) * 3, plain[1])}) == {"bits_per_byte": pytest.approx(3)}


def test_targets_are_the_next_bytes(tmp_path: Path) -> None:
    """A model that predicts its text exactly has no loss."""
    (tmp_path / "abc.txt").write_text("abc" * 20)
    task = text(tmp_path / "abc.txt")
    batch = torch.stack(list(task.train_data()))

    def says(shift: int) -> Any:
        return lambda tokens: 50.0 * torch.nn.functional.one_hot((tokens - 97 + shift) % 3 + 97, 256)

    assert task.loss(says(1), batch)[0] < 1e-6
    assert task.loss(says(0), batch)[0].item() / task.loss(says(0), batch)[1] == pytest.approx(50)


def test_gpt_sees_no_later_byte() -> None:
    model = task_of("task=text").model().eval()
    tokens = torch.arange(40)[None]
    changed = tokens.clone()
    changed[0, 25:] = 7
    assert torch.equal(model(tokens)[:, :25], model(changed)[:, :25])
    assert not torch.equal(model(tokens)[:, 25:], model(changed)[:, 25:])


def test_tied_weights_are_trained_once() -> None:
    task, config = task_of("task=text"), compose(["task=text"])
    model = task.model()
    assert model.head.weight is model.tokens.weight
    optimizer = make_optimizer(config, task, model, Recipe(0.1, (0.9,), None, 0.0)).optimizer
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sum(parameter is model.tokens.weight for parameter in trained) == 1
    assert len(trained) == len(list(model.parameters()))


def test_mnist1d_is_deterministic() -> None:
    lines, labels = generate(500)
    digest = hashlib.sha256(lines.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "6e7ce58091053facd5c08f9b771d484a265a6958079a33db12b3c9f8e41d3e1e"
    assert lines.shape == (500, 40)
    assert np.bincount(labels).tolist() == [50] * 10
    assert not np.array_equal(lines, generate(500, seed=1)[0])


def test_mnist1d_is_split_without_loss() -> None:
    task = task_of("task=mnist1d")
    lines, labels = generate(5000)
    parts = [data.tensors for data in (task.train_data(), task.val_data())]
    assert np.array_equal(np.concatenate([part[0][:, 0].numpy() for part in parts]), lines)
    assert np.array_equal(np.concatenate([part[1].numpy() for part in parts]), labels)
    assert len(np.unique(lines, axis=0)) == 5000
