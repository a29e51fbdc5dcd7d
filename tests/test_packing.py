"""Packing a batch and attention within it, against loops over sentences."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import batch, dense, moebert, packed_by_hand

from moebert_lib import accelerate
from moebert_lib.data import batching
from moebert_lib.data.batching import Packing, attention

try:
    from torch.nn.attention import varlen
except ImportError:  # before torch 2.10
    varlen = None


@st.composite
def masks(draw, *, first=False):
    """``(B, T)`` of any pattern; with ``first``, the first token of each sentence is real."""
    B, T = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    rows = st.lists(st.booleans(), min_size=T, max_size=T)
    mask = torch.tensor(draw(st.lists(rows, min_size=B, max_size=B)))
    mask[:, 0] |= first
    return mask


def numbered(mask, width=3):
    """A number of its own for every place, ``(B, T, width)``."""
    return torch.arange(mask.numel() * width, dtype=torch.float64).view(*mask.shape, width) + 1


@given(masks())
def test_packing_and_unpacking_lose_only_padding(mask):
    packed, padded = Packing.of(mask), numbered(mask)
    assert torch.equal(packed.unpack(packed.pack(padded)), padded * mask[..., None])
    rows = torch.randn(len(packed), 2, 5)
    assert torch.equal(packed.pack(packed.unpack(rows)), rows)
    assert len(packed) == mask.sum() and packed.shape == mask.shape


@given(masks())
def test_shortest_sentences_come_first_and_tokens_stay_in_order(mask):
    packed = Packing.of(mask)
    assert torch.equal(packed.pack(numbered(mask)), packed_by_hand(numbered(mask), mask))
    assert packed.lengths == sorted(mask.sum(1).tolist())
    B, T = mask.shape
    places = [divmod(place, T) for place in packed.places.tolist()]
    assert places == [*zip(packed.sentence.tolist(), packed.position.tolist(), strict=True)]
    assert sorted(packed.order.tolist()) == [*range(B)]


@given(masks())
def test_starts_are_where_sentences_begin(mask):
    packed = Packing.of(mask)
    starts = packed.starts.tolist()
    assert packed.starts.dtype == torch.int32  # what a kernel for several lengths takes
    for row, start, end in zip(packed.order, starts, starts[1:], strict=False):
        own = numbered(mask)[row][mask[row]]
        assert torch.equal(packed.pack(numbered(mask))[start:end], own)
    assert starts[0] == 0 and starts[-1] == len(packed) and len(starts) == len(mask) + 1


@given(masks())
def test_runs_of_one_length_cover_the_row(mask):
    packed = Packing.of(mask)
    runs = packed.alike()
    assert [length for n, length in runs for _ in range(n)] == [n for n in packed.lengths if n]
    lengths = [length for _, length in runs]
    assert lengths == sorted(set(lengths))


@given(masks(), st.integers(0, 99))
def test_sums_and_means_are_those_of_a_loop(mask, seed):
    noise = torch.Generator().manual_seed(seed)
    values = torch.randn(*mask.shape, 3, generator=noise, dtype=torch.float64)
    packed = Packing.of(mask)
    rows = packed.pack(values)
    for row, (own, real) in enumerate(zip(values, mask, strict=True)):
        total = sum(own[real], torch.zeros(3, dtype=torch.float64))
        assert torch.allclose(packed.sums(rows)[row], total, rtol=0, atol=1e-12)
        mean = total / max(int(real.sum()), 1)
        assert torch.allclose(packed.means(rows)[row], mean, rtol=0, atol=1e-12)


@given(masks())
def test_rows_of_sentences_return_to_the_order_of_the_batch(mask):
    packed, rows = Packing.of(mask), torch.randn(len(mask), 2)
    assert torch.equal(packed.to_batch_order(rows[packed.order]), rows)


def test_a_hand_worked_packing():
    packed = Packing.of(torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 1]]))
    assert packed.places.tolist() == [3, 6, 8, 0, 1, 2]
    assert packed.sentence.tolist() == [1, 2, 2, 0, 0, 0]
    assert packed.position.tolist() == [0, 0, 2, 0, 1, 2]
    assert packed.order.tolist() == [1, 2, 0] and packed.lengths == [1, 2, 3]
    assert packed.starts.tolist() == [0, 1, 3, 6] and packed.alike() == [(1, 1), (1, 2), (1, 3)]


def slow_attention(q, k, v, query_starts, key_starts):
    """Softmax attention, one sentence, head and query at a time: ``(N, H, d)``."""
    out = torch.empty_like(q)
    for s in range(len(key_starts) - 1):
        keys = slice(key_starts[s], key_starts[s + 1])
        for i in range(query_starts[s], query_starts[s + 1]):
            for h in range(q.shape[1]):
                scores = k[keys, h] @ q[i, h] / q.shape[-1] ** 0.5
                out[i, h] = scores.softmax(0) @ v[keys, h]
    return out


@given(masks(first=True), st.booleans(), st.integers(0, 99))
def test_attention_stays_within_the_sentence(mask, first, seed):
    packed, noise = Packing.of(mask), torch.Generator().manual_seed(seed)
    q, k, v = 3 * torch.randn(3, len(packed), 2, 4, generator=noise, dtype=torch.float64)
    starts = packed.starts.tolist()
    asking = [*range(len(mask) + 1)] if first else starts
    q = q[: len(mask)] if first else q
    expected = slow_attention(q, k, v, asking, starts).flatten(1)
    assert torch.allclose(attention(q, k, v, packed), expected, rtol=0, atol=1e-12)


class OnGpu(torch.Tensor):
    """A CPU's tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def gpu_kernel(monkeypatch):
    """The kernel for sequences of several lengths, done slowly; gives its calls.

    It takes what torch's own takes, so a call that torch would refuse fails here too.
    """
    if varlen is None:
        pytest.skip("this torch has no varlen_attn")
    calls, signature = [], inspect.signature(varlen.varlen_attn)

    def stand_in(*args, **kwargs):
        q, k, v, cu_q, cu_k, longest_q, longest_k, *more = signature.bind(*args, **kwargs).args
        assert not more and q.dtype == k.dtype == v.dtype
        for starts, rows, longest in ((cu_q, q, longest_q), (cu_k, k, longest_k)):
            assert starts.dtype == torch.int32 and starts.is_contiguous()
            assert starts[0] == 0 and starts[-1] == len(rows)
            assert starts.diff().max() == longest and isinstance(longest, int)
        calls.append(len(q))
        plain = (x.as_subclass(torch.Tensor) for x in (q, k, v))
        return slow_attention(*plain, cu_q.tolist(), cu_k.tolist())

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(batching, "HALF", (torch.float64,))  # so that equality is exact
    monkeypatch.setattr(batching, "_has_varlen", lambda device, head_size: True)
    return calls


@given(masks(first=True), st.booleans())
def test_on_a_gpu_the_kernel_for_several_lengths_is_asked_rightly(gpu_kernel, mask, first):
    packed = Packing.of(mask)
    q, k, v = torch.randn(3, len(packed), 2, 4, dtype=torch.float64)
    q = q[packed.starts[:-1].long()] if first else q
    before = len(gpu_kernel)
    on_gpu = attention(*(x.as_subclass(OnGpu) for x in (q, k, v)), packed)
    assert torch.allclose(on_gpu, attention(q, k, v, packed), rtol=0, atol=1e-12)
    assert len(gpu_kernel) == before + 1


def test_with_dropout_a_gpu_goes_the_common_way(gpu_kernel):
    packed = Packing.of(torch.ones(2, 3))
    q, k, v = torch.randn(3, 6, 2, 4, dtype=torch.float64).as_subclass(OnGpu)
    assert attention(q, k, v, packed, dropout=0.5).shape == (6, 8) and gpu_kernel == []


@pytest.mark.parametrize("routing", [None, "hash-random", "gate-sentence"])
def test_a_whole_model_goes_through_that_kernel(gpu_kernel, monkeypatch, routing):
    """As on a GPU: the layers' own modules, and the kernel's attention in each."""
    model = moebert(routing=routing) if routing else dense()
    inputs = batch([5, 2, 7])
    expected = model(**inputs, output_hidden_states=True)
    through = batching.attention

    def as_on_gpu(q, *others, **options):
        found = through(q.as_subclass(OnGpu), *others, **options)
        return found.as_subclass(torch.Tensor)

    monkeypatch.setattr("moebert_lib.model.accelerate.attention", as_on_gpu)
    faster = accelerate(model)
    for states in (None, True):
        output = faster(**inputs, output_hidden_states=states)
        assert torch.allclose(output.logits, expected.logits, rtol=0, atol=1e-12)
    first_alone = routing != "gate-sentence"  # a gate's last layer serves all tokens
    assert gpu_kernel == [14, 3 if first_alone else 14, 14, 14]
