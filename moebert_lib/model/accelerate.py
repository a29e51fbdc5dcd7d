"""Accelerate a model: no padding, prepacked weights, and only first tokens in the last layer.

``accelerate`` returns a model that shares its parameters with the original. A batch is packed once
(``batching.Packing``). Embeddings, LayerNorms, experts and the head remain the same modules, so it
works alike for a dense encoder of any family and for its MoEBERT, hash or gate, in training or not.
Without gradient on a CPU, linear layers run through ``cpu_kernels``.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from moebert_lib.data.batching import Packing, attention
from moebert_lib.method import importance
from moebert_lib.method.encoder_layouts import FAMILIES, Family, at, supported
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
    layers or attentions, a mask that hides first tokens or is no ``(B, T)``, for MPNet a mask with
    holes, and training a span head on padded batches, whose loss counts the padding. (Without
    gradient, a span head's logits at padding are those of a zero state, and so its loss on padded
    batches differs.) Gradient checkpointing is not done.

    Weights rearranged for the processor follow optimisers, loading and moving; after writing to
    ``parameter.data`` in place, which torch does not count, call ``eval()`` of the accelerated
    model. Layers are shared too: ``train()``, ``half()`` or ``to()`` of one model acts on the
    layers of both. On a GPU, call ``model.set_experts_implementation("grouped_mm")`` first: one
    grouped product serves all experts then.

    Args:
        model: An encoder of transformers of a family in ``encoder_layouts``, dense or MoEBERT,
            with any head, or without one.
        dtype: To compute in without gradient on a CPU, such as ``torch.bfloat16`` where the
            processor has it (``moebert doctor`` says so; others are slow in it); what comes out
            keeps the model's dtype, and layers with several experts a token compute in it. On a
            GPU use ``model.to(torch.bfloat16)``, and for training autocast, as
            ``Trainer(bf16=True)``.
        prepack: Keep linear layers' weights a second time, rearranged for oneDNN. CPU only.

    Raises:
        ValueError: no such encoder, a decoder, layers of another kind (hooks and other linear
            layers are welcome), no floating dtype, or ``padding_in_balance=True``, which needs the
            padding.

    Example:
        >>> import moebert_lib
        >>> model = moebert_lib.accelerate(model)  # doctest: +SKIP
    """
    encoder = getattr(model, "base_model", None)
    encoder = encoder.ordinary if isinstance(encoder, PackedEncoder) else encoder
    family = _family(encoder)
    if family is None or getattr(encoder.config, "is_decoder", False):
        kind = f"a {type(model).__name__}" if family is None else "a decoder"
        raise ValueError(
            f"accelerate takes an encoder of transformers ({supported()}, or a MoEBERT of one), "
            f"not {kind}"
        )
    for name, module in _replaced(encoder, family):
        if not _is_known(module):
            kind, name = type(module).__name__, name or "the model"
            raise ValueError(
                f"accelerate does the work of transformers' layers, and {name} is a {kind} "
                "with a forward of its own"
            )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: expected a floating dtype such as torch.bfloat16")
    if getattr(encoder.config, "padding_in_balance", False):
        raise ValueError(
            "accelerate drops padding, and padding_in_balance=True counts it; "
            "expected padding_in_balance=False"
        )
    packed = _packed(encoder, Kernels(dtype=dtype, prepack=prepack), _read_by_head(model))
    if model.base_model is model:
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
    distribution over all places of a padded batch.
    """
    has_spans = hasattr(model, "qa_outputs")
    padding_counts = has_spans or getattr(model.config, "padding_in_balance", False)
    return model if padding_counts else accelerate(model)


@functools.wraps(importance.ffn_importance, assigned=["__doc__"])
def ffn_importance(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], **options: Any
) -> importance.Importance:
    """:func:`importance.ffn_importance`, without padding where the model allows it."""
    return importance.ffn_importance(accelerate_if_possible(model), batches, **options)


class PackedEncoder:
    """An encoder's forward over packed tokens; a mix-in before the model's class.

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
    def ordinary(self) -> PreTrainedModel:
        """The original model, with the same parameters."""
        return self._ordinary[0]

    @property
    def family(self) -> Family:
        """Where layers have their parts."""
        return _family(self)

    def __reduce_ex__(self, protocol: int):
        return _packed, (self.ordinary, self.kernels, self.reads)  # copies and pickles

    def train(self, mode: bool = True) -> "PackedEncoder":
        """As ``nn.Module.train``; weights are prepared again."""
        self.prepared.clear()
        return super().train(mode)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | str | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As the ordinary encoder's; see :func:`accelerate`."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        call = RoutingCall.of(attention_mask)
        attention_mask = call.mask
        if self._needs_ordinary(input_ids, attention_mask, others):
            routed = hasattr(self, "routed_layer")  # a dense encoder knows no call
            if token_type_ids is not None:
                others["token_type_ids"] = token_type_ids
            if output_hidden_states == "packed":
                others["return_dict"] = True
            output = self.ordinary(
                input_ids,
                attention_mask=call if routed else attention_mask,
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
        pooler = getattr(self, "pooler", None)
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=pooler and pooler(last),
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
        if others.get("return_dict", self.config.return_dict) is False:
            return True
        maps = others.get("output_attentions")
        if self.config.output_attentions if maps is None else maps:
            return True
        passed_over = _passed_over(self, self.family)
        tables = (hooks for module in passed_over for hooks in hooks_of(module))
        if any(map(has_user_hook, tables)):
            return True
        if mask is None:
            return False
        if mask.shape != input_ids.shape or not bool(mask[:, 0].all()):
            return True
        if self._has_bias and bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
            return True  # the bias is of distances in a sentence without holes
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
        x, family = self._embedded(packing, input_ids, types), self.family
        bias = self._bias(packing, x)
        call = call.of_tokens(packing.pack(input_ids)[None], packing)
        on_cpu, layers = x.device.type == "cpu", family.layers_of(self)
        fast = on_cpu and not (torch.is_grad_enabled() or family.stack_of(self).training)
        fast = fast and not torch.is_autocast_enabled("cpu")  # mixes dtypes; kernels want one
        states, dtype = [x], x.dtype
        for index, layer in enumerate(layers):
            last = index == len(layers) - 1
            first = last and self.reads == "first" and not all_rows
            # several experts a token are more than a prepared layer knows
            single = getattr(at(layer, family.replaced), "top_k", 1) == 1
            ready = self._prepared(index, layer) if fast and single else None
            if ready and not ready.watch.has_hooks():
                x = ready(x.to(self.kernels.dtype or dtype), call, first=first, bias=bias)
            else:
                with OneDNNLinear() if on_cpu and self.kernels.prepack else nullcontext():
                    x = self._plain(layer, x.to(dtype), call, first=first, bias=bias)
            states.append(x.to(dtype) if all_rows or last else x)
        return states

    def _embedded(self, packing: Packing, input_ids: Tensor, types: Tensor | None) -> Tensor:
        """``X^0``, ``(N, D)``."""
        given = {"input_ids": packing.pack(input_ids)[None]}
        padding = self.embeddings.position_embeddings.padding_idx
        positions = packing.position
        if padding is not None:  # RoBERTa and MPNet count the tokens that are no padding's
            real = input_ids.ne(padding).long()
            positions = packing.pack(real.cumsum(1) * real + padding)
        if types is not None and hasattr(self.embeddings, "token_type_embeddings"):
            given["token_type_ids"] = packing.pack(types)[None]
        x = self.embeddings(**given, position_ids=positions[None])
        if hasattr(self, "embeddings_project"):  # ELECTRA, where embeddings are narrower
            x = self.embeddings_project(x)
        return x[0]

    @property
    def _has_bias(self) -> bool:
        """Whether attention's scores depend on the distance of two tokens, as MPNet's do."""
        return hasattr(self.family.stack_of(self), "compute_position_bias")

    def _bias(self, packing: Packing, x: Tensor) -> Tensor | None:
        """What is added to attention's scores in all layers, ``(H, T, T)``."""
        if not self._has_bias:
            return None
        T = packing.lengths[-1]  # the longest
        return self.family.stack_of(self).compute_position_bias(x.new_empty(1, T))[0]

    def _plain(
        self,
        layer: nn.Module,
        x: Tensor,
        call: RoutingCall,
        *,
        first: bool,
        bias: Tensor | None,
    ) -> Tensor:
        """One layer through its modules, with their hooks and dropout."""
        family, packing = self.family, call.mask
        where, output = family.attention, at(layer, family.replaced)
        moe = hasattr(output, "experts")
        first = first and not (moe and output.gated)  # a gate balances over all tokens
        rows = packing.starts[:-1].long()
        queries, attend = x[rows] if first else x, at(layer, where.module)
        query, key, value = (at(layer, path) for path in (where.query, where.key, where.value))
        heads = (-1, self.config.num_attention_heads, attend.attention_head_size)
        q, k, v = query(queries).view(heads), key(x).view(heads), value(x).view(heads)
        dropout = attend.dropout.p if attend.training else 0.0
        context = attention(q, k, v, packing, dropout=dropout, bias=bias)
        a = at(layer, where.output)(context)
        a = at(layer, where.dropout)(a) if where.dropout else a
        a = at(layer, where.norm)(a + queries)[None]
        if moe:
            call = call.of_tokens(call.input_ids[:, rows], packing) if first else call
            return output(a, call)[0]
        h = at(layer, family.bypassed)(a)
        return (output(h + a) if family.normed_last else output(h, a))[0]

    def _prepared(self, index: int, layer: nn.Module) -> PreparedLayer:
        """The layer with prepacked weights, prepared again where it has changed."""
        prepared = self.prepared.get(index)
        if prepared is None or prepared.layer is not layer or not prepared.watch.same():
            self.prepared[index] = prepared = PreparedLayer(layer, self.family, self.kernels)
        return prepared


def _family(encoder: Any) -> Family | None:
    """The family of an encoder without head, dense or MoEBERT; None of anything else."""
    kind = getattr(getattr(encoder, "config", None), "model_type", "").removeprefix("moe")
    family = FAMILIES.get(kind)
    known = family is not None and hasattr(encoder, "embeddings") and family.layers_of(encoder)
    return family if known else None


def _replaced(encoder: PreTrainedModel, family: Family) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules whose forward is replaced here."""
    yield "", encoder
    yield family.layers.rpartition(".")[0], family.stack_of(encoder)
    feed_forward = (family.bypassed, family.replaced, family.parts.norm)
    for index, layer in enumerate(family.layers_of(encoder)):
        yield f"{family.layers}.{index}", layer
        for part in dict.fromkeys((*_inner(family), family.attention.norm, *feed_forward)):
            yield f"{family.layers}.{index}.{part}", at(layer, part)


def _inner(family: Family) -> list[str]:
    """The modules of a layer that contain the parts of its attention."""
    where = family.attention
    paths = (where.query, where.output, where.norm)
    pieces = [path.split(".")[:-1] for path in paths]
    names = [".".join(names[:n]) for names in pieces for n in range(1, len(names) + 1)]
    return list(dict.fromkeys(names))


_OWN = tuple(f"transformers.models.{name}." for name in FAMILIES)


def _is_known(module: nn.Module) -> bool:
    """Whether it is a class of transformers' encoders, of this library or of torch, unchanged."""
    known = (*_OWN, "moebert_lib.", "torch.nn.modules.")
    return type(module).__module__.startswith(known) and "forward" not in vars(module)


def _passed_over(encoder: PreTrainedModel, family: Family) -> Iterator[nn.Module]:
    """Modules whose forward is never called."""
    yield family.stack_of(encoder)
    for layer in family.layers_of(encoder):
        yield layer
        yield from (at(layer, part) for part in _inner(family))


def _read_by_head(model: PreTrainedModel) -> str:
    """What a head reads of the last state: see ``PackedEncoder.reads``."""
    kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith(_OWN)]
    if any(name.endswith("ForQuestionAnswering") for name in kinds):
        return "padding"
    sentences = any(name.endswith("ForSequenceClassification") for name in kinds)
    return "first" if sentences and _is_known(model) else ""


def _mask(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(input_ids) if mask is None else mask


def _packed(encoder: PreTrainedModel, kernels: Kernels, reads: str) -> PreTrainedModel:
    twin = _twin(encoder)
    twin.__class__ = _class(type(encoder))
    twin.kernels, twin.reads, twin.prepared = kernels, reads, {}
    twin._ordinary = (encoder,)  # in a tuple: its parameters are registered once
    return twin


@functools.cache
def _class(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(kind.__name__, (PackedEncoder, kind), {"__doc__": kind.__doc__})


def _twin(module: nn.Module) -> nn.Module:
    """A shallow copy: the same parts, in dictionaries that can be changed apart."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if name.startswith("_") and isinstance(value, dict):
            twin.__dict__[name] = value.copy()
    return twin
