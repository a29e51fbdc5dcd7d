"""Checks: equalities of the method, for a reader to run in a notebook and for pytest to run.

Each check takes the reader's objects, computes both sides in float64 and returns a :class:`Check`,
which prints as one line; where the equality does not hold it raises ``AssertionError`` with that
line. Both sides are computed here, without the library's own mathematics, so that a check can
contradict it. In all of them ``dense`` is the model that was converted, ``moebert`` its
conversion, and ``batch`` holds model inputs by name.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebert_lib.method import encoder_layouts
from moebert_lib.method.encoder_layouts import FAMILIES, family
from moebert_lib.method.importance import ffn_importance
from moebert_lib.model.conversion import to_moebert
from moebert_lib.model.modeling import HEADS
from moebert_lib.model.moe_layer import parameter_counts

Values = Tensor | Sequence


class Check(NamedTuple):
    """An equality, the largest difference, and the tolerance allowed."""

    claim: str
    difference: float
    tolerance: float

    def __str__(self) -> str:
        verdict = "holds" if self.difference <= self.tolerance else "FAILS"
        numbers = f"largest difference {self.difference:.1e}, tolerance {self.tolerance:.0e}"
        return f"{verdict}: {self.claim} ({numbers})"

    __repr__ = __str__


def equal(claim: str, left: Values, right: Values, *, tolerance: float = 1e-12) -> Check:
    """Check that two sides of a claim, tensors or lists of numbers, are equal.

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
    """Return the FFN of each layer: two linear layers, the first widens, the second narrows."""
    linear = [module for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    return [(a, b) for a, b in pairwise(linear) if a.in_features == b.out_features < a.out_features]


_TARGETS = ("labels", "start_positions", "end_positions")


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return logits ``(B, C)``; of a span head those of all real tokens, ``(n, 2)``."""
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
    """A layer's output is the sum of its neurons, added in any order (Eq. 1).

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
    """One expert as wide as the FFN gives the dense model's logits."""
    left, right = _logits(_double(dense), batch), _logits(_double(moebert), batch)
    return equal("one full-width expert = the dense model", left, right, tolerance=1e-12)


def permuting_neurons_changes_nothing(dense: nn.Module, batch: dict, *, seed: int = 0) -> Check:
    """The order of a layer's neurons does not change the logits."""
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
    """Computed in groups or one at a time, each token's output is at the place of its input.

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
    """Eq. 4 is the slope of the losses as a neuron's column and row are scaled down.

    No gradient is used: each neuron is scaled by ``1 - step`` and ``1 + step``. The other
    arguments are those of :func:`importance_equals_weight_gradients`.
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
    """Saving and loading keeps all tensors bit for bit, and the logits."""
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
    """The most important neurons are in every expert; every other neuron is in one at most.

    Args:
        experts: One layer's assignment, ``(E, K)``.
        ranking: The layer's neurons, most important first, ``(F,)``.
        n_shared: Neurons that every expert should have.
    """
    top = set(ranking[:n_shared].tolist())
    hands = [set(row.tolist()) for row in experts]
    missing = sum(len(top - hand) for hand in hands)
    single = [neuron for hand in hands for neuron in hand - top]
    repeated = len(single) - len(set(single))
    claim = "the top neurons are in every expert, each other neuron in at most one"
    return equal(claim, torch.tensor([missing + repeated]), torch.tensor([0]), tolerance=0.0)


def deal_keeps_as_many_as_the_formula(experts: Tensor, n_shared: int) -> Check:
    """Of all neurons, ``s + N (K - s)`` are in some expert (Sec. 3.1).

    Args:
        experts: One layer's assignment, ``(N, K)``.
        n_shared: Neurons that every expert has, ``s``.
    """
    (N, K), s = experts.shape, n_shared
    kept = len({neuron for hand in experts.tolist() for neuron in hand})
    claim = f"{kept:,} neurons are kept, s + N (K - s) of them"
    return equal(claim, [kept], [s + N * (K - s)], tolerance=0.0)


def teacher_is_its_own_best_student(loss, states: list[Tensor], logits: Tensor) -> Check:
    """The distillation loss is zero where student and teacher are the same.

    Args:
        loss: Function of (student states, teacher states, student logits, teacher logits).
        states: Hidden states, each ``(B, T, D)``.
        logits: ``(B, C)``.
    """
    value = torch.as_tensor(loss(states, states, logits, logits)).reshape(1)
    claim = "the distillation loss of a model against itself is zero"
    return equal(claim, value, torch.zeros_like(value), tolerance=1e-6)


def teacher_only_watches(train, student: nn.Module, teacher: nn.Module) -> Check:
    """While the student is trained, the teacher stays in eval mode and does not change.

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
    of_student = {id(parameter) for parameter in student.parameters()}
    overlap = [p for p in teacher.parameters() if id(p) in of_student]
    if overlap or any(modes) or not modes:
        raise AssertionError("FAILS: the teacher is part of the student, in train mode, or idle")
    moved = [(before[n].double() - t.double()).abs().max() for n, t in teacher.state_dict().items()]
    claim = f"the teacher answers {len(modes)} batches in eval mode and does not move"
    return equal(claim, torch.stack(moved), torch.zeros(len(moved)).to(moved[0]), tolerance=0.0)


def same_token_same_expert(model: nn.Module, batch: dict[str, Tensor]) -> Check:
    """With a hash, all occurrences of a token go to the same expert in a layer."""
    ids = batch["input_ids"].flatten()
    first = (ids[:, None] == ids).int().argmax(1)  # of each token, where it stands first
    moved = [(experts != experts[first]).sum() for experts, _ in routes(model, batch)]
    claim = "a hash sends every occurrence of a token to one expert"
    return _holds(claim, torch.stack(moved).max(), 0.0)


def training_leaves_tables(before: nn.Module, after: nn.Module) -> Check:
    """Training does not change the tables of a hash router."""
    old, new = _hash_tables(before), _hash_tables(after)
    moved = sum(int((a != b).sum()) for a, b in zip(old, new, strict=True)) if old else 1
    return _holds("training leaves a hash's tables as they were", moved, 0.0)


def _hash_tables(model: nn.Module) -> list[Tensor]:
    return [table for name, table in model.named_buffers() if name.endswith("tid2eid")]


def sentence_stays_together(model: nn.Module, batch: dict[str, Tensor]) -> Check:
    """With a sentence gate, all tokens of a sentence go to the same expert in a layer."""
    shape = batch["input_ids"].shape
    rows = [experts.view(*shape, -1) for experts, _ in routes(model, batch)]
    apart = torch.stack([(row != row[:, :1]).sum() for row in rows]).max()
    return _holds("a sentence gate keeps a sentence's tokens together", apart, 0.0)


def gate_takes_its_favourite(model: nn.Module, batch: dict[str, Tensor]) -> Check:
    """A gate's factors are softmax's ``k`` largest, so together at least ``k / N`` (Eq. 3)."""
    N, k = model.config.n_experts, model.config.num_experts_per_tok
    totals = [weights.sum(1) for _, weights in routes(model, batch)]
    short = [torch.maximum(k / N - total, total - 1).max() for total in totals]
    claim = "a gate's p lies between 1/N and 1"
    if k > 1:
        claim = f"a gate's {k} largest p add up to between {k}/N and 1"
    return _holds(claim, torch.stack(short).max().clamp(min=0), 1e-6)


def balance_is_within_one_token(table: Tensor, counts: Tensor, n_experts: int) -> Check:
    """A balanced table's loads differ by at most the count of the most frequent token.

    Args:
        table: Expert of each vocabulary entry, ``(vocab,)``.
        counts: Occurrences of each, ``(vocab,)``.
        n_experts: Number of experts; one that has no token has no work.
    """
    work = torch.bincount(table.flatten(), weights=counts.double(), minlength=n_experts)
    over = (work.max() - work.min() - counts.max()).clamp(min=0)
    return _holds("the loads differ by at most the most frequent token", over, 0.0)


def conversion_leaves_embeddings(moebert: nn.Module, dense: nn.Module, batch: dict) -> Check:
    """Before training, student and teacher have the same embedding output X^0."""
    ids = batch["input_ids"]
    with torch.no_grad():
        left, right = (_double(model).base_model.embeddings(ids) for model in (moebert, dense))
    return equal("conversion leaves the embeddings as they are", left, right, tolerance=0.0)


@torch.no_grad()
def experts_hold_the_dense_neurons(moebert: nn.Module, dense: nn.Module) -> Check:
    """Before training every weight is the dense model's, bit for bit (Eq. 1).

    Each expert holds rows of W1 and b1 and columns of W2, the output's bias and LayerNorm; and
    what is no feed-forward layer is as it was.
    """
    pairs = []
    for layer, ffn in zip(_expert_layers(moebert), encoder_layouts.ffns(dense), strict=True):
        up, down, experts = ffn.up, ffn.down, layer.experts
        for e, dealt in enumerate(layer.neurons):
            pairs += [
                (experts.up_proj[e], up.weight[dealt]),
                (experts.up_proj_bias[e], up.bias[dealt]),
                (experts.down_proj[e], down.weight[:, dealt]),
            ]
        pairs += [
            (experts.down_proj_bias, down.bias),
            (layer.LayerNorm.weight, ffn.norm.weight),
            (layer.LayerNorm.bias, ffn.norm.bias),
        ]
    old, new = dense.state_dict(), moebert.state_dict()
    common = [name for name in new if name in old and new[name].shape == old[name].shape]
    pairs += [(new[name], old[name]) for name in common]
    gap = torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max()
    claim = "before training every expert's weights, and all others, are the dense model's own"
    return _holds(claim, gap, 0.0)


def deal_follows_scores(moebert: nn.Module, scores: Tensor) -> Check:
    """The highest scored neurons are in every expert, the next go to one in turn (Sec. 3.1).

    Args:
        scores: Of each layer's neurons, ``(L, F)``; of two alike the first comes first.
    """
    s, wrong = moebert.config.n_shared, 0
    for layer, row in zip(_expert_layers(moebert), scores.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda neuron: -row[neuron])
        E, K = layer.neurons.shape
        for e, held in enumerate(layer.neurons.tolist()):
            expected = order[:s] + order[s + e : s + E * (K - s) : E]
            wrong += sum(a != b for a, b in zip(held, expected, strict=True))
    return _holds("the highest scores are in every expert, the next are dealt in turn", wrong, 0.0)


@torch.no_grad()
def experts_serve_their_tokens(moebert: nn.Module, batch: dict[str, Tensor]) -> Check:
    """Each layer computes ``LN(a + sum_k p_k E_k(a))`` with a token's experts (Eq. 2).

    Here every expert computes every token, and the outputs of the routed experts are taken.
    """
    model, seen = copy.deepcopy(moebert).double(), []
    layers = _expert_layers(model)
    hooks = [
        layer.register_forward_hook(lambda _m, given, output: seen.append((given[0], output)))
        for layer in layers
    ]
    ways = routes(model, batch)
    for hook in hooks:
        hook.remove()
    gaps = []
    for layer, (a, output), way in zip(layers, seen, ways, strict=True):
        expected = _served(layer, a.flatten(0, 1), *way, eps=model.config.layer_norm_eps)
        gaps.append((output.flatten(0, 1) - expected).abs().max())
    claim = "every token is served by its own experts' weights (Eq. 2)"
    return _holds(claim, torch.stack(gaps).max(), 1e-10)


def _served(layer: nn.Module, a: Tensor, chosen: Tensor, p: Tensor, *, eps: float) -> Tensor:
    """A layer's output for tokens ``a (N, D)``, with experts and factors ``(N, k)`` of each."""
    experts, norm = layer.experts, layer.LayerNorm
    tokens = torch.arange(len(a), device=a.device)[:, None]
    every = [
        experts.act_fn(a @ experts.up_proj[e].T + experts.up_proj_bias[e]) @ experts.down_proj[e].T
        + experts.down_proj_bias[e]
        for e in range(len(layer.neurons))
    ]  # of each expert (N, D)
    outputs = torch.stack(every, 1)[tokens, chosen]  # (N, k, D)
    factors = torch.ones_like(p) if layer.outside else p
    y = a + (outputs * factors[..., None]).sum(1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + eps).sqrt()
    gain, bias = norm.weight, norm.bias
    if gain.dim() == 2:  # of each expert: mixed by the shares of p
        share = (p / p.sum(1, keepdim=True))[..., None]
        gain, bias = ((values[chosen] * share).sum(1) for values in (gain, bias))
    y = y * gain + bias
    return y * p if layer.outside else y


def _expert_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "neurons")]


def same_logits(
    claim: str, left: nn.Module, right: nn.Module, batch: dict[str, Tensor], *, tolerance: float
) -> Check:
    """Two models give the same logits, in their own dtype; of span heads at real tokens."""
    left, right = _logits(left.eval(), batch), _logits(right.eval(), batch)
    return equal(claim, left, right, tolerance=tolerance)


def swapping_changes_nothing(
    loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor
) -> Check:
    """A symmetric divergence is the same both ways, and one direction of KL is not.

    Args:
        loss: Function of two tensors of logits, such as ``distill.prediction_loss`` (Eq. 6).
        a: Logits ``(B, C)``.
        b: Logits ``(B, C)``.

    Raises:
        AssertionError: the two ways differ, or KL is symmetric for these logits, so that
            nothing is shown by them.
    """
    a, b = a.double(), b.double()
    p, q = a.softmax(-1), b.softmax(-1)
    one_way, other_way = ((x * (x / y).log()).sum() for x, y in ((p, q), (q, p)))
    if torch.isclose(one_way, other_way):
        raise AssertionError("FAILS: KL is the same both ways for these logits; choose others")
    apart = (loss(a, b) - loss(b, a)).abs()
    return _holds("L_pred is the same both ways, though KL is not", apart, 1e-12)


def identical_experts_are_one(many: nn.Module, one: nn.Module, batch: dict) -> Check:
    """Experts that are copies of each other give the logits of one of them alone.

    Args:
        many: A MoEBERT whose experts all have the same neurons, not trained, with a hash router.
        one: The same conversion with a single expert.
    """
    left, right = _logits(_double(many), batch), _logits(_double(one), batch)
    return equal("identical experts, untrained, are one expert", left, right, tolerance=1e-10)


def outputs_differ(left: Tensor, right: Tensor, *, by: float = 1e-4) -> Check:
    """The outputs of two models differ by more than ``by``."""
    gap = float((torch.as_tensor(left).double() - torch.as_tensor(right).double()).abs().max())
    return _holds(f"outputs differ, by up to {gap:.2g}", max(0.0, by - gap), 0.0)


@torch.no_grad()
def routes(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return chosen experts and factors of each layer's router, ``(B*T, k)`` each."""
    chosen = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, route: chosen.append((route[0], route[1])))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "router"
    ]
    try:
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
    finally:
        for hook in hooks:
            hook.remove()
    return [(experts, weights.double()) for experts, weights in chosen]


def _holds(claim: str, difference: Tensor | float, tolerance: float) -> Check:
    return equal(claim, [float(difference)], [0.0], tolerance=tolerance)


# Two of the checks on a small random model of each encoder family.

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


@torch.no_grad()
def tiny_encoder(
    kind: type[PreTrainedModel], *, seed: int = 0, **config: object
) -> PreTrainedModel:
    """Return a random dense model in float64 and eval mode, with non-zero biases.

    Args:
        kind: Such as ``RobertaForSequenceClassification``; its FFNs have 64 neurons.
        seed: Of its weights.
        config: Further values of its configuration.
    """
    row = family(kind.config_class.model_type)
    sizes = {row.key(name): size for name, size in SIZES.items()}
    model = kind(kind.config_class(**{**sizes, **config})).double().eval()
    noise = torch.Generator().manual_seed(seed)
    for name, values in model.named_parameters():
        centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        values.copy_(centre + 0.2 * torch.randn(values.shape, generator=noise))
    return model


def tiny_batch(model: PreTrainedModel, *, n: int = 4, length: int = 10, seed: int = 0) -> dict:
    """Return a padded batch with the head's targets; row ``i`` lacks ``i % 4`` tokens."""
    noise = torch.Generator().manual_seed(seed)
    mask = (torch.arange(length) < length - torch.arange(n)[:, None] % 4).long()
    ids = torch.randint(3, model.config.vocab_size, mask.shape, generator=noise)
    inputs = {
        "input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id),
        "attention_mask": mask,
    }
    drawn: Tensor = torch.randint(2, (n,), generator=noise)
    if hasattr(model, "qa_outputs"):
        return {**inputs, "start_positions": drawn, "end_positions": drawn + 2}
    return {**inputs, "labels": drawn}


def encoder_table() -> pd.DataFrame:
    """Convert a classifier of each family; return differences of two checks, and parameters.

    Returns:
        One row a family: ``encoder``, ``one expert - dense`` of logits, ``scores - slow loop``
        over all neurons, and parameters of the dense model and of 4 experts of 16 neurons.

    Raises:
        AssertionError: an equality does not hold.
    """
    rows = []
    for kind in [kind for kind in HEADS if kind.__name__.endswith("SequenceClassification")]:
        dense = tiny_encoder(kind)
        batch = tiny_batch(dense)
        scores = ffn_importance(dense, [batch])
        one, four = (to_moebert(dense, scores, n_experts=n, n_shared=n // 4 * 8) for n in (1, 4))
        counts = parameter_counts(four)
        rows.append(
            {
                "encoder": FAMILIES[dense.config.model_type].name,
                "one expert - dense": one_expert_is_dense(dense, one, batch).difference,
                "scores - slow loop": importance_equals_slow_loop(
                    ffn_importance, dense, batch
                ).difference,
                "dense": parameter_counts(dense).stored,
                "effective": counts.effective,
                "stored": counts.stored,
            }
        )
    return pd.DataFrame(rows)
