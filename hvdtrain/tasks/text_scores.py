"""Texts compared with references: BLEU, chrF and ROUGE, each a function of sums, which batches and ranks add up.

    bleu             sacreBLEU as it is published, of text that is not tokenised (Post 2018)
    bleu_tokenized   sacreBLEU of lower-cased text that is tokenised already: multi-bleu.perl -lc
    chrf             character n-grams of one to six, recall counting twice (Popovic 2015), by sacreBLEU
    rouge            f-measures of ROUGE-1, 2 and L (Lin 2004), by rouge-score; mean over the texts

All from 0 to 100. A text may have several references. BLEU and chrF take them as sacreBLEU does; ROUGE those of the
reference with the highest ROUGE-1, as the evaluation of SciTLDR does (Cachola et al. 2020, scripts/cal-rouge.py).
Every sum is one of whole numbers, so it is the same in whatever order it is added up.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol
from unicodedata import normalize

from hvdtrain.errors import ConfigError

References = Sequence[Sequence[str]]  # of each text: one or several


class TextScore(Protocol):
    """``count``: how many sums it is a function of; ``names``: of the scores that come of them."""

    count: int
    names: tuple[str, ...]

    def sums(self, texts: Sequence[str], references: References) -> list[float]:
        """Whole numbers, which add up over texts."""

    def scores(self, sums: Sequence[float], texts: int) -> list[float]:
        """Of ``texts`` texts with these sums, in the order of ``names``."""

    def signature(self, references: int) -> str:
        """What another must know to compute the same. references: of each text; -1: not alike."""


class TextScores:
    """Several scores of the same texts. Errors: ConfigError for a name that is not in ``SCORES``."""

    def __init__(self, names: Sequence[str]):
        self._scores = {name: SCORES[name]() for name in names_of(" ".join(names))}
        self.count = 3 + sum(score.count for score in self._scores.values())

    def sums(self, texts: Sequence[str], references: References) -> list[float]:
        """``count`` whole numbers, which add up over texts: how many texts, references, their squares; then each's."""
        several = [len(of_text) for of_text in references]
        assert len(several) == len(texts) and all(several), "each text has a reference"
        sums = [float(len(texts)), float(sum(several)), float(sum(n * n for n in several))]
        for score in self._scores.values():
            sums += score.sums(texts, references) if texts else [0.0] * score.count
        return sums

    def scores(self, sums: Sequence[float]) -> dict[str, float]:
        found: dict[str, float] = {}
        first = 3
        for score in self._scores.values():
            values = score.scores(sums[first : first + score.count], int(sums[0]))
            found |= dict(zip(score.names, values, strict=True))
            first += score.count
        return found

    def signatures(self, sums: Sequence[float] = (1.0, 1.0, 1.0)) -> dict[str, str]:
        """Of each score, by its name in ``SCORES``. sums: without them, each text has one reference."""
        texts, references, squares = sums[:3]
        alike = references * references == texts * squares
        each = int(references / max(1.0, texts)) if alike else -1
        return {name: score.signature(each) for name, score in self._scores.items()}


def names_of(text: str) -> tuple[str, ...]:
    """``"bleu chrf"``: names of ``SCORES``, each once. Errors: ConfigError."""
    names = tuple(dict.fromkeys(text.replace(",", " ").split()))
    if strangers := [name for name in names if name not in SCORES]:
        raise ConfigError(f"no score {strangers[0]!r}; there are: {', '.join(SCORES)}")
    return names


def score_names(text: str) -> tuple[str, ...]:
    """Under which names the results of ``"bleu rouge"`` stand: bleu, rouge1, rouge2, rougeL."""
    return tuple(name for of in names_of(text) for name in RESULTS[of])


class _Sacre:
    """BLEU or chrF. Their sums of single texts are where sacreBLEU's own significance tests take them from."""

    def __init__(self, name: str, **how: Any):
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        self.names = RESULTS[name]
        # force: no word about tokenised text
        self._metric: Any = CHRF() if name == "chrf" else BLEU(force=True, **how)
        self.count = len(self._metric._extract_corpus_statistics([""], [[""]])[0])

    def sums(self, texts: Sequence[str], references: References) -> list[float]:
        most = max(map(len, references))
        by_place = [[one[place] if place < len(one) else None for one in references] for place in range(most)]
        rows = self._metric._extract_corpus_statistics(texts, by_place)
        return [float(sum(column)) for column in zip(*rows, strict=True)]

    def scores(self, sums: Sequence[float], texts: int) -> list[float]:
        return [self._metric._compute_score_from_stats([int(value) for value in sums]).score]

    def signature(self, references: int) -> str:
        self._metric.num_refs = references
        return str(self._metric.get_signature())


class _Rouge:
    names = ("rouge1", "rouge2", "rougeL")
    count = 6

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer  # which takes seconds

        self._scorer = RougeScorer(self.names, tokenizer=WordTokenizer())

    def sums(self, texts: Sequence[str], references: References) -> list[float]:
        sums = [0.0] * self.count
        for text, of_text in zip(texts, references, strict=True):
            found = [self._scorer.score(reference, text) for reference in of_text]
            best = max(found, key=lambda of_reference: of_reference["rouge1"].fmeasure)  # the first of equal ones
            for place, name in enumerate(self.names):
                for part, whole in enumerate(_in_two(best[name].fmeasure)):
                    sums[2 * place + part] += whole
        return sums

    def scores(self, sums: Sequence[float], texts: int) -> list[float]:
        high, low = sums[::2], sums[1::2]
        return [100 * _joined(*parts) / max(1, texts) for parts in zip(high, low, strict=True)]

    def signature(self, references: int) -> str:
        from importlib.metadata import version

        several = "var" if references < 0 else references
        how = "best:rouge1|f-measure|mean|stem:no|tok:letters+marks+digits,lower,NFC,han+kana apart"
        return f"nrefs:{several}|{how}|version:rouge-score {version('rouge-score')}"


class WordTokenizer:
    """Words of lower-cased text: letters with their marks and digits, of any script; what else there is parts them.

    On ASCII as rouge-score's own, which drops all else. Han and kana, written without spaces, are words one by one.
    """

    def __init__(self) -> None:
        import regex  # of Unicode's classes

        alone = r"\p{Han}\p{Hiragana}\p{Katakana}"
        self._words = regex.compile(rf"(?V1)[{alone}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{alone}]]+")

    def tokenize(self, text: str) -> list[str]:
        return self._words.findall(normalize("NFC", text).lower())


_HALF = float(1 << 26)  # two of them hold the 53 bits of a double


def _in_two(share: float) -> tuple[float, float]:
    """A number from 0 to 1 as two whole numbers, of which 2**27 add up without rounding."""
    high = float(int(share * _HALF))
    return high, float(round((share * _HALF - high) * _HALF))


def _joined(high: float, low: float) -> float:
    return (high + low / _HALF) / _HALF


SCORES: dict[str, Any] = {  # name -> what makes a TextScore
    "bleu": partial(_Sacre, "bleu"),
    "bleu_tokenized": partial(_Sacre, "bleu_tokenized", lowercase=True, tokenize="none"),
    "chrf": partial(_Sacre, "chrf"),
    "rouge": _Rouge,
}
RESULTS = {"bleu": ("bleu",), "bleu_tokenized": ("bleu_tokenized",), "chrf": ("chrf",), "rouge": _Rouge.names}
