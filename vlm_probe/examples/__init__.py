"""Pictures and conversations on disk become examples."""

from vlm_probe.examples.conversations import write_examples
from vlm_probe.examples.example import UNREADABLE, Example, as_examples
from vlm_probe.examples.reading import read_examples
from vlm_probe.examples.sequence import Examples, ExampleStream
from vlm_probe.examples.shipped import data_folder

__all__ = [
    "UNREADABLE",
    "Example",
    "ExampleStream",
    "Examples",
    "as_examples",
    "data_folder",
    "read_examples",
    "write_examples",
]
