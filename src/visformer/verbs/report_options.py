"""Which options make a run what it is: those in which runs differ, and those that neither its recipe nor the defaults
have.

A run folder does not say which recipe it came from, so the one that leaves the fewest options to explain is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from visformer.verbs.report_runs import Run

# Where a run lies and how it was started say nothing of what it does.
PLACES = {"ckpt_save_dir", "resume", "resume_opt"}
# A recipe is for any data and any machine.
NOT_IN_RECIPES = PLACES | {
    "data_dir", "dataset_download", "num_parallel_workers", "device_target", "log_interval", "tensorboard", "trackio",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """An option with its value in each run, and what it is in a recipe (if there is one) and by default."""

    name: str
    values: list[Any]
    default: Any
    recipe: Any = None


def differing(runs: Sequence[Run]) -> list[Row]:
    """The options in which the runs differ. One that a run's record lacks, being older, counts as its default."""
    default = defaults()
    runs = [run for run in runs if run.options]
    names = dict.fromkeys([*default, *(name for run in runs for name in run.options)])
    rows = [
        Row(n, [run.options.get(n, default.get(n)) for run in runs], default.get(n)) for n in names if n not in PLACES
    ]
    return [row for row in rows if any(value != row.values[0] for value in row.values)]


def unusual(run: Run) -> tuple[str, list[Row]]:
    """The name of the recipe nearest to a run, empty where the defaults are as near, and the options that differ from
    it."""
    default = defaults()
    candidates = {"": default, **_recipes()}
    names = [name for name in run.options if name not in NOT_IN_RECIPES]

    def differences(candidate: dict[str, Any]) -> list[str]:
        return [name for name in names if run.options[name] != candidate.get(name)]

    nearest = min(candidates, key=lambda name: len(differences(candidates[name])))
    recipe = candidates[nearest]
    return nearest, [
        Row(name, [run.options[name]], default.get(name), recipe.get(name)) for name in differences(recipe)
    ]


def defaults() -> dict[str, Any]:
    """Every option's default as a run's config.yaml would have it."""
    from visformer.config import TrainConfig

    return _written(TrainConfig())


@functools.cache
def _recipes() -> dict[str, dict[str, Any]]:
    from visformer.config import TrainConfig
    from visformer.options import from_keywords, recipes

    return {name: _written(from_keywords(TrainConfig, {}, config=path)) for name, path in recipes().items()}


def _written(options: Any) -> dict[str, Any]:
    import yaml

    from visformer.options import to_yaml

    return yaml.safe_load(to_yaml(options))
