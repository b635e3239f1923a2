"""A stack that an adapter can be trained in within a second, and examples for it.

The processes that tests kill are forked from a server that has all of it imported, as
in `killable`.
"""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from killable import forked  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import LAYERS, tiny_language, tiny_sae, tiny_vision  # noqa: E402

from vlm_probe.examples import Example  # noqa: E402
from vlm_probe.training.adapter import train_adapter  # noqa: E402
from vlm_probe.training.settings import Stage  # noqa: E402

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}


def stack():
    """Vision model, language model and SAEs, the same each time."""
    torch.manual_seed(0)
    vision, language = tiny_vision(), tiny_language()
    with torch.no_grad():
        for parameter in language.hooked.parameters():
            parameter.mul_(0.25)  # twice what training starts from: losses stay small
    return vision, language, {n: tiny_sae(n) for n in range(LAYERS)}


VISION, LANGUAGE, SAES = stack()


def examples(n, *, broken=()):
    """Pictures of one color, which is asked for; some whose picture is not there."""
    found = []
    for i in range(n):
        color = list(COLORS)[i % 3]
        shade = [min(255, c + 5 * (i % 5)) for c in COLORS[color]]
        picture = Image.new("RGB", (40 + i % 4, 40), tuple(shade))
        image = "nowhere.png" if i in broken else picture
        more = (("where is it ?", "top left"),) if i % 4 == 1 else ()
        found.append(
            Example(image, "what color ?", color, color, id=f"e{i}", turns=more)
        )
    return found


STAGES = [
    (examples(23, broken=(4, 11)), Stage(epochs=2.0, batch_size=2, accumulate=2)),
    (examples(12), Stage(steps=6, batch_size=3, learning_rate=3e-3, average="turns")),
]


def train(out=None, *, stages=STAGES, saes=None, **more):
    """Trains with a checkpoint after every step."""
    settings = {"calibration": 6} | more
    return train_adapter(
        VISION,
        LANGUAGE,
        stages,
        saes=saes,
        out=out,
        checkpoint_every=0.0,
        progress=False,
        **settings,
    )


def start(*given, **more):
    """Starts `train` in a process of its own."""
    process = forked.Process(target=train, args=given, kwargs=more, daemon=True)
    process.start()
    return process


def main(out, batch_size):
    """What `accelerate launch` starts: four steps on twelve examples."""
    train(out, stages=[(examples(12, broken=(5,)), four(batch_size))], whiten=False)


def four(batch_size, **more):
    return Stage(
        steps=4, batch_size=batch_size, learning_rate=1e-2, average="turns", **more
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
