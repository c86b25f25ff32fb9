"""The two corpora that need no file and no network: `stdlib`, read from this Python, and `toy`, drawn from a grammar.

`toy` is a probabilistic grammar without ambiguity: a sentence has one derivation, so its probability is the product of
the choices made, and the entropy of the language is a sum over choices. The number of the subject has to be kept in
mind over any relative clause until the verb agrees with it, so the least perplexity asks for memory:

    the girls that see a dog that hears the old cats walk here
        ^^^^^                                        ^^^^
"""

import ast
import math
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

Rule = list[tuple[float, list[str]]]


def _equally(words: str) -> Rule:
    choices = words.split()
    return [(1 / len(choices), [word]) for word in choices]


GRAMMAR: dict[str, Rule] = {
    "SENTENCE": [(0.5, ["ONE", "DOES", "END"]), (0.5, ["MANY", "DO", "END"])],
    "END": [(0.6, []), (0.4, ["PLACE"])],
    "OBJECT": [(0.6, ["ONE"]), (0.4, ["MANY"])],
    "ONE": [(0.7, ["the", "ADJECTIVES", "NOUN", "THAT-DOES"]), (0.3, ["a", "ADJECTIVES", "NOUN", "THAT-DOES"])],
    "MANY": [(0.8, ["the", "ADJECTIVES", "NOUNS", "THAT-DO"]), (0.2, ["ADJECTIVES", "NOUNS", "THAT-DO"])],
    "ADJECTIVES": [(0.75, []), (0.25, ["ADJECTIVE", "ADJECTIVES"])],
    "THAT-DOES": [(0.75, []), (0.25, ["that", "SEES", "OBJECT"])],
    "THAT-DO": [(0.75, []), (0.25, ["that", "SEE", "OBJECT"])],
    "DOES": _equally("walks sleeps sings runs waits"),
    "DO": _equally("walk sleep sing run wait"),
    "SEES": _equally("sees hears likes"),
    "SEE": _equally("see hear like"),
    "NOUN": _equally("dog cat girl boy bird"),
    "NOUNS": _equally("dogs cats girls boys birds"),
    "ADJECTIVE": _equally("old young small happy"),
    "PLACE": _equally("here there outside"),
}
"""Each symbol's expansions with their probabilities; what is not a key is a word."""

TOY_SENTENCES = {"train": 24_000, "valid": 2_000, "test": 6_000}
_TOY_SEED = {"train": 1, "valid": 2, "test": 3}


def toy_text(split: str) -> str:
    """The sentences of one split of `toy`, a line each. The same on every machine and in every version of Python."""
    draw = random.Random(_TOY_SEED[split])
    return "".join(" ".join(_words("SENTENCE", draw)) + "\n" for _ in range(TOY_SENTENCES[split]))


def _words(symbol: str, draw: random.Random) -> Iterator[str]:
    if symbol not in GRAMMAR:
        yield symbol
        return
    probabilities, expansions = zip(*GRAMMAR[symbol], strict=True)
    (expansion,) = draw.choices(expansions, probabilities)
    for part in expansion:
        yield from _words(part, draw)


def toy_entropy_rate() -> float:
    """Nats per token of `toy`, line ends counted: e to this is the least perplexity that any model can have.

    With H(A) the entropy of what symbol A derives and L(A) its mean length, H = own choice + mean of H over the parts,
    and L likewise: two linear systems over the grammar's symbols (Grenander 1967; here without ambiguity, so that
    derivations and sentences are one to one).
    """
    symbols = list(GRAMMAR)
    mean_parts = np.zeros((len(symbols), len(symbols)))
    own_entropy, own_words = np.zeros(len(symbols)), np.zeros(len(symbols))
    for row, symbol in enumerate(symbols):
        for probability, expansion in GRAMMAR[symbol]:
            own_entropy[row] -= probability * math.log(probability)
            for part in expansion:
                if part in GRAMMAR:
                    mean_parts[row, symbols.index(part)] += probability
                else:
                    own_words[row] += probability
    entropy, length = np.linalg.solve(np.eye(len(symbols)) - mean_parts, np.stack([own_entropy, own_words], axis=1)).T
    start = symbols.index("SENTENCE")
    return float(entropy[start] / (length[start] + 1))


def stdlib_text() -> dict[str, str]:
    """train, valid and test of `stdlib`: the documentation that every Python carries, a sentence a line.

    The language reference in `pydoc_data.topics` and the docstrings of the standard library's sources, read with `ast`
    and never imported; paragraphs of prose only, lower case, punctuation set apart by spaces. Of the distinct texts in
    sorted order, every twentieth is for valid and every twentieth for test.
    """
    from pydoc_data.topics import topics

    documents = sorted(set(topics.values()) | set(_docstrings(Path(sysconfig.get_paths()["stdlib"]))))
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for number, document in enumerate(documents):
        splits[{9: "valid", 19: "test"}.get(number % 20, "train")].extend(_sentences(document))
    return {split: "\n".join(lines) + "\n" for split, lines in splits.items()}


_NOT_ENGLISH = re.compile(r"(^|/)(test|tests|idlelib|lib2to3|turtledemo|site-packages|pydoc_data|__pycache__)/")


def _docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if _NOT_ENGLISH.search(path.relative_to(folder).as_posix()):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template or a test's bad file
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield docstring


def _sentences(document: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", document):
        text = " ".join(paragraph.split())
        letters = sum(character.isalpha() or character in " ,.'" for character in text)
        if letters < 0.9 * len(text):  # code, tables, rules
            continue
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"'])", text):
            words = re.findall(r"\w+(?:'\w+)?|[^\w\s]", sentence.lower())
            if len(words) > 2:
                yield " ".join(words)
