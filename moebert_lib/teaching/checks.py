"""Equalities that must hold, for a reader to run in a notebook and for pytest to run.

Each takes the reader's own objects, computes both sides in float64, and returns a
:class:`Check` that prints in one line; a failing one raises ``AssertionError`` with the same
line. They use nothing of this library, so they can contradict it. :func:`equal` holds any two
sides that a cell has computed; the others compute one of the sides, or both, by themselves.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

Values = Tensor | Sequence


class Check(NamedTuple):
    """An equality, the largest difference found, and the tolerance it was held to."""

    claim: str
    difference: float
    tolerance: float

    def __str__(self) -> str:
        verdict = "holds" if self.difference <= self.tolerance else "FAILS"
        found = f"largest difference {self.difference:.1e}, tolerance {self.tolerance:.0e}"
        return f"{verdict}: {self.claim} ({found})"

    __repr__ = __str__


def equal(claim: str, left: Values, right: Values, *, tolerance: float = 1e-12) -> Check:
    """Two sides of a claim are the same: tensors, or lists of numbers.

    NaN and shapes that differ count as infinitely far apart.

    Example:
        >>> equal("a half and a half are one", torch.tensor([0.5]) * 2, [1.0])
        holds: a half and a half are one (largest difference 0.0e+00, tolerance 1e-12)
    """
    left = torch.as_tensor(left, dtype=torch.float64)
    right = torch.as_tensor(right, dtype=torch.float64, device=left.device)
    difference = float("inf")
    if left.shape == right.shape:
        gap = (left - right).abs()
        difference = float(gap.nan_to_num(nan=float("inf")).max()) if gap.numel() else 0.0
    check = Check(claim, difference, tolerance)
    if difference > tolerance:
        raise AssertionError(check)  # prints as its line
    return check


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()


def _feed_forward(model: nn.Module) -> list[tuple[nn.Linear, nn.Linear]]:
    """Of each layer the two linear layers of which one widens and the next one narrows."""
    linear = [module for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    return [(a, b) for a, b in pairwise(linear) if a.in_features == b.out_features < a.out_features]


_TARGETS = ("labels", "start_positions", "end_positions")


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits ``(B, C)``; of a span head where starts and ends are, real tokens only, ``(n, 2)``."""
    inputs = {name: v for name, v in batch.items() if name not in (*_TARGETS, "index")}
    with torch.no_grad():
        output = model(**inputs)
    if "start_logits" not in output:
        return output.logits
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return torch.stack([output.start_logits[mask], output.end_logits[mask]], -1)


def layer_is_the_sum_of_its_neurons(
    ffn: Callable, states: Tensor, n_neurons: int, *, seed: int = 0
) -> Check:
    """Put together neuron by neuron, in whatever order, a layer gives the same output (Eq. 1).

    Args:
        ffn: Function of (states, neurons): the output of the layer with only these neurons,
            with the output's bias.
        states: What the layer reads, ``(..., D)``.
        n_neurons: Neurons of the layer, ``F``.
        seed: Of the order.
    """
    order = torch.randperm(n_neurons, generator=torch.Generator().manual_seed(seed))
    output = ffn(states, order[:0])
    bias = output.clone()
    for neuron in order:
        output = output + (ffn(states, neuron[None]) - bias)
    claim = f"the layer = its {n_neurons} neurons, added one by one in any order"
    return equal(claim, output, ffn(states, torch.arange(n_neurons)))


def one_expert_is_dense(dense: nn.Module, moebert: nn.Module, batch: dict) -> Check:
    """One expert as wide as the FFN gives the dense model's logits.

    Args:
        dense: The model that was converted.
        moebert: Its conversion with ``n_experts=1``.
        batch: Model inputs.
    """
    left, right = _logits(_double(dense), batch), _logits(_double(moebert), batch)
    return equal("one full-width expert = the dense model", left, right, tolerance=1e-12)


def permuting_neurons_changes_nothing(dense: nn.Module, batch: dict, *, seed: int = 0) -> Check:
    """The order of a layer's neurons is a matter of bookkeeping: logits stay the same."""
    model, shuffled = _double(dense), _double(dense)
    generator = torch.Generator().manual_seed(seed)
    for up, down in _feed_forward(shuffled):
        order = torch.randperm(up.out_features, generator=generator).to(up.weight.device)
        up.weight.data, up.bias.data = up.weight.data[order], up.bias.data[order]
        down.weight.data = down.weight.data[:, order]
    claim = "permuting neurons changes nothing"
    return equal(claim, _logits(model, batch), _logits(shuffled, batch), tolerance=1e-12)


def padding_changes_nothing(moebert: nn.Module, batch: dict) -> Check:
    """A sentence gets the same logits alone and padded in a batch, whatever its router.

    The release's sentence gate fails this: a batch of one takes a path without Eq. 2's factor.

    Args:
        moebert: The model.
        batch: Inputs of sentences of several lengths.
    """
    model, mask = _double(moebert), batch["attention_mask"].bool()
    inputs = {name: value for name, value in batch.items() if value.shape == mask.shape}
    alone = [
        _logits(model, {name: value[i : i + 1, mask[i]] for name, value in inputs.items()})
        for i in range(len(mask))
    ]
    claim = "a sentence alone and in a padded batch gets the same logits"
    return equal(claim, _logits(model, batch), torch.cat(alone), tolerance=1e-10)


def tokens_return_to_their_place(experts: nn.Module, hidden: Tensor, expert_of: Tensor) -> Check:
    """Served in groups or one at a time, every token's output lands where its input was.

    Args:
        experts: A layer's stacked experts.
        hidden: ``(N, D)`` token states.
        expert_of: ``(N, 1)`` int64.
    """
    experts, hidden = copy.deepcopy(experts).double(), hidden.detach().double()
    ones = torch.ones_like(hidden[:, :1])
    with torch.no_grad():
        together = experts(hidden, expert_of, ones)
        alone = [experts(hidden[[i]], expert_of[[i]], ones[[i]]) for i in range(len(ones))]
    return equal("every token returns to its place", together, torch.cat(alone), tolerance=1e-12)


def importance_equals_slow_loop(score, dense: nn.Module, batch: dict) -> Check:
    """Scores of a batch equal Eq. 4 computed example by example from weight gradients.

    Args:
        score: Function of (model, list of batches) with ``.scores`` in its result, such as
            ``ffn_importance``.
        dense: A fine-tuned BERT, or another encoder.
        batch: Inputs with ``labels``; a few examples, since the loop is slow.
    """
    model = _double(dense)
    fast = score(model, [batch]).scores
    slow = torch.zeros_like(fast)
    for i in range(len(batch["input_ids"])):
        example = {name: value[i : i + 1] for name, value in batch.items() if name != "index"}
        model.zero_grad()
        model(**example).loss.backward()
        for row, (up, down) in zip(slow, _feed_forward(model), strict=True):
            w1, w2 = up.weight, down.weight
            term = (w1.detach() * w1.grad).sum(1) + (w2.detach() * w2.grad).sum(0)
            row += term.abs().cpu()
    return equal("importance = the per-example loop over Eq. 4", fast, slow, tolerance=1e-10)


def importance_equals_weight_gradients(
    scores: Tensor, losses: Callable, W1: Tensor, W2: Tensor
) -> Check:
    """Scores of one layer equal Eq. 4 as it is written: weight gradients, example by example.

    Args:
        scores: To be checked, ``(F,)``.
        losses: Function of (W1, W2): the loss of each example, ``(B,)``, by differentiable steps.
        W1: ``(D, F)``, a column for each neuron.
        W2: ``(F, D)``, a row for each neuron.
    """
    slow = torch.zeros_like(scores)
    w1, w2 = (weight.detach().clone().requires_grad_() for weight in (W1, W2))
    for loss in losses(w1, w2):
        grad_w1, grad_w2 = torch.autograd.grad(loss, (w1, w2), retain_graph=True)
        slow += ((W1 * grad_w1).sum(0) + (W2 * grad_w2).sum(1)).abs()
    return equal("importance by hand = Eq. 4 from automatic weight gradients", scores, slow)


def importance_is_a_slope(
    scores: Tensor, losses: Callable, W1: Tensor, W2: Tensor, *, step: float = 1e-4
) -> Check:
    """Eq. 4 is how fast the losses change as a neuron begins to shrink, column and row together.

    No gradient is asked: each neuron is made a little smaller and a little larger. The arguments
    are those of :func:`importance_equals_weight_gradients`; ``step`` is a part of the neuron.
    """
    slopes = torch.zeros_like(scores)
    for neuron in range(len(scores)):
        smaller, larger = torch.ones(2, len(scores), dtype=W1.dtype)
        smaller[neuron], larger[neuron] = 1 - step, 1 + step
        moved = [losses(W1 * scale, W2 * scale[:, None]) for scale in (smaller, larger)]
        slopes[neuron] = ((moved[1] - moved[0]) / (2 * step)).abs().sum()
    claim = "importance = the slope of the losses as a neuron begins to shrink"
    return equal(claim, scores, slopes, tolerance=1e-6)


def saving_changes_nothing(moebert: nn.Module, batch: dict) -> Check:
    """Saved and loaded again, the model routes and answers bit for bit as before."""
    with tempfile.TemporaryDirectory() as folder:
        moebert.save_pretrained(folder)
        back = type(moebert).from_pretrained(folder, dtype=moebert.dtype).to(moebert.device)
    moebert.eval()
    for name, tensor in moebert.state_dict().items():
        if not torch.equal(tensor, back.state_dict()[name]):
            raise AssertionError(f"FAILS: {name} changed in saving")
    claim = "save_pretrained and from_pretrained keep tables and weights bit for bit"
    return equal(claim, _logits(moebert, batch), _logits(back.eval(), batch), tolerance=1e-6)


def deal_is_fair(experts: Tensor, ranking: Tensor, n_shared: int) -> Check:
    """The most important neurons sit in every expert; no other neuron sits in two.

    Args:
        experts: One layer's assignment, ``(E, K)``.
        ranking: The layer's neurons, most important first, ``(F,)``.
        n_shared: Neurons that every expert should hold.
    """
    top = set(ranking[:n_shared].tolist())
    hands = [set(row.tolist()) for row in experts]
    missing = sum(len(top - hand) for hand in hands)
    own = [neuron for hand in hands for neuron in hand - top]
    # identical hands (n_shared = K) or a single hand have nothing to double
    twice = len(own) - len(set(own))
    claim = "the top neurons are in every expert, each other neuron in at most one"
    return equal(claim, torch.tensor([missing + twice]), torch.tensor([0]), tolerance=0.0)


def deal_keeps_as_many_as_the_formula(experts: Tensor, n_shared: int) -> Check:
    """Of all neurons, ``s + N (K - s)`` sit in some expert (Sec. 3.1).

    Args:
        experts: One layer's assignment, ``(N, K)``.
        n_shared: Neurons that every expert holds, ``s``.
    """
    (N, K), s = experts.shape, n_shared
    kept = len({neuron for hand in experts.tolist() for neuron in hand})
    claim = f"{kept:,} neurons are kept, s + N (K - s) of them"
    return equal(claim, [kept], [s + N * (K - s)], tolerance=0.0)


def teacher_is_its_own_best_student(loss, states: list[Tensor], logits: Tensor) -> Check:
    """Distillation costs nothing where student and teacher agree.

    Args:
        loss: Function of (student states, teacher states, student logits, teacher logits).
        states: Hidden states, each ``(B, T, D)``.
        logits: ``(B, C)``.
    """
    value = torch.as_tensor(loss(states, states, logits, logits)).reshape(1)
    claim = "the distillation loss of a model against itself is zero"
    return equal(claim, value, torch.zeros_like(value), tolerance=1e-6)


def teacher_only_watches(train, student: nn.Module, teacher: nn.Module) -> Check:
    """While the student is trained, the teacher neither learns nor drops neurons out.

    Args:
        train: Function of (student, teacher) that takes a few steps of distillation.
        student: Trained in place.
        teacher: Watched: every forward pass must be in eval mode and without gradient.
    """
    before, modes = copy.deepcopy(teacher.state_dict()), []
    hook = teacher.register_forward_pre_hook(
        lambda module, _: modes.append(module.training or torch.is_grad_enabled())
    )
    try:
        train(student, teacher)
    finally:
        hook.remove()
    own = {id(parameter) for parameter in student.parameters()}
    inside = [p for p in teacher.parameters() if id(p) in own]
    if inside or any(modes) or not modes:
        raise AssertionError("FAILS: the teacher is part of the student, in train mode, or idle")
    moved = [(before[n].double() - t.double()).abs().max() for n, t in teacher.state_dict().items()]
    claim = f"the teacher answers {len(modes)} batches in eval mode and does not move"
    return equal(claim, torch.stack(moved), torch.zeros(len(moved)).to(moved[0]), tolerance=0.0)
