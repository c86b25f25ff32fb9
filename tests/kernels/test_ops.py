"""The native kernels agree with their plain twins, values and gradients, over odd shapes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, floats, integers, sampled_from
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unrolled.kernels import build, ops, step, update
from unrolled.nn.cells import CELLS, Cell, State
from unrolled.nn.dropout import Dropout, dropout_plain
from unrolled.nn.loss import decoder_loss, token_nll, token_nll_plain
from unrolled.nn.model import LanguageModel
from unrolled.nn.rounding import rounded
from unrolled.nn.stream import Stream
from unrolled.nn.unroll import unroll, unroll_native, unroll_plain
from unrolled.training.optim import clip_and_step

pytestmark = pytest.mark.skipif(build.library() is None, reason="the kernels are not built: unrolled kernels build")

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("lstm", {}),
    ("lstm", {"join": "add"}),
    ("gru", {}),
    ("elman", {}),
    ("elman", {"activation": "relu", "join": "add"}),
]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def most_kept(count: int) -> Iterator[None]:
    """So many exponentials are kept in f32 for the backward pass; beyond they are made again."""
    before, ops.MOST_KEPT = ops.MOST_KEPT, count
    try:
        yield
    finally:
        ops.MOST_KEPT = before


def cell_of(kind: tuple[str, dict[str, Any]], inputs_size: int, hidden_size: int) -> Cell:
    """With biases that are none of them zero."""
    cell = CELLS[kind[0]](inputs_size, hidden_size, **kind[1])
    cell.reset_parameters(hidden_size**-0.5, draw_biases=True)
    return cell


def assert_near(native: list[Tensor], plain: list[Tensor], narrow: bool, limit: float = 1e-2) -> None:
    """f32: each within 1e-5 of its norm. bf16: all together within `limit`, for one may be the rest of a sum."""
    if narrow:
        native, plain = ([torch.cat([tensor.flatten() for tensor in way])] for way in (native, plain))
    for one, other in zip(native, plain, strict=True):
        assert (one - other).norm() <= (limit if narrow else 1e-5) * other.norm() + 1e-6


def gradients(way: Any, cell: Cell, inputs: Tensor, state: State, weights: list[Tensor]) -> list[Tensor]:
    """What comes out, and the gradients of a weighted sum of it by inputs, state and parameters."""
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in (inputs, *state)]
    outputs, after = way(cell, leaves[0], tuple(leaves[1:]))
    total = torch.stack([(tensor * w).sum() for tensor, w in zip((outputs, *after), weights, strict=True)]).sum()
    wanted = [leaf for leaf in leaves if leaf.requires_grad] + list(cell.parameters())
    return [outputs, *after, *torch.autograd.grad(total, wanted)]


@settings(max_examples=120)
@given(
    kind=sampled_from(KINDS),
    narrow=booleans(),
    one_hot=booleans(),
    steps=integers(1, 12),
    batch=integers(1, 40),
    inputs_size=integers(1, 70),
    hidden_size=integers(1, 90),
    workers=integers(1, 3),
    seed=integers(0, 1000),
)
def test_a_recurrent_layer_agrees_with_the_plain_loop(
    kind: tuple[str, dict[str, Any]],
    narrow: bool,
    one_hot: bool,
    steps: int,
    batch: int,
    inputs_size: int,
    hidden_size: int,
    workers: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    cell = cell_of(kind, inputs_size, hidden_size)
    inputs = torch.randn(steps, batch, inputs_size)
    if one_hot:
        inputs = torch.randint(inputs_size, (steps, batch))
    state = tuple(torch.randn_like(tensor) / 2 for tensor in cell.initial_state(batch))
    weights = [torch.randn(steps, batch, hidden_size), *map(torch.randn_like, state)]
    plain = gradients(unroll_plain, cell, inputs, state, weights)
    with threads(workers), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        native = gradients(unroll_native, cell, inputs, state, weights)
    flips = "activation" in kind[1]  # with ReLU a unit near 0 may be rounded to its other side
    assert_near(native, plain, narrow, 0.2 if flips else 1e-2)


class _Product(torch.autograd.Function):
    """x w', every operand rounded to bf16, those of the backward pass too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(rounded(x), rounded(w))
        return rounded(x) @ rounded(w).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (x, w), gradient = ctx.saved_tensors, rounded(gradients[0])
        return gradient @ w, gradient.flatten(0, -2).T @ x.flatten(0, -2)


class _Rounding(TorchFunctionMode):
    """Within it the cells' products are those of rounded operands."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            product = _Product.apply(*args[:2])
            return product if len(args) < 3 or args[2] is None else product + args[2]
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            return _Product.apply(args[0], args[1].T)
        return func(*args, **(kwargs or {}))


@given(
    kind=sampled_from(KINDS),
    steps=integers(1, 12),
    batch=integers(1, 40),
    inputs_size=integers(1, 70),
    hidden_size=integers(1, 90),
    seed=integers(0, 1000),
)
def test_in_bf16_a_recurrent_layer_is_the_plain_loop_with_rounded_operands(
    kind: tuple[str, dict[str, Any]], steps: int, batch: int, inputs_size: int, hidden_size: int, seed: int
) -> None:
    """Each value and gradient by its own norm; and it is not the loop in f32."""
    torch.manual_seed(seed)
    cell = cell_of(kind, inputs_size, hidden_size)
    inputs = torch.randn(steps, batch, inputs_size)
    state = tuple(torch.randn_like(tensor) / 2 for tensor in cell.initial_state(batch))
    weights = [torch.randn(steps, batch, hidden_size), *map(torch.randn_like, state)]
    with torch.autocast("cpu", torch.bfloat16):
        native = gradients(unroll_native, cell, inputs, state, weights)
    plain = gradients(unroll_plain, cell, inputs, state, weights)
    with _Rounding():
        narrow = gradients(unroll_plain, cell, inputs, state, weights)
    for one, other in zip(native, narrow, strict=True):
        assert (one - other).norm() <= 2e-3 * other.norm() + 1e-6
    assert not all(torch.equal(one, other) for one, other in zip(native, plain, strict=True))


@settings(max_examples=60)
@given(
    narrow=booleans(),
    tokens=integers(1, 80) | integers(250, 600),
    hidden_size=integers(1, 70),
    vocab_size=integers(1, 300) | integers(256, 900),
    scale=sampled_from([0.1, 1.0, 3.0]),
    kept=booleans(),
    workers=integers(1, 3),
    seed=integers(0, 1000),
)
def test_the_decoder_with_its_loss_agrees_with_whole_logits(
    narrow: bool, tokens: int, hidden_size: int, vocab_size: int, scale: float, kept: bool, workers: int, seed: int
) -> None:
    torch.manual_seed(seed)
    decoder = nn.Linear(hidden_size, vocab_size)
    hidden, targets = torch.randn(tokens, hidden_size), torch.randint(vocab_size, (tokens,))
    weights = torch.rand(tokens)

    def run(way: Any) -> list[Tensor]:
        leaf = (hidden * scale).requires_grad_()
        nll = way(leaf, decoder, targets)
        return [nll, *torch.autograd.grad((nll * weights).sum(), [leaf, *decoder.parameters()])]

    plain = run(token_nll_plain)
    with (
        threads(workers),
        most_kept(ops.MOST_KEPT if kept else 0),
        torch.autocast("cpu", torch.bfloat16, enabled=narrow),
    ):
        native = run(token_nll)
    assert_near(native, plain, narrow)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("words", [20, 300])
def test_where_the_model_is_sure_of_the_target_nothing_is_left_to_learn_in_bf16_either(
    native: bool, words: int
) -> None:
    torch.manual_seed(0)
    decoder, hidden, targets = nn.Linear(7, words), torch.randn(400, 7, requires_grad=True), torch.full((400,), 5)
    with torch.no_grad():
        decoder.bias[5] = 60.0
    with nullcontext() if native else build.switched_off(), torch.autocast("cpu", torch.bfloat16):
        nll = token_nll(hidden, decoder, targets).sum() / 20
    for gradient in torch.autograd.grad(nll, [hidden, *decoder.parameters()]):
        assert gradient.abs().max() < 1e-8


def test_near_zero_a_layer_keeps_its_digits() -> None:
    for kind in ("lstm", "gru", "elman"):
        cell = CELLS[kind](20, 20)
        for parameter in cell.parameters():
            nn.init.uniform_(parameter, -1e-3, 1e-3)
        inputs = torch.randn(5, 3, 20) * 1e-3
        native, plain = (way(cell, inputs, cell.initial_state(3))[0] for way in (unroll_native, unroll_plain))
        assert (native - plain).norm() <= 1e-5 * plain.norm()


def test_what_the_kernels_cannot_do_twice_they_refuse_to() -> None:
    model, ids = LanguageModel(300, 4, [5]), torch.randint(300, (3, 2))
    for native in (True, False):
        with nullcontext() if native else build.switched_off():
            nll, _, _ = model.nll(ids, ids, model.initial_state(2))
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                torch.autograd.grad(nll, model.get_parameter("decoder.weight"), create_graph=True)


def test_a_gradient_of_weights_that_have_changed_since_is_refused() -> None:
    model, ids = LanguageModel(300, 4, [5]), torch.randint(300, (3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    nll, _, _ = model.nll(ids, ids, model.initial_state(2))
    nll.backward(retain_graph=True)
    clip_and_step(optimizer, 5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll.backward()


def test_another_precision_than_f32_is_pytorchs_and_autocast_to_f16_none_of_ours() -> None:
    torch.manual_seed(0)
    model, ids = LanguageModel(300, 4, [5]), torch.randint(300, (7, 2))
    expected = model.nll(ids, ids, model.initial_state(2))[0]
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(model.nll(ids, ids, model.initial_state(2))[0], expected)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        model = model.to(dtype)
        nll, _, _ = model.nll(ids, ids, model.initial_state(2))
        assert nll.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(nll.float(), expected, rtol=1e-3, atol=1e-3)


def test_a_decoder_without_biases_and_a_hidden_layer_in_bf16_are_taken() -> None:
    hidden, targets = torch.randn(9, 7), torch.randint(300, (9,))
    for decoder in (nn.Linear(7, 300, bias=False), nn.Linear(7, 300)):
        for given_hidden in (hidden, hidden.bfloat16()):
            expected = token_nll_plain(given_hidden.float(), decoder, targets)
            torch.testing.assert_close(token_nll(given_hidden, decoder, targets), expected)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e15])
@pytest.mark.parametrize(("words", "kept"), [(20, 0), (300, 0), (300, 1 << 20)])
def test_no_logits_are_too_large(narrow: bool, size: float, words: int, kept: int) -> None:
    torch.manual_seed(0)
    decoder = nn.Linear(1, words)
    with torch.no_grad():
        decoder.weight.copy_(torch.linspace(-size, size, words).unsqueeze(1))
    hidden = torch.tensor([[1.0], [-1.0], [1.0], [0.0]], requires_grad=True)
    targets = torch.tensor([words - 1, words - 1, 0, 5])
    with most_kept(kept), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        nll = token_nll(hidden, decoder, targets)
    expected = token_nll_plain(hidden, decoder, targets)
    torch.testing.assert_close(nll, expected, rtol=1e-2 if narrow else 1e-5, atol=size / 256 if narrow else 1e-3)
    assert (nll > -1e-4).all()
    nll.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in decoder.parameters())


def test_what_is_not_a_number_stays_so() -> None:
    cell, decoder = CELLS["lstm"](3, 20), nn.Linear(20, 2000)
    inputs = torch.zeros(2, 2, 3)
    inputs[0, 1, 2] = torch.nan
    outputs, _ = unroll_native(cell, inputs, cell.initial_state(2))
    assert outputs[:, 0].isfinite().all()
    assert outputs[:, 1].isnan().all()
    nll = token_nll(outputs[1], decoder, torch.tensor([1, 1]))
    assert nll.isfinite().tolist() == [True, False]


@given(
    size=integers(0, 100),
    p=floats(0.01, 0.99),
    seed=integers(0, (1 << 62) - 1),
)
def test_dropouts_mask_is_that_of_the_plain_twin_forward_and_backward(size: int, p: float, seed: int) -> None:
    x = torch.linspace(1, 2, size, requires_grad=True)
    dropped = torch.ops.unrolled.dropout(x, p, seed)
    torch.testing.assert_close(dropped, dropout_plain(x, p, seed))
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    torch.testing.assert_close(gradient, dropout_plain(torch.ones(size), p, seed))


def test_dropout_drops_the_share_it_is_asked_to_and_no_two_alike() -> None:
    size, p = 1_000_000, 0.35
    masks = [torch.ops.unrolled.dropout(torch.ones(size), p, seed) == 0 for seed in (1, 2, 1 << 40)]
    for mask in masks:
        assert abs(mask.double().mean().item() - p) < 4 * (p * (1 - p) / size) ** 0.5
        neighbours = (mask[1:] & mask[:-1]).double().mean().item()
        assert abs(neighbours - p * p) < 4 * (p * p * (1 - p * p) / size) ** 0.5
    for one, other in ((0, 1), (0, 2), (1, 2)):
        both = (masks[one] & masks[other]).double().mean().item()
        assert abs(both - p * p) < 4 * (p * p * (1 - p * p) / size) ** 0.5
    dropout = Dropout(0.5)
    torch.manual_seed(1)
    first = dropout(torch.ones(100))
    assert not torch.equal(first, dropout(torch.ones(100)))
    torch.manual_seed(1)
    assert torch.equal(first, dropout(torch.ones(100)))
    assert torch.equal(dropout.eval()(torch.ones(100)), torch.ones(100))


def test_dropout_masks_have_nothing_to_do_with_each_other() -> None:
    """Neither those of two steps, nor a mask with itself some places on; an estimate's deviation is 1 / sqrt(N)."""
    torch.manual_seed(0)
    dropout, size = Dropout(0.5), 700 * 650
    first, second = (dropout(torch.ones(size)) - 1 for _ in range(2))
    for shift in (0, 1, 650, 13_000):
        assert abs((first.roll(shift) * second).mean().item()) < 5 * size**-0.5
        assert shift == 0 or abs((first.roll(shift) * first).mean().item()) < 5 * size**-0.5


@given(
    sizes=sampled_from([(1,), (5, 3), (4096, 17, 1), (10_000, 300)]),
    scale=sampled_from([1e-3, 1.0, 1e3]),
    rows=sampled_from([(0, 5), (1, 1), (7, 3), (40, 33), (200, 16)]),
    height=integers(1, 90),
    apart=booleans(),
    workers=integers(1, 3),
)
def test_the_update_is_clipping_and_descent(
    sizes: tuple[int, ...], scale: float, rows: tuple[int, int], height: int, apart: bool, workers: int
) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(size) * scale for size in sizes]
    parameters = [torch.randn(size) for size in sizes]
    ids, of_rows = torch.randint(height, rows[:1]), torch.randn(rows) * scale
    whole = torch.zeros(height, rows[1]).index_add_(0, ids, of_rows)
    few = torch.randn(height, rows[1]), ids, of_rows
    counted = [*gradients, of_rows.clone() if apart else whole]
    expected = torch.cat([tensor.flatten() for tensor in counted]).double().norm()
    factor = 0.1 * min(1.0, 5.0 / expected.item())
    pairs = zip([*parameters, few[0]], [*gradients, whole], strict=True)
    after = [parameter - factor * gradient for parameter, gradient in pairs]
    with threads(workers):
        norm = update.clip_and_descend(parameters, gradients, *few, apart, 5.0, 0.1)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for one, other in zip([*parameters, few[0]], after, strict=True):
        torch.testing.assert_close(one, other)


@given(
    sizes=sampled_from([(1,), (5, 3), (4096, 17, 1), (10_000, 300)]),
    scale=sampled_from([1e-3, 1.0, 1e3]),
    weight_decay=sampled_from([0.0, 0.1]),
    workers=integers(1, 3),
)
def test_the_update_of_adamw_is_clipping_and_pytorchs(
    sizes: tuple[int, ...], scale: float, weight_decay: float, workers: int
) -> None:
    """Over three steps, and one between them that is not taken."""
    torch.manual_seed(0)
    first = [torch.randn(size) for size in sizes]
    ways = [[nn.Parameter(tensor.clone()) for tensor in first] for _ in range(2)]
    native, plain = (torch.optim.AdamW(way, lr=0.1, weight_decay=weight_decay) for way in ways)
    for step_scale in (scale, math.nan, scale, 0.1 * scale):
        gradients = [torch.randn(size) * step_scale for size in sizes]
        norms = []
        for optimizer, way in ((native, ways[0]), (plain, ways[1])):
            for parameter, gradient in zip(way, gradients, strict=True):
                parameter.grad = gradient.clone()
            with threads(workers), nullcontext() if optimizer is native else build.switched_off():
                norms.append(clip_and_step(optimizer, 5.0))
        assert norms[0] == pytest.approx(norms[1], rel=1e-6, nan_ok=True)
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        for name, tensor in plain.state[other].items():
            assert (native.state[one][name] - tensor).norm() <= 1e-5 * tensor.norm()


def test_an_update_of_no_such_row_is_refused() -> None:
    with pytest.raises(IndexError, match="an id"):
        update.clip_and_descend([], [], torch.zeros(3, 2), torch.tensor([1, 3]), torch.ones(2, 2), False, 5.0, 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    parameters, gradients = [torch.ones(9000), torch.ones(3)], [torch.ones(9000), torch.tensor([1.0, value, 1.0])]
    few = torch.ones(5, 4), torch.tensor([1, 1, 3]), torch.ones(3, 4)
    assert not update.clip_and_descend(parameters, gradients, *few, False, 5.0, 0.1).isfinite()
    assert all((parameter == 1).all() for parameter in [*parameters, few[0]])


@settings(max_examples=40)
@given(
    kind=sampled_from(KINDS),
    narrow=booleans(),
    batch=integers(1, 20),
    vocab_size=integers(2, 300),
    embedding_size=sampled_from([0, 1, 7, 32, 40]),
    sizes=sampled_from([(1,), (33,), (16, 16), (20, 7, 40)]),
    workers=integers(1, 3),
)
def test_a_packed_model_reads_as_the_model_does(
    kind: tuple[str, dict[str, Any]],
    narrow: bool,
    batch: int,
    vocab_size: int,
    embedding_size: int,
    sizes: tuple[int, ...],
    workers: int,
) -> None:
    torch.manual_seed(0)
    model = LanguageModel(
        vocab_size,
        embedding_size,
        sizes,
        kind[0],
        init_scale=0.3,
        draw_decoder_bias=True,
        draw_layer_biases=True,
        **kind[1],
    ).eval()
    states = model.initial_state(batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        stream = Stream(model, states)
    with threads(workers), torch.no_grad():
        for _ in range(5):
            ids = torch.randint(vocab_size, (batch,))
            with build.switched_off():
                logits, states = model(ids.unsqueeze(0), states)
            torch.testing.assert_close(
                stream.read(ids), logits[0].log_softmax(-1), rtol=0, atol=0.02 if narrow else 2e-5
            )


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_remembered_of_a_token_is_what_it_was(narrow: bool, workers: int) -> None:
    """Tokens that come again, and others that take their place, are read as by a stream that has seen none of them."""
    torch.manual_seed(0)
    model = LanguageModel(2500, 20, [70, 17], init_scale=0.5).eval()
    with threads(workers), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        stream = Stream(model, model.initial_state(1))
        for number in (3, 3, 1027, 3, 2051, 1027, 0, 1024, 0):
            fresh = Stream(model, stream.states)
            id = torch.tensor([number])
            assert torch.equal(stream.read(id), fresh.read(id))
            assert all(torch.equal(a, b) for a, b in zip(stream.states[0], fresh.states[0], strict=True))


def test_the_likeliest_are_the_largest_log_probabilities() -> None:
    torch.manual_seed(0)
    model = LanguageModel(1003, 20, [24, 17], init_scale=0.5).eval()
    one, other = (Stream(model, model.initial_state(1)) for _ in range(2))
    for id in torch.randint(1003, (6,)):
        values, ids = one.likeliest(id.view(1), 7)
        log_probs = other.read(id.view(1))[0]
        assert torch.equal(ids, log_probs.topk(7).indices)
        torch.testing.assert_close(values, log_probs[ids])


@given(size=integers(1, 200), seed=integers(0, 100), few=booleans())
def test_the_likeliest_are_found_in_order_and_equal_ones_by_their_ids(size: int, seed: int, few: bool) -> None:
    torch.manual_seed(seed)
    model, k = LanguageModel(size, 3, [5]).eval(), 1 + seed % size
    bias = torch.randint(3, (size,)).float() if few else torch.randn(size)
    with torch.no_grad():
        model.get_parameter("decoder.weight").zero_()
        model.get_parameter("decoder.bias").copy_(bias)
    found, places = Stream(model, model.initial_state(1)).likeliest(torch.tensor([0]), k)
    expected = bias.log_softmax(-1).sort(descending=True, stable=True)
    torch.testing.assert_close(found, expected.values[:k])
    assert torch.equal(places, expected.indices[:k])


def test_the_operators_keep_to_pytorchs_rules() -> None:
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    names = torch.ops.unrolled
    weights = leaf(28, 5), leaf(28, 7), leaf(28)
    ids = torch.randint(5, (3, 4))
    layer = ops.Layer("lstm", (torch.randn(28, 5), torch.randn(28, 7), torch.randn(28)))
    packed = step.pack([layer], torch.randn(30, 5), torch.randn(30, 7), torch.randn(30), narrow=False)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (names.recurrent, (leaf(3, 4, 5), leaf(4, 7), leaf(4, 7), *weights, 0, False)),
        (names.recurrent, (ids, leaf(4, 7), None, leaf(7, 5), leaf(7, 7), leaf(7), 2, False)),
        (names.decoder_nll, (leaf(6, 7), leaf(11, 7), leaf(11), torch.randint(11, (6,)), False, True)),
        (names.recurrent, (leaf(3, 4, 5), leaf(4, 7), None, leaf(21, 5), leaf(21, 7), leaf(21), 1, True)),
        (names.recurrent, (leaf(3, 4, 5), leaf(4, 7), None, leaf(7, 5), leaf(7, 7), leaf(7), 3, False)),
        (names.dropout, (leaf(3, 4), 0.5, 7)),
        (names.clip_and_adapt, (*([torch.randn(3)] for _ in range(4)), [1], 5.0, 0.1, [0.9, 0.99], 1e-8, 0.1)),
        (names.clip_and_descend, ([torch.randn(3)], [torch.randn(3)], None, None, None, False, 5.0, 0.1)),
        (names.clip_and_descend, ([], [], torch.randn(5, 4), ids[0], torch.randn(4, 4), True, 5.0, 0.1)),
        (names.step, (packed, torch.tensor([3, 4]), torch.zeros(2 * 7 * 2), 30)),
        (names.likeliest, (packed, torch.tensor([3]), torch.zeros(7 * 2), 5)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator.default, arguments)
    for narrow in (False, True):  # but for the values of what is kept, for beyond its words is room that nothing reads
        arguments = leaf(6, 7), leaf(300, 7), leaf(300), torch.randint(300, (6,)), narrow, True
        checks = "test_schema", "test_autograd_registration", "test_faketensor"
        torch.library.opcheck(names.decoder_nll.default, arguments, test_utils=checks)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("narrow", [False, True])
def test_what_an_earlier_call_left_in_memory_has_no_say(kind: tuple[str, dict[str, Any]], narrow: bool) -> None:
    """A call full of NaN before every other; sizes at and beside the edges of blocks, few streams and many."""
    for hidden_size in (1, 15, 16, 17, 31, 33, 48):
        for one_hot, batch in ((False, 5), (True, 5), (False, 19), (True, 19)):
            torch.manual_seed(0)
            cell = cell_of(kind, 20, hidden_size)
            inputs = torch.randint(20, (6, batch)) if one_hot else torch.randn(6, batch, 20)
            state = cell.initial_state(batch)
            weights = [torch.ones(6, batch, hidden_size), *(torch.ones_like(tensor) for tensor in state)]
            spoilt = CELLS[kind[0]](40, 100, **kind[1])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                for parameter in spoilt.parameters():
                    parameter.fill_(torch.nan)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                first = spoilt.initial_state(9)
                ones = [torch.ones(3, 9, 100), *(torch.ones_like(tensor) for tensor in first)]
                gradients(unroll_native, spoilt, torch.ones(3, 9, 40), first, ones)
                native = gradients(unroll_native, cell, inputs, state, weights)
            assert all(tensor.isfinite().all() for tensor in native)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("words", [20, 300])
def test_what_an_earlier_loss_left_in_memory_has_no_say(narrow: bool, words: int) -> None:
    spoilt, decoder = nn.Linear(70, 2 * words), nn.Linear(33, words)
    with torch.no_grad():
        spoilt.weight.fill_(torch.nan)
    for kept in (ops.MOST_KEPT, 0):
        with most_kept(kept), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            for layer, tokens in ((spoilt, 90), (decoder, 37)):
                hidden = torch.randn(tokens, layer.in_features, requires_grad=True)
                nll = token_nll(hidden, layer, torch.arange(tokens) % words)
                found = [nll, *torch.autograd.grad(nll.sum(), [hidden, *layer.parameters()])]
        assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("size", [200, 650, 1500])
def test_layer_and_loss_agree_with_their_twins_in_the_sizes_of_the_recipes(narrow: bool, size: int) -> None:
    torch.manual_seed(0)
    cell, decoder = cell_of(KINDS[0], size, size), nn.Linear(size, 10_000)
    inputs, state = torch.randn(3, 20, size), cell.initial_state(20)
    targets, results = torch.randint(10_000, (3, 20)), []
    for way, loss in ((unroll_native, token_nll), (unroll_plain, token_nll_plain)):
        with threads(2), torch.autocast("cpu", torch.bfloat16, enabled=narrow and way is unroll_native):
            outputs, after = way(cell, inputs, state)
            nll = loss(outputs, decoder, targets)
            found = torch.autograd.grad(nll.sum() / 20, [*cell.parameters(), *decoder.parameters()])
        results.append([outputs, *after, nll, *found])
    assert_near(results[0], results[1], narrow)


@pytest.mark.parametrize("vocabulary", [20, 300])
def test_targets_that_are_no_ids_or_not_in_place_are_refused(vocabulary: int) -> None:
    hidden, decoder = torch.randn(2, 3, 5), nn.Linear(5, vocabulary)
    with pytest.raises(ValueError, match="a kernel expects ids"):
        token_nll(hidden, decoder, torch.full((2, 3), 1.7))
    for loss in (token_nll, decoder_loss):
        with pytest.raises(ValueError, match=r"targets of shape \(3, 2\)"):
            loss(hidden, decoder, torch.zeros(3, 2, dtype=torch.int64))


def test_what_a_caller_gets_wrong_is_an_error_and_no_crash() -> None:
    model = LanguageModel(300, 0, [20])
    ids = torch.zeros(3, 2, dtype=torch.int64)
    for inputs, targets in ((ids + 10**9, ids), (ids - 1, ids), (ids, ids + 300)):
        with pytest.raises(IndexError, match="not below the number of tokens"):
            model.nll(inputs, targets, model.initial_state(2))
    states = model.initial_state(2)
    longs = tuple(tuple(part.long() for part in state) for state in states)
    for wrong in ((ids, ids, model.initial_state(3)), (ids, ids.to("meta"), states), (ids, ids, longs)):
        with pytest.raises(ValueError, match=r"a kernel expects (f32|ids) of shape \(.*\) on the CPU, not"):
            model.nll(*wrong)
    results = []
    for given_ids in (ids, ids.int()):
        nll, _, _ = model.nll(given_ids, given_ids, model.initial_state(2))
        results.append([nll, *torch.autograd.grad(nll, list(model.parameters()))])
    torch.testing.assert_close(results[1], results[0])
    cell, state = CELLS["lstm"](3, 5), torch.zeros(2, 5)
    for kind, c in ((0, None), (2, state)):
        with pytest.raises(ValueError, match="an LSTM has cells, and nothing else has"):
            torch.ops.unrolled.recurrent(ids, state, c, *cell.parameters(), kind, False)
    stream = Stream(model.eval(), model.initial_state(1))
    for k in (0, 301):
        with pytest.raises(ValueError, match="k must be at least 1"):
            stream.likeliest(ids[0, :1], k)
    doubles = Stream(model, tuple(tuple(part.double() for part in state) for state in model.initial_state(1)))
    with pytest.raises(ValueError, match="a kernel expects f32"):
        doubles.likeliest(ids[0, :1], 3)
    with pytest.raises(ValueError, match="contiguous"):
        update.clip_and_descend([torch.ones(3, 2).T], [torch.ones(2, 3)], None, None, None, False, 1.0, 1.0)
    packed, state = stream._packed, stream._state
    assert packed is not None
    for wrong_packed, wrong_state, said in (
        (packed.float(), state, "the bytes of `pack`"),
        (packed[:-1], state, "no model from `pack`"),
        (torch.zeros(100, dtype=torch.uint8), state, "no model from `pack`"),
        (packed, torch.zeros(2 * len(state))[::2], "a state that is contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            torch.ops.unrolled.step(wrong_packed, ids[0, :1], wrong_state, 300)
        with pytest.raises(ValueError, match=said):
            torch.ops.unrolled.likeliest(wrong_packed, ids[0, :1], wrong_state, 5)
    with pytest.raises(ValueError, match="a kernel expects f32 of shape"):
        torch.ops.unrolled.dropout(torch.ones(1000, dtype=torch.float16), 0.5, 1)
    with pytest.raises(ValueError, match="the state is not that of so many streams"):
        stream.read(ids[:, 0])
    with pytest.raises(IndexError):
        stream.read(ids[0, :1] + 300)
    columns = torch.randint(300, (4, 3))
    one, other = (Stream(model, model.initial_state(4)) for _ in range(2))
    assert torch.equal(one.read(columns[:, 1]), other.read(columns[:, 1].contiguous()))


def test_the_backward_operators_refuse_what_does_not_belong_together() -> None:
    names, zeros = torch.ops.unrolled, torch.zeros
    for targets, exponentials, error in (
        (torch.tensor([0, 300]), zeros(0), IndexError),
        (torch.tensor([0, -1]), zeros(0), IndexError),
        (torch.tensor([0, 1, 2]), zeros(0), ValueError),
        (torch.tensor([0, 1]), zeros(300, 32), ValueError),
        (torch.tensor([0, 1]), zeros(332, 32, dtype=torch.bfloat16), ValueError),
    ):
        with pytest.raises(error):
            names.decoder_nll_backward(
                zeros(2), zeros(2, 7), zeros(300, 7), zeros(300), targets, zeros(2), zeros(2), exponentials, False
            )
    weights, gates, none = (zeros(7, 5), zeros(7, 7)), zeros(0), zeros(0)
    with pytest.raises(ValueError, match="an LSTM has cells"):
        names.recurrent_backward(
            zeros(3, 4, 7),
            None,
            zeros(3, 4, 5),
            zeros(4, 7),
            None,
            *weights,
            zeros(3, 4, 7),
            gates,
            none,
            0,
            False,
            False,
        )
    for ids, outputs, kept, error in (
        (torch.full((3, 4), 5), zeros(3, 4, 7), gates, IndexError),
        (zeros(3, 4, dtype=torch.int64), zeros(3, 4, 8), gates, ValueError),
        (zeros(3, 4, dtype=torch.int64), zeros(3, 4, 7), zeros(3, 4, 1, 1, 16), ValueError),
    ):
        with pytest.raises(error):
            names.recurrent_backward(
                outputs, None, ids, zeros(4, 7), None, *weights, outputs, kept, none, 2, False, False
            )


def test_a_step_of_another_model_or_of_more_layers_than_it_can_is_no_step() -> None:
    layer = ops.Layer("tanh", (torch.randn(7, 5), torch.randn(7, 7), torch.randn(7)))
    packed = step.pack([layer], torch.randn(300, 5), torch.randn(300, 7), torch.randn(300), narrow=False)
    with pytest.raises(ValueError, match="the state is not that of so many streams of this model"):
        torch.ops.unrolled.step(packed, torch.tensor([1]), torch.zeros(7), 30)
    for count in (0, 65):
        with pytest.raises(ValueError, match="up to 64 layers"):
            step.pack([layer] * count, None, torch.randn(300, 7), torch.randn(300), narrow=False)
    model = LanguageModel(10, 0, [3] * 65).eval()
    stream, plain = (Stream(model, model.initial_state(1)) for _ in range(2))
    assert torch.equal(stream.read(torch.tensor([1])), plain._read_plain(torch.tensor([1])))


def test_what_is_not_a_number_in_the_decoder_stays_so() -> None:
    model = LanguageModel(100, 4, [5]).eval()
    with torch.no_grad():
        model.get_parameter("decoder.bias")[3] = torch.nan
    for workers in (1, 2):
        with threads(workers):
            assert Stream(model, model.initial_state(1)).read(torch.tensor([1])).isnan().all()


def test_weights_that_do_not_belong_together_are_not_packed() -> None:
    layer = ops.Layer("tanh", (torch.randn(7, 5), torch.randn(7, 7), torch.randn(7)))
    embedding, weight, bias = torch.randn(300, 5), torch.randn(300, 7), torch.randn(300)
    step.pack([layer], embedding, weight, bias, narrow=False)
    for wrong in (
        ([layer], embedding, weight.bfloat16(), bias),
        ([layer], embedding, weight, bias.double()),
        ([layer], embedding[:299], weight, bias),
        ([layer], embedding[:, :4], weight, bias),
        ([layer], None, weight, bias),
        ([layer], embedding, weight[:, :6], bias),
        ([layer, layer], embedding, weight, bias),
        ([ops.Layer("lstm", layer.weights)], embedding, weight, bias),
    ):
        with pytest.raises(ValueError, match=r"a kernel expects|the decoder reads"):
            step.pack(*wrong, narrow=False)


def test_what_pytorch_makes_unless_told_otherwise_has_no_say() -> None:
    model = LanguageModel(50, 4, [5]).eval()
    expected = Stream(model, model.initial_state(1)).likeliest(torch.tensor([1]), 5)
    torch.set_default_dtype(torch.float64)
    try:
        found = Stream(model, model.initial_state(1)).likeliest(torch.tensor([1]), 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


def test_a_word_that_cannot_be_leaves_the_others_as_they_are() -> None:
    model = LanguageModel(17, 4, [5]).eval()
    with torch.no_grad():
        model.get_parameter("decoder.bias")[16] = -torch.inf  # all that the second of two threads has
    for workers in (1, 2):
        with threads(workers):
            stream, plain = (Stream(model, model.initial_state(1)) for _ in range(2))
            expected = plain._read_plain(torch.tensor([1]))
            torch.testing.assert_close(stream.read(torch.tensor([1])), expected)
            assert expected[0, 16] == -torch.inf


def test_cells_and_inputs_that_pytorch_has_changed_are_taken() -> None:
    cell, state = CELLS["lstm"](4, 5), (torch.zeros(2, 5), torch.zeros(2, 5))
    inputs = torch.randn(3, 2, 4)
    expected, _ = unroll(cell, inputs, state)
    assert torch.equal(unroll(cell, inputs.double(), state)[0], expected)
    nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    torch.testing.assert_close(unroll(cell, inputs, state)[0], expected)


def test_an_update_of_what_the_kernels_do_not_take_is_pytorchs() -> None:
    for other in (torch.ones(3, dtype=torch.float64), torch.ones(2, 3).T):
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(other)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        clip_and_step(torch.optim.SGD(parameters, lr=0.5), 100.0)
        assert all((parameter == 0.5).all() for parameter in parameters)


def test_a_rectified_unit_that_is_not_a_number_passes_its_gradient_on() -> None:
    cell = cell_of(("elman", {"activation": "relu"}), 1, 1)
    found = []
    for way in (unroll_native, unroll_plain):
        outputs, _ = way(cell, torch.full((1, 1, 1), math.nan), cell.initial_state(1))
        found.append(torch.autograd.grad(outputs.sum(), cell.bias_ih)[0])
    assert torch.equal(*found)


def test_a_state_that_was_taken_stays_as_it_was() -> None:
    model = LanguageModel(20, 4, [5]).eval()
    stream = Stream(model, model.initial_state(1))
    before = stream.states
    first = stream.read(torch.tensor([1]))
    stream.states = before
    assert torch.equal(stream.read(torch.tensor([1])), first)


def test_without_kernels_an_operator_says_what_is_missing() -> None:
    with build.switched_off(), pytest.raises(RuntimeError, match="unrolled kernels build"):
        torch.ops.unrolled.dropout(torch.zeros(3), 0.5, 1)
    assert ops.serves(torch.zeros(3))
