"""Neighbours against plain cosine, and a map whose tokens are the commonest."""

import numpy as np
import pytest
import torch

from unrolled import Run, UnrolledError
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.inference.embeddings import map_tokens, neighbours
from unrolled.nn.model import LanguageModel


def test_neighbours_are_those_of_greatest_cosine(toy_run: Run) -> None:
    vectors = toy_run.model.token_vectors.detach()
    id = toy_run.tokenizer.vocabulary.index("dog")
    cosine = torch.nn.functional.cosine_similarity(vectors, vectors[id], dim=1)
    order = [other for other in cosine.argsort(descending=True).tolist() if other != id]
    found = neighbours(toy_run.model, toy_run.tokenizer, "dog", 4)
    assert [word for word, _ in found] == [toy_run.tokenizer.token(other) for other in order[:4]]
    assert [value for _, value in found] == pytest.approx(cosine[order[:4]].tolist(), rel=1e-5)
    everything = neighbours(toy_run.model, toy_run.tokenizer, "dog", 1_000)
    assert len(everything) == len(toy_run.tokenizer) - 1
    assert "dog" not in dict(everything)


def test_words_of_one_kind_are_near_each_other(toy_run: Run) -> None:
    near = [word for word, _ in neighbours(toy_run.model, toy_run.tokenizer, "dog", 3)]
    assert len({"cat", "girl", "boy", "bird"} & set(near)) >= 2, near


def test_one_hot_models_have_vectors_too() -> None:
    model = LanguageModel(6, 0, [4], cell="elman")
    assert torch.equal(model.token_vectors, model.layers[0].weight_ih.T)


def test_a_word_that_is_no_single_token_is_named(toy_run: Run) -> None:
    with pytest.raises(UnrolledError, match="'dgo' is not in the model's vocabulary; did you mean 'dog'"):
        neighbours(toy_run.model, toy_run.tokenizer, "dgo")
    with pytest.raises(UnrolledError, match="k must be at least 1, not 0"):
        neighbours(toy_run.model, toy_run.tokenizer, "dog", 0)
    pieces = prepare(open_corpus("toy"), Vocabulary("bpe", 300)).tokenizer
    assert pieces.token(pieces.id_of("dog")) == " dog"
    with pytest.raises(UnrolledError, match="'zebra' is not one token but"):
        pieces.id_of("zebra")


def test_a_map_places_the_commonest_tokens_and_its_seed_decides_it(toy_run: Run) -> None:
    tokens, places = map_tokens(toy_run.model, toy_run.tokenizer, most=20, seed=3)
    assert tokens == toy_run.tokenizer.vocabulary[:20]
    assert places.shape == (20, 2)
    assert np.isfinite(places).all()
    np.testing.assert_array_equal(map_tokens(toy_run.model, toy_run.tokenizer, most=20, seed=3)[1], places)
    with pytest.raises(UnrolledError, match="takes 5 tokens or more, not 4"):
        map_tokens(toy_run.model, toy_run.tokenizer, most=4)
