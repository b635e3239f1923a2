"""What decides the numbers of a run, but for its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from vlm_probe.model import VisionLanguageModel
from vlm_probe.saes import outlines
from vlm_probe.settings import ProbeSettings

_PACKAGES = (
    "vlm_probe",
    "torch",
    "transformer-lens",
    "sae-lens",
    "nnsight",
    "open_clip_torch",
)


def configuration(
    model: VisionLanguageModel,
    settings: ProbeSettings,
    layers: Sequence[int],
    encoding: str,
) -> dict[str, object]:
    """All that must be the same for a run to go on, JSON only.

    Args:
        model: Of the run.
        settings: What is asked.
        layers: Those that are probed.
        encoding: How codes are computed; "auto" in the settings may mean one thing
            here and another on the next machine.
    """
    vision, language = model.vision, model.language
    return {
        "settings": asdict(settings) | {"encoding": encoding},
        "layers": list(layers),
        "hook_point": model.hook_point,
        "inject_layer": model.adapter.inject_layer,
        "parts": model.identities(),
        "saes": {
            f"layer {layer}": sae.computes()
            for layer, sae in outlines(model.saes).items()
        },
        "vision": {"block": vision.block, "preprocess": vision.preprocessing},
        "language": {
            "device": language.device.type,
            "backend": language.backend,
            "padding_side": language.padding_side,
            "default_prompt": language.chat.default_prompt,
            "chat_template": language.tokenizer.chat_template,
        },
        "reference_texts": list(model.reference_texts),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the package and the libraries that numbers depend on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
