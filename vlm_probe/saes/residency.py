"""Autoencoders too many for memory are read layer by layer, the next one ahead."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

from vlm_probe.codes import uses_screening
from vlm_probe.saes.layer import LayerSae
from vlm_probe.saes.memory import memory_at_hand
from vlm_probe.tokens import RESIDENCIES, check_names

Reader = Callable[[], LayerSae]
"""Reads the SAE of one layer."""

SHARE = 0.5
"""How much of the memory at hand all SAEs together may take. They are read before the
language model, which is often as large as they are, and a batch needs room too."""

SCREEN_SHARE = 0.75
"""What a screen takes of an SAE's own bytes: the encoder, which is half of them, once
more, and once in half as many bits."""

_PAGE = 4096
"""The smallest piece in which files are mapped, in bytes."""


class StreamedSaes(Mapping[int, LayerSae]):
    """SAEs by layer, of which two are held: the last one given, and the next.

    While one is used, the next is read in a thread of its own, which ends when it has
    read; what goes wrong there is raised when that layer is asked for. The next is the
    layer that followed this one last time, at first the next in order, and the first
    after the last, for so batches go through the layers.

    On the CPU, files in sae-lens' own format and in the dtype asked for are mapped, not
    copied, and reading ahead touches their pages. All else is converted ahead, and for
    a GPU copied there, behind what it is given to compute meanwhile.

    An SAE is read anew each time, so what is changed in one goes with it. For one
    consumer at a time. A caller who keeps what was given holds more.
    """

    def __init__(self, readers: Mapping[int, Reader]) -> None:
        """Reads each SAE once, and so finds at once what cannot be read.

        Args:
            readers: What reads the SAE of a layer, in the order of the layers.
        """
        self._readers = dict(readers)
        layers = list(self._readers)
        self._next = dict(zip(layers, layers[1:] + layers[:1], strict=True))
        self._given: tuple[int, LayerSae] | None = None
        self._ahead: tuple[int, Future[LayerSae]] | None = None
        self.outlines = {layer: _outline(read()) for layer, read in readers.items()}
        """What is known of each, for those who need no weights: theirs are of PyTorch's
        device "meta", which has shapes and no numbers."""

    def __getitem__(self, layer: int) -> LayerSae:
        """The SAE of a layer, with its weights.

        Raises:
            KeyError: There is none.
        """
        if layer not in self._readers:
            raise KeyError(layer)
        if self._given is None or self._given[0] != layer:
            if self._given is not None:
                self._next[self._given[0]] = layer
            self._given = layer, self._take(layer)
        if self._ahead is None and (following := self._next[layer]) != layer:
            pool = ThreadPoolExecutor(1, "vlm_probe-sae")
            self._ahead = following, pool.submit(_ahead, self._readers[following])
            pool.shutdown(wait=False)
        return self._given[1]

    def __iter__(self) -> Iterator[int]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, layer: object) -> bool:
        return layer in self._readers  # Mapping's own would read it

    def _take(self, layer: int) -> LayerSae:
        """What was read ahead if it is this layer, else the layer read now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            foreseen, future = ahead
            if foreseen == layer:
                return future.result()
            wait([future])
            del ahead, future
        return _read(self._readers[layer])


def outlines(saes: Mapping[int, LayerSae]) -> Mapping[int, LayerSae]:
    """The SAEs for those who need no weights: of streamed ones, none is read."""
    return saes.outlines if isinstance(saes, StreamedSaes) else saes


def encoding_of(saes: Mapping[int, LayerSae], asked: str) -> str:
    """How the codes of these SAEs are computed, "dense" or "screened".

    Where that is left open ("auto"), streamed ones are not screened: to make ready what
    screening needs takes longer than it saves in one batch. Nor are those whose screens
    would take more than a quarter of the memory that is left.
    """
    if asked != "auto" or isinstance(saes, StreamedSaes):
        return "dense" if asked == "auto" else asked
    screened = [sae for sae in saes.values() if uses_screening(sae.sae, asked)]
    needed = SCREEN_SHARE * sum(sae.n_bytes for sae in screened)
    if not screened or needed > memory_at_hand(str(screened[0].sae.device)) / 4:
        return "dense"
    return "screened"


def reside(
    readers: Mapping[int, Reader],
    widths: Mapping[int, int | None],
    *,
    residency: str,
    device: str,
) -> Mapping[int, LayerSae]:
    """SAEs in memory, or streamed.

    Args:
        readers: What reads the SAE of a layer, in the order of the layers.
        widths: Number of features of each, if known.
        residency: "memory", "streamed", or "auto": in memory if all together take no
            more than `SHARE` of what is at hand on the device. What all take is
            estimated from the first: the others take as much for each feature, and have
            as many where their number is not known.
        device: Where they are computed.

    Raises:
        ValueError: An unknown residency.
    """
    check_names("residency", [residency], RESIDENCIES)
    if residency == "streamed":
        return StreamedSaes(readers)
    at_hand = memory_at_hand(device)
    (first, read), *others = readers.items()
    sae = read()
    features = sum(width or sae.n_features for width in widths.values())
    needed = sae.n_bytes / sae.n_features * features
    if residency == "auto" and needed > SHARE * at_hand:
        return StreamedSaes(readers)
    return {first: sae} | {layer: read() for layer, read in others}


def _read(read: Reader) -> LayerSae:
    """Reads an SAE that is freed as soon as it is let go."""
    sae = read()
    # Where activations are normalized, sae-lens keeps functions in the SAE that hold
    # it in turn, and its weights would stay until the garbage collector comes by.
    weakly = weakref.proxy(sae.sae)
    type(sae.sae)._setup_activation_normalization(weakly)
    return sae


def _ahead(read: Reader) -> LayerSae:
    """Reads an SAE in the background, with the pages of files that are only mapped."""
    sae = _read(read)
    for tensor in sae.sae.state_dict().values():
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.flatten()[:: _PAGE // tensor.element_size()].sum()
    return sae


def _outline(sae: LayerSae) -> LayerSae:
    sae.sae.to(device="meta")
    return sae
