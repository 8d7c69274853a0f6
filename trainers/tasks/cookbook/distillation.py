"""Distil a frozen teacher into a small student (Hinton et al. 2015).

Exact on any hardware: the teacher has no trained parameter and is returned in eval mode. It stays in eval mode, draws
nothing, and updates no statistics; the run reports it. The loss is a divergence per sample, summed over classes.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.distillation.Distil lr.peak=0.1
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Distil:
    def __init__(self) -> None:
        pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
        self.images, self.labels = pixels.float() / 8 - 1, labels

    def model(self) -> nn.ModuleDict:
        student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        teacher = nn.Linear(64, 10)  # load your own here; this one classifies by the nearest mean image
        centres = torch.stack([self.images[self.labels == label].mean(0) for label in range(10)])
        teacher.weight.data, teacher.bias.data = 2 * centres, -centres.square().sum(1)
        return nn.ModuleDict({"student": student, "teacher": teacher.requires_grad_(False).eval()})

    def train_data(self) -> TensorDataset:
        return TensorDataset(self.images)

    def loss(self, model: nn.ModuleDict, batch: tuple[Tensor]) -> Tensor:
        teacher = F.log_softmax(model["teacher"](batch[0]) / 4, dim=1)
        student = F.log_softmax(model["student"](batch[0]) / 4, dim=1)
        return 16 * F.kl_div(student, teacher, log_target=True, reduction="none").sum(1)
