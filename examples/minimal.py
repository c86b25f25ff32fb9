"""The training of `unrolled train`, on one page without the command: text in, perplexity and a sample out.

python examples/minimal.py [TEXT FILE]       (the embedded corpus when left out; two minutes on two cores)
"""

import math
import sys

import torch

from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.inference.evaluate import evaluate_exact
from unrolled.inference.generate import generate
from unrolled.nn.loss import loss
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import detach

BATCH_SIZE, NUM_STEPS, EPOCHS, LEARNING_RATE, MAX_GRAD_NORM = 20, 20, 4, 1.0, 5.0

torch.manual_seed(1)
corpus = open_corpus(sys.argv[1] if len(sys.argv) > 1 else "stdlib")  # train, valid, test
dataset = prepare(corpus, Vocabulary("word", size=10_000, min_count=2))  # ids of each, and the tokenizer
windows = Windows(dataset.ids["train"], BATCH_SIZE, NUM_STEPS)  # (T, B) windows of B parallel streams
model = LanguageModel(len(dataset.tokenizer), embedding_size=200, hidden_sizes=[200])
optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

for epoch in range(1, EPOCHS + 1):
    model.train()
    state, nll_nats, tokens = model.initial_state(BATCH_SIZE), 0.0, 0
    for inputs, targets in windows:
        logits, state = model(inputs, detach(state))  # the state goes on, its gradient does not
        nll, count = loss(logits, targets)
        (nll / BATCH_SIZE).backward()  # summed over time, averaged over streams
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if not tokens and epoch == 1:
            print(f"before training: {nll.item() / count:.4f} nats a token; ln V = {math.log(model.vocab_size):.4f}")
        nll_nats += nll.item()
        tokens += count
    valid = evaluate_exact(model, dataset.ids["valid"])
    print(f"epoch {epoch}: train perplexity {math.exp(nll_nats / tokens):.2f}, valid {valid.perplexity:.2f}")

print(f"test perplexity {evaluate_exact(model, dataset.ids['test']).perplexity:.2f}")
print("".join(generate(model, dataset.tokenizer, length=50, temperature=0.8, seed=1)))
