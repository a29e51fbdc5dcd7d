"""Export a MoEBERT to ONNX: any batch size and length, and each token still visits its own experts.

transformers loops over experts and skips those without tokens, which a graph cannot do. Here
``nonzero`` gives the rows of an expert's tokens, the expert computes them, and ``index_put`` writes
them back, so the graph computes no more than the model does. Needs ``moebert[onnx]``.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import ModelOutput

from moebert_lib.config.errors import UserError

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
IMPLEMENTATION = "moebert-rows"  # transformers' name for the way experts are computed here


def check() -> None:
    """Raise UserError if a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; pip install 'moebert[onnx]'")


def export(model: PreTrainedModel, batch: dict[str, Tensor], path: Path) -> None:
    """Write a model as ONNX; its inputs have the batch's names and shape ``(batch, tokens)``.

    Args:
        model: A MoEBERT that classifies sentences (output ``logits``) or predicts spans
            (``start_logits`` and ``end_logits``); it is not changed.
        batch: Inputs of at least two sentences, to trace the model with.
        path: The file to write.

    Raises:
        UserError: a package is missing.
    """
    check()
    traced = copy.deepcopy(model).cpu().float().eval()
    traced.set_experts_implementation(IMPLEMENTATION)
    spans = hasattr(model, "qa_outputs")
    names = ["start_logits", "end_logits"] if spans else ["logits"]
    values = tuple(tensor.cpu() for tensor in batch.values())
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with _quiet():
        program = torch.onnx.export(
            _Graph(traced, list(batch), names).eval(),
            values,
            dynamo=True,
            dynamic_shapes=((free,) * len(batch),),
            input_names=list(batch),
            output_names=names,
            verbose=False,
        )
    program.save(path)


class OnnxModel(nn.Module):
    """An exported model in ONNX Runtime, called as the model that it was exported from."""

    def __init__(self, path: Path):
        import onnxruntime

        super().__init__()
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, **batch: Tensor) -> ModelOutput:
        inputs = {name: values.cpu().numpy() for name, values in batch.items()}
        names = [output.name for output in self.session.get_outputs()]
        values = [torch.as_tensor(value) for value in self.session.run(None, inputs)]
        return ModelOutput(zip(names, values, strict=True))


class _Graph(nn.Module):
    """The model as a function of positional inputs that returns its logits only."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        output = self.model(**dict(zip(self.inputs, values, strict=True)))
        return tuple(output[name] for name in self.outputs)


def _rows(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """``moe_layer.Experts.forward`` without counting tokens, one choice of expert after another.

    Args:
        experts: The layer's experts.
        hidden: What the layer reads, ``(N, D)``.
        chosen: Each token's experts, ``(N, k)``.
        weights: Their weights, ``(N, k)``.
    """
    choices = zip(chosen.unbind(1), weights.split(1, dim=1), strict=True)
    return sum(_one_expert_each(experts, hidden, expert) * weight for expert, weight in choices)


def _one_expert_each(experts: nn.Module, hidden: Tensor, expert: Tensor) -> Tensor:
    """Each token through one expert: ``hidden (N, D)``, ``expert (N,)``."""
    output = torch.zeros_like(hidden)
    for index, (w1, b1, w2, b2) in enumerate(zip(*experts.unbound(), strict=True)):
        rows = (expert == index).nonzero()[:, 0]
        h = experts.act_fn(F.linear(hidden.index_select(0, rows), w1, b1))
        output = output.index_put((rows,), F.linear(h, w2, b2))
    return output


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about optional packages of the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _rows)
