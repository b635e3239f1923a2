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
        for said, point in _OTHER:
            if said & set(words):
                return point
        if not {"res", "resid"} & set(words):
            return None
        for point in ("pre", "mid", "post"):
            if point in words:
                return f"resid_{point}"
        # The first sets of GPT-2 are of resid_pre, and their names do not say it.
        early = canonical(self.model) == "gpt2-small" and {"jb", "ajt"} & set(words)
        return "resid_pre" if early else "resid_post"

    @property
    def width(self) -> str | None:
        """Number of features in the words of the name, such as 16k, if it says it."""
        found = re.search(r"(?<![^-_])(?:(\d+[km])|fs(\d+))(?![^-_])", self.id.lower())
        return (found[1] or found[2]) if found else None

    def differences(self, sae: SaeIdentity) -> list[str]:
        """In what it differs from an SAE, in words; nothing if it may be of that SAE.

        Names tell model, layer, place and width. An SAE that says its Neuronpedia id
        is told apart from others too that differ in sparsity or training only.
        """
        known = known_source(sae)
        found = self._contradictions(sae)
        if known and not found and not self.same_as(known):
            found.append(f"name {self}, the SAE's is {known}")
        return found

    def _contradictions(self, sae: SaeIdentity) -> list[str]:
        """In what the parts of its name differ from an SAE."""
        found = []
        if sae.model_name and canonical(self.model) != canonical(sae.model_name):
            found.append(f"model {self.model}, the SAE's is {sae.model_name}")
        # What leaves the last block has the number of a block that is not there, if
        # the set is of resid_pre: gpt2-small/12-res-jb is of blocks.11.hook_resid_post.
        end = (sae.layer + 1, "resid_pre") == (self.layer, self.hook_point)
        if end and sae.hook_point == "resid_post" and sae.neuronpedia_id == str(self):
            return found
        if self.layer not in (None, sae.layer):
            found.append(f"layer {self.layer}, the SAE's is {sae.layer}")
        if self.hook_point not in (None, sae.hook_point):
            found.append(f"hook point {self.hook_point}, the SAE's is {sae.hook_point}")
        if self.width and not _is_width(self.width, sae.n_features):
            found.append(f"width {self.width}, the SAE has {sae.n_features} features")
        return found

    def same_as(self, other: Source) -> bool:
        """Whether both names mean one source."""
        return (canonical(self.model), self.id.lower()) == (
            canonical(other.model),
            other.id.lower(),
        )


def known_source(sae: SaeIdentity) -> Source | None:
    """The source that an SAE says is its own; None if it says none, or a wrong one.

    Lists of SAEs have mistakes: in that of SAELens, the SAE of layer 2 in
    gemma-scope-9b-pt-res has an id of layer 20. An id that contradicts the SAE is none.
    """
    if not sae.neuronpedia_id:
        return None
    named = Source.named(sae.neuronpedia_id)
    return None if named._contradictions(sae) else named


# Places that are no residual stream.
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
