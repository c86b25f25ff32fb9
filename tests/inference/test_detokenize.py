"""Text for people."""

import pytest

from unrolled.inference.detokenize import detokenize


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("he does n't say , i 'm told , what it 's worth .", "he doesn't say, i'm told, what it's worth."),
        ("`` it costs $ N ( or less ) , '' she said", '"it costs $N (or less)," she said'),
        ("the banks ' rates rose N % ; why ?", "the banks' rates rose N%; why?"),
        ("an <unk> of mr. <unk>", "an <unk> of mr. <unk>"),
        ("two lines .\nthe second .", "two lines.\nthe second."),
        ("", ""),
    ],
)
def test_tokens_become_text(tokens: str, text: str) -> None:
    assert detokenize(tokens) == text
