"""List cases that must give the same weights on every engine, each with a feature that is easy to get wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.support.tasks import Slow

TASK = (
    "task=custom", "task._target_=tests.support.same.Blocks", "duration=12st", "lr.peak=0.05", "evaluate.every=null",
    "log.every=1st", "clip_norm=0.5", "batch.per_gpu=7",
)  # fmt: skip


class Block(nn.Module):
    """A residual block with dropout and a BatchNorm or LayerNorm."""

    def __init__(self, width: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm1d(width) if norm else nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout))
        self.outer = nn.Linear(2 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.outer(self.inner(self.norm(inputs)))


class Centred(nn.Linear):
    """A linear layer that subtracts a running mean from its inputs, and has an expanded buffer."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("ones", torch.ones(1).expand(width))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(inputs.detach().mean(0), 0.1)
        return super().forward((inputs - self.mean.clone()) * self.ones)


class Net(nn.Module):
    """Blocks between two layers, with a frozen parameter and a parameter that two layers share."""

    def __init__(self, width: int, blocks: int, dropout: float, norm: bool, gain: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.blocks = nn.ModuleList(Block(width, dropout, norm) for _ in range(blocks))
        self.again = nn.Linear(8, width)
        self.again.weight = self.enter.weight
        self.leave = nn.Linear(width, 7)
        self.gain = nn.Parameter(torch.tensor(1.0)) if gain else 1.0
        self.shift = nn.Parameter(torch.full((7,), 0.1), requires_grad=False)

    def encode(self, inputs: Tensor) -> Tensor:
        hidden = self.enter(inputs) + self.again(inputs.flip(1))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def forward(self, inputs: Tensor) -> Tensor:
        return self.leave(self.encode(inputs)) * self.gain + self.shift


class Blocks(Slow):
    """A task with unequal numbers of units, augmentation and dropout.

    Args:
        call: how the loss calls the model: whole, twice (in one pass), or parts (never the model's own forward).
        odd: index of a sample whose inputs are NaN, or -1.
        gain: give the model a parameter without dimensions.
        moved: give the model an expanded buffer, and one that the forward changes and no rank synchronises.
        strided: store weights column-major, similar to channels_last.
    """

    def __init__(
        self,
        norm: bool = False,
        call: str = "whole",
        odd: int = -1,
        double: bool = False,
        gain: bool = False,
        strided: bool = False,
        moved: bool = False,
        width: int = 15,
        **args: Any,
    ) -> None:
        super().__init__(width=width, **args)
        self.norm, self.call, self.double, self.gain, self.strided = norm, call, double, gain, strided
        self.moved = moved
        if odd >= 0:
            self.inputs[odd] = float("nan")

    def model(self) -> nn.Module:
        net = Net(self.width, 2, self.dropout, self.norm, self.gain)
        for parameter in (p for p in net.parameters() if p.ndim > 1 and self.strided):
            parameter.data = parameter.data.t().contiguous().t()
        if self.moved:
            net.leave = Centred(self.width, 7)
        return net.double() if self.double else net

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        inputs, targets, units = batch
        inputs = inputs.double() if self.double else inputs
        return super().loss(lambda x: self.called(model, x), (inputs, targets, units))  # type: ignore[arg-type]

    def called(self, model: Any, inputs: Tensor) -> Tensor:
        if self.call == "twice":
            return model(inputs) + model(-inputs)
        if self.call == "parts":
            return model.leave(model.blocks[0](model.enter(inputs)) + model.blocks[1](model.again(inputs)))
        return model(inputs)


class Case(NamedTuple):
    """A case: its overrides, its tolerance (max |Δ| / max |w|), and the engines that don't support it.

    The tolerance is 1e-6 in float32 after 12 steps. It is ten times more for a division by a size that may be small,
    such as a gradient's in Adam or a deviation in BatchNorm (see tests/support/harness.py), a hundred times more for a
    factored second moment (Adafactor), and 2^-8 of each step's change in bf16. ``exempt`` has prefixes of engine names.
    """

    overrides: tuple[str, ...]
    apart: float = 1e-6
    exempt: tuple[str, ...] = ()


FLAT = ("ZeRO-1", "ZeRO-2", "ZeRO-3")  # their optimizer gets one flat tensor

CASES: dict[str, Case] = {
    "SGD, dropout, augmentation, unequal units, uneven cuts, clipping": Case(()),
    "a schedule of batches": Case(("batch.schedule='0sa:16 160sa:41'",)),
    "ranks without samples": Case(("batch.global_size=2",)),
    "the model is called twice in a pass": Case(("task.args.call=twice",)),
    "only parts of the model are called, never its forward": Case(("task.args.call=parts",)),
    "a parameter without dimensions": Case(("task.args.gain=true",), exempt=("ZeRO-3",)),
    "weights that aren't contiguous": Case(("task.args.strided=true", "optimizer=adamw", "lr.peak=0.01"), 1e-5),
    "ghost BatchNorm": Case(
        ("task.args.norm=true", "batchnorm.mode=ghost", "batchnorm.ghost_size=8", "batch.global_size=40",
         "batch.per_gpu=8"), 1e-5,
    ),
    "ghost BatchNorm, ranks without samples": Case(
        ("task.args.norm=true", "batchnorm.mode=ghost", "batchnorm.ghost_size=8", "batch.global_size=8",
         "batch.per_gpu=8"), 1e-5,
    ),
    "a moving average of the weights": Case(("ema=60sa",)),
    "a skipped step that isn't finite": Case(("task.args.odd=77", "on_nonfinite=skip")),
    "the gradient noise scale": Case(("noise.every=1st", "batch.global_size=42")),
    "float64": Case(("task.args.double=true",), 1e-14, ("ZeRO",)),
    "AdamW": Case(("optimizer=adamw", "lr.peak=0.01"), 1e-5),
    "LARS": Case(("optimizer=lars", "lr.peak=0.5"), 1e-6, FLAT),
    "LAMB": Case(("optimizer=lamb", "lr.peak=0.02"), 1e-5, FLAT),
    # Muon's Newton-Schulz iteration in bf16 amplifies differences in rounding
    "Muon": Case(("optimizer=muon", "lr.peak=0.02"), 1e-2, FLAT),
    "Adafactor": Case(("optimizer=adafactor", "lr.peak=0.02"), 1e-4, (*FLAT, "FSDP")),
    "RMSprop": Case(("optimizer=custom", "optimizer._target_=torch.optim.RMSprop", "lr.peak=0.002"), 1e-5),
    "bf16": Case(("precision=bf16",), 1e-2),
    "recomputed activations": Case(("recompute=[blocks.*]",)),
}  # fmt: skip

ENGINES: dict[str, tuple[str, ...]] = {
    "DDP": (),
    "FSDP": ("engine=fsdp",),
    "Accelerate": ("engine=accelerate",),
    **{f"ZeRO-{stage}": ("engine=deepspeed", f"engine.stage={stage}") for stage in range(4)},
}


def overrides(case: str, engine: str) -> tuple[str, ...]:
    """Return the overrides of a case on an engine."""
    own = CASES[case].overrides
    size = () if any(text.startswith("batch.schedule") for text in own) else ("batch.global_size=41",)
    return (*TASK, *size, *own, *ENGINES[engine])


def pairs() -> list[tuple[str, str]]:
    """Return every supported pair of case and engine."""
    return [
        (case, engine)
        for case, (_, _, exempt) in CASES.items()
        for engine in ENGINES
        if not engine.startswith(exempt or ("none",))
    ]
