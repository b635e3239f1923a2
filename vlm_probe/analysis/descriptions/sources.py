"""Which autoencoder a source of Neuronpedia is of, as its name tells."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm_probe.analysis.descriptions.interface import SaeIdentity


@dataclass(frozen=True, order=True)
class Source:
    """A model and one set of features of it, as Neuronpedia names them."""

    model: str
    """Such as gemma-2-2b."""
    id: str
    """Such as 20-gemmascope-res-16k: layer, set, place and width."""

    @classmethod
    def named(cls, name: str) -> Source:
        """The source of a name such as gemma-2-2b/20-gemmascope-res-16k.

        Raises:
            ValueError: It is no such name.
        """
        model, _, rest = name.partition("/")
        if not model or not rest or "/" in rest:
            raise ValueError(
                f"{name!r} is no name of a Neuronpedia source; expected one such as "
                "'gemma-2-2b/20-gemmascope-res-16k'"
            )
        return cls(model, rest)

    def __str__(self) -> str:
        return f"{self.model}/{self.id}"

    @property
    def layer(self) -> int | None:
        """Number of the block, if the name says it."""
        found = re.match(r"(\d+)-", self.id)
        return int(found[1]) if found else None

    @property
    def hook_point(self) -> str | None:
        """Where in its block, if the name says it."""
        words = re.split(r"[-_]+", self.id.lower())
        for words_of, point in _OTHER:
            if words_of & set(words):
                return point
        if not {"res", "resid"} & set(words):
            return None
        for point in ("pre", "mid", "post"):
            if point in words:
                return f"resid_{point}"
        return "resid_pre" if {"jb", "ajt"} & set(words) else "resid_post"

    @property
    def width(self) -> str | None:
        """Number of features in the words of the name, such as 16k, if it says it."""
        found = re.search(r"(?<![^-_])(?:(\d+[km])|fs(\d+))(?![^-_])", self.id.lower())
        return (found[1] or found[2]) if found else None

    def differences(self, sae: SaeIdentity) -> list[str]:
        """In what it differs from an SAE, in words; nothing if it may be of that SAE.

        Where the SAE says its Neuronpedia id, this counts alone: sets that differ in
        sparsity or training only have the same model, layer, place and width.
        """
        known = sae.neuronpedia_id and Source.named(sae.neuronpedia_id)
        if known and self.same_as(known):
            return []
        model = sae.model_name or (known.model if known else None)
        told = (
            ("model", self.model, model, model and canonical(model)),
            ("layer", self.layer, sae.layer, sae.layer),
            ("hook point", self.hook_point, sae.hook_point, sae.hook_point),
        )
        found = [
            f"{what} {own}, the SAE's is {given}"
            for what, own, given, compared in told
            if None not in (own, compared)
            and (canonical(str(own)) if what == "model" else own) != compared
        ]
        if self.width and not _is_width(self.width, sae.n_features):
            found.append(f"width {self.width}, the SAE has {sae.n_features} features")
        if known and not found:
            found.append(f"name {self.id}, the SAE's is {known.id}")
        return found

    def same_as(self, other: Source) -> bool:
        """Whether both names mean one source."""
        return (canonical(self.model), self.id.lower()) == (
            canonical(other.model),
            other.id.lower(),
        )


# Places that are no residual stream. Joseph Bloom's first sets (jb) and those made
# beside them (ajt) are of resid_pre, and their names do not say it.
_OTHER = (
    ({"transcoder", "clt"}, "transcoder"),
    ({"att", "attn"}, "attn_out"),
    ({"mlp"}, "mlp_out"),
)


def canonical(model: str) -> str:
    """One name for a model that has several: gemma-2-2b for google/gemma-2-2b."""
    name = model.split("/")[-1].lower().removeprefix("meta-")
    name = re.sub(r"^llama-(?=\d)", "llama", name)
    name = re.sub(r"-instruct$", "-it", name).removesuffix("-pt")
    return "gpt2-small" if name == "gpt2" else name


def _is_width(width: str, n_features: int) -> bool:
    """Whether 16k, 131k or 768 can mean so many: names round either way."""
    if width.isdecimal():
        return int(width) == n_features
    power = {"k": 1, "m": 2}[width[-1]]
    thousands = n_features / 1000**power
    return int(width[:-1]) in (
        int(thousands),
        round(thousands),
        n_features / 1024**power,
    )
