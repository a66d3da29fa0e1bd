"""How one replica is spread over ranks. A cut is one file and one line in this table."""

from hvdtrain.cut.cut import Cut
from hvdtrain.cut.whole import Whole

CUTS: dict[str, Cut] = {
    "whole": Whole,
}
