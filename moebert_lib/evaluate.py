"""How good a model is on a task, with scikit-learn's and scipy's metrics."""

from collections.abc import Iterable

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn

from moebert_lib.distill import layer_distances

#: Metric name to a function of (labels, predictions). GLUE's F1 is of class 1.
METRICS = {
    "accuracy": accuracy_score,
    "f1": lambda labels, predicted: f1_score(labels, predicted, zero_division=0),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predicted: pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: spearmanr(labels, predicted).statistic,
}


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> np.ndarray:
    """Logits of every example in the dataset's order. Shape ``(n, C)``, float32.

    The model is put into eval mode and returned to its former one. ``labels`` may be absent.

    Args:
        model: Dense or MoEBERT, with a classification head.
        batches: From ``data.batches``; ``index`` says where each row belongs.
    """
    training = model.training
    model.eval()
    logits, places = [], []
    for batch in batches:
        inputs = {name: v for name, v in batch.items() if name not in ("labels", "index")}
        logits.append(model(**inputs).logits.float().cpu())
        places.append(batch["index"].cpu())
    model.train(training)
    rows, order = torch.cat(logits), torch.cat(places)
    return rows[order.argsort()].numpy()


def score(logits: np.ndarray, labels: np.ndarray, metrics: Iterable[str]) -> dict[str, float]:
    """Metrics of predictions, each as a fraction (0.9 is 90 %) or a correlation.

    Args:
        logits: ``(n, C)``; one column means regression.
        labels: ``(n,)``, class indices or values.
        metrics: Names out of :data:`METRICS`.

    Raises:
        ValueError: an unknown metric.
    """
    predicted = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)
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
    total, tokens = torch.zeros(()), 0
    for batch in batches:
        inputs = {name: v for name, v in batch.items() if name not in ("labels", "index")}
        own, other = (
            model.eval()(**inputs, output_hidden_states=True).hidden_states
            for model in (student, teacher)
        )
        n = int(batch["attention_mask"].sum())
        total = total + n * layer_distances(own, other, batch["attention_mask"]).cpu()
        tokens += n
    return total / tokens
