"""Fine-tune by LoRA (Hu et al. 2022): low-rank adapters beside the frozen layers of a base model.

Exact on any hardware: an adapter is a sum of products per sample. The base has no trained parameter and is returned in
eval mode, so it stays there, and its dropout is off; the run reports it. The optimizer gets only the adapters.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.lora.LoRA lr.peak=0.1
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)  # so that the first step starts from the base model

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.base(inputs) + self.up(self.down(inputs))
        return outputs


class LoRA:
    def model(self) -> nn.Module:
        base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))  # load your pretrained weights here
        return nn.Sequential(*(Adapted(layer, rank=4) if isinstance(layer, nn.Linear) else layer for layer in base))

    def train_data(self) -> TensorDataset:
        pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
        return TensorDataset(pixels.float() / 8 - 1, labels)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
