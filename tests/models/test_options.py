"""Which options go together; what the others say."""

import pytest
from pydantic import ValidationError

from hvdtrain.models.options import RotaryOptions, TransformerOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "sinusoidal", "width": 9, "heads": 3}, "positions=sinusoidal need an even width, not 9"),
        ({"head_width": 3, "positions": "rotary"}, "rotary positions need an even head width, not 3"),
        ({"positions": "rotary", "position_offset": 2}, "position_offset is for positions=learned or sinusoidal"),
        ({"positions": "none", "separate_positions": True}, "separate_positions is for positions=learned, not none"),
        ({"rotary": {"base": 5e5}}, "rotary is for positions=rotary, not learned"),
        ({"relative_buckets": 16}, "relative_buckets is for positions=relative, not learned"),
        ({"positions": "relative", "relative_buckets": 30}, "relative_buckets=30 is not a multiple of 4"),
        ({"positions": "relative", "relative_distance": 16}, "relative_distance=16 must be above half"),
    ],
)
def test_what_does_not_fit_together(options: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        TransformerOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 4.0}, "factor=4.0 is not read with scaling=none"),
        ({"scaling": "linear", "original_context": 8}, "original_context=8 is not read with scaling=linear"),
        ({"scaling": "llama3", "factor": 8.0}, "scaling=llama3 needs original_context"),
        ({"scaling": "llama3", "original_context": 8, "high_factor": 0.5}, "high_factor=0.5 must be above low_factor"),
        ({"scaling": "yarn", "original_context": 8, "slow_turns": 40.0}, "fast_turns=32.0 must be above slow_turns=40"),
    ],
)
def test_rotary_scaling_that_does_not_fit(options: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        RotaryOptions(**options)
