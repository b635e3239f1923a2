"""What is run, the table, and the JSON lines: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from benchmarks.alone import memory, million
from benchmarks.compare import DisagreementError
from benchmarks.inside import stages, trace
from benchmarks.measure import processor, say
from benchmarks.race import race
from benchmarks.scaling import scaling
from benchmarks.workload import FULL, SMALL

PARTS = ("contenders", "trace", "stages", "memory", "million", "scaling")
Line = dict[str, object]

_COLUMNS = {
    "contender": None,
    "seconds": "{:.2f}",
    "seconds_median": "{:.2f}",
    "cpu_seconds": "{:.2f}",
    "ratio_to_limit": "{:.2f}",
    "ratio_to_limit_reused": "{:.2f}",
    "cpu_ratio_to_limit": "{:.2f}",
    "ratio_to_hooks": "{:.3f}",
    "peak_mb": "{:.0f}",
    "added_mb": "{:.0f}",
    "images": "{:.0f}",
    "images_per_second": "{:.2f}",
    "written_mb_per_image": "{:.0f}",
    "share": "{:.1%}",
    "growth_percent": "{:.1f}",
    "under_10_gb": None,
    "speed_up": "{:.2f}",
    "largest_difference": "{:.1g}",
    "error": None,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts asked for.

    Returns:
        The exit code: 1 if contenders found different numbers, or a part failed.
    """
    given = _parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with given.output.open("w") as output:
        for name in given.parts or PARTS:
            begun, lines = time.perf_counter(), []
            say(f"== {name}")
            try:
                with torch.no_grad():
                    for line in _parts(given)[name]():
                        lines.append(_complete(line, name, given))
                        print(json.dumps(lines[-1]), file=output, flush=True)
            except DisagreementError as error:
                say(f"error: {error}")
                failed = True
            failed = failed or any("error" in line for line in lines)
            print(f"\n{name}, {time.perf_counter() - begun:.0f} s\n{_table(lines)}")
            sys.stdout.flush()
    return int(failed)


def _parts(given: argparse.Namespace) -> dict[str, Callable[[], Iterator[Line]]]:
    size = SMALL if given.small else FULL
    device = given.device
    return {
        "contenders": partial(
            race, size, given.images, given.rounds, device, screened=given.screened
        ),
        "trace": partial(trace, size, given.rounds, device),
        "stages": partial(stages, size, given.images, device),
        "memory": partial(memory, size, given.threads, device, full=given.full),
        "million": partial(million, size, given.threads, device),
        "scaling": partial(scaling, size, given.images),
    }


def _complete(line: Line, part: str, given: argparse.Namespace) -> Line:
    """A line with what is asked of every line."""
    load = None
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()
    return {
        "contender": None,
        "part": part,
        "seconds": None,
        "ratio_to_limit": None,
        "peak_mb": None,
        "threads": given.threads,
        "processor": processor(given.device),
        "device": given.device,
        "torch": torch.__version__,
        "load": load,
        "size": asdict(SMALL if given.small else FULL),
        **line,
    }


def _table(lines: list[Line]) -> str:
    """The columns that any of the lines has, for people."""
    shown = {}
    for column, written in _COLUMNS.items():
        values = [line.get(column) for line in lines]
        if any(value is not None for value in values):
            shown[column] = [
                ""
                if value is None
                else str(value)
                if written is None
                else written.format(value)
                for value in values
            ]
    if not shown:
        return "nothing was measured"
    words = [pd.DataFrame(shown).to_string(index=False)]
    if "l0_image" in lines[0]:
        image, text = lines[0]["l0_image"], lines[0]["l0_text_after_image"]
        words.append(f"L0: {image} on image tokens, {text} on text tokens")
    return "\n".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="How long a probe takes and how much it holds, against what it "
        "could be at best. The table goes to stdout, progress to stderr.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default all"
    )
    add = parser.add_argument
    add("--images", type=int, default=8, help="pictures a contender (default 8)")
    add("--rounds", type=int, default=3, help="turns of each contender (default 3)")
    add("--threads", type=int, default=os.cpu_count(), help="default all cores")
    add("--device", default="cpu", help="where models and SAEs are (default cpu)")
    add("--small", action="store_true", help="a reduced size that says nothing")
    add("--full", action="store_true", help="memory: the whole shape, minutes more")
    add(
        "--screened",
        action="store_true",
        help="the screened encoding also where bfloat16 is slow",
    )
    add(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results.jsonl",
        help="JSON lines (default benchmarks/results.jsonl, written anew)",
    )
    parse = parser.parse_args

    def checked(arguments: Sequence[str] | None = None) -> argparse.Namespace:
        found = parse(arguments)
        if unknown := [part for part in found.parts if part not in PARTS]:
            parser.error(f"unknown part {', '.join(unknown)}; of {', '.join(PARTS)}")
        return found

    parser.parse_args = checked
    return parser


if __name__ == "__main__":
    sys.exit(main())
