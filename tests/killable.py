"""A run in a process of its own, which a test can kill.

The processes are forked from a server that has all of this imported: torch alone takes
seconds, which twenty attempts would spend twenty times.
"""

import multiprocessing

import torch

torch.set_num_threads(1)  # threads that are not there do not get lost in a fork

from PIL import Image  # noqa: E402
from tiny import tiny_model  # noqa: E402

from vlm_probe.examples import Example  # noqa: E402
from vlm_probe.probe import probe_layers  # noqa: E402
from vlm_probe.tokens import CONTROLS  # noqa: E402

MODEL = tiny_model()
N_IMAGES = 24
SETTINGS = {"controls": CONTROLS, "batch_size": 2, "replicates": 50, "calibration": 9}

forked = multiprocessing.get_context("forkserver")


def examples():
    """Pictures of one color each, two of which cannot be read."""
    for i in range(N_IMAGES):
        picture = Image.new("RGB", (40 + i, 40), (5 * i, 200 - 3 * i, i * i % 256))
        words = f"a large circle {'on grass .' * (i % 3)}"
        yield Example("nowhere.png" if i in (0, 17) else picture, "what ?", None, words)


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
