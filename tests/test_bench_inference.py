"""The inference bench: what is timed, that it answers rightly, and what is kept and said."""

import json

import pandas as pd
import pytest
import torch

from moebert_lib.bench import harness, inference, roofline
from moebert_lib.cli import main
from moebert_lib.config.errors import UserError
from moebert_lib.model.accelerate import PackedEncoder
from moebert_lib.model.moe_layer import moe_layers, parameter_counts
from moebert_lib.store.store import Store

TINY = inference.TINY


@pytest.fixture
def small(monkeypatch):
    """The command at a size that takes no time."""
    usual = inference.fig4_batches
    monkeypatch.setattr(
        inference, "fig4_batches", lambda vocab, *, device: usual(vocab, device=device, scale=16)
    )
    monkeypatch.setitem(inference.inference.__kwdefaults__, "shape", TINY)
    rates = roofline.Ceilings(1e9, 2e9, 1e9)
    monkeypatch.setattr(roofline, "measure_ceilings", lambda: rates)


def test_the_variants_have_the_sizes_they_claim():
    built = inference.models(TINY)
    limit = parameter_counts(built["equal FLOPs"]).effective
    moe = parameter_counts(built["moebert hash-random"]).effective
    assert moe == limit < parameter_counts(built["dense"]).effective
    assert len(built["half depth"].distilbert.transformer.layer) == 1
    assert not any(model.training for model in built.values())


def test_each_layer_has_a_table_of_its_own():
    tables = [layer.router.tid2eid for layer in moe_layers(inference.moebert(TINY))]
    assert len(tables) == 2 and not torch.equal(*tables)


def test_sentences_are_as_long_as_those_of_glue():
    inputs = inference.glue_like(1000)
    lengths = inputs["attention_mask"].sum(1)
    assert inputs["input_ids"].shape == (32, 128) and lengths.max() == 128
    assert 38 < lengths.float().mean() < 42
    assert not lengths.equal(lengths.sort().values)  # in no order
    assert ((inputs["input_ids"] > 0) == inputs["attention_mask"].bool()).all()


def test_tokens_are_as_uneven_as_words():
    """By Zipf's law the first of 999 tokens makes 1 / (1 + 1/2 + ... + 1/999) = 13.4 %."""
    ids = inference.zipf(1000, n=200, length=100)["input_ids"]
    assert abs(float((ids == 1).double().mean()) - 0.134) < 0.01
    assert 0 < ids.min() and ids.max() < 1000


def test_accelerated_models_share_the_parameters_of_the_ordinary_ones():
    found = inference.cpu_models(TINY)
    for name, model in found.items():
        assert isinstance(model.base_model, PackedEncoder) == ("accelerated" in name)
        if "accelerated" in name:
            origin = found[name.partition(", ")[0]]
            assert {*map(id, model.parameters())} == {*map(id, origin.parameters())}
    assert found["dense, bf16"].dtype == torch.bfloat16 and found["dense"].dtype == torch.float32


def test_every_moe_is_held_to_the_limit_of_its_own_code():
    found = inference.limits(inference.cpu_models(TINY))
    assert found == {
        "moebert hash-random": "equal FLOPs",
        "moebert gate-sentence": "equal FLOPs",
        "release style": "equal FLOPs",
        "moebert hash-random, accelerated": "equal FLOPs, accelerated",
        "moebert gate-sentence, accelerated": "equal FLOPs, accelerated",
        "moebert hash-random, accelerated, bf16": "equal FLOPs, accelerated, bf16",
    }


def test_a_model_that_answers_differently_is_not_timed():
    batches = {"2 x 8": inference.zipf(99, n=2, length=8)}
    built = inference.models(TINY, only=("dense", "equal FLOPs"))
    wrong = {"dense": built["dense"], "dense, accelerated": built["equal FLOPs"]}
    with pytest.raises(UserError, match="'dense, accelerated' differ from those of 'dense'"):
        inference.forward_passes(wrong, batches, repeats=1).measure("2 x 8")
    logits = torch.zeros(2, 2)
    for name in ("dense, accelerated", "dense, bf16"):
        with pytest.raises(UserError, match="by nan of the largest"):
            inference.check_logits({"dense": logits, name: logits * torch.nan})
    with pytest.raises(UserError, match="'release style'"):
        inference.check_logits({"moebert hash-random": logits, "release style": logits + 1})


def test_only_one_sentence_is_given_to_the_ordinary_gate():
    benchmark = inference.inference(shape=TINY, batch=1, length=4, repeats=2)
    assert "moebert gate-sentence" in set(benchmark.measure("1 x 4")["variant"])
    benchmark = inference.inference(shape=TINY, batch=32, length=4, repeats=2)
    timings = benchmark.measure("32 x 4")
    assert "moebert gate-sentence" not in set(timings["variant"])
    assert set(timings.groupby("variant")["repeat"].nunique()) == {2}


def test_the_command_keeps_numbers_and_roofline(moebert_home, small, capsys):
    assert main.main(["bench", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    record = harness.read(Store(), "inference")
    assert record["complete"] and record["tokens"]["1 x 64"] == 4
    settings = {"32 x 128", "GLUE-like", "1 x 64", "1 x 128"}
    main_rows = [row for row in record["summary"] if row["variant"] == record["main"]]
    assert {row["setting"] for row in main_rows if row["of_limit"]} == settings
    assert printed.count("moves") == 4 and "saved as" in printed
    roof = pd.DataFrame(record["roofline"]).set_index(["setting", "variant"])
    named = {(row["setting"], row["variant"]) for row in record["summary"]}
    assert {*roof.index} == named and (roof["share"] > 0).all()


def test_a_single_setting_is_named_by_its_sizes(moebert_home, small):
    out = moebert_home / "one.json"
    argv = ["bench", "--batch", "2", "--length", "6", "--repeats", "1", "--out", str(out)]
    assert main.main(argv) == 0
    record = json.loads(out.read_text())
    assert record["tokens"] == {"2 x 6": 12} and record["what"] == "inference-one"


def test_the_way_of_a_gpu_runs_on_a_cpu():
    """In bfloat16 with grouped products; only compiling is left out."""
    built = inference.gpu_models(TINY, device="cpu", compiler=lambda model, **_: model)
    assert built["dense"].dtype == torch.bfloat16
    assert built[inference.HASH].config._experts_implementation == "grouped_mm"
    batch = {"GLUE-like": inference.glue_like(99, n=2, longest=8)}
    benchmark = inference.forward_passes(built, batch, repeats=1, baseline="dense, compiled")
    timings = benchmark.measure("GLUE-like")
    assert len(timings) == len(built)
    table = harness.summary(timings, baseline="dense, compiled", limits=benchmark.limits)
    fast = table.set_index("variant").loc["moebert hash-random, accelerated"]
    assert fast[["ratio", "of_limit"]].notna().all()


def test_a_gpu_that_is_not_there_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["bench", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "moebert: --device cuda: torch sees no GPU here; leave it out to measure the CPU"
    ]
