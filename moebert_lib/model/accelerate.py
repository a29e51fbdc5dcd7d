"""Accelerate a model: no padding, prepacked weights, and only first tokens in the last layer.

``accelerate`` returns a model that shares its parameters with the original. A batch is packed once
(``batching.Packing``). Embeddings, LayerNorms, experts and the head remain the same modules, so it
works alike for a dense BERT and a MoEBERT, hash or gate, in training or not. Without gradient on a
CPU, linear layers run through ``cpu_kernels``.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import can_return_tuple

from moebert_lib.data.batching import Packing, attention
from moebert_lib.method import importance
from moebert_lib.method.importance import over_tokens
from moebert_lib.model.cpu_kernels import (
    Kernels,
    OneDNNLinear,
    PreparedLayer,
    has_user_hook,
    hooks_of,
)
from moebert_lib.model.moe_layer import RoutingCall


def accelerate(
    model: PreTrainedModel, *, dtype: torch.dtype | None = None, prepack: bool = True
) -> PreTrainedModel:
    """The same model with a faster forward; parameters are shared, ``model`` stays as it is.

    Outputs are those of ``model`` at real tokens; states at padding are zero. It trains, saves
    and loads as ``model`` does. ``output_hidden_states="packed"`` gives the states of the real
    tokens alone, ``(N, D)``, in an order that depends on the attention mask only. Under a head that
    classifies sentences, ``base_model``'s ``last_hidden_state`` is of the first token only.

    It is fast in eval mode without gradient (``torch.inference_mode()``), and in training. The
    ordinary forward does what packing cannot: ``inputs_embeds``, attention maps, hooks on whole
    layers or attentions, a mask that hides first tokens or is no ``(B, T)``, and training a span
    head on padded batches, whose loss counts the padding. (Without gradient, a span head's logits
    at padding are those of a zero state, and so its loss on padded batches differs.) Gradient
    checkpointing is not done.

    Weights rearranged for the processor follow optimisers, loading and moving; after writing to
    ``parameter.data`` in place, which torch does not count, call ``eval()`` of the accelerated
    model. Layers are shared too: ``train()``, ``half()`` or ``to()`` of one model acts on the
    layers of both. On a GPU, call ``model.set_experts_implementation("grouped_mm")`` first: one
    grouped product serves all experts then.

    Args:
        model: A BERT or MoEBERT of transformers with any head, or without one.
        dtype: To compute in without gradient on a CPU, such as ``torch.bfloat16`` where the
            processor has it (``moebert doctor`` says so; others are slow in it); what comes out
            keeps the model's dtype, and layers with several experts a token compute in it. On a
            GPU use ``model.to(torch.bfloat16)``, and for training autocast, as
            ``Trainer(bf16=True)``.
        prepack: Keep linear layers' weights a second time, rearranged for oneDNN. CPU only.

    Raises:
        ValueError: no BERT, a decoder, layers of another kind (hooks and other linear layers are
            welcome), no floating dtype, or ``padding_in_balance=True``, which needs the padding.

    Example:
        >>> import moebert_lib
        >>> model = moebert_lib.accelerate(model)  # doctest: +SKIP
    """
    bert = getattr(model, "base_model", None)
    bert = bert.ordinary if isinstance(bert, PackedBert) else bert
    if not isinstance(bert, BertModel) or bert.config.is_decoder:
        kind = "a decoder" if isinstance(bert, BertModel) else f"a {type(model).__name__}"
        raise ValueError(f"accelerate takes a BERT or MoEBERT encoder of transformers, not {kind}")
    for name, module in _replaced(bert):
        if not _is_berts_own(module):
            kind, name = type(module).__name__, name or "the model"
            raise ValueError(
                f"accelerate does the work of BERT's layers, and {name} is a {kind} "
                "with a forward of its own"
            )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: expected a floating dtype such as torch.bfloat16")
    if getattr(bert.config, "padding_in_balance", False):
        raise ValueError(
            "accelerate drops padding, and padding_in_balance=True counts it; "
            "expected padding_in_balance=False"
        )
    usual = isinstance(model, BertForSequenceClassification) and _is_berts_own(model)
    head = "first" if usual else ""
    head = "padding" if isinstance(model, BertForQuestionAnswering) else head
    packed = _packed(bert, Kernels(dtype=dtype, prepack=prepack), head)
    if isinstance(model, BertModel):
        return packed
    twin = _twin(model)
    twin._modules[model.base_model_prefix] = packed
    return twin


def accelerate_if_possible(model: nn.Module) -> nn.Module:
    """:func:`accelerate`'s model, or the model itself where ``accelerate`` does not take it."""
    try:
        return accelerate(model)
    except ValueError:
        return model


def accelerate_if_exact(model: PreTrainedModel) -> PreTrainedModel:
    """:func:`accelerate`'s model where padding changes no result, else the model itself.

    Padding counts where gates balance it too, and in the logits of spans, which are one
    distribution over all places of a padded batch. Families that ``accelerate`` does not know
    come back as they are, too.
    """
    has_spans = hasattr(model, "qa_outputs")
    padding_counts = has_spans or getattr(model.config, "padding_in_balance", False)
    other_family = not isinstance(model.base_model, BertModel)
    return model if padding_counts or other_family else accelerate(model)


@functools.wraps(importance.ffn_importance)
def ffn_importance(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], **options: Any
) -> importance.Importance:
    """:func:`importance.ffn_importance`, without padding where the model allows it."""
    return importance.ffn_importance(accelerate_if_possible(model), batches, **options)


class PackedBert:
    """``BertModel.forward`` over packed tokens; a mix-in before the model's class.

    Attributes:
        kernels: Linear layers without gradient.
        prepared: Layers with prepacked weights, by number.
        reads: What the head reads of the last state: only the ``first`` tokens, ``padding`` too,
            or the real tokens ("").
    """

    kernels: Kernels
    prepared: dict[int, PreparedLayer]
    reads: str

    @property
    def ordinary(self) -> BertModel:
        """The original model, with the same parameters."""
        return self._ordinary[0]

    def __reduce_ex__(self, protocol: int):
        return _packed, (self.ordinary, self.kernels, self.reads)  # copies and pickles

    def train(self, mode: bool = True) -> "PackedBert":
        """As ``nn.Module.train``; weights are prepared again."""
        self.prepared.clear()
        return super().train(mode)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | str | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As ``BertModel.forward``; see :func:`accelerate`."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        call = RoutingCall.of(attention_mask)
        attention_mask = call.mask
        if self._needs_ordinary(input_ids, attention_mask, others):
            routed = hasattr(self, "routed_layer")  # a dense encoder knows no call
            output = self.ordinary(
                input_ids,
                attention_mask=call if routed else attention_mask,
                token_type_ids=token_type_ids,
                output_hidden_states=bool(output_hidden_states),
                **others,
            )
            if output_hidden_states == "packed":
                packing = Packing.of(_mask(input_ids, attention_mask))
                output.hidden_states = tuple(packing.pack(x) for x in output.hidden_states)
            return output
        packing = Packing.of(_mask(input_ids, attention_mask))
        states = self._states(
            packing, input_ids, token_type_ids, call, all_rows=output_hidden_states
        )
        if self.reads == "first":
            rows, B = states[-1], packing.shape[0]
            rows = rows if len(states[-1]) == B else rows[packing.starts[:-1].long()]
            last = packing.to_batch_order(rows)[:, None]  # (B, 1, D)
        else:
            last = packing.unpack(states[-1])
        if output_hidden_states is True:
            states = [packing.unpack(state) for state in states]
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(last),
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def token_sum(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_others: Any,
    ) -> Callable[[Tensor], Tensor]:
        """A function that sums over each example's tokens what passes through a layer.

        Args:
            input_ids, attention_mask: As the forward pass is given.

        Returns:
            From ``(1, N, F)``, or ``(1, B, F)`` where only first tokens are computed, or
            ``(B, T, F)`` where the ordinary forward pass runs, to ``(B, F)``.
        """
        if input_ids is None:
            return over_tokens
        packing = Packing.of(_mask(input_ids, attention_mask))

        def summed(values: Tensor) -> Tensor:
            if len(values) == packing.shape[0]:
                return over_tokens(values)
            rows = values[0]
            if len(rows) == len(packing):
                return packing.sums(rows)
            return packing.to_batch_order(rows)

        return summed

    def _needs_ordinary(self, input_ids: Tensor | None, mask: Tensor | None, others: dict) -> bool:
        """Whether the ordinary forward has to compute this call."""
        unpacked = ("inputs_embeds", "position_ids", "past_key_values", "encoder_hidden_states")
        if input_ids is None or any(others.get(name) is not None for name in unpacked):
            return True
        if others.get("output_attentions", self.config.output_attentions):
            return True
        tables = (hooks for module in _passed_over(self.encoder) for hooks in hooks_of(module))
        if any(map(has_user_hook, tables)):
            return True
        if mask is None:
            return False
        if mask.shape != input_ids.shape or not bool(mask[:, 0].all()):
            return True
        return self.reads == "padding" and torch.is_grad_enabled() and not bool(mask.all())

    def _states(
        self,
        packing: Packing,
        input_ids: Tensor,
        types: Tensor | None,
        call: RoutingCall,
        *,
        all_rows: bool | str,
    ) -> list[Tensor]:
        """``X^0 .. X^L`` of Eq. 5, each ``(N, D)``; the last of first tokens only, if allowed."""
        ids = packing.pack(input_ids)
        types = None if types is None else packing.pack(types)[None]
        positions = packing.position[None]
        x = self.embeddings(input_ids=ids[None], token_type_ids=types, position_ids=positions)[0]
        call = call.of_tokens(ids[None], packing)
        on_cpu = x.device.type == "cpu"
        fast = on_cpu and not (torch.is_grad_enabled() or self.encoder.training)
        fast = fast and not torch.is_autocast_enabled("cpu")  # mixes dtypes; kernels want one
        states, dtype = [x], x.dtype
        for index, layer in enumerate(self.encoder.layer):
            last = index == len(self.encoder.layer) - 1
            first = last and self.reads == "first" and not all_rows
            single = getattr(layer.output, "top_k", 1) == 1  # all that a prepared layer knows
            ready = self._prepared(index, layer) if fast and single else None
            if ready and not ready.watch.has_hooks():
                x = ready(x.to(self.kernels.dtype or dtype), call, first=first)
            else:
                with OneDNNLinear() if on_cpu and self.kernels.prepack else nullcontext():
                    x = self._plain(layer, x.to(dtype), call, first=first)
            states.append(x.to(dtype) if all_rows or last else x)
        return states

    def _plain(self, layer: nn.Module, x: Tensor, call: RoutingCall, *, first: bool) -> Tensor:
        """One layer through its modules, with their hooks and dropout."""
        attend, packing = layer.attention.self, call.mask
        moe = hasattr(layer.output, "experts")
        first = first and not (moe and layer.output.gated)  # a gate balances over all tokens
        rows = packing.starts[:-1].long()
        queries = x[rows] if first else x
        heads = (len(x), attend.num_attention_heads, attend.attention_head_size)
        q = attend.query(queries).view(-1, *heads[1:])
        k, v = attend.key(x).view(heads), attend.value(x).view(heads)
        dropout = attend.dropout.p if attend.training else 0.0
        a = layer.attention.output(attention(q, k, v, packing, dropout=dropout), queries)[None]
        if not moe:
            return layer.output(layer.intermediate(a), a)[0]
        call = call.of_tokens(call.input_ids[:, rows], packing) if first else call
        return layer.output(a, call)[0]

    def _prepared(self, index: int, layer: nn.Module) -> PreparedLayer:
        """The layer with prepacked weights, prepared again where it has changed."""
        prepared = self.prepared.get(index)
        if prepared is None or prepared.layer is not layer or not prepared.watch.same():
            self.prepared[index] = prepared = PreparedLayer(layer, self.kernels)
        return prepared


def _replaced(bert: BertModel) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules whose forward is replaced here."""
    parts = (
        "",
        "attention",
        "attention.self",
        "attention.output",
        "attention.output.LayerNorm",
        "intermediate",
        "output",
        "output.LayerNorm",
    )
    yield "", bert
    yield "encoder", bert.encoder
    for index, layer in enumerate(bert.encoder.layer):
        for part in parts:
            name = f"encoder.layer.{index}" + f".{part}" * bool(part)
            names = part.split(".") if part else []
            yield name, functools.reduce(lambda m, child: getattr(m, child, None), names, layer)


def _is_berts_own(module: nn.Module) -> bool:
    """Whether it is a class of transformers' BERT, of this library or of torch, unchanged."""
    known = ("transformers.models.bert.", "moebert_lib.", "torch.nn.modules.")
    return type(module).__module__.startswith(known) and "forward" not in vars(module)


def _passed_over(encoder: nn.Module) -> Iterator[nn.Module]:
    """Modules whose forward is never called."""
    yield encoder
    for layer in encoder.layer:
        yield from (layer, layer.attention, layer.attention.self)


def _mask(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(input_ids) if mask is None else mask


def _packed(bert: BertModel, kernels: Kernels, reads: str) -> BertModel:
    twin = _twin(bert)
    twin.__class__ = _class(type(bert))
    twin.kernels, twin.reads, twin.prepared = kernels, reads, {}
    twin._ordinary = (bert,)  # in a tuple: its parameters are registered once
    return twin


@functools.cache
def _class(kind: type[BertModel]) -> type[BertModel]:
    return type(kind.__name__, (PackedBert, kind), {"__doc__": kind.__doc__})


def _twin(module: nn.Module) -> nn.Module:
    """A shallow copy: the same parts, in dictionaries that can be changed apart."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name.startswith("_") and isinstance(value, dict):
            twin.__dict__[name] = value.copy()
    return twin
