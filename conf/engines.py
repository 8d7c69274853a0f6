"""The choices of ``engine=``: each has a YAML in engine/, and a section here if it has its own keys or limits.

The engine isn't part of a run's identity, and ``optimizer=auto`` doesn't depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Union

from pydantic import Field, create_model, model_validator

from isobatch.conf.types import Dtype, Free, Modules, Section, tag
from isobatch.scaling.errors import UserError

# torch's optimizers that are elementwise and have no state before the first step. Adagrad has some, and DeepSpeed drops
# it.
ELEMENTWISE = tuple(
    f"torch.optim.{name}"
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "ASGD")
)
FLAT = (
    "its optimizer steps part of a flat tensor, which is only right for an elementwise optimizer that starts without "
    "state"
)
ALL = ("parameters", "gradients", "optimizer state")


@dataclass(frozen=True, slots=True)
class Ability:
    """Describe the abilities of an engine.

    Attributes:
        shards: the state that is sharded over ranks.
        offloads: the state that ``engine.offload=true`` moves to the host's memory.
        takes: the supported optimizers, by their targets, except for those in ``refuses``; None supports all.
        why_not: why the engine doesn't support other optimizers.
        bitwise: the engine supports ``numerics=bitwise``.
    """

    shards: tuple[str, ...] = ()
    offloads: tuple[str, ...] = ()
    takes: tuple[str, ...] | None = None
    refuses: tuple[str, ...] = ()
    why_not: str = ""
    bitwise: bool = False

    def carries(self, target: str) -> bool:
        """Return whether the engine supports the optimizer with this target."""
        return target not in self.refuses and (self.takes is None or target in self.takes)


class Engine(Section):
    """The keys and abilities of an engine without a section of its own."""

    name: str
    config: Free
    abilities: ClassVar[tuple[Ability, ...]] = (Ability(),)  # one for each stage; engines without stages have one


class DDP(Engine):
    name: Literal["ddp"]
    abilities = (Ability(bitwise=True),)


class FSDP(Engine):
    name: Literal["fsdp"]
    shard: Literal["auto"] | Modules
    param_dtype: Dtype | None
    reduce_dtype: Dtype | None
    offload: bool
    abilities = (
        Ability(
            shards=ALL,
            offloads=ALL,
            refuses=("torch.optim.Adafactor", "torch.optim.Rprop"),
            why_not="torch's Adafactor and Rprop don't work on sharded tensors",
        ),
    )

    @model_validator(mode="after")
    def _gradients_are_reduced_as_they_are_computed(self) -> FSDP:
        if self.reduce_dtype is not None and self.param_dtype is None:
            problem = f"engine.reduce_dtype={self.reduce_dtype} needs engine.param_dtype, else gradients are fp32"
            raise UserError(problem, f"give engine.param_dtype={self.reduce_dtype}, too", "engine.reduce_dtype")
        return self


class DeepSpeed(Engine):
    name: Literal["deepspeed"]
    stage: Literal[0, 1, 2, 3]
    offload: bool
    abilities = (
        Ability(),
        *(Ability(ALL[3 - stage :], ALL[2:], takes=ELEMENTWISE, why_not=FLAT) for stage in (1, 2, 3)),
    )

    @model_validator(mode="after")
    def _what_is_offloaded_is_sharded(self) -> DeepSpeed:
        if self.offload and self.stage == 0:
            problem = "engine.offload=true needs engine.stage=1, 2 or 3: at 0 DeepSpeed offloads nothing"
            raise UserError(problem, "give engine.stage, or leave engine.offload out", "engine.offload")
        return self


_OWN: tuple[type[Engine], ...] = (DDP, FSDP, DeepSpeed)
_names = sorted({file.stem for file in (Path(__file__).parent / "engine").glob("*.yaml")} - {*map(tag, _OWN)})
_bare = [create_model(f"{name.title()}Engine", __base__=Engine, name=(Literal[name], ...)) for name in _names]  # type: ignore[arg-type]
globals().update({kind.__name__: kind for kind in _bare})  # pickle, by which spawned workers get a config, looks here
ENGINES = (*_OWN, *_bare)

if TYPE_CHECKING:
    AnyEngine = Engine
else:
    AnyEngine = Annotated[Union[ENGINES], Field(discriminator="name")]  # noqa: UP007  a tuple has no |
