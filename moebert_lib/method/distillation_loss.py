"""What the student is trained on: the task, and the teacher layer by layer (Sec. 3.2).

L_trm  = sum over l = 0..L of MSE(X^l, X^l_tea)                 Eq. 5, l = 0 the embeddings
L_pred = (KL(p || p_tea) + KL(p_tea || p)) / 2                  Eq. 6
L_distill = L_trm + L_pred                                      Eq. 7
L = CE(f(x), y) + lambda_distill * L_distill                    the objective, unnumbered
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DistillationTerms(NamedTuple):
    """The two parts of Eq. 7, each a scalar."""

    hidden: Tensor  #: L_trm, Eq. 5
    prediction: Tensor  #: L_pred, Eq. 6


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


def layer_distances(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None
) -> Tensor:
    """MSE between student's and teacher's state at each layer: Eq. 5 before the sum.

    Args:
        student: ``L + 1`` hidden states ``(B, T, D)``, embeddings first; or packed ones
            ``(N, D)``, which hold the tokens that count alone.
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
    real = None if mask is None else mask.bool()

    def counted(state: Tensor) -> Tensor:
        return state if real is None or state.dim() == 2 else state[real]

    pairs = zip(map(counted, student), map(counted, teacher), strict=True)
    return torch.stack([F.mse_loss(own, other.to(own.dtype)) for own, other in pairs])


def prediction_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Symmetric KL divergence of the predicted distributions (Eq. 6), mean over the batch.

    From log-probabilities, so a vanishing probability gives a large number and never NaN.
    A single logit (regression) predicts no distribution: the squared difference stands in.

    Args:
        logits: Student's, ``(B, C)``.
        teacher_logits: Teacher's, ``(B, C)``, in any dtype.
    """
    teacher_logits = teacher_logits.to(logits.dtype)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits, teacher_logits)
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)  # KL(p || p_tea)
    backward = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)  # KL(p_tea || p)
    return (forward + backward) / 2


def _predicted(output) -> list[Tensor]:
    """Logits of each distribution that a model predicts: one, or a span's start and end."""
    if hasattr(output, "start_logits"):
        return [output.start_logits, output.end_logits]  # (B, T) each
    return [output.logits]  # (B, C)


def distillation_terms(
    student, teacher, *, mask: Tensor | None, layers: str = "all"
) -> DistillationTerms:
    """Eq. 5 and Eq. 6 for one batch.

    Eq. 6 of a span is the mean of start's and end's, as its task loss is.

    Args:
        student: Model output with ``hidden_states`` and ``logits``, or ``start_logits`` and
            ``end_logits``.
        teacher: The same of the teacher, without gradient.
        mask: ``(B, T)``, 1 for tokens whose states count; ``None`` for all. Packed states hold
            those that count alone.
        layers: ``all``, ``skip`` or ``last`` (Fig. 3b).
    """
    chosen = chosen_layers(len(student.hidden_states) - 1, layers)
    own = [student.hidden_states[index] for index in chosen]
    other = [teacher.hidden_states[index] for index in chosen]
    pairs = zip(_predicted(student), _predicted(teacher), strict=True)
    prediction = torch.stack([prediction_loss(*pair) for pair in pairs]).mean()
    return DistillationTerms(layer_distances(own, other, mask).sum(), prediction)
