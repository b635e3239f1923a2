"""Probes as one of several processes; what `torchrun` starts in the tests."""

import sys
from pathlib import Path

import torch
from killable import MODEL, SETTINGS, examples

from vlm_probe.probe import probe_layers
from vlm_probe.probe.shards import joined


def main(out, checkpoint):
    """Saves the result of every process."""
    with joined() as shard:
        result = probe_layers(
            MODEL, examples(), progress=False, checkpoint=checkpoint, **SETTINGS
        )
    result.save(Path(out) / f"{shard.rank}-of-{shard.size}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2])
