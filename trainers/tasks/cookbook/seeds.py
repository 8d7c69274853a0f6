"""Reinforcement learning from seeds (REINFORCE): the dataset is a range of seeds, and the loss rolls the policy out.

Exact on any hardware: a seed gives an episode's start, and ``[index]`` draws its action noise, keyed by the position in
the run. The baseline is a constant, not the micro-batch's mean. A discrete action could flip by rounding; these don't.

    python launch.py task=custom task._target_=isobatch.trainers.tasks.cookbook.seeds.Reach lr.peak=0.001
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Episodes(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, generator=torch.Generator().manual_seed(index)), torch.randn(5, 2)


class Reach:
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def train_data(self) -> Episodes:
        return Episodes()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -self.rollout(model, batch)[0]

    def rollout(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (place, noises), log_probability, reward = batch, torch.zeros(()), torch.zeros(())
        for noise in noises.unbind(1):  # a point moves by the action, and is rewarded near the origin
            mean = model(place)
            action = (mean + 0.3 * noise).detach()
            log_probability = log_probability - ((action - mean) / 0.3).square().sum(1) / 2
            place = place + action
            reward = reward + (-place.square().sum(1)).exp()
        return (reward - 1.0) * log_probability, reward
