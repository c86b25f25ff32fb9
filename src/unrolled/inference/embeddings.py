"""What a model has learnt about its tokens: nearest neighbours, and a map of them in two dimensions.

A token's vector is its row of the embedding, or where inputs are one-hot its column of the first matrix.
"""

import numpy as np
import torch

from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError
from unrolled.nn.model import LanguageModel

_FEWEST_ON_A_MAP = 5


@torch.inference_mode()
def neighbours(model: LanguageModel, tokenizer: Tokenizer, word: str, k: int = 10) -> list[tuple[str, float]]:
    """The k tokens whose vectors point most nearly where that of `word` does.

    Args:
        model: any language model.
        tokenizer: the model's.
        word: one token.
        k: how many; no more than there are others.

    Returns:
        Pairs of token and cosine similarity, by falling similarity; `word` itself is not among them.

    Raises:
        UnrolledError: k is less than 1, or `word` is not one token of the vocabulary.
    """
    if k < 1:
        raise UnrolledError(f"-k must be at least 1, not {k}")
    id = tokenizer.id_of(word)
    vectors = torch.nn.functional.normalize(model.token_vectors.float(), dim=-1)
    similarity = vectors @ vectors[id]
    similarity[id] = -torch.inf
    values, ids = similarity.topk(min(k, len(tokenizer) - 1))
    return [(tokenizer.token(other), value) for other, value in zip(ids.tolist(), values.tolist(), strict=True)]


@torch.inference_mode()
def map_tokens(
    model: LanguageModel, tokenizer: Tokenizer, most: int = 300, seed: int = 0
) -> tuple[list[str], np.ndarray]:
    """The commonest tokens laid out so that near ones have like vectors, by t-SNE over cosine distance.

    van der Maaten & Hinton 2008, "Visualizing data using t-SNE". Ids fall in count, so the commonest come first; those
    of BPE come in the order in which they were merged.

    Args:
        model: any language model.
        tokenizer: the model's.
        most: how many tokens; no more than there are.
        seed: of the layout.

    Returns:
        N tokens and their places (N, 2).

    Raises:
        UnrolledError: there are fewer than five tokens, or scikit-learn is missing.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UnrolledError("a map needs scikit-learn: pip install 'unrolled[plots]'") from error
    count = min(most, len(tokenizer))
    if count < _FEWEST_ON_A_MAP:
        raise UnrolledError(f"a map takes {_FEWEST_ON_A_MAP} tokens or more, not {count}")
    vectors = model.token_vectors[:count].float().cpu().numpy()
    layout = TSNE(
        metric="cosine", init="random", perplexity=min(30, (count - 1) / 3), random_state=seed, learning_rate="auto"
    )
    return [tokenizer.token(id) for id in range(count)], layout.fit_transform(vectors)
