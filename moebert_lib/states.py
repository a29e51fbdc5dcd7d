"""A sentence's state after every layer, and the plane in which a teacher's states differ most.

Eq. 5 compares states token by token, in all dimensions. To look at them, a sentence is one
point a layer, the mean over its tokens, and seen in the two directions in which the teacher's
sentences spread most (principal components).
"""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from torch import Tensor, nn

from moebert_lib.batching import without_targets


@torch.inference_mode()
def sentence_states(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> np.ndarray:
    """Mean state of each sentence's real tokens after every layer, in the dataset's order.

    Args:
        model: Dense or MoEBERT; put into eval mode.
        batches: From ``data.batches``; ``index`` says where each row belongs.

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
        onto, seen = _plane(own)
        for stage, values in states.items():
            x, y = ((values[layer] - own.mean(0)) @ onto).T
            columns = dict(layer=layer, stage=stage, sentence=range(len(x)), x=x, y=y, seen=seen)
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _plane(own: np.ndarray) -> tuple[np.ndarray, float]:
    """Two main directions of ``(n, D)`` states as columns, and their part of the variance."""
    onto = np.zeros((own.shape[1], 2))
    n = min(2, len(own) - 1)
    if n == 0 or not own.std(0).any():
        return onto, 0.0
    found = PCA(n, svd_solver="full").fit(own)
    onto[:, :n] = found.components_.T
    return onto, float(found.explained_variance_ratio_.sum())
