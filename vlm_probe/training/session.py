"""What is learned so far, and how a step adds to it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from vlm_probe.adapter import Adapter
from vlm_probe.checkpoint import Checkpoint, State
from vlm_probe.examples import Example
from vlm_probe.training.batches import Batch, Batches, Failure
from vlm_probe.training.calibration import calibrate
from vlm_probe.training.curve import Curve
from vlm_probe.training.frozen import Frozen
from vlm_probe.training.learner import Learner
from vlm_probe.training.provenance import configuration, told_of
from vlm_probe.training.settings import AdapterTraining, Stage
from vlm_probe.training.step import Step, Sums
from vlm_probe.vision import TokenCache


class NotFiniteError(ValueError):
    """A loss or gradient that is not a number; what was learned before it is whole."""


class Session:
    """A run of training: the learner, where in the data it is, and its curve."""

    def __init__(
        self,
        frozen: Frozen,
        stages: Sequence[tuple[Iterable[Example], Stage]],
        settings: AdapterTraining,
        *,
        accelerator: Accelerator,
        folder: Path | None,
        vision_cache: Path | None,
        on_error: str,
    ) -> None:
        """Has learned nothing yet."""
        self._frozen, self._settings = frozen, settings
        self._accelerator, self._folder = accelerator, folder
        self._on_error = on_error
        vision, language = frozen.vision, frozen.language
        self._stages = [stage for _, stage in stages]
        rows, columns = vision.grid
        most = language.hooked.cfg.n_ctx
        self._batches = [
            Batches(
                examples,
                stage,
                number=number,
                seed=settings.seed,
                chat=language.chat,
                n_patches=rows * columns,
                max_length=min(stage.max_length or most, most),
                read=vision_cache is None,
                part=(accelerator.process_index, accelerator.num_processes),
            )
            for number, (examples, stage) in enumerate(stages, 1)
        ]
        learner = Learner(vision.d_vision, language.d_model, settings)
        self._learner = learner.to(language.device)
        cache = vision_cache and TokenCache(
            vision_cache,
            vision,
            identity=frozen.digests["vision"],
            dtype=settings.vision_cache_dtype,
        )
        self._cached = cache is not None
        self._step = Step(frozen, self._learner, settings, accelerator, cache)
        self._optimizer: torch.optim.Optimizer | None = None
        self._resumed: dict[str, Tensor] = {}
        """State of the optimizer that waits for its stage."""
        self.curve = Curve(None if folder is None else folder / "metrics.csv")
        self.failures: list[Failure] = []
        self._known: set[tuple[int, int]] = set()
        """Stage and index of the failures."""
        self.number, self.step = 1, 0
        """The stage, from 1, and the steps of it that are done."""
        self._learned = 0
        """Examples of this stage that were learned from."""
        self.complete = False
        """Whether there are no more steps."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self._accelerator.is_main_process

    @property
    def n_steps(self) -> int:
        """Steps of the stage."""
        return self._batches[self.number - 1].n_steps

    @property
    def n_done(self) -> int:
        """Steps of all stages so far."""
        before = self._batches[: self.number - 1]
        return sum(batches.n_steps for batches in before) + self.step

    @property
    def progress(self) -> str:
        """How far it is, in words."""
        return (
            f"stopped in stage {self.number} of {len(self._stages)}, after step "
            f"{self.step} of {self.n_steps}"
        )

    def begin(
        self, kept: Checkpoint | None, resume: bool, reference_texts: list[str]
    ) -> None:
        """Takes up a checkpoint, or scales and whitens the untrained adapter.

        Raises:
            FileExistsError: There is a run already, and `resume` is not asked for.
            FileNotFoundError: There is none, and it is.
        """
        state = kept.load() if kept else None
        if self._folder is not None:
            # Only the main process has the checkpoint open.
            (state,) = broadcast_object_list([state])
            if state is not None and not resume:
                raise FileExistsError(
                    f"there is a run in {self._folder} already; ask for resume "
                    "(--resume) to go on with it, or give another folder"
                )
        if self._folder is not None and state is None:
            stale = self._folder / "adapter.safetensors"
            if stale.exists():
                raise FileExistsError(
                    f"there is an adapter in {self._folder} already, and no checkpoint "
                    "to go on with; give another folder"
                )
        if resume and state is None:
            raise FileNotFoundError(
                f"nothing to resume: no checkpoint in {self._folder}; begin without "
                "resume (--resume)"
            )
        if state is not None:
            self._restore(state)
            return
        calibrate(
            self._learner,
            self._frozen.language,
            self._batches,
            self._settings,
            encode=self._step.encode,
            texts=reference_texts,
        )
        if kept:
            self.curve.restore(0, 0)
            self.save(kept)  # so that it is known at once if it cannot be

    def to_come(self) -> Iterator[int]:
        """Numbers of the stages that are not done."""
        while self.number <= len(self._stages):
            yield self.number
            if self.step < self.n_steps:
                return  # stopped
            self.number, self.step, self._learned = self.number + 1, 0, 0

    @contextlib.contextmanager
    def stage(self, number: int) -> Iterator[Iterator[dict[str, float | int | None]]]:
        """The steps of a stage that are still to come, done as they are taken.

        Gives rows of the curve.
        """
        stage, batches = self._stages[number - 1], self._batches[number - 1]
        parameters = list(self._learner.parameters())
        optimizer = torch.optim.AdamW(
            parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay
        )
        self._optimizer = optimizer
        _restore_optimizer(optimizer, self._resumed)
        self._resumed = {}
        for group in optimizer.param_groups:
            group["initial_lr"] = stage.learning_rate  # asked for behind step 0
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=round(stage.warm_up * batches.n_steps),
            num_training_steps=batches.n_steps,
            min_lr=stage.final_rate,
            last_epoch=self.step - 1,
        )
        todo = range(self.step * stage.accumulate, len(batches))
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=todo,  # pyright: ignore[reportArgumentType] -- any iterable
            num_workers=self._settings.workers,
            collate_fn=_unchanged,
            worker_init_fn=_follow,
        )
        yield self._steps(stage, iter(loader), optimizer, schedule)
        if self.step == batches.n_steps and not self._learned:
            first = next((f for f in self.failures if f.stage == number), None)
            raise ValueError(
                f"none of the examples of stage {number} could be learned from"
                + (f"; the first, {first.id!r}: {first.error}" if first else "")
            )

    def asked_to_stop(self, here: bool) -> bool:
        """Whether any of the processes was asked to stop."""
        return bool(self._step.of_all(torch.tensor(float(here))))

    @property
    def at_end(self) -> bool:
        """Whether the last step of the last stage is done."""
        last = len(self._stages)
        return (self.number, self.step) == (last, self._batches[-1].n_steps)

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def adapter(self, manifest: dict) -> Adapter:
        """What was learned, as an adapter of plain patch tokens."""
        told = told_of(self._frozen, self._settings, self._plan())
        told["n_failures"] = len(self.failures)
        if not self.complete:
            told["partial"] = self.progress
        return self._learner.folded(told | manifest)

    def configuration(self) -> dict[str, object]:
        """All that must be the same for a run to go on, JSON only."""
        n_processes = self._accelerator.num_processes
        must = configuration(self._frozen, self._settings, self._plan(), n_processes)
        return must | {"cached": self._cached}

    def _plan(self) -> list[tuple[Stage, int | None]]:
        """Stages, and how many examples each has, if known."""
        pairs = zip(self._stages, self._batches, strict=True)
        return [(stage, batches.n_examples) for stage, batches in pairs]

    def save(self, kept: Checkpoint) -> None:
        """Writes the checkpoint."""
        self.curve.to_disk()
        tensors = {f"learner.{k}": v for k, v in self._learner.state_dict().items()}
        if self._optimizer is not None:
            for index, moments in self._optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        tensors["rng"] = torch.get_rng_state()
        record = {
            "stage": self.number,
            "step": self.step,
            "learned": self._learned,
            "failures": [asdict(failure) for failure in self.failures],
            "ids": self._ids_before(),
        }
        kept.save(State({k: v.clone() for k, v in tensors.items()}, record))

    def _restore(self, state: State) -> None:
        tensors, record = dict(state.tensors), state.record
        torch.set_rng_state(tensors.pop("rng").cpu())
        learned = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            (learned if part == "learner" else self._resumed)[rest] = tensor
        self._learner.load_state_dict(learned)
        self.number, self.step = record["stage"], record["step"]
        self._learned = record["learned"]
        self.failures = [Failure(**failure) for failure in record["failures"]]
        self._known = {(f.stage, f.index) for f in self.failures}
        if self.is_main:
            self.curve.restore(self.number, self.step)
            if (ids := self._ids_before()) != record["ids"]:
                raise ValueError(
                    f"the run in {self._folder} last learned from the examples "
                    f"{record['ids'][:3]}..., and at their place are now {ids[:3]}...; "
                    "give the examples it was begun with, or another folder"
                )

    def _ids_before(self) -> list[str]:
        """Ids of the last batch, by which other examples are recognized."""
        if not self.step or self.number > len(self._stages):
            return []
        stage, batches = self._stages[self.number - 1], self._batches[self.number - 1]
        if batches.n_examples is None:
            return []  # a stream, which would have to be read again
        return batches.ids(self.step * stage.accumulate - 1)

    def _steps(
        self,
        stage: Stage,
        batches: Iterator[Batch],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> Iterator[dict[str, float | int | None]]:
        begun, portions = time.perf_counter(), range(stage.accumulate)
        while self.step < self.n_steps:
            optimizer.zero_grad()
            taken = self._batches[self.number - 1]
            seen = [self._step.look(next(batches), taken) for _ in portions]
            here = [failure for part in seen for failure in part.failures]
            self._refuse(here)
            sums = self._step.learn(seen, stage)
            if sums.n_failures:
                self._record(gather_object(here))
            fvu = sums.fvu if self._settings.sae_penalty else 0.0
            if not math.isfinite(sums.cross_entropy + sums.gradient_norm + fvu):
                ids = [str(item.example.id) for part in seen for item in part.items]
                raise NotFiniteError(
                    f"the loss is not a number at step {self.step + 1} of stage "
                    f"{self.number} (cross-entropy {sums.cross_entropy:.3g}, gradient "
                    f"{sums.gradient_norm:.3g}); its examples: "
                    f"{', '.join(gather_object(ids))}. What was learned before it is "
                    "kept, as adapter.partial.safetensors where a folder was given. "
                    "Look at these examples; or begin again with a lower "
                    "learning_rate, or the language model in float32"
                )
            (rate,) = schedule.get_last_lr()
            optimizer.step()  # without gradients, where nothing could be used
            schedule.step()
            self.step += 1
            self._learned += sums.n_conversations
            seconds = time.perf_counter() - begun
            begun += seconds
            row = self._row(sums) | {
                "learning_rate": rate,
                "seconds": round(seconds, 4),
                "tokens_per_second": round(sums.n_tokens / seconds, 1),
            }
            if self.is_main:
                self.curve.add(row)
            yield row

    def _row(self, sums: Sums) -> dict[str, float | int | None]:
        """A row of the curve; None for what was not measured."""
        cross_entropy, fvu = None, None
        if sums.weight:
            cross_entropy = sums.cross_entropy / sums.weight
        if sums.n_pictures and self._frozen.layers:
            fvu = sums.fvu / sums.n_pictures
        loss = cross_entropy
        if loss is not None and self._settings.sae_penalty:
            loss += self._settings.sae_penalty * (fvu or 0.0)
        return {
            "stage": self.number,
            "step": self.step,
            "loss": loss,
            "cross_entropy": cross_entropy,
            "fvu": fvu,
            "gradient_norm": sums.gradient_norm,
            "n_conversations": sums.n_conversations,
            "n_tokens": sums.n_tokens,
        }

    def _refuse(self, failures: Sequence[Failure]) -> None:
        if failures and self._on_error == "raise":
            first = failures[0]
            raise ValueError(
                f"example {first.index} of stage {first.stage}, {first.id!r}: "
                f'{first.error} (on_error="record" lists it and goes on)'
            )

    def _record(self, failures: Sequence[Failure]) -> None:
        for failure in sorted(failures, key=lambda f: (f.stage, f.index)):
            if (failure.stage, failure.index) not in self._known:
                self._known.add((failure.stage, failure.index))
                self.failures.append(failure)


_DEATH = 1
"""PR_SET_PDEATHSIG of Linux' prctl: the signal that is sent when the parent ends."""


def _follow(_: int) -> None:
    """Lets a worker end with its parent, also where that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH, signal.SIGKILL)


def _unchanged(batch: Batch) -> Batch:
    return batch


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Takes moments back, by the number of their parameter."""
    if not tensors:
        return
    state = optimizer.state_dict()
    for name, tensor in tensors.items():
        index, _, moment = name.partition(".")
        state["state"].setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict(state)
