"""One-sentence movie reviews from a small grammar whose sentiment is known.

    review  = [opening] "the" aspect opinion ["and" "the" aspect opinion] [verdict] "."
    opinion = verb [degree] adjective
    verdict = "," "i" ("loved" | "hated") "it"

All opinion words of a review are positive, or all are negative; half of the reviews are of each
kind.
"""

import re
from collections.abc import Sequence

import numpy as np

OPENINGS = (
    "",
    "honestly ,",
    "in short ,",
    "to be fair ,",
    "after all ,",
    "for once ,",
    "as expected ,",
    "in the end ,",
)
ASPECTS = (
    "film plot cast script music ending acting story dialogue pacing scenery direction humour "
    "finale score premise tone "
    "setting opening photography editing theme sequel"
).split()
VERBS = "is was feels felt seems looks sounds".split()
# "" for none; three of the words are of both sentiments, so that a degree alone tells little.
DEGREES = {
    True: ("", "very", "quite", "truly", "delightfully", "pleasantly"),
    False: ("", "very", "quite", "utterly", "painfully", "sadly"),
}
ADJECTIVES = {
    True: "wonderful great clever moving charming witty funny lovely fresh superb gripping warm".split(),
    False: "awful dull clumsy boring bland terrible silly ugly stale weak tedious cold".split(),
}
FEELINGS = {
    True: "loved enjoyed liked admired adored praised".split(),
    False: "hated regretted disliked despised loathed resented".split(),
}
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
LONGEST = 24  # tokens of the longest review with its start and end


def _pick(rng, words: Sequence[str]) -> str:
    return words[rng.integers(len(words))]


def prompt(rng: np.random.Generator) -> str:
    """The start of a review, up to where its sentiment shows."""
    return f"{_pick(rng, OPENINGS)} the {_pick(rng, ASPECTS)}".strip()


def completion(rng: np.random.Generator, positive: bool) -> str:
    """The rest of a review, with the sentiment asked for."""

    def opinion():
        verb = _pick(rng, VERBS)
        return f"{verb} {_pick(rng, DEGREES[positive])} {_pick(rng, ADJECTIVES[positive])}"

    second = f"and the {_pick(rng, ASPECTS)} {opinion()}" if rng.random() < 0.75 else ""
    verdict = f", i {_pick(rng, FEELINGS[positive])} it" if rng.random() < 0.75 else ""
    # Split and joined: parts may be empty, and two spaces are no token.
    return " ".join(f"{opinion()} {second} {verdict} .".split())


def review(rng: np.random.Generator) -> str:
    """A full review of random sentiment."""
    return f"{prompt(rng)} {completion(rng, bool(rng.integers(2)))}"


def garbled(rng: np.random.Generator, text: str) -> str:
    """The same text with one word replaced by another of the vocabulary: usually no longer a
    review.
    """
    words = text.split()
    words[rng.integers(len(words))] = _pick(rng, VOCABULARY[3:])
    return " ".join(words)


def sentiment(text: str) -> bool | None:
    """True or False for a grammatical review that is positive or negative; None for anything else.

    >>> sentiment("honestly , the plot was very dull and the cast is weak ."), sentiment("the film was great , i hated it .")
    (False, None)
    """
    for positive, pattern in _PATTERNS.items():
        if pattern.fullmatch(text):
            return positive
    return None


def tokenizer():
    """A `transformers` tokenizer whose tokens are the grammar's words.

    >>> tokenizer().decode(tokenizer().encode("the film is great .", add_special_tokens=False))
    'the film is great .'
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=PAD)
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, VOCABULARY.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _vocabulary() -> tuple[str, ...]:
    of_sentiment = (words for table in (DEGREES, ADJECTIVES, FEELINGS) for words in table.values())
    parts = (OPENINGS, ASPECTS, VERBS, *of_sentiment, ["the and , i it ."])
    # Sorted, so that ids are the same in every process: the order of a set of texts is not.
    words = sorted({word for part in parts for text in part for word in text.split()})
    return (PAD, BOS, EOS, *words)


def _pattern(positive: bool) -> re.Pattern:

    def one(words):
        return "(?:" + "|".join(re.escape(w) for w in words if w) + ")"

    opinion = f" {one(VERBS)}(?: {one(DEGREES[positive])})? {one(ADJECTIVES[positive])}"
    aspect = f"the {one(ASPECTS)}"
    return re.compile(
        f"(?:{one(OPENINGS)} )?{aspect}{opinion}(?: and {aspect}{opinion})?(?: , i "
        f"{one(FEELINGS[positive])} it)? \\."
    )


VOCABULARY = _vocabulary()
_PATTERNS = {positive: _pattern(positive) for positive in (True, False)}
