"""A recipe's training in Keras 3 on TensorFlow: unrolled layers, tf.function, XLA. A subject of `unrolled bench`."""

import json
import os
import sys

os.environ["KERAS_BACKEND"], os.environ["TF_CPP_MIN_LOG_LEVEL"] = "tensorflow", "3"
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

work = json.loads(sys.argv[1])
model, training = work["recipe"]["model"], work["recipe"]["training"]
if training["optimizer"] != "sgd":
    sys.exit("only recipes with SGD")
ids, vocab_size = np.load(work["ids"]), work["vocab_size"]
batch_size, num_steps = training["batch_size"], training["num_steps"]
one_hot, lstm = model["embedding_size"] == 0, model["cell"] == "lstm"
uniform = keras.initializers.RandomUniform(-model["init_scale"], model["init_scale"])
options = {"kernel_initializer": uniform, "recurrent_initializer": uniform}
options |= {"return_sequences": True, "return_state": True}
make = keras.layers.LSTM if lstm else keras.layers.SimpleRNN
options |= {"unit_forget_bias": False} if lstm else {"activation": model["activation"]}
layers = [make(size, unroll=True, **options) for size in model["hidden_sizes"]]
embedding = None if one_hot else keras.layers.Embedding(vocab_size, model["embedding_size"], uniform)
dropout = keras.layers.Dropout(model["dropout"])
decoder = keras.layers.Dense(vocab_size, kernel_initializer=uniform)


def forward(inputs, states):
    x = tf.one_hot(inputs, vocab_size) if one_hot else dropout(embedding(inputs), training=True)
    after = []
    for layer, state in zip(layers, states, strict=True):
        x, *state = layer(x, initial_state=state)
        x = dropout(x, training=True)
        after.append(state)
    return decoder(x), after


@tf.function(jit_compile=True)
def step(inputs, targets, states):
    variables = [v for part in (embedding, *layers, decoder) if part is not None for v in part.trainable_variables]
    with tf.GradientTape() as tape:
        logits, states = forward(inputs, states)
        nll = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits))
        cost = nll / batch_size
    gradients = tape.gradient(cost, [v.value for v in variables])
    gradients, _ = tf.clip_by_global_norm(gradients, training["max_grad_norm"])
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.value.assign_sub(training["learning_rate"] * tf.convert_to_tensor(gradient))
    return cost, states


def main():
    length = len(ids) // batch_size
    streams, at = ids[: length * batch_size].reshape(batch_size, length).astype(np.int32), 0
    states = [[tf.zeros((batch_size, h))] * (2 if lstm else 1) for h in model["hidden_sizes"]]
    forward(tf.constant(streams[:, :num_steps]), states)
    for line in sys.stdin:
        for _ in range(int(line)):
            at = at if at + num_steps < length else 0
            inputs, targets = streams[:, at : at + num_steps], streams[:, at + 1 : at + 1 + num_steps]
            cost, states = step(tf.constant(inputs), tf.constant(targets), states)
            cost.numpy()
            at += num_steps
        print(line.strip(), flush=True)


main()
