"""Images go through the model, block by block, until there are no more."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from vlm_probe.checkpoint import Checkpoint, Stop, stoppable
from vlm_probe.examples import Example
from vlm_probe.model import VisionLanguageModel, cheap_findings
from vlm_probe.probe.feed import Block, Feed
from vlm_probe.probe.provenance import configuration
from vlm_probe.probe.run import Run
from vlm_probe.probe.shards import Shard
from vlm_probe.result import ProbeResult
from vlm_probe.settings import ProbeSettings
from vlm_probe.tokens import check_names

ON_ERROR = ("record", "raise")


def probe_layers(
    model: VisionLanguageModel,
    images: Iterable[Image.Image | str | Path | Example],
    settings: ProbeSettings | None = None,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    on_error: str = "record",
    progress: bool = True,
    **changes: object,
) -> ProbeResult:
    """Measures, layer by layer, how well language features describe image tokens.

    Each picture goes through the model once for the condition `model` and once for
    each control arm, and once more without picture, in words, for `text_only`. At
    each layer the SAE codes the residual stream, and only sums are kept. What
    `vlm_probe.doctor` can tell without a pass is looked at first: what may spoil the
    numbers is warned of, and stands in `meta["findings"]`.

    Ctrl-C or SIGTERM ends the run after the batch it is at, with a result of the
    images so far that says it is partial; a second Ctrl-C ends it at once.

    Where torch.distributed is in use (`torchrun -m vlm_probe probe ...`, or a process
    group of your own), the processes take the images by turns and add up their sums;
    every one of them gives back the result of all.

    Args:
        model: Of `vlm_probe.load`.
        images: Pictures, paths or examples; a generator is read as it comes.
        settings: What is asked; the defaults if None.
        checkpoint: A folder in which the run is kept. Begun again with the same images
            and settings, a run that was stopped or killed goes on from there, and ends
            with the very numbers of one that was not.
        checkpoint_every: How often it is written, in seconds.
        on_error: What is done about an example that cannot be used, since its picture
            cannot be read or its prompt is too long: "record" lists it in `failures`
            and goes on; "raise" stops.
        progress: Whether to show a progress bar.
        **changes: Fields of `ProbeSettings`, over `settings`, for instance
            `layers=[0, 4]`, `controls=["noise"]`, `convention="paper"`.

    Returns:
        Tables by layer, group and condition, with 95 % bounds.

    Raises:
        KeyboardInterrupt: Stopped before any image was through, or twice.
        OSError: The checkpoint cannot be written, or another process has it.
        RuntimeError: Another of the processes failed.
        TypeError: Something among the images is none, or an unknown setting.
        ValueError: No image (could be read), an unknown layer, group or control, an
            activation that is not a number, or a checkpoint of another run.
    """
    check_names("on_error", [on_error], ON_ERROR)
    shard = Shard()
    findings = [f for f in cheap_findings(model) if f.verdict != "ok"]
    for finding in findings:
        if finding.verdict in ("warning", "wrong") and shard.rank == 0:
            warnings.warn(f"{finding.check}: {finding.said}", stacklevel=2)
    started, begun = datetime.now(UTC), time.perf_counter()
    run = Run(model, _settings(settings, changes))
    feed = Feed(images, run.settings.batch_size, recognize=checkpoint is not None)
    with contextlib.ExitStack() as open_things:
        open_things.enter_context(shard.watched())
        kept = None
        if checkpoint is not None:
            part = shard.rank, shard.size
            must = configuration(model, run.settings, run.layers, run.encoding)
            kept = open_things.enter_context(Checkpoint(checkpoint, must, part))
        state = kept and kept.load()
        run.prepare(feed, state)
        if kept and state is None:
            kept.save(run.state())  # so that it is known at once if it cannot be
        bar = tqdm(
            total=feed.n_images,
            initial=run.n_seen * shard.size,
            desc="probe",
            unit="image",
            disable=not progress or shard.rank > 0,
        )
        stop = open_things.enter_context(stoppable())
        with bar:
            for block in _through(run, feed, shard, stop, on_error, kept):
                bar.update(len(block.examples) * shard.size)
                if kept and kept.age() >= checkpoint_every:
                    _save(kept, run)
        if kept:
            _save(kept, run)
        whole = _gathered(run, shard)
    if not whole.complete and not whole.names:
        raise KeyboardInterrupt
    timing = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - begun, 2),
        "stages": {stage: round(s, 3) for stage, s in run.clock.spent.items()},
    }
    more = {"findings": [asdict(finding) for finding in findings]}
    result = whole.result(more, timing, feed.n_images)
    if result.partial and shard.rank == 0:
        warnings.warn(f"a partial result: {result.meta['partial']}", stacklevel=2)
    return result


def _through(
    run: Run,
    feed: Feed,
    shard: Shard,
    stop: Stop,
    on_error: str,
    kept: Checkpoint | None,
) -> Iterator[Block]:
    """Takes blocks through the run, until there are no more or someone stops it."""
    mine = feed.read(run.next, run.order, rank=shard.rank, size=shard.size)
    with contextlib.closing(mine):
        blocks = run.clock.waiting("pictures", mine)
        try:
            for block in blocks:
                run.add(block, on_error)
                yield block
                # What is asked behind the last block stops nothing.
                if stop.asked and next(blocks, None) is not None:
                    return
        except BaseException:
            # What went through is kept; half a batch is not.
            if kept and run.whole:
                _save(kept, run)
            raise
    run.complete = True


def _save(kept: Checkpoint, run: Run) -> None:
    """Writes the checkpoint; a run does not end because that fails on its way."""
    with run.clock("checkpoint"):
        try:
            kept.save(run.state())
        except OSError as error:
            warnings.warn(str(error), stacklevel=3)


def _gathered(run: Run, shard: Shard) -> Run:
    """The run with the parts of all processes."""
    if shard.size == 1:
        return run
    whole = Run(run.model, run.settings)
    whole.encoding, whole.complete = run.encoding, True
    for state in shard.gather(run.state()):
        part = Run(run.model, run.settings)
        part.restore(state)
        whole.merge(part)
    return whole


def _settings(
    settings: ProbeSettings | None, changes: dict[str, object]
) -> ProbeSettings:
    valid = [field.name for field in fields(ProbeSettings)]
    unknown = [name for name in changes if name not in valid]
    if unknown:
        raise TypeError(
            f"unknown setting {', '.join(map(repr, unknown))}; "
            f"valid: {', '.join(valid)}"
        )
    return replace(settings or ProbeSettings(), **changes)
