"""A model as one ONNX file, for programs that have no PyTorch: in a browser, on a phone, in another language.

The graph is what `LanguageModel.forward` computes, with log-probabilities in the place of logits. Time and streams may
be of any length, the state goes in and comes out, and the tokenizer stands in the file's metadata, so that nothing is
needed beside it. Before a file is written, what another program makes of it is compared with the model.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError
from unrolled.files import write_whole
from unrolled.nn.cells import GRU, LSTM, Cell, Elman, Jordan
from unrolled.nn.loss import perplexity
from unrolled.nn.model import LanguageModel

OPSET, IR_VERSION = 17, 8
"""Of 2022, which runtimes have long read."""
_OPERATORS: dict[type[Cell], tuple[str, tuple[int, ...]]] = {
    LSTM: ("LSTM", (0, 3, 1, 2)),  # ours are i, f, g, o; ONNX has i, o, f, c
    GRU: ("GRU", (1, 0, 2)),  # r, z, n; z, r, h
    Elman: ("RNN", (0,)),
}
"""ONNX's operator for a cell, and which of our gates stand in its places."""
_MOST_BYTES = (1 << 31) - 1
"""Of protobuf, which the file is in."""
_CHECKED, _AT_ONCE = 1_000, 5  # so few, because rounding grows from step to step where a model is chaotic
_RELATIVE, _ABSOLUTE = 1e-4, 1e-3


def export(
    model: LanguageModel, tokenizer: Tokenizer, path: Path, ids: np.ndarray, int8: bool = False
) -> dict[str, Any]:
    """Writes `model` as an ONNX file, after ONNX Runtime has read the first 1,000 of `ids` (N,) as the model does.

    Args:
        model: in evaluation mode.
        tokenizer: goes into the file's metadata.
        path: the file, NAME.onnx.
        ids: a text to compare on, two tokens or more.
        int8: each row of a matrix as whole numbers of 8 bits and a scale: a quarter of the size, and as fast. What
            ONNX Runtime reads is compared with the model of such weights.

    Returns:
        What was written; the perplexity of those tokens here and there; how far apart two log-probabilities or states
        are at most.

    Raises:
        UnrolledError: the name is another, the file would be larger than ONNX files may be, or it does not do what the
            model does.
    """
    if path.suffix.lower() != ".onnx":
        raise UnrolledError(f"{path}: the name of an ONNX file ends in .onnx")
    _refuse_too_large(path, model, model.num_parameters() * (1 if int8 else 4))
    made = onnx_model(model, tokenizer, int8)
    _refuse_too_large(path, model, made.ByteSize())
    onnx.checker.check_model(made, full_check=True)
    content = made.SerializeToString()
    ids = np.asarray(ids[: _CHECKED + 1], np.int64)
    ours, theirs, apart = _compared(_rounded(model) if int8 else model, OnnxReader(content), ids, path)
    if int8:
        ours, _, _ = _compared(model, None, ids, path)
    write_whole(path, content)
    shapes = {value.name: _shape(value) for value in (*made.graph.input, *made.graph.output)}
    return {
        "file": str(path),
        "bytes": len(content),
        "weights": "int8" if int8 else "f32",
        "inputs": {value.name: shapes[value.name] for value in made.graph.input},
        "outputs": {value.name: shapes[value.name] for value in made.graph.output},
        "start_id": tokenizer.start_id,
        "checked_tokens": len(ids) - 1,
        "perplexity": perplexity(ours, len(ids) - 1),
        "onnx_perplexity": perplexity(theirs, len(ids) - 1),
        "largest_difference": apart,
    }


@final
class OnnxReader:
    """An exported file in use: reads windows of ids, and keeps the state of B streams between them.

    Args:
        content: of the file.
        batch_size: B.
    """

    def __init__(self, content: bytes, batch_size: int = 1) -> None:
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.states = {
            value.name: np.zeros((batch_size, value.shape[1]), np.float32)
            for value in self.session.get_inputs()
            if value.name != "ids"
        }

    def read(self, ids: np.ndarray) -> np.ndarray:
        """ids (T, B) -> log-probabilities (T, B, V) of what follows each."""
        names = [value.name for value in self.session.get_outputs()]
        values = map(np.asarray, self.session.run(names, {"ids": ids, **self.states}))
        found = dict(zip(names, values, strict=True))
        self.states = {name: found[name.replace("state", "next")] for name in self.states}
        return found["log_probs"]


@torch.inference_mode()
def _compared(
    model: LanguageModel, reader: OnnxReader | None, ids: np.ndarray, path: Path
) -> tuple[float, float, float]:
    """Nats of ids[1:], each after all before it, by the model, and by the reader from the model's states; and how far
    apart the two are at most."""
    states, ours, theirs, apart = model.initial_state(1), 0.0, 0.0, 0.0
    for first in range(0, len(ids) - 1, _AT_ONCE):
        targets = ids[first + 1 : first + 1 + _AT_ONCE]
        inputs, chosen = ids[first : first + len(targets), None], (np.arange(len(targets)), 0, targets)
        before = [part.cpu().numpy() for state in states for part in state]
        logits, states = model(torch.from_numpy(inputs).to(model.device), states)
        log_probs = logits.log_softmax(-1).cpu().numpy()
        ours -= log_probs[chosen].sum(dtype=np.float64)
        if reader is None:
            continue
        reader.states = dict(zip(reader.states, before, strict=True))
        found = reader.read(inputs)
        theirs -= found[chosen].sum(dtype=np.float64)
        after = [part.cpu().numpy() for state in states for part in state]
        for mine, other in zip([log_probs, *after], [found, *reader.states.values()], strict=True):
            largest = float(np.abs(mine - other).max())
            if not np.allclose(other, mine, _RELATIVE, _ABSOLUTE):
                raise UnrolledError(f"{path} is not written: what ONNX Runtime makes of it is up to {largest:.2g} off")
            apart = max(apart, largest)
    return ours, theirs, apart


def _refuse_too_large(path: Path, model: LanguageModel, size: int) -> None:
    if size > _MOST_BYTES:
        parameters = model.num_parameters()
        raise UnrolledError(f"{path}: an ONNX file holds less than 2 GiB; this model has {parameters:,} parameters")


def _scale(matrix: Tensor) -> Tensor:
    """What each row's whole numbers of 8 bits are multiplied by, (…, 1)."""
    return matrix.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127


def _rounded(model: LanguageModel) -> LanguageModel:
    """The same model with every matrix as 8 bits have it."""
    rounded = deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.dim() > 1:
                parameter.copy_((parameter / _scale(parameter)).round() * _scale(parameter))
    return rounded


def _shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


@final
class _Graph:
    """Nodes, and the tensors that they read.

    Args:
        int8: matrices are stored as whole numbers of 8 bits, which two nodes turn into what they stood for. Programs
            do that once, when they load the file; ONNX's own operator for it they would run for every token.
    """

    def __init__(self, int8: bool = False) -> None:
        self.int8 = int8
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def node(self, operator: str, inputs: list[str], output: str | list[str], **attributes: Any) -> str:
        """Adds one; the name of its first output."""
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def tensor(self, name: str, value: Tensor | np.ndarray) -> str:
        """Adds one; its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def matrix(self, name: str, value: Tensor, turned: bool = False) -> str:
        """Adds one whose rows may be rounded, as it is or turned; its name."""

        def laid(tensor: Tensor) -> Tensor:
            return tensor.T if turned else tensor

        if not self.int8:
            return self.tensor(name, laid(value))
        scale = _scale(value)
        numbers = self.tensor(f"{name}.int8", laid((value / scale).round().to(torch.int8)))
        as_float = self.node("Cast", [numbers], f"{name}.unscaled", to=TensorProto.FLOAT)
        return self.node("Mul", [as_float, self.tensor(f"{name}.scale", laid(scale))], name)


def onnx_model(model: LanguageModel, tokenizer: Tokenizer, int8: bool = False) -> onnx.ModelProto:
    """The graph: ids (T, B) and each layer's state in, log-probabilities (T, B, V) of what follows and the states out.

    Names: `ids`; `state.L.N`, the N-th tensor of layer L's state, an LSTM's h and c; `log_probs`; `next.L.N`. A Jordan
    network is fed its own output.
    """
    graph = _Graph(int8)
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["T", "B"])]
    outputs = [helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["T", "B", model.vocab_size])]
    flows = "ids"
    if isinstance(model.embedding, nn.Embedding):
        flows = graph.node("Gather", [graph.matrix("embedding.weight", model.embedding.weight), "ids"], "embedded")
    for number, (cell, state) in enumerate(zip(model.layers, model.initial_state(1), strict=True)):
        names = [f"state.{number}.{part}" for part in range(len(state))]
        after = [name.replace("state", "next") for name in names]
        for names_of, values in ((names, inputs), (after, outputs)):
            for name, part in zip(names_of, state, strict=True):
                values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", part.shape[1]]))
        if isinstance(cell, Jordan):
            flows = _jordan(graph, f"layers.{number}", cell, flows, names[0], after[0])
        else:
            flows = _layer(graph, f"layers.{number}", cell, flows, names, after)
    if isinstance(model.decoder, nn.Linear):
        if model.has_tied_weights:
            columns = graph.node("Transpose", ["embedding.weight"], "decoder.columns")
        else:
            columns = graph.matrix("decoder.columns", model.decoder.weight, turned=True)
        product = graph.node("MatMul", [flows, columns], "decoded")
        flows = graph.node("Add", [product, graph.tensor("decoder.bias", model.decoder.bias)], "logits")
    graph.node("LogSoftmax", [flows], "log_probs", axis=-1)
    made = helper.make_model(
        helper.make_graph(graph.nodes, "unrolled", inputs, outputs, graph.tensors),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="unrolled",
    )
    helper.set_model_props(made, {"tokenizer.json": tokenizer.to_json(), "start_id": str(tokenizer.start_id)})
    return made


def _layer(graph: _Graph, name: str, cell: Cell, flows: str, state: list[str], after: list[str]) -> str:
    """An LSTM, a GRU or an Elman network: ONNX has an operator for each, which has a dimension for two directions."""
    operator, order = _OPERATORS[type(cell)]
    if flows == "ids":
        depth, values = graph.tensor("vocab_size", np.array(cell.input_size)), np.array([0, 1], np.float32)
        flows = graph.node("OneHot", ["ids", depth, graph.tensor("off_on", values)], "one_hot")

    def ordered(tensor: Tensor) -> Tensor:
        gates = tensor.detach().chunk(cell.gates)
        return torch.cat([gates[place] for place in order])

    bias_hh = getattr(cell, "bias_hh", None)
    biases = [ordered(cell.bias_ih), torch.zeros_like(cell.bias_ih) if bias_hh is None else ordered(bias_hh)]
    weights = [
        graph.matrix(f"{name}.weight_ih", ordered(cell.weight_ih).unsqueeze(0)),
        graph.matrix(f"{name}.weight_hh", ordered(cell.weight_hh).unsqueeze(0)),
        graph.tensor(f"{name}.biases", torch.cat(biases).unsqueeze(0)),
    ]
    options: dict[str, Any] = {"hidden_size": cell.hidden_size}
    if isinstance(cell, GRU):
        options["linear_before_reset"] = 1
    if isinstance(cell, Elman):
        options["activations"] = ["Relu" if cell.activation is torch.relu else "Tanh"]
    axes = [graph.tensor(f"{name}.axis_{number}", np.array([number])) for number in (0, 1)]
    before = [graph.node("Unsqueeze", [part, axes[0]], f"{name}.{part}") for part in state]
    made = [f"{name}.outputs", *(f"{name}.{part}" for part in after)]
    graph.node(operator, [flows, *weights, "", *before], made, **options)
    for part, part_after in zip(made[1:], after, strict=True):
        graph.node("Squeeze", [part, axes[0]], part_after)
    return graph.node("Squeeze", [made[0], axes[1]], f"{name}.output")


def _jordan(graph: _Graph, name: str, cell: Jordan, flows: str, state: str, after: str) -> str:
    """A Jordan network: a loop over time, whose body is its step."""
    for key, value in (("ih", cell.weight_ih), ("hh", cell.weight_hh), ("ho", cell.weight_ho)):
        graph.matrix(f"{name}.weight_{key}", value, turned=True)
    graph.tensor(f"{name}.bias_ih", cell.bias_ih)
    graph.tensor(f"{name}.bias_ho", cell.bias_ho)
    looked_up = graph.node("Gather", [f"{name}.weight_ih", flows], f"{name}.columns")
    projected = graph.node("Add", [looked_up, f"{name}.bias_ih"], f"{name}.projected")
    step = _Graph()
    fed_back = step.node("MatMul", ["y", f"{name}.weight_hh"], "fed_back")
    h = step.node("Relu" if cell.activation is torch.relu else "Tanh", [step.node("Add", ["x", fed_back], "sum")], "h")
    logits = step.node(
        "Add", [step.node("MatMul", [h, f"{name}.weight_ho"], "decoded_h"), f"{name}.bias_ho"], "logits_t"
    )
    step.node("Softmax", [logits], "y_after", axis=-1)
    vocab_size, kind = cell.input_size, TensorProto.FLOAT
    body = helper.make_graph(
        step.nodes,
        "step",
        [
            helper.make_tensor_value_info("y", kind, ["B", vocab_size]),
            helper.make_tensor_value_info("x", kind, ["B", cell.hidden_size]),
        ],
        [helper.make_tensor_value_info(part, kind, ["B", vocab_size]) for part in ("y_after", "logits_t")],
    )
    graph.node("Scan", [state, projected], [after, f"{name}.logits"], body=body, num_scan_inputs=1)
    return f"{name}.logits"
