"""An adapter is learned through the frozen language model, step by step."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pandas as pd
from accelerate import Accelerator
from tqdm.auto import tqdm

from vlm_probe.adapter import Adapter
from vlm_probe.checkpoint import Checkpoint, Stop, stoppable
from vlm_probe.examples import Example, data_folder
from vlm_probe.language import LanguageModel
from vlm_probe.model import lines
from vlm_probe.saes import LayerSae
from vlm_probe.tokens import check_names
from vlm_probe.training.batches import Failure, as_stages
from vlm_probe.training.frozen import Frozen
from vlm_probe.training.session import NotFiniteError, Session
from vlm_probe.training.settings import AdapterTraining, Stage
from vlm_probe.training.tracking import Tracking, require
from vlm_probe.vision import VisionModel


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter, and how it was learned."""

    adapter: Adapter
    """Frozen, and of plain patch tokens; its manifest says how it came to be."""
    curve: pd.DataFrame
    """A row per step; see `vlm_probe.training.curve.COLUMNS`."""
    failures: pd.DataFrame
    """Examples that could not be learned from: `stage`, `index`, `id`, `error`."""
    partial: str | None = None
    """How far training came, if it was stopped."""


def train_adapter(
    vision: VisionModel,
    language: LanguageModel,
    stages: Sequence[tuple[Iterable[Example], Stage]],
    settings: AdapterTraining | None = None,
    *,
    saes: Mapping[int, LayerSae] | None = None,
    reference_texts: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: float = 60.0,
    vision_cache: str | Path | None = None,
    on_error: str = "record",
    track: Sequence[str] = (),
    progress: bool = True,
    manifest: Mapping[str, object] | None = None,
    **changes: object,
) -> TrainedAdapter:
    """Learns an adapter, so that the language model gives the right answers.

    The loss is the cross-entropy of what the assistant says; vision model, language
    model and SAEs stay frozen, which is proved by digests of their weights before and
    after. An example that cannot be used (its picture cannot be read, nothing is said
    about it, or only beyond `max_length`) is listed in `failures`, and its batch is
    smaller for it.

    Started by `accelerate launch`, processes share each step's examples: two of them do
    what one does with twice the batch (but for `sae_penalty`, which is taken by batch).
    Each loads the models to the GPU of its number. Ctrl-C or SIGTERM ends training
    after its step.

    Args:
        vision: Gives patch tokens.
        language: Reads the adapter's vectors. What it computes in decides what training
            does; the adapter itself is learned in float32.
        stages: Examples and settings of each stage in turn (the paper's: captions, then
            instructions), `vlm_probe.training.settings.PAPER`. Examples with a length
            and an index, such as lists and what `read_examples` gives, are shuffled
            each epoch.
        settings: What is learned, and how.
        saes: By layer; needed for `sae_penalty`, and measured beside the loss if given.
        reference_texts: Give the norm of words at `inject_layer`; the embedded texts if
            not given.
        out: A folder for adapter.safetensors (adapter.partial.safetensors of a run that
            was stopped), metrics.csv (the curve, while it grows), failures.csv, and the
            checkpoint.
        resume: Goes on with the run that `out` holds. On the CPU, with as many threads,
            it ends with the very numbers of one that was never stopped.
        checkpoint_every: How often the checkpoint is written, in seconds.
        vision_cache: A folder in which patch tokens are kept, for later epochs and
            runs.
        on_error: "record" lists an example that cannot be used and goes on; "raise"
            stops.
        track: Where else to send the curve: "wandb", "tensorboard".
        progress: Whether to show a progress bar.
        manifest: Anything to be kept beside the weights, JSON only.
        **changes: Fields of `AdapterTraining`, over `settings`, such as
            `kind="mlp2x_gelu"`, `inject_layer=3`, `sae_penalty=0.1`.

    Raises:
        FileExistsError: `out` holds a run already, and `resume` is not asked for.
        FileNotFoundError: `resume` is asked for, and there is nothing to go on with.
        KeyboardInterrupt: Stopped twice.
        ImportError: A tracker is not installed.
        RuntimeError: A frozen weight changed, and nothing is saved; or a stream gives
            no more examples.
        TypeError: Something among the examples is none, or an unknown setting.
        ValueError: A loss that is not a number (the batch is named, and the state
            before it is kept), a stage without a usable example, or a checkpoint of
            another run.
    """
    check_names("on_error", [on_error], ("record", "raise"))
    require(track)
    manifest = json.loads(json.dumps(dict(manifest or {})))
    settings = _changed(settings or AdapterTraining(), changes)
    frozen = Frozen(vision, language, saes or {}, settings)
    folder = None if out is None else Path(out)
    session = Session(
        frozen,
        as_stages(stages),
        settings,
        accelerator=_accelerator(language),
        folder=folder,
        vision_cache=None if vision_cache is None else Path(vision_cache),
        on_error=on_error,
    )
    with contextlib.ExitStack() as open_things:
        kept = None
        if folder is not None and session.is_main:
            kept = open_things.enter_context(
                Checkpoint(folder / "checkpoint", session.configuration())
            )
        texts = reference_texts or lines(data_folder() / "reference_texts.txt")
        session.begin(kept, resume, list(texts))
        tracking = open_things.enter_context(
            Tracking(track if session.is_main else (), folder, settings, session.n_done)
        )
        stop = open_things.enter_context(stoppable())
        open_things.callback(session.curve.close)

        def save() -> None:
            # What was learned between changed weights is never gone on with.
            frozen.check()
            if kept:
                session.save(kept)
            if folder is not None and session.is_main:
                _listed(session).to_csv(folder / "failures.csv", index=False)

        try:
            for row in _shown(session, stop, progress):
                tracking.log(row)
                if kept and kept.age() >= checkpoint_every:
                    save()
        except NotFiniteError:
            save()
            if folder is not None and session.is_main:
                _save(session.adapter(manifest), folder, "adapter.partial")
            raise
        save()
    partial = None if session.complete else session.progress
    adapter = session.adapter(manifest)
    if folder is not None and session.is_main:
        _save(adapter, folder, "adapter.partial" if partial else "adapter")
    session.wait()
    return TrainedAdapter(adapter, session.curve.table(), _listed(session), partial)


def _accelerator(language: LanguageModel) -> Accelerator:
    """Which of the processes this is; alone, no more than that."""
    started = "LOCAL_RANK" in os.environ
    accelerator = Accelerator(cpu=started and language.device.type == "cpu")
    asked = os.environ.get("ACCELERATE_USE_CPU"), "MASTER_PORT" in os.environ
    if asked == ("True", True) and accelerator.num_processes == 1:
        warnings.warn(
            "accelerate launch --cpu was asked for several processes and started one, "
            "as it does where there is no mpirun; use --multi_gpu in place of --cpu, "
            "which works without a GPU, too",
            stacklevel=3,
        )
    here = language.device
    if (
        accelerator.num_processes > 1
        and here.type == "cuda"
        and (here.index not in (None, accelerator.device.index))
    ):
        raise ValueError(
            f"process {accelerator.process_index} has its language model on {here}, "
            f"expected {accelerator.device}: each process takes the GPU of its number; "
            "load the models with that device"
        )
    return accelerator


def _save(adapter: Adapter, folder: Path, name: str) -> None:
    """Writes the adapter beside the one before, which it then replaces."""
    unfinished = folder / f"{name}.unfinished"
    adapter.save(unfinished)
    unfinished.replace(folder / f"{name}.safetensors")
    if name == "adapter":
        (folder / "adapter.partial.safetensors").unlink(missing_ok=True)


def _listed(session: Session) -> pd.DataFrame:
    """Failures in order of place."""
    ordered = sorted(session.failures, key=lambda f: (f.stage, f.index))
    return pd.DataFrame(
        [asdict(failure) for failure in ordered],
        columns=[field.name for field in fields(Failure)],
    )


def _shown(
    session: Session, stop: Stop, progress: bool
) -> Iterator[dict[str, float | int | None]]:
    """Steps of all stages, in progress bars that say how it goes."""
    for number in session.to_come():
        with session.stage(number) as steps:
            bar = tqdm(
                total=session.n_steps,
                initial=session.step,
                desc=f"adapter, stage {number}",
                unit="step",
                disable=not progress or not session.is_main,
                mininterval=1.0,
            )
            with bar:
                for row in steps:
                    loss, speed = row["loss"], row["tokens_per_second"]
                    shown = "none" if loss is None else f"{loss:.3f}"
                    failed = len(session.failures)
                    bar.set_postfix_str(
                        f"loss {shown}, {speed:.0f} tokens/s"
                        + (f", {failed} examples failed" if failed else ""),
                        refresh=False,
                    )
                    bar.update()
                    yield row
                    if session.asked_to_stop(stop.asked) and not session.at_end:
                        return
    session.complete = True


def _changed(
    settings: AdapterTraining, changes: Mapping[str, object]
) -> AdapterTraining:
    valid = [field.name for field in fields(AdapterTraining)]
    if unknown := [name for name in changes if name not in valid]:
        raise TypeError(
            f"unknown setting {', '.join(map(repr, unknown))}; "
            f"valid: {', '.join(valid)}"
        )
    return replace(settings, **changes)


__all__ = ["AdapterTraining", "Stage", "TrainedAdapter", "train_adapter"]
