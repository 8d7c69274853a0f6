"""Batch schedules: a global batch that changes while training, as text and as the segments of a plan."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from isobatch.scaling.errors import UserError
from isobatch.scaling.geometry import counted
from isobatch.scaling.rules import Rule
from isobatch.scaling.schedule import Schedule, Segment, samples_after
from isobatch.scaling.units import Duration

FORMS = (
    '"0sa:256 200000sa:512" (from when: how much), "ramp from:32 over:30%" (in steps of by:32, to:512), '
    '"curriculum" (doublings, from:32 to:512), "doubling" or "seesaw" (in place of the decay of the LR, to:4096 at '
    "most); lr:hold keeps the LR of stages, ramps and curricula"
)
RAMP, CURRICULUM = ("from", "over", "to", "by", "lr"), ("from", "to", "lr")
OPTIONS = {"ramp": RAMP, "curriculum": CURRICULUM, "doubling": ("to",), "seesaw": ("to",)}
SEGMENTS = 10_000  # a schedule of more is a mistake
OF_THE_DATA = 10  # a batch larger than this part of the data loses what the noise is good for (Smith et al. 2018)


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Hold a batch schedule as it was asked for, sizes in ``batch.unit``.

    >>> BatchSchedule.parse("0sa:256 200000sa:512").stages[1]
    (Duration(value=200000.0, unit='sa'), 512)

    Attributes:
        text: as it was written.
        kind: stages, or a name of OPTIONS.
        stages: of the kind ``stages``: from when, how much.
        first, last, by: sizes, where they are given; ``over`` is the length of a ramp.
        hold: the LR stays what it is at the first size.
    """

    text: str
    kind: str
    stages: tuple[tuple[Duration, int], ...] = ()
    first: int | None = None
    last: int | None = None
    by: int | None = None
    over: Duration | None = None
    hold: bool = False

    @classmethod
    def parse(cls, text: object) -> BatchSchedule:
        """Read one of FORMS.

        Raises:
            UserError: it isn't one; the message says what is wrong, and shows them.
        """
        words, problem = text.split() if isinstance(text, str) else [], f"{text!r} is no batch schedule"
        if not words:
            raise UserError(problem, f"write {FORMS}", "batch.schedule", text)
        try:
            return cls._named(str(text), words) if words[0] in OPTIONS else cls._of_stages(str(text), words)
        except UserError as error:
            raise UserError(f"{problem}: {error}", f"write {FORMS}", "batch.schedule", text) from None

    @classmethod
    def _of_stages(cls, text: str, words: list[str]) -> BatchSchedule:
        options = _options("stages", [word for word in words if word.startswith("lr:")], ("lr",))
        stages = []
        for word in (word for word in words if not word.startswith("lr:")):
            when, colon, size = word.rpartition(":")
            if not colon:
                raise UserError(f"{word} isn't when:size")
            stages.append((_duration(when), _size(word, size)))
        if not stages or stages[0][0].value != 0:
            raise UserError("the first stage has to start at 0sa")
        return cls(text, "stages", tuple(stages), hold=_hold(options))

    @classmethod
    def _named(cls, text: str, words: list[str]) -> BatchSchedule:
        kind, *rest = words
        options = _options(kind, rest, OPTIONS[kind])
        given = {name: size for name, size in options.items() if name in ("from", "to", "by")}
        sizes = {name: _size(f"{name}:{size}", size) for name, size in given.items()}
        over = _duration(options["over"]) if "over" in options else None
        if kind == "ramp" and ("from" not in sizes or over is None):
            raise UserError("a ramp needs from:… and over:…")
        if kind == "curriculum":
            sizes = {"from": 32, "to": 512, **sizes}
        first, last = sizes.get("from"), sizes.get("to")
        if first is not None and last is not None and first > last:
            raise UserError(f"from:{first} is above to:{last}")
        return cls(text, kind, (), first, last, sizes.get("by"), over, _hold(options))

    def __str__(self) -> str:
        return self.text

    @property
    def of_the_run(self) -> bool:
        """Tell whether its stages follow from the length of the run."""
        lengths = [when for when, _ in self.stages] + ([self.over] if self.over else [])
        return self.kind not in ("stages", "ramp") or any(length.unit == "%" for length in lengths)

    @property
    def for_decay(self) -> bool:
        """Tell whether its larger batches stand in for the decay of the LR."""
        return self.kind in ("doubling", "seesaw")

    @property
    def start(self) -> int | None:
        """Return the size it begins with; None: the global batch of the run."""
        return self.stages[0][1] if self.stages else self.first


def segments_for(
    wanted: BatchSchedule,
    first: Segment,
    *,
    last: int | None,
    batch: Callable[[int], int],
    in_samples: Callable[[Duration], int | None],
    run_samples: int | None,
) -> tuple[Segment, ...] | None:
    """Return the segments of ``wanted`` in a run that begins with ``first``; None: not known yet.

    Args:
        last: the run's global batch in samples, to which a ramp climbs that says nothing else.
        batch: a size of ``wanted`` in samples.
        in_samples: lengths in samples, of all units but steps; None where they aren't known yet.

    Raises:
        UserError: a stage doesn't come after the one before it, or not within the run; a size isn't a whole number of
            samples; or the batch wouldn't move.
    """
    assert not wanted.for_decay
    rule = _later(first, Rule("none") if wanted.hold else first.rule)
    starts = list(_starts(wanted, first, last, in_samples, batch, run_samples))
    if None in [start for start, _ in starts]:
        return None
    if len(starts) > SEGMENTS:
        raise _rejection(wanted, f" makes more than {SEGMENTS:,} steps of the batch", "use a larger by:…")
    segments = (first, *(Segment(start or 0, size, rule) for start, size in starts[1:]))
    begins = [segment.start_sample for segment in segments]
    if begins != sorted(set(begins)):
        raise _rejection(wanted, f": its stages start at {begins}", "they have to come one after another")
    if run_samples is not None and begins[-1] >= run_samples:
        problem = f": its last stage starts at sample {begins[-1]:,}, and the run has {run_samples:,}"
        raise _rejection(wanted, problem, "let it start earlier, or give a longer duration")
    return segments


def _later(first: Segment, rule: Rule) -> Rule:
    """Return ``rule`` for the segments after ``first``: parts given for the run stay, but lr.peak is of the first."""
    return replace(rule, fixed=tuple(part for part in first.rule.fixed if part != "lr"))


def _starts(
    wanted: BatchSchedule,
    first: Segment,
    last: int | None,
    in_samples: Callable[[Duration], int | None],
    batch: Callable[[int], int],
    run_samples: int | None,
) -> Iterator[tuple[int | None, int]]:
    """Yield from which sample on there are how many samples a step."""
    size = first.global_size
    if wanted.kind == "stages":
        laid: list[tuple[int, int]] = []
        for when, wants in wanted.stages:
            start = samples_after(math.ceil(when.value), laid) if when.unit == "st" and laid else in_samples(when)
            laid.append((start or 0, batch(wants)))
            yield start, laid[-1][1]
    elif wanted.kind == "ramp":
        assert wanted.over is not None
        over, top = in_samples(wanted.over), last if wanted.last is None else batch(wanted.last)
        by = batch(wanted.by) if wanted.by else size
        if top is None or top <= size:
            raise _rejection(wanted, f" climbs from {size} to {top}", "give a larger to:…, or batch.global_size")
        climbs = -(-(top - size) // by)
        for climb in range(min(climbs, SEGMENTS) + 1):
            yield None if over is None else -(-over * climb // max(1, climbs)), min(top, size + climb * by)
    else:
        assert wanted.last is not None
        doublings = int(math.log2(batch(wanted.last) / size))
        if doublings == 0 or size << doublings != batch(wanted.last):
            begins = wanted.first or 0
            fix = f"give to:{begins << doublings} or to:{begins << doublings + 1}"
            raise _rejection(wanted, f": doublings of {begins} don't come to {wanted.last}", fix)
        for doubling in range(doublings + 1):
            start = None if run_samples is None else -(-run_samples * doubling // (doublings + 1))
            yield start, size << doubling


def in_place_of_decay(wanted: BatchSchedule, first: Segment, most: int, schedule: Schedule) -> tuple[Segment, ...]:
    """Return segments of B × f where the LR's decay would come to η/f: f = 2, or 1/gamma of a decay by steps.

    ``doubling`` holds the LR (Smith et al. 2018, arXiv:1711.00489), ``seesaw`` divides it by √f (for Adam; Meterez et
    al. 2025, arXiv:2510.14717).

    Args:
        most: the largest batch, in samples.
        schedule: of the LR, which then holds it until the last of these segments starts.

    Raises:
        UserError: there is no place, or no larger batch, for even one.
    """
    factor = 1 / schedule.gamma if schedule.decay == "step" and schedule.gamma < 1 else 2.0
    rule = _later(first, Rule("power", -0.5) if wanted.kind == "seesaw" else Rule("none"))
    if not first.global_size * factor <= most:
        limit = f"{most:,}, which is {'its to:…' if wanted.last else 'a tenth of the training data'}"
        problem = f": {counted(first.global_size, 'sample')} × {factor:g} are more than {limit}"
        raise _rejection(wanted, problem, "give a larger to:…, or a smaller batch.global_size")
    segments = [first]
    for growth in count(1):
        size, start = first.global_size * factor**growth, schedule.falls_to(factor**-growth * (1 + 1e-9))
        if size > most or start is None:
            break
        if start == segments[-1].start_sample > 0:
            segments.pop()
        segments.append(Segment(start, round(size), rule))
    if len(segments) == 1:
        falls = f"lr.decay={schedule.decay} with lr.final={schedule.final:g} never comes to 1/{factor:g} of the peak"
        problem = f" puts larger batches in place of the LR's decay, and {falls}"
        raise _rejection(wanted, problem, "choose another lr.decay")
    return tuple(segments)


def _rejection(wanted: BatchSchedule, problem: str, fix: str) -> UserError:
    return UserError(f"batch.schedule={wanted}{problem}", fix, "batch.schedule", wanted)


def _options(kind: str, words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in words:
        name, colon, value = word.partition(":")
        if not colon or name not in known or name in options:
            raise UserError(f"{word} is nothing that {kind} takes once, which is {', '.join(f'{k}:…' for k in known)}")
        options[name] = value
    return options


def _hold(options: dict[str, str]) -> bool:
    wanted = options.get("lr", "rule")
    if wanted not in ("rule", "hold"):
        raise UserError(f"lr:{wanted} can't be: lr:rule moves the LR by lr.rule, lr:hold keeps it")
    return wanted == "hold"


def _duration(text: str) -> Duration:
    duration = Duration.parse(text)
    if duration.unit == "min":
        raise UserError(f"{text} is in minutes; use sa, ep, st, tok or %")
    return duration


def _size(word: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UserError(f"{word} has no size, a whole number of 1 or more")
    return int(text)
