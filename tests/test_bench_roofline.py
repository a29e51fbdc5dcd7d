"""The roofline: operations as counted by torch, bytes by hand, and which ceiling binds."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moebert_lib.bench import inference, roofline
from moebert_lib.bench.inference import glue_like, moebert, zipf
from moebert_lib.bench.roofline import Ceilings, Work
from moebert_lib.model.accelerate import accelerate
from moebert_lib.model.moe_layer import RoutingCall

TINY, VOCAB = inference.TINY, inference.TINY["vocab_size"]
GATES = 2 * 32 * 4  # a gate's operations for each state that it looks at, here 4 experts of 32
BALANCE = 2 * 2 * 4  # and those of its balance loss for each token: two means over 4 experts


def counted(model, inputs) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.inference_mode():
            model(**inputs)
    return counter.get_total_flops()


BATCHES = {"full": zipf(VOCAB, n=3, length=7), "padded": glue_like(VOCAB, n=5, longest=9)}
FAST = ("dense", "equal FLOPs", "moebert hash-random", "moebert gate-sentence")
KINDS = [("half depth", False), *((name, fast) for name in FAST for fast in (False, True))]


@pytest.mark.parametrize("inputs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("name", "fast"), KINDS)
def test_operations_are_those_that_torch_counts(name, fast, inputs):
    model = inference.models(TINY, only=(name,))[name]
    if fast:
        model = accelerate(model, prepack=False)
    ids = inputs["input_ids"]
    tokens = int(inputs["attention_mask"].sum()) if fast and len(inputs) > 1 else ids.numel()
    gate = GATES * 2 * len(ids) + BALANCE * 2 * tokens if "gate" in name else 0
    assert roofline.work(model, inputs).flops + gate == counted(model, inputs)


def test_a_layer_of_one_sentence_by_hand():
    """D = 2, K = 3, two tokens: 4 D^2 = 16 and 2 T D = 8 and 2 D K = 12 for each of them."""
    attention, moved = roofline.attention_work(2, [2], queries=[2])
    assert attention == 2 * 2 * (16 + 8)
    assert moved == 16 + 2 * 2 * (3 * 2 + 2 + 2 + 2)  # q k v, context, a, norm
    ffn, moved = roofline.ffn_work(2, 3, 2, experts=4)
    assert ffn == 2 * 2 * 12 and moved == 4 * 12 + 2 * 2 * (3 + 2 + 2)  # h, y, norm


def test_the_last_layer_works_for_first_tokens_alone():
    """Two sentences of 2 and 3 tokens: keys and values of 5, the rest of 2."""
    flops, _ = roofline.attention_work(2, [2, 3], queries=[1, 1])
    assert flops == 2 * (5 * 8 + 2 * 8 + 2 * 5 * 2)
    gated, _ = roofline.attention_work(2, [2, 3], queries=[2, 3])
    assert gated == 2 * (5 * 16 + 2 * (4 + 9) * 2)


def test_experts_count_where_a_token_visits_them():
    model = accelerate(moebert(TINY))
    for layer in model.bert.encoder.layer:
        layer.output.router.tid2eid.copy_(torch.arange(VOCAB).view(-1, 1) % 4)
    mask = torch.tensor([[1, 1, 1, 0]])
    few = {"input_ids": torch.tensor([[4, 8, 5, 3]]), "attention_mask": mask}
    one = {"input_ids": torch.tensor([[4, 8, 12]])}
    expert = 4 * 2 * 32 * 16  # bytes of an expert's weights
    more = roofline.work(model, few).bytes - roofline.work(model, one).bytes
    assert more == expert  # of the first layer; the last serves the first token alone


def test_bfloat16_moves_half_of_the_bytes():
    model, inputs = inference.models(TINY, only=("dense",))["dense"], zipf(VOCAB, n=2, length=8)
    full, half = (
        roofline.work(accelerate(model, dtype=dtype), inputs) for dtype in (None, torch.bfloat16)
    )
    head = 4 * (32 * 32 + 32 * 2)  # stays in the model's own dtype
    assert full.flops == half.flops and full.bytes - head == 2 * (half.bytes - head)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)


@pytest.fixture
def rows():
    summary = pd.DataFrame({"setting": "s", "variant": ["limit", "moe"], "median_ms": [3.0, 8.0]})
    works = {("s", "limit"): Work(2000, 10), ("s", "moe"): Work(2000, 40)}
    ceiling = Ceilings(float32=1e6, bfloat16=4e6, bandwidth=1e4)
    return roofline.table(summary, works, ceiling)


def test_the_lower_ceiling_binds(rows):
    limit, moe = (row for _, row in rows.iterrows())
    assert (limit["intensity"], limit["attainable"], limit["bound"]) == (200, 1e6, "compute")
    assert (moe["intensity"], moe["attainable"], moe["bound"]) == (50, 5e5, "memory")
    assert np.isclose(limit["share"], 2000 / 0.003 / 1e6) and np.isclose(moe["share"], 0.5)
    assert np.allclose(rows["least_ms"], [2, 4]) and np.allclose(rows["in_turn_ms"], [3, 6])


def test_why_names_work_bytes_and_both_bounds(rows):
    said = roofline.explain(rows, "s", "moe", "limit", measured=0.375)
    assert "computes 1.00 times as much as limit and moves 4.00 times the bytes" in said
    assert "can reach 0.50 of the limit's speed" in said and "reaches 0.38" in said


def test_ceilings_are_rates_of_this_machine():
    found = roofline.measure_ceilings(size=64, megabytes=1, seconds=0.01)
    assert found.float32 > 1e7 and found.bfloat16 > 1e6 and found.bandwidth > 1e7


def test_points_are_the_feed_forward_layers_alone():
    """Two layers of 32 x 64 and of 4 experts of 32 x 16, for one token and for many."""
    built = inference.models(TINY, only=("dense", "moebert hash-random"))
    ids = [zipf(VOCAB, n=1, length=n)["input_ids"][0] for n in (1, 64)]
    found = roofline.time_feed_forward(built, ids, repeats=2)
    one = found[found["repeat"] == 0].set_index(["tokens", "variant"])
    assert len(found) == 8 and (found["seconds"] > 0).all()
    assert one.loc[(1, "dense"), "flops"] == 2 * 2 * 2 * 32 * 64
    assert one.loc[(64, "moebert hash-random"), "flops"] == 64 * 2 * 2 * 2 * 32 * 16
    expert = 2 * 32 * 16  # weights: one of them is read for one token, all four for many
    for n, read in {1: expert, 64: 4 * expert}.items():
        moved = 2 * 4 * (read + 2 * n * (16 + 2 * 32))
        assert one.loc[(n, "moebert hash-random"), "bytes"] == moved


@pytest.mark.parametrize("name", ["dense", "moebert hash-random"])
def test_points_compute_what_the_models_layers_do(name):
    model = inference.models(TINY, only=(name,))[name].double()
    ids = zipf(VOCAB, n=1, length=9)["input_ids"][0]
    torch.manual_seed(5)
    found = roofline._feed_forward(model, ids)()
    torch.manual_seed(5)
    x = torch.rand(1, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            given = (RoutingCall(ids[None]),) if name != "dense" else (x,)
            x = layer.output(layer.intermediate(x), *given)
    assert torch.allclose(found, x[0], rtol=0, atol=1e-12)
