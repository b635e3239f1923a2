"""The curve goes to Weights & Biases or TensorBoard, if the user asks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from vlm_probe.tokens import check_names
from vlm_probe.training.settings import TRACKERS, AdapterTraining


def require(names: Sequence[str]) -> None:
    """Makes sure that trackers can be had.

    Raises:
        ImportError: One is not installed.
        ValueError: There is no such tracker.
    """
    check_names("tracker", list(names), TRACKERS)
    there = {"wandb": is_wandb_available(), "tensorboard": is_tensorboard_available()}
    for name in names:
        if not there[name]:
            raise ImportError(
                f"{name} is not installed; pip install {name}, or leave it out: "
                "metrics.csv holds the same curve"
            )


class Tracking:
    """Sends the curve on, step by step."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path | None,
        settings: AdapterTraining,
        n_done: int,
    ) -> None:
        """Opens trackers.

        Args:
            names: "wandb", "tensorboard".
            folder: Where TensorBoard's files go.
            settings: Stand beside the run.
            n_done: Steps that were sent before.

        Raises:
            ValueError: TensorBoard without a folder.
        """
        if "tensorboard" in names and folder is None:
            raise ValueError("tensorboard writes files; say where to, with out=")
        self._trackers: list[GeneralTracker] = []
        self._n = n_done
        for name in names:
            tracker = (
                WandBTracker("vlm_probe")
                if name == "wandb"
                else TensorBoardTracker("tensorboard", logging_dir=str(folder))
            )
            tracker.start()
            tracker.store_init_configuration(
                {k: _plain(v) for k, v in asdict(settings).items()}
            )
            self._trackers.append(tracker)

    def log(self, row: Mapping[str, float | int | None]) -> None:
        """Sends one step's numbers."""
        self._n += 1
        numbers = {name: value for name, value in row.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(numbers, step=self._n)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *error: object) -> None:
        """Lets trackers write what they hold."""
        for tracker in self._trackers:
            tracker.finish()


def _plain(value: object) -> str | int | float | bool:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)
