"""BLEU, chrF and ROUGE: of any split of the texts what the libraries say of all at once."""

import math

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from hvdtrain.errors import ConfigError
from hvdtrain.tasks.text_scores import SCORES, TextScores, WordTokenizer, names_of, score_names

WORDS = [
    "le",
    "chien",
    "œuvre",
    "Été",
    "狗在跑",
    "ひと",
    "собака",
    "हिन्दी",
    "(hi)",
    "a.",
    "don't",
    "3,5",
    "👩‍🔬",
    "",
    "\u2028",
]
TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
PAIRS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=9)
ALL = TextScores(list(SCORES))


def in_parts(scores: TextScores, pairs: list[tuple[str, list[str]]], parts: int) -> list[float]:
    """The sums of parts of the texts, of which some may be empty, added up the other way round."""
    sums = [
        scores.sums([text for text, _ in mine], [of for _, of in mine])
        for mine in (pairs[n::parts] for n in range(parts))
    ]
    return [sum(column) for column in zip(*reversed(sums), strict=True)]


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.integers(1, 11))
def test_any_split_gives_the_librarys_score_of_the_whole_to_the_last_bit(pairs: list, parts: int):
    texts, references = [text for text, _ in pairs], [of for _, of in pairs]
    sums = in_parts(ALL, pairs, parts)
    found = ALL.scores(sums)
    by_place = [
        [of[place] if place < len(of) else None for of in references] for place in range(max(map(len, references)))
    ]
    assert found["bleu"] == sacrebleu.corpus_bleu(texts, by_place).score
    tokenized = {"lowercase": True, "tokenize": "none", "force": True}
    assert found["bleu_tokenized"] == sacrebleu.corpus_bleu(texts, by_place, **tokenized).score
    assert found["chrf"] == sacrebleu.corpus_chrf(texts, by_place).score
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=WordTokenizer())
    best = [
        max((scorer.score(one, text) for one in of), key=lambda score: score["rouge1"].fmeasure) for text, of in pairs
    ]
    for name in scorer.rouge_types:
        mean = 100 * math.fsum(score[name].fmeasure for score in best) / len(pairs)
        assert found[name] == pytest.approx(mean, rel=1e-14, abs=1e-14)
    assert found == ALL.scores(in_parts(ALL, pairs, 1))


def test_signatures_are_the_librarys():
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    for of_texts in ([["a b"], ["c"]], [["a b", "c"], ["d", "e"]], [["a b", "c"], ["d"]]):
        sums = ALL.sums(["x", "y"], of_texts)
        by_place = [
            [of[place] if place < len(of) else None for of in of_texts] for place in range(max(map(len, of_texts)))
        ]
        for metric in (bleu, chrf):
            metric.corpus_score(["x", "y"], by_place)
        found = ALL.signatures(sums)
        assert (found["bleu"], found["chrf"]) == (str(bleu.get_signature()), str(chrf.get_signature()))
        assert "|case:lc|eff:no|tok:none|" in found["bleu_tokenized"]
        assert found["rouge"].startswith(found["bleu"].partition("|")[0] + "|best:rouge1|")
    assert ALL.signatures()["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_rouge_takes_the_reference_with_the_best_rouge_1_for_all_three():
    """As SciTLDR's evaluation does: not the best reference of each kind."""
    scores = TextScores(["rouge"])
    first, second = "b a d c x", "a b y z w v u t s"  # the first has more words in common, the second a pair of words
    found = scores.scores(scores.sums(["a b c d"], [[first, second]]))
    assert found == scores.scores(scores.sums(["a b c d"], [[first]]))
    assert found["rouge2"] == 0 < scores.scores(scores.sums(["a b c d"], [[second]]))["rouge2"]


@given(st.text(st.characters(max_codepoint=127)))
def test_on_ascii_words_are_those_of_rouge_score(text: str):
    assert WordTokenizer().tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("L'Œuvre d'été", ["l", "œuvre", "d", "été"]),
        ("e\u0301te\u0301", ["été"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("狗在跑 RUN跑", ["狗", "在", "跑", "run", "跑"]),
        ("カレーが 好き", ["カ", "レ", "ー", "が", "好", "き"]),
        ("Собака, 3.5!", ["собака", "3", "5"]),
    ],
)
def test_words_of_other_scripts_are_not_dropped(text: str, words: list[str]):
    assert WordTokenizer().tokenize(text) == words


def test_names():
    assert names_of("chrf, bleu chrf") == ("chrf", "bleu")
    assert score_names("rouge bleu") == ("rouge1", "rouge2", "rougeL", "bleu")
    assert names_of("") == ()
    with pytest.raises(ConfigError, match=r"no score 'blue'; there are: bleu, bleu_tokenized, chrf, rouge"):
        TextScores(["bleu", "blue"])


def test_texts_that_are_all_empty_score_nothing_and_none_at_all_are_no_error():
    for texts, references in ((["", ""], [[""], ["a"]]), ([], [])):
        assert set(ALL.scores(ALL.sums(texts, references)).values()) == {0.0}
