"""What every test starts from: no network, two threads, a fixed seed, one toy."""

import os
import random

# First of all imports: nnsight puts `.save` on every object, and beartype cannot be
# imported after that (TypeError: unhashable type: 'instancemethod').
import beartype  # noqa: F401
import numpy as np
import pytest
import torch

# vlm_probe itself is imported inside the fixtures: the hook that enforces shapes is
# put in place after this file is read, and misses what was imported before it.

os.environ["HF_HUB_OFFLINE"] = "1"
# Two cores in all: two workers of one thread, or one process of two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy():
    """The toy model that ships with the package, loaded by the first test to ask."""
    import vlm_probe

    return vlm_probe.load("toy")


@pytest.fixture(scope="session")
def examples():
    """Twelve held-out toy examples: few enough to probe in a second or two."""
    import vlm_probe

    return vlm_probe.toy_examples(12)
