"""Equalities about routers and about learning, for a reader to run and for pytest to run.

As in ``checks``: both sides are computed here, in float64, from the reader's own objects, with
nothing else of this library.
"""

import copy
from collections.abc import Callable

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
from moebert_lib.teaching import checks
from moebert_lib.teaching.checks import Check, _logits, equal


def same_token_same_expert(model: nn.Module, batch: dict[str, Tensor]) -> Check:
    """Under a hash, every occurrence of a token goes to one expert in each layer.

    Args:
        model: A MoEBERT with a hash router.
        batch: Model inputs.
    """
    ids = batch["input_ids"].flatten()
    first = (ids[:, None] == ids).int().argmax(1)  # of each token, where it stands first
    moved = [(experts != experts[first]).sum() for experts, _ in routes(model, batch)]
    claim = "a hash sends every occurrence of a token to one expert"
    return _holds(claim, torch.stack(moved).max(), 0.0)


def training_leaves_tables(before: nn.Module, after: nn.Module) -> Check:
    """A hash learns nothing: its tables are the same before and after training.

    Args:
        before: A MoEBERT with hash routers, as converted.
        after: The same, trained.
    """
    own, other = (
        [table for name, table in model.named_buffers() if name.endswith("tid2eid")]
        for model in (before, after)
    )
    moved = sum(int((a != b).sum()) for a, b in zip(own, other, strict=True)) if own else 1
    return _holds("training leaves a hash's tables as they were", moved, 0.0)


def sentence_stays_together(model: nn.Module, batch: dict[str, Tensor]) -> Check:
    """Under a sentence gate, all tokens of a sentence go to one expert in each layer.

    Args:
        model: A MoEBERT with a sentence gate.
        batch: Model inputs.
    """
    shape = batch["input_ids"].shape
    rows = [experts.view(*shape, -1) for experts, _ in routes(model, batch)]
    apart = torch.stack([(row != row[:, :1]).sum() for row in rows]).max()
    return _holds("a sentence gate keeps a sentence's tokens together", apart, 0.0)


def gate_takes_its_favourite(model: nn.Module, batch: dict[str, Tensor]) -> Check:
    """A gate's factors are softmax's ``k`` largest, so together at least ``k / N`` (Eq. 3).

    Args:
        model: A MoEBERT with a gate; in the paper one expert serves a token, ``k = 1``.
        batch: Model inputs.
    """
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
    """Before training, student and teacher start each sentence from the same states, X^0.

    Args:
        moebert: As converted.
        dense: The model that was converted.
        batch: Model inputs.
    """
    ids = batch["input_ids"]
    own, other = (
        copy.deepcopy(model.base_model.embeddings).double().eval() for model in (moebert, dense)
    )
    with torch.no_grad():
        apart = (own(ids) - other(ids)).abs().max()
    return _holds("conversion leaves the embeddings as they are", apart, 0.0)


@torch.no_grad()
def experts_hold_the_dense_neurons(moebert: nn.Module, dense: nn.Module) -> Check:
    """Before training every weight is the dense model's, bit for bit (Eq. 1).

    Each expert holds rows of W1 and b1 and columns of W2, the output's bias and LayerNorm; and
    what is no feed-forward layer is as it was.

    Args:
        moebert: As converted; its layers remember which neurons each expert was dealt.
        dense: The model that was converted.
    """
    pairs = []
    for layer, old in zip(_expert_layers(moebert), encoder_layouts.ffns(dense), strict=True):
        up, down, experts = old.up, old.down, layer.experts
        for e, dealt in enumerate(layer.neurons):
            pairs += [
                (experts.up_proj[e], up.weight[dealt]),
                (experts.up_proj_bias[e], up.bias[dealt]),
                (experts.down_proj[e], down.weight[:, dealt]),
            ]
        pairs += [
            (experts.down_proj_bias, down.bias),
            (layer.LayerNorm.weight, old.norm.weight),
            (layer.LayerNorm.bias, old.norm.bias),
        ]
    own, other = moebert.state_dict(), dense.state_dict()
    alike = [name for name in own if name in other and own[name].shape == other[name].shape]
    pairs += [(own[name], other[name]) for name in alike]
    gap = torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max()
    claim = "before training every expert's weights, and all others, are the dense model's own"
    return _holds(claim, gap, 0.0)


def deal_follows_scores(moebert: nn.Module, scores: Tensor) -> Check:
    """The neurons of highest score are in every expert, the next are dealt in turn (Sec. 3.1).

    Args:
        moebert: Converted by these scores, trained or not.
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
    """Each layer gives ``LN(a + sum_k p_k E_k(a))`` of a token's own experts (Eq. 2).

    Here every expert serves every token, and of its answers those of the route are taken.

    Args:
        moebert: Trained or not, whatever its router.
        batch: Model inputs.
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
    answers = torch.stack(every, 1)[tokens, chosen]  # (N, k, D)
    factors = torch.ones_like(p) if layer.outside else p
    y = a + (answers * factors[..., None]).sum(1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + eps).sqrt()
    gain, bias = norm.weight, norm.bias
    if gain.dim() == 2:  # of each expert: mixed by the shares of p
        share = (p / p.sum(1, keepdim=True))[..., None]
        gain, bias = ((own[chosen] * share).sum(1) for own in (gain, bias))
    y = y * gain + bias
    return y * p if layer.outside else y


def _expert_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "neurons")]


def same_logits(
    claim: str, left: nn.Module, right: nn.Module, batch: dict[str, Tensor], *, tolerance: float
) -> Check:
    """Two models answer a batch alike, in their own dtype; at real tokens where spans are found."""
    return equal(
        claim, *(_logits(model.eval(), batch) for model in (left, right)), tolerance=tolerance
    )


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
        many: A MoEBERT whose experts all hold the same neurons, as converted, with a hash router.
        one: The same conversion with a single expert.
        batch: Model inputs.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        left, right = (copy.deepcopy(m).double().eval()(**inputs) for m in (many, one))
    names = [name for name in ("logits", "start_logits", "end_logits") if name in left]
    apart = max(float((left[name] - right[name]).abs().max()) for name in names)
    return _holds("identical experts, untrained, are one expert", apart, 1e-10)


def outputs_differ(left: Tensor, right: Tensor, *, by: float = 1e-4) -> Check:
    """Two models' outputs of one shape are more than ``by`` apart: they are not one model."""
    gap = float((torch.as_tensor(left).double() - torch.as_tensor(right).double()).abs().max())
    return _holds(f"outputs differ, by up to {gap:.2g}", max(0.0, by - gap), 0.0)


@torch.no_grad()
def routes(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each layer's router: chosen experts and factors, ``(B*T, k)`` each."""
    found = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, route: found.append((route[0], route[1])))
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "router"
    ]
    try:
        model.eval()(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"))
    finally:
        for hook in hooks:
            hook.remove()
    return [(experts, weights.double()) for experts, weights in found]


def _holds(claim: str, difference: Tensor | float, tolerance: float) -> Check:
    return equal(claim, [float(difference)], [0.0], tolerance=tolerance)


# Every family of ``adapters`` held to the same equalities, on small random models.

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


@torch.no_grad()
def tiny(kind: type[PreTrainedModel], *, seed: int = 0, **config: object) -> PreTrainedModel:
    """A random model of a dense class: float64, eval mode, no bias 0 and no LayerNorm the identity.

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


def batch(model: PreTrainedModel, *, n: int = 4, length: int = 10, seed: int = 0) -> dict:
    """A padded batch with what the model's head is asked; row ``i`` lacks ``i % 4`` tokens."""
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


def table() -> pd.DataFrame:
    """Each family's classifier, converted: largest differences of two equalities, and parameters.

    Returns:
        One row a family: ``encoder``, ``one expert - dense`` of logits, ``scores - slow loop``
        over all neurons, and parameters of the dense model and of 4 experts of 16 neurons.

    Raises:
        AssertionError: an equality does not hold.
    """
    rows = []
    for kind in [kind for kind in HEADS if kind.__name__.endswith("SequenceClassification")]:
        dense = tiny(kind)
        inputs = batch(dense)
        scores = ffn_importance(dense, [inputs])
        one, four = (to_moebert(dense, scores, n_experts=n, n_shared=n // 4 * 8) for n in (1, 4))
        counts = parameter_counts(four)
        rows.append(
            {
                "encoder": FAMILIES[dense.config.model_type].name,
                "one expert - dense": checks.one_expert_is_dense(dense, one, inputs).difference,
                "scores - slow loop": checks.importance_equals_slow_loop(
                    ffn_importance, dense, inputs
                ).difference,
                "dense": parameter_counts(dense).stored,
                "effective": counts.effective,
                "stored": counts.stored,
            }
        )
    return pd.DataFrame(rows)
