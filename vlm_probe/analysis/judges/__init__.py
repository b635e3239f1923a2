"""Who says whether a description describes a picture."""

from vlm_probe.analysis.judges.embedding import EmbeddingJudge
from vlm_probe.analysis.judges.endpoint import EndpointJudge
from vlm_probe.analysis.judges.interface import Estimate, Judge, Question
from vlm_probe.analysis.judges.prompt import PROMPT, PROMPT_VERSION
from vlm_probe.analysis.judges.truth import TruthJudge
from vlm_probe.analysis.judges.wire import EndpointError

__all__ = [
    "PROMPT",
    "PROMPT_VERSION",
    "EmbeddingJudge",
    "EndpointError",
    "EndpointJudge",
    "Estimate",
    "Judge",
    "Question",
    "TruthJudge",
]
