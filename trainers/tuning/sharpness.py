"""Measure how sharp the minimum is: the largest curvature of the loss, and its rise under small changes of the weights.

Model and loss run in fp32 and eval mode: no dropout, and BatchNorm with its running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from isobatch.conf.rundir.directory import RunDir
from isobatch.scaling.errors import UserError
from isobatch.scaling.tuning.spread import Spread
from isobatch.trainers.checkpoints.weights import WEIGHTS, initialise
from isobatch.trainers.data.fetch import Fetch, to_device
from isobatch.trainers.model.build import prepare
from isobatch.trainers.model.modes import in_eval_mode
from isobatch.trainers.model.randomness import generators_kept, seed_generators
from isobatch.trainers.tasks.losses import checked
from isobatch.trainers.tasks.task import make_model
from isobatch.trainers.tensors.names import checkpoints
from isobatch.trainers.trial.sandbox import exact_fp32
from isobatch.trainers.tuning.bench import Bench

SAMPLES, SEED = 256, 0  # of the training data, the same ones for all runs of a task
MOST, CLOSE = 40, 0.01  # Lanczos steps, and the relative error from which on no more are taken
RADIUS, DRAWS = 0.1, 10  # of a perturbation: its norm over that of the weights

Vector = list[Tensor]
"""A tensor per parameter."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure at the weights of ``init_from``, or at those of the run directory.

    Raises:
        UserError: there are no weights, or an operation of the model has no second derivative.
    """
    world, config = bench.session.world, bench.config
    source = weights_of(bench)
    as_trained = config.model_copy(update={"compile": False, "recompute": ()})
    with generators_kept(world.device):
        seed_generators(config.seed)
        model = prepare(make_model(config, bench.opened.task), as_trained, bench.stream, world.size)
    found = initialise(model, source, world)
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters()):
        model = model.float()
    surface = Surface(bench, model.to(world.device))
    with in_eval_mode(model), exact_fp32():
        loss = surface.loss()
        largest = lanczos(surface.curvature, surface.random(0), lambda steps: bench.say(f"{steps} products", None))
        rises = [surface.loss_at(draw) - loss for draw in range(1, DRAWS + 1)]
        bench.say(f"loss + {sum(rises) / DRAWS:.3g} under perturbations", 1.0)
    spread = Spread.of(rises)
    assert spread is not None
    finite = all(map(math.isfinite, (loss, largest.value, spread.mean)))
    if not finite:
        raise UserError(f"the loss of {found} isn't finite", "give weights of a run that didn't diverge", "init_from")
    return {
        "weights": found, "samples": surface.samples, "loss": loss, "sharpness": largest.value,
        "error": largest.error, "products": largest.products, "perturbed": spread.mean,
        "perturbed_deviation": spread.deviation, "radius": RADIUS, "draws": DRAWS,
    }  # fmt: skip


def weights_of(bench: Bench) -> str:
    """Return ``init_from``, or the run directory if it has weights."""
    config, world = bench.config, bench.session.world
    if config.init_from:
        return config.init_from
    run = RunDir(bench.run)
    known = world.rank == 0 and ((run.final / WEIGHTS).is_file() or bool(checkpoints(run)))
    if not world.any(known):
        problem = f"tune.parts=[sharpness] measures trained weights, and {run.path} has none"
        raise UserError(problem, "train the run first, or give init_from", "init_from")
    return str(run.path)


def tell(found: Mapping[str, Any]) -> str:
    """Return a sentence with the result."""
    rise = f"{found['perturbed']:.3g} ± {found['perturbed_deviation']:.2g}"
    perturbed = f"the loss of {found['loss']:.4g} rises by {rise} where weights change by {found['radius']:.0%}"
    return f"largest curvature {found['sharpness']:.4g} (error {found['error']:.1g}); {perturbed}"


class Surface:
    """The mean loss of fixed samples of the training data, as a function of a model's weights.

    The samples are split over the ranks, and fetched again for each pass, so that only one micro-batch is in memory.
    """

    def __init__(self, bench: Bench, model: nn.Module) -> None:
        opened, self._world = bench.opened, bench.session.world
        self._bench, self._model, self._task = bench, model, opened.task
        self.samples = min(SAMPLES, len(opened.data))
        self._fetch = Fetch(opened.data, opened.task, SEED)
        size, rank = self._world.size, self._world.rank
        own = range(self.samples * rank // size, self.samples * (rank + 1) // size)
        most = opened.plan.cut.micro_batches[0][0]
        self._ranges = [(start, min(start + most, own.stop)) for start in range(own.start, own.stop, most)]
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._units = 1.0
        if not self._parameters:
            raise UserError("no parameter of the model is trained", "train one", "task._target_")

    def loss(self) -> float:
        """Return the mean loss per unit."""
        total = torch.zeros(2, dtype=torch.float64)
        for loss, units in self._losses():
            total += torch.tensor([float(loss.detach()), float(units)], dtype=torch.float64)
        loss, self._units = self._world.sum(total).tolist()
        return loss / self._units if self._units else math.nan

    def curvature(self, vector: Vector) -> Vector:
        """Return the product of the loss's Hessian and a vector, by two backwards; ``loss`` has to be called before."""
        found = [torch.zeros_like(parameter) for parameter in self._parameters]
        try:
            for loss, _ in self._losses():
                first = torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True)
                pairs = [
                    (one, v) for one, v in zip(first, vector, strict=True) if one is not None and one.requires_grad
                ]
                if not pairs:
                    continue
                second = torch.autograd.grad(
                    [one for one, _ in pairs], self._parameters, [v for _, v in pairs], allow_unused=True
                )
                for total, part in zip(found, second, strict=True):
                    if part is not None:
                        total += part
        except RuntimeError as error:
            if "derivative" not in str(error):
                raise
            problem = f"the model has an operation without a second derivative: {error!s:.200}"
            raise UserError(problem, "leave sharpness out of tune.parts", "tune.parts") from error
        for total in found:
            self._world.sum(total)
            total /= self._units
        return found

    def loss_at(self, draw: int) -> float:
        """Return the loss under a random change of the weights, RADIUS times the norm of each.

        A row of a matrix, or a filter, is changed by a random one of its own norm, so that rescaled weights are
        changed alike. Biases and scales (fewer than two dimensions) stay (Li et al. 2018, arXiv:1712.09913).
        """
        kept = [parameter.detach().clone() for parameter in self._parameters]
        with torch.no_grad():
            for parameter, noise in zip(self._parameters, self.random(draw), strict=True):
                if parameter.ndim > 1:
                    filters, own = parameter.flatten(1), noise.flatten(1)
                    scale = filters.norm(dim=1, keepdim=True) / own.norm(dim=1, keepdim=True).clamp(min=1e-30)
                    parameter.add_((scale * own).view_as(parameter), alpha=RADIUS)
        try:
            return self.loss()
        finally:
            with torch.no_grad():
                for parameter, before in zip(self._parameters, kept, strict=True):
                    parameter.copy_(before)

    def random(self, draw: int) -> Vector:
        """Return a normal random vector, the same on all ranks."""
        generator = torch.Generator().manual_seed(draw)
        return [torch.randn(p.shape, generator=generator).to(p) for p in self._parameters]

    def _losses(self) -> Iterator[tuple[Tensor, Tensor | float]]:
        """Yield sum of losses and units of each of this rank's micro-batches."""
        device = self._world.device
        for start, stop in self._ranges:
            fetched = self._fetch[start, stop]
            self._bench.session.watch.beat()
            self._bench.stream.start(start, stop)
            with sdpa_kernel(SDPBackend.MATH), _generators(self._bench.stream.stop):
                loss, units, _ = checked(self._task.loss(self._model, to_device(fetched.batch, device)), stop - start)
            yield loss, units
        self._bench.refuse_stop()


@contextmanager
def _generators(stop: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    finally:
        stop()


class Largest(NamedTuple):
    """The largest eigenvalue of a symmetric matrix, a bound of its error, and the products that it took."""

    value: float
    error: float
    products: int


def lanczos(
    product: Callable[[Vector], Vector], start: Vector, tell: Callable[[int], None] = lambda products: None
) -> Largest:
    """Return the largest eigenvalue of a symmetric matrix that is known by its products with vectors.

    Every new vector is made orthogonal to all before it, twice, so that no eigenvalue is found again by rounding.

    Args:
        start: a vector that isn't orthogonal to the eigenvector, such as a random one.
        tell: called with the number of products.

    Returns:
        The eigenvalue, and the bound |β·s| of its error (Parlett 1998, The Symmetric Eigenvalue Problem, section 13.2).
    """
    basis, diagonal, beside = [_scaled(start, 1 / _norm(start))], list[float](), list[float]()
    while True:
        image = product(basis[-1])
        diagonal.append(_dot(image, basis[-1]))
        for _ in range(2):
            for vector in basis:
                along = _dot(image, vector)
                image = [one - along * v for one, v in zip(image, vector, strict=True)]
        rest, steps = _norm(image), len(diagonal)
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        value, error = float(values[-1]), rest * abs(float(vectors[-1, -1]))
        tell(steps)
        whole = steps >= sum(one.numel() for one in start)
        if error <= CLOSE * abs(value) or steps == MOST or whole or not math.isfinite(error):
            return Largest(value, error, steps)
        beside.append(rest)
        basis.append(_scaled(image, 1 / rest))


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(one, other, strict=True)))


def _norm(vector: Sequence[Tensor]) -> float:
    return math.sqrt(_dot(vector, vector))


def _scaled(vector: Sequence[Tensor], factor: float) -> Vector:
    return [factor * one for one in vector]
