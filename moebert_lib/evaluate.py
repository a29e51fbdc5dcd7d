"""How good a model is on a task, with scikit-learn's and scipy's metrics; spans have ``spans``."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel

from moebert_lib.batching import without_targets
from moebert_lib.distill import layer_distances
from moebert_lib.packed import accelerate

#: Metric name to a function of (labels, predictions). GLUE's F1 is of class 1.
METRICS = {
    "accuracy": accuracy_score,
    "f1": lambda labels, predicted: f1_score(labels, predicted, zero_division=0),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predicted: pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: spearmanr(labels, predicted).statistic,
}


PADDING = -1e4  #: logit of a position that a shorter batch did not have


def faster(model: PreTrainedModel) -> PreTrainedModel:
    """The model accelerated, where it can be and padding changes no result.

    It does where gates balance padding too, and in a span's logits, which are one distribution
    over all places of a batch; such models come back as they are, and so do those of families
    that ``accelerate`` does not know.
    """
    spans = hasattr(model, "qa_outputs")
    padding_counts = spans or getattr(model.config, "padding_in_balance", False)
    other = not isinstance(model.base_model, BertModel)
    return model if padding_counts or other else accelerate(model)


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> np.ndarray:
    """Logits of every row in the dataset's order, float32.

    The model is put into eval mode and returned to its former one. Targets may be absent.

    Args:
        model: Dense or MoEBERT, with a head for classification or spans; :func:`faster` or not.
        batches: From ``data.batches``; ``index`` says where each row belongs.

    Returns:
        Shape ``(n, C)``; for spans ``(n, 2, T)``, start and end, with :data:`PADDING` beyond the
        tokens of a row's batch.
    """
    training = model.training
    model.eval()
    logits, places = [], []
    for batch in batches:
        output = model(**without_targets(batch))
        spans = "start_logits" in output
        one = torch.stack([output.start_logits, output.end_logits], 1) if spans else output.logits
        logits.append(one.float().cpu())
        places.append(batch["index"].cpu())
    model.train(training)
    longest = max(rows.shape[-1] for rows in logits)
    padded = [F.pad(rows, (0, longest - rows.shape[-1]), value=PADDING) for rows in logits]
    return torch.cat(padded)[torch.cat(places).argsort()].numpy()


def score(predicted: np.ndarray, labels: np.ndarray, metrics: Iterable[str]) -> dict[str, float]:
    """Metrics of predictions, each as a fraction (0.9 is 90 %) or a correlation.

    Args:
        predicted: ``(n,)``, class indices or values.
        labels: ``(n,)``, the same of the truth.
        metrics: Names out of :data:`METRICS`.

    Raises:
        ValueError: an unknown metric.
    """
    scores = {}
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
        scores[name] = float(METRICS[name](labels, predicted))
    return scores


@torch.inference_mode()
def state_distances(
    student: nn.Module, teacher: nn.Module, batches: Iterable[dict[str, Tensor]]
) -> Tensor:
    """Mean squared distance of student and teacher at each layer (Eq. 5's terms) over a dataset.

    Padding is left out; every real token weighs the same.

    Returns:
        Shape ``(L + 1,)``, embeddings first.
    """
    total, tokens, models = torch.zeros(()), 0, (student.eval(), teacher.eval())
    for batch in batches:
        asked = {**without_targets(batch), "output_hidden_states": True}
        own, other = (model(**asked).hidden_states for model in models)
        n = int(batch["attention_mask"].sum())
        total = total + n * layer_distances(own, other, batch["attention_mask"]).cpu()
        tokens += n
    return total / tokens
