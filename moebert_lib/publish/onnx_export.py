"""A MoEBERT as an ONNX graph of any batch size and length, in which a token visits its experts.

The usual loop over experts asks how many tokens each one has, which a graph cannot know. Here
the rows of an expert's tokens are found by ``NonZero``, served, and scattered back, so that the
graph computes no more than the model does. Needs ``moebert[onnx]``.
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

from moebert_lib.config.errors import UserError

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
DISPATCH = "moebert-rows"  # the experts' implementation under which a model is exported


def check() -> None:
    """Refuse where a package is missing.

    Raises:
        UserError: naming it.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; pip install 'moebert[onnx]'")


def export(model: PreTrainedModel, batch: dict[str, Tensor], path: Path) -> None:
    """Write a model as ONNX: inputs by the batch's names, ``(batch, tokens)``, both free.

    Args:
        model: A MoEBERT that classifies sentences (output ``logits``) or finds spans
            (``start_logits`` and ``end_logits``); it stays as it is.
        batch: Inputs of at least two sentences, to follow the model with.
        path: The file.

    Raises:
        UserError: a package is missing.
    """
    check()
    own = copy.deepcopy(model).cpu().float().eval()
    own.set_experts_implementation(DISPATCH)
    names, values = _outputs(model), tuple(values.cpu() for values in batch.values())
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    with _quiet():
        program = torch.onnx.export(
            _Graph(own, list(batch), names).eval(),
            values,
            dynamo=True,
            dynamic_shapes=((free,) * len(batch),),
            input_names=list(batch),
            output_names=names,
            verbose=False,
        )
    program.save(path)


def answers(path: Path, batch: dict[str, Tensor]) -> Tensor:
    """What an exported model says: logits ``(B, C)``; of spans ``(B, T, 2)``, start and end."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {name: values.cpu().numpy() for name, values in batch.items()}
    found = [torch.as_tensor(values) for values in session.run(None, given)]
    return found[0] if len(found) == 1 else torch.stack(found, -1)


class _Graph(nn.Module):
    """The model as a function of its inputs in order that returns logits alone."""

    def __init__(self, model: nn.Module, inputs: list[str], outputs: list[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        output = self.model(**dict(zip(self.inputs, values, strict=True)))
        return tuple(output[name] for name in self.outputs)


def _outputs(model: nn.Module) -> list[str]:
    return ["start_logits", "end_logits"] if hasattr(model, "qa_outputs") else ["logits"]


def _rows(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """``moe_layer.Experts.forward`` without a count of tokens; a choice at a time."""
    choices = zip(chosen.unbind(1), weights.split(1, dim=1), strict=True)
    return sum(_served(experts, hidden, expert) * weight for expert, weight in choices)


def _served(experts: nn.Module, hidden: Tensor, expert: Tensor) -> Tensor:
    """Each token by one expert: ``hidden (N, D)``, ``expert (N,)``."""
    output = torch.zeros_like(hidden)
    for index, (w1, b1, w2, b2) in enumerate(zip(*experts.unbound(), strict=True)):
        rows = (expert == index).nonzero()[:, 0]
        h = experts.act_fn(F.linear(hidden.index_select(0, rows), w1, b1))
        output = output.index_put((rows,), F.linear(h, w2, b2))
    return output


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about packages that the exporter could use and does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


ALL_EXPERTS_FUNCTIONS.register(DISPATCH, _rows)
