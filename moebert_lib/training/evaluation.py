"""Evaluate models: predictions, metrics, distances to the teacher, sentence states.

Metrics are scikit-learn's and scipy's; those of spans are in ``data.squad``.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from scipy.stats import pearsonr, spearmanr
from sklearn.decomposition import PCA
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn

from moebert_lib.data.batching import without_targets
from moebert_lib.method.distillation_loss import layer_distances, teacher_layers

#: Metric name to a function of (labels, predictions). GLUE's F1 is of class 1.
METRICS = {
    "accuracy": accuracy_score,
    "f1": lambda labels, predicted: f1_score(labels, predicted, zero_division=0),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, predicted: pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: spearmanr(labels, predicted).statistic,
}


PADDING = -1e4  #: logit of a position that a shorter batch did not have


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> np.ndarray:
    """Logits of every row in the dataset's order, float32.

    The model is put into eval mode and returned to its former one. Targets may be absent.

    Args:
        model: Dense or MoEBERT, with a head for classification or spans; accelerated or not.
        batches: From ``batching.batches``; ``index`` is the place of each row in the dataset.

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
        heads = (output.start_logits, output.end_logits) if spans else ()
        rows = torch.stack(heads, 1) if spans else output.logits  # (B, 2, T) or (B, C)
        logits.append(rows.float().cpu())
        places.append(batch["index"].cpu())
    model.train(training)
    longest = max(rows.shape[-1] for rows in logits)
    padded = [F.pad(rows, (0, longest - rows.shape[-1]), value=PADDING) for rows in logits]
    return torch.cat(padded)[torch.cat(places).argsort()].numpy()


def score(predicted: np.ndarray, labels: np.ndarray, metrics: Iterable[str]) -> dict[str, float]:
    """Metrics of predictions, each as a fraction (0.9 is 90 %) or a correlation.

    Args:
        predicted: ``(n,)``, class indices or values.
        labels: ``(n,)``, the true ones.
        metrics: Names of :data:`METRICS`.

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

    Padding is left out; every real token weighs the same. Which of the teacher's states a student
    of half the depth is compared with says ``distillation_loss.teacher_layers``.

    Returns:
        Shape ``(L + 1,)``, embeddings first.
    """
    total, tokens, models = torch.zeros(()), 0, (student.eval(), teacher.eval())
    for batch in batches:
        asked = {**without_targets(batch), "output_hidden_states": True}
        own, other = (model(**asked).hidden_states for model in models)
        compared = [other[layer] for layer in teacher_layers(len(own) - 1, len(other) - 1)]
        n = int(batch["attention_mask"].sum())
        total = total + n * layer_distances(own, compared, batch["attention_mask"]).cpu()
        tokens += n
    return total / tokens


# Pictures of hidden states. Eq. 5 compares states token by token, in all dimensions. In a picture
# a sentence is one point a layer, the mean over its tokens, in the plane of the two directions in
# which the teacher's sentences differ most (principal components).


@torch.inference_mode()
def sentence_states(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> np.ndarray:
    """Mean state of each sentence's real tokens after every layer, in the dataset's order.

    Args:
        model: Dense or MoEBERT; put into eval mode.
        batches: From ``batching.batches``; ``index`` is the place of each row in the dataset.

    Returns:
        Shape ``(L + 1, n, D)``, float32, embeddings first.
    """
    means, places = [], []
    model.eval()
    for batch in batches:
        hidden = model(**without_targets(batch), output_hidden_states=True).hidden_states
        real = batch["attention_mask"][..., None].to(hidden[0].dtype)  # (B, T, 1)
        mean = [(state * real).sum(1) / real.sum(1) for state in hidden]  # (B, D) each
        means.append(torch.stack(mean).float().cpu())
        places.append(batch["index"].cpu())
    return torch.cat(means, 1)[:, torch.cat(places).argsort()].numpy()


def planes(states: Mapping[str, ArrayLike], *, of: str = "teacher") -> pd.DataFrame:
    """Every model's states in the plane of one model's two main directions, layer by layer.

    Args:
        states: Name of a model to an array ``(L + 1, n, D)``, as :func:`sentence_states` gives.
        of: The model whose principal components span the planes.

    Returns:
        A row for each ``layer`` (0 is the embeddings), model (``stage``) and ``sentence``, with
        its coordinates ``x`` and ``y`` from the middle of that model's states, and ``seen``, the
        share of their variance that lies in the plane. With one sentence there is no plane, and
        all coordinates are 0.
    """
    states = {name: np.asarray(values, dtype=np.float64) for name, values in states.items()}
    frames = []
    for layer, own in enumerate(states[of]):
        directions, seen = _plane(own)
        for stage, values in states.items():
            x, y = ((values[layer] - own.mean(0)) @ directions).T
            columns = dict(layer=layer, stage=stage, sentence=range(len(x)), x=x, y=y, seen=seen)
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _plane(own: np.ndarray) -> tuple[np.ndarray, float]:
    """Two main directions of ``(n, D)`` states as columns, and their part of the variance."""
    directions = np.zeros((own.shape[1], 2))
    n = min(2, len(own) - 1)
    if n == 0 or not own.std(0).any():
        return directions, 0.0
    pca = PCA(n, svd_solver="full").fit(own)
    directions[:, :n] = pca.components_.T
    return directions, float(pca.explained_variance_ratio_.sum())
