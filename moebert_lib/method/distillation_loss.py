"""Distillation losses: hidden states, predictions, and their sum (Sec. 3.2, Eqs. 5-7).

The first three functions are the paper's formulas, of tensors that hold what counts. The others
find these tensors in models' outputs: chosen layers, tokens without padding, heads of any kind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moebert_lib.data.batching import Packing


def layer_loss(X: Sequence[Tensor], X_tea: Sequence[Tensor]) -> Tensor:
    """``L_trm = sum over l = 0 .. L of MSE(X^l, X_tea^l)``, a scalar.

    Args:
        X: The student's hidden states, ``(..., D)`` each; ``l = 0`` are the embeddings.
        X_tea: The teacher's.

    Source: Eq. 5.
    """
    layers = zip(X, X_tea, strict=True)
    return torch.stack([F.mse_loss(x, x_tea) for x, x_tea in layers]).sum()


def layer_loss_by_example(X: Sequence[Tensor], X_tea: Sequence[Tensor], example: Tensor) -> Tensor:
    """:func:`layer_loss` with each example's mean over its tokens, then the mean over examples.

    Args:
        X: The student's states of the counted tokens, ``(N, D)`` each.
        X_tea: The teacher's.
        example: Which example each token is of, ``(N,)``, int64.
    """
    tokens = torch.bincount(example)  # of each example
    weight = 1 / (tokens[example] * (tokens > 0).sum())  # (N,), sums to 1
    distances = [(x - x_tea).square().mean(-1) for x, x_tea in zip(X, X_tea, strict=True)]
    return torch.stack([(weight * distance).sum() for distance in distances]).sum()


def prediction_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``L_pred = (KL(p || p_tea) + KL(p_tea || p)) / 2``, mean over the batch.

    Computed from log-probabilities, so that a vanishing probability gives a large number, not NaN.

    Args:
        logits: The student's, ``(B, C)``; ``p`` is their softmax.
        teacher_logits: The teacher's, ``(B, C)``.

    Source: Eq. 6.
    """
    log_p, log_p_tea = logits.log_softmax(-1), teacher_logits.log_softmax(-1)  # (B, C)
    forward = F.kl_div(log_p_tea, log_p, reduction="batchmean", log_target=True)  # KL(p || p_tea)
    backward = F.kl_div(log_p, log_p_tea, reduction="batchmean", log_target=True)  # KL(p_tea || p)
    return (forward + backward) / 2


def total_loss(task_loss: Tensor, L_trm: Tensor, L_pred: Tensor, lambda_distill: float) -> Tensor:
    """What the student minimises: ``CE(f(x), y) + lambda_distill * L_distill``, scalars.

    Source: Eq. 7, ``L_distill = L_trm + L_pred``, and the objective below it.
    """
    L_distill = L_trm + L_pred
    return task_loss + lambda_distill * L_distill


def layer_distances(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """MSE between student's and teacher's state at each layer: Eq. 5 before the sum.

    Args:
        student: ``L + 1`` hidden states ``(B, T, D)``, embeddings first; or packed ones
            ``(N, D)``, which are of counted tokens only.
        teacher: The same of the teacher, in any dtype.
        mask: ``(B, T)``, 1 for tokens that count; ``None`` counts padding too, as the release.
            Packed states need none.

    Returns:
        Shape ``(L + 1,)``: mean over counted tokens and dimensions.

    Raises:
        ValueError: another number of states.
    """
    if len(student) != len(teacher):
        raise ValueError(f"student has {len(student)} states, teacher {len(teacher)}")
    pairs = [_counted(x, x_tea, mask) for x, x_tea in zip(student, teacher, strict=True)]
    return torch.stack([F.mse_loss(x, x_tea) for x, x_tea in pairs])


def _counted(x: Tensor, x_tea: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both states without padding, in the student's dtype."""
    if mask is not None:
        x, x_tea = (state if state.dim() == 2 else state[mask.bool()] for state in (x, x_tea))
    return x, x_tea.to(x.dtype)


def _example_of(state: Tensor, mask: Tensor) -> Tensor:
    """Which example each of the tokens in :func:`_counted` is of, ``(N,)``."""
    return Packing.of(mask).sentence if state.dim() == 2 else mask.nonzero()[:, 0]


class DistillationTerms(NamedTuple):
    """The two parts of Eq. 7, each a scalar."""

    hidden: Tensor  #: L_trm, Eq. 5
    prediction: Tensor  #: L_pred, Eq. 6


def distillation_terms(
    student, teacher, *, mask: Tensor | None, layers: str = "all", mean: str = "tokens"
) -> DistillationTerms:
    """Eq. 5 and Eq. 6 for one batch.

    For spans, Eq. 6 is the mean of start's and end's, as the task loss is.

    Args:
        student: Model output with ``hidden_states`` and ``logits``, or ``start_logits`` and
            ``end_logits``.
        teacher: The same of the teacher, without gradient; :func:`teacher_layers` says which of
            its states the student's are compared with.
        mask: ``(B, T)``, 1 for tokens whose states count; ``None`` for all. For packed states
            only ``examples`` needs it.
        layers: ``all``, ``skip`` or ``last`` (Fig. 3b).
        mean: ``tokens``: Eq. 5's mean is over all counted tokens of the batch, so that a longer
            example weighs more; ``examples``: over each example's tokens, then over examples.
    """
    n_layers = len(student.hidden_states) - 1
    compared = teacher_layers(n_layers, len(teacher.hidden_states) - 1)
    states = [
        (student.hidden_states[layer], teacher.hidden_states[compared[layer]])
        for layer in chosen_layers(n_layers, layers)
    ]
    X, X_tea = zip(*[_counted(*pair, mask) for pair in states], strict=True)
    if mean == "examples" and mask is not None:
        hidden = layer_loss_by_example(X, X_tea, _example_of(student.hidden_states[0], mask))
    else:  # without a mask all examples have as many tokens
        hidden = layer_loss(X, X_tea)
    logits = zip(_logits(student), _logits(teacher), strict=True)
    predictions = torch.stack([_prediction_distance(*pair) for pair in logits])
    return DistillationTerms(hidden, predictions.mean())


def teacher_layers(n_student: int, n_teacher: int) -> list[int]:
    """The teacher's state that each of the student's ``X^0 .. X^L`` is compared with in Eq. 5.

    The same one; for a student of half the depth (``conversion.half_depth``) the embeddings and
    every other layer, counted from the last: those that its layers are copies of.

    Raises:
        ValueError: another number of layers.

    Example:
        >>> teacher_layers(3, 6)
        [0, 2, 4, 6]
    """
    if n_student == n_teacher:
        return list(range(n_teacher + 1))
    if n_student == (n_teacher + 1) // 2:
        return [0, *sorted(range(n_teacher, 0, -2))]
    raise ValueError(f"student has {n_student + 1} states, teacher {n_teacher + 1}")


def chosen_layers(n_layers: int, which: str) -> list[int]:
    """Which states ``X^0 .. X^L`` enter Eq. 5 (Fig. 3b).

    ``all``: every one; ``skip``: every other, counted from the last; ``last``: only the last;
    ``none``: nothing (Table 3).

    Example:
        >>> chosen_layers(6, "skip")
        [0, 2, 4, 6]
    """
    if which == "all":
        return list(range(n_layers + 1))
    if which == "skip":
        return sorted(range(n_layers, -1, -2))
    if which == "last":
        return [n_layers]
    if which == "none":
        return []
    raise ValueError(f"layers must be all, skip, last or none, not {which!r}")


def _logits(output) -> list[Tensor]:
    """Logits of each distribution that a model predicts: one, or a span's start and end."""
    if hasattr(output, "start_logits"):
        return [output.start_logits, output.end_logits]  # (B, T) each
    return [output.logits]  # (B, C)


def _prediction_distance(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Eq. 6; for a single logit (regression), which is no distribution, the squared difference."""
    teacher_logits = teacher_logits.to(logits.dtype)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits, teacher_logits)
    return prediction_loss(logits, teacher_logits)
