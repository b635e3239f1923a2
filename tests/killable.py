"""A run in a process of its own, which a test can kill.

The processes are forked from a server that has all of this imported: torch alone takes
seconds, which twenty attempts would spend twenty times.
"""

import multiprocessing
import os
from pathlib import Path

import torch

torch.set_num_threads(1)  # threads that are not there do not get lost in a fork

from PIL import Image  # noqa: E402
from tiny import tiny_model  # noqa: E402

from vlm_probe.examples import Example  # noqa: E402
from vlm_probe.probe import probe_layers  # noqa: E402
from vlm_probe.tokens import CONTROLS  # noqa: E402

MODEL = tiny_model()
N_IMAGES = 24
BROKEN = (0, 8, 9, 10, 11, 17)  # two whole batches among them
SETTINGS = {"controls": CONTROLS, "batch_size": 2, "replicates": 50, "calibration": 9}

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["killable"])
# The server, which is started with this environment, has no other path to this file.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
)


def examples():
    """Pictures of one color each, some of which cannot be read."""
    for i in range(N_IMAGES):
        picture = Image.new("RGB", (40 + i, 40), (5 * i, 200 - 3 * i, i * i % 256))
        words = f"a large circle {'on grass .' * (i % 3)}"
        yield Example("nowhere.png" if i in BROKEN else picture, "what ?", None, words)


def run(checkpoint, out):
    """Probes, with a checkpoint after every batch, and saves the result.

    Args:
        checkpoint: Its folder, or None.
        out: Where the result goes.
    """
    result = probe_layers(
        MODEL,
        examples(),
        checkpoint=checkpoint,
        checkpoint_every=0.0,
        progress=False,
        **SETTINGS,
    )
    result.save(out)


def start(*given):
    """Starts `run` in a process of its own."""
    process = forked.Process(target=run, args=given, daemon=True)
    process.start()
    return process
