"""A recipe's training in JAX: lax.scan over time, jit over the step. A subject of `unrolled bench`."""

import json
import sys
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

work = json.loads(sys.argv[1])
model, training = work["recipe"]["model"], work["recipe"]["training"]
if training["optimizer"] != "sgd":
    sys.exit("only recipes with SGD")
ids, vocab_size = np.load(work["ids"]), work["vocab_size"]
batch_size, num_steps, keep = training["batch_size"], training["num_steps"], 1 - model["dropout"]
one_hot, lstm = model["embedding_size"] == 0, model["cell"] == "lstm"
sizes = [model["embedding_size"] or vocab_size, *model["hidden_sizes"]]
gates = {"lstm": 4, "elman": 1}[model["cell"]]
activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[model["activation"]]


def drawn(key, *shape):
    return jax.random.uniform(key, shape, minval=-model["init_scale"], maxval=model["init_scale"])


def parameters():
    keys = iter(jax.random.split(jax.random.key(1), 2 + 2 * len(sizes)))
    layers = [
        {"ih": drawn(next(keys), e, gates * h), "hh": drawn(next(keys), h, gates * h), "b": jnp.zeros(gates * h)}
        for e, h in pairwise(sizes)
    ]
    decoder = {"w": drawn(next(keys), sizes[-1], vocab_size), "b": jnp.zeros(vocab_size)}
    return {
        "embedding": [] if one_hot else drawn(next(keys), vocab_size, sizes[0]),
        "layers": layers,
        "decoder": decoder,
    }


def dropped(x, key):
    return x if keep == 1 else jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0)


def layer_step(hh, state, projected):
    h, c = state
    z = projected + h @ hh
    if not lstm:
        h = activation(z)
        return (h, c), h
    i, f, g, o = jnp.split(z, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def loss(params, states, inputs, targets, key):
    keys = jax.random.split(key, len(params["layers"]) + 1)
    x, after = inputs, []
    if not one_hot:
        x = dropped(params["embedding"][inputs], keys[0])
    for number, (layer, state) in enumerate(zip(params["layers"], states, strict=True)):
        projected = (layer["ih"][x] if one_hot and number == 0 else x @ layer["ih"]) + layer["b"]
        state, x = lax.scan(partial(layer_step, layer["hh"]), state, projected)
        x = dropped(x, keys[number + 1])
        after.append(state)
    log_probs = jax.nn.log_softmax(x @ params["decoder"]["w"] + params["decoder"]["b"])
    nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1).sum()
    return nll / batch_size, after


@partial(jax.jit, donate_argnums=(0, 1))
def step(params, states, inputs, targets, key):
    (value, states), gradients = jax.value_and_grad(loss, has_aux=True)(params, states, inputs, targets, key)
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradients)))
    rate = training["learning_rate"] * jnp.minimum(1.0, training["max_grad_norm"] / norm)
    return jax.tree.map(lambda p, g: p - rate * g, params, gradients), states, value


def main():
    length = len(ids) // batch_size
    streams = ids[: length * batch_size].reshape(batch_size, length).T.astype(np.int32)
    params, key, at = parameters(), jax.random.key(2), 0
    states = [(jnp.zeros((batch_size, h)), jnp.zeros((batch_size, h))) for h in sizes[1:]]
    for line in sys.stdin:
        for _ in range(int(line)):
            at = at if at + num_steps < length else 0
            inputs, targets = streams[at : at + num_steps], streams[at + 1 : at + 1 + num_steps]
            key, own = jax.random.split(key)
            params, states, value = step(params, states, inputs, targets, own)
            value.item()
            at += num_steps
        print(line.strip(), flush=True)


main()
