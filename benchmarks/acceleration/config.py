"""What a study runs: one TOML file of sets, arms and plans."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from benchmarks.acceleration.loop import ArmSection
from benchmarks.acceleration.sets import SetSection
from curate.errors import UserError
from curate.recipe import TrainSection
from curate.recipe_types import Section

UNIFORM = "uniform"


class ReferenceSection(Section):
    """How references are trained: with the learner's architecture and optimiser, on uniform batches."""

    steps: int = Field(ge=1, description="optimiser steps, a cosine to their end")


class PlanSection(Section):
    """Arms that are run on one set with the same steps and seeds, and compared with its uniform arm."""

    set: str
    arms: list[str] = Field(description="`uniform` is always run beside them")
    steps: int = Field(ge=1, description="of each learner; the batch is b, so the examples are alike, too")
    warm_steps: int = Field(0, ge=0, description="of uniform training that all learners have behind them at the start")
    uniform_steps: int | None = Field(
        None, ge=1, description="of the uniform arm, where it is followed for longer: its end is what others must reach"
    )
    cosine: bool = Field(False, description="rates fall to 0 at the end of each run, so that only its end counts")
    seeds: list[int] = Field(min_length=1, max_length=10, description="of a learner's weights and of all draws")
    pool_seed: int = Field(description="of the pictures; settings are chosen on another one than is reported")

    def steps_of(self, arm: str) -> int:
        """How long an arm is trained."""
        return self.uniform_steps or self.steps if arm == UNIFORM else self.steps


class StudySection(Section):
    """One study."""

    model: str = Field(description="open_clip JSON config beside this module, of learner and reference")
    training: TrainSection
    reference: ReferenceSection
    evaluate_every: int = Field(ge=1, description="steps between two points of a curve")
    sets: dict[str, SetSection]
    arms: dict[str, ArmSection]
    plans: list[PlanSection]


def load_study(path: Path) -> StudySection:
    """Read a study; `[selection]` holds what all its arms' selections have in common.

    Raises:
        UserError: not a study; one line per mistake.
    """
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        common = data.pop("selection", {})
        for arm in data.get("arms", {}).values():
            arm["selection"] = common | arm.get("selection", {})
        study = StudySection.model_validate(data)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: expected a study ({error}); begin with a copy of quick.toml") from None
    except ValidationError as error:
        mistakes = ((".".join(map(str, details["loc"])), details["msg"]) for details in error.errors())
        raise UserError(*(f"{path}: {field}: {message}; correct it" for field, message in mistakes)) from None
    for plan in study.plans:
        if unknown := {UNIFORM, *plan.arms} - set(study.arms):
            raise UserError(f"{path}: a plan names the arms {sorted(unknown)}, of which there are none; add [arms.…]")
        if plan.set not in study.sets:
            raise UserError(f"{path}: a plan names the set {plan.set!r}, and there is none; add [sets.{plan.set}]")
    return study
