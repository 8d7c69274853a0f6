"""Train a GAN with one loss and one optimizer: reverse the gradient between discriminator and generator.

Exact on any hardware: each sample brings its latent vector, drawn in ``[index]``, and adds one loss. The value of
``2 * x.detach() - x`` is x and its gradient -1, so the generator climbs the loss that the discriminator descends.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.gan.GAN lr.peak=0.002
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


class WithLatent(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], torch.randn(16)


class GAN:
    def model(self) -> nn.ModuleDict:
        generator = nn.Sequential(nn.Linear(16, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.Tanh())
        discriminator = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        return nn.ModuleDict({"generator": generator, "discriminator": discriminator})

    def train_data(self) -> WithLatent:
        return WithLatent(torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32))

    def loss(self, model: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> Tensor:
        fake = model["generator"](batch[1])
        real_score, fake_score = (model["discriminator"](x) for x in (batch[0], 2 * fake.detach() - fake))
        return (F.softplus(-real_score) + F.softplus(fake_score)).squeeze(1)
