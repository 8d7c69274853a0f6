"""Train beside a moving average of the student (mean teacher, Tarvainen and Valpola 2017).

Exact on any hardware: torch calls the hook after each optimizer step, on every rank. The teacher is part of the model,
so checkpoints hold it; it is frozen and stays in eval mode. Not with DeepSpeed: it steps flat copies of the parameters.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.teacher.MeanTeacher lr.peak=0.1
"""

import copy
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.data import TensorDataset


class MeanTeacher:
    def model(self) -> nn.ModuleDict:
        student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
        teacher = copy.deepcopy(student).requires_grad_(False).eval()

        def follow(optimizer: Optimizer, *args: Any) -> None:
            stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            if stepped.issuperset(student.parameters()):  # else it is a part of the run's optimizer, as in Muon's
                for mean, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                    mean.lerp_(parameter.detach(), 0.1)

        register_optimizer_step_post_hook(follow)
        return nn.ModuleDict({"student": student, "teacher": teacher})

    def train_data(self) -> TensorDataset:
        return TensorDataset(*map(torch.as_tensor, load_digits(return_X_y=True)))

    def loss(self, model: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, logits = batch[0].float() / 8 - 1, model["student"](batch[0].float() / 8 - 1)
        consistency = F.mse_loss(logits.softmax(1), model["teacher"](images).softmax(1), reduction="none")
        return F.cross_entropy(logits, batch[1], reduction="none") + consistency.sum(1)
