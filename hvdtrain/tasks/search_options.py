"""How texts and targets are searched for."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from hvdtrain.options import Options, option


class SearchOptions(Options):
    beam: int = option(1, "hypotheses that are followed side by side; 1: one, the likeliest token or a drawn one", ge=1)
    n_best: int = option(1, "hypotheses of each input to return, the best first; at most beam", ge=1)
    length_penalty: float = option(1.0, "a hypothesis' score: sum of log p / tokens^this; above 0 favours long ones")
    early_stopping: Literal["no", "yes", "never"] = option(
        "no",
        "when beams end before max_tokens. yes: as many have ended as there are beams; "
        "no: and the best that goes on, ended here, would be worse; never: and could not become better",
    )
    no_repeat_ngram: int = option(0, "no so many tokens may follow one another twice; 0: they may", ge=0)
    min_tokens: int = option(0, "no end before so many tokens", ge=0)
    max_tokens: int = option(200, "tokens to add, the end's among them; beams end at model.context too", ge=1)
    forced_first: int | None = option(None, "the first token added (mBART: the language)", ge=0)
    forced_last: int | None = option(None, "the last token, where max_tokens are reached (BART: the end's)", ge=0)
    temperature: float = option(0.0, "0: the likeliest token; 1: drawn from the model's own distribution", ge=0)
    top_k: int = option(0, "draw from the k likeliest tokens only; 0: from all", ge=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that hold this probability together", gt=0, le=1)
    seed: int = option(1, "the same seed and number of an input draw the same tokens", ge=0, lt=1 << 63)
    batch_tokens: int = option(4096, "of a batch: inputs x beams x the longest input's tokens", ge=1)

    @field_validator("early_stopping", mode="before")
    @classmethod
    def _yes_is_yaml(cls, value: Any) -> Any:
        """In YAML yes and no are true and false."""
        return ("yes" if value else "no") if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _fit(self) -> "SearchOptions":
        if self.n_best > self.beam:
            raise ValueError(f"n_best={self.n_best} hypotheses of beam={self.beam}; raise beam, or lower n_best")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.beam > 1 and self.temperature > 0:
            raise ValueError(f"beam={self.beam} takes the likeliest; with temperature={self.temperature} set beam=1")
        return self
