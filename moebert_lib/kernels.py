"""Linear layers as a processor likes them: weights rearranged once, gelu in the same pass.

oneDNN, the matrix library in torch's CPU builds, reads weights faster in an order of its own.
The operators that torch.compile uses for it are private, so a plain ``F.linear`` stands behind
them wherever they are missing, refuse, or do not know a dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation


class Kernels:
    """Linear layers without gradient, from weights rearranged on first use.

    A weight that changed since (training, loading) is rearranged again: its address, layout and
    torch's count of its changes tell. What is kept doubles the memory of the linear layers.

    Args:
        dtype: To compute in; ``None`` is the weights' own.
        prepack: Rearrange for oneDNN where it can be done.
    """

    def __init__(self, *, dtype: torch.dtype | None = None, prepack: bool = True):
        self.dtype, self.prepack = dtype, prepack
        self._kept: dict[Any, tuple[list, tuple]] = {}

    def __deepcopy__(self, memo: dict) -> "Kernels":
        return Kernels(dtype=self.dtype, prepack=self.prepack)

    def __reduce__(self):
        return _fresh, (self.dtype, self.prepack)

    def linear(
        self,
        name: Any,
        x: Tensor,
        sources: Sequence[Tensor],
        make: Callable[[], tuple[Tensor, Tensor]],
        *,
        gelu: bool = False,
    ) -> Tensor:
        """``x W^T + b``, and gelu of it if wanted.

        Args:
            name: What the rearranged weight is kept under.
            x: Shape ``(N, D_in)``.
            sources: The parameters that weight and bias are made of: what is kept is used as
                long as these are the same tensors, unchanged.
            make: Gives weight ``(D_out, D_in)`` and bias ``(D_out,)``.
            gelu: Apply gelu to the result.

        Returns:
            Shape ``(N, D_out)``.
        """
        weight, bias, packed = self._ready(name, sources, make)
        if packed:
            attr, algorithm = ("gelu", "none") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y

    def layer(self, name: Any, x: Tensor, *layers: nn.Module, gelu: bool = False) -> Tensor:
        """:meth:`linear` with the outputs of several layers side by side.

        What is no plain ``nn.Linear``, or is listened to by hooks, is called as it is.
        """
        if not all(map(_is_plain, layers)):
            y = torch.cat(
                [
                    layer(x.to(getattr(layer.weight, "dtype", x.dtype))).to(x.dtype)
                    for layer in layers
                ],
                -1,
            )
            return F.gelu(y) if gelu else y
        sources = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]

        def make() -> tuple[Tensor, Tensor]:
            if len(layers) == 1:
                return layers[0].weight, layers[0].bias
            return torch.cat([m.weight for m in layers]), torch.cat([m.bias for m in layers])

        return self.linear(name, x, sources, make, gelu=gelu)

    def norm(self, name: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """LayerNorm of ``(N, D)`` with gain and bias ``(D,)``."""
        if weight.dtype != x.dtype:
            sources = (weight, bias)
            weight, bias = self._keep(name, sources, lambda: tuple(y.to(x) for y in sources))
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def _ready(self, name: Any, sources: Sequence[Tensor], make: Callable) -> tuple:
        def build() -> tuple[Tensor, Tensor, bool]:
            weight, bias = (x.detach().to(self.dtype or x.dtype).contiguous() for x in make())
            if self.prepack and _packable(weight.device.type, weight.dtype):
                return torch.ops.mkldnn._reorder_linear_weight(weight), bias, True
            return weight, bias, False

        return self._keep(name, sources, build)

    def forget(self) -> None:
        """Rearrange everything again when it is next used."""
        self._kept.clear()

    def _keep(self, name: Any, sources: Sequence[Tensor], build: Callable[[], tuple]) -> tuple:
        """What ``build`` made of these tensors, as long as they stay as they were."""
        if any(x.is_inference() for x in sources):
            return build()  # such a tensor does not count its changes
        found = self._kept.get(name)
        if found is None or not all(map(_unchanged, found[0], sources)):
            # aliases keep the storage, so that no other weight comes to lie at its address
            states = [(x.detach(), x.data_ptr(), x._version) for x in sources]
            self._kept[name] = found = (states, build())
        return found[1]


def _unchanged(state: tuple[Tensor, int, int], x: Tensor) -> bool:
    alias, address, version = state
    if x.data_ptr() != address or x._version != version:
        return False
    return x.shape == alias.shape and x.stride() == alias.stride()


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


def is_gelu(act: nn.Module) -> bool:
    """Whether an activation is the exact gelu, which a linear layer can apply by itself."""
    return (
        isinstance(act, (GELUActivation, nn.GELU)) and getattr(act, "approximate", "none") == "none"
    )


def _fresh(dtype: torch.dtype | None, prepack: bool) -> Kernels:
    return Kernels(dtype=dtype, prepack=prepack)


_KNOWN: dict[tuple[str, torch.dtype], bool] = {}


def _packable(device: str, dtype: torch.dtype) -> bool:
    """Whether this torch rearranges and multiplies such weights correctly; tried once."""
    if (device, dtype) not in _KNOWN:
        _KNOWN[device, dtype] = device == "cpu" and _tried(_multiply_rearranged, dtype)
    return _KNOWN[device, dtype]


def _tried(trial: Callable[[torch.dtype], bool], dtype: torch.dtype) -> bool:
    try:
        return trial(dtype)
    except Exception:  # missing operator, dtype or processor: all mean the plain way
        return False


def _multiply_rearranged(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 16), (8, 16), (8,))
    x, weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none")
    return torch.allclose(y, F.gelu(F.linear(x, weight, bias)), rtol=1e-2, atol=1e-2)
