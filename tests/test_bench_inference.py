"""The inference bench: what is timed, that it answers rightly, and what is kept and said."""

import json

import pytest
import torch

from moebert_lib.bench import harness, inference, roofline
from moebert_lib.cli import main
from moebert_lib.config.errors import UserError
from moebert_lib.model.accelerate import PackedBert
from moebert_lib.model.moe_layer import moe_layers, parameter_counts

TINY = harness.TINY_SHAPE


@pytest.fixture
def small(monkeypatch):
    """The command at a size that takes no time."""
    usual = inference.settings
    monkeypatch.setattr(inference, "settings", lambda vocab: usual(vocab, scale=16))
    monkeypatch.setattr(
        inference.main,
        "__kwdefaults__",
        {**inference.main.__kwdefaults__, "shape": TINY},
    )
    rates = roofline.Ceilings(1e9, 2e9, 1e9)
    monkeypatch.setattr(roofline, "ceilings", lambda: rates)


def test_the_variants_have_the_sizes_they_claim():
    built = harness.models(TINY)
    limit = parameter_counts(built["equal FLOPs"]).effective
    moe = parameter_counts(built["moebert hash-random"]).effective
    assert moe == limit < parameter_counts(built["dense"]).effective
    assert len(built["half depth"].distilbert.transformer.layer) == 1
    assert not any(model.training for model in built.values())


def test_each_layer_has_a_table_of_its_own():
    tables = [layer.router.tid2eid for layer in moe_layers(harness.moebert(TINY))]
    assert len(tables) == 2 and not torch.equal(*tables)


def test_sentences_are_as_long_as_those_of_glue():
    inputs = harness.glue_like(1000, seed=4)
    lengths = inputs["attention_mask"].sum(1)
    assert inputs["input_ids"].shape == (32, 128) and lengths.max() == 128
    assert 38 < lengths.float().mean() < 42
    assert not lengths.equal(lengths.sort().values)  # in no order
    assert ((inputs["input_ids"] > 0) == inputs["attention_mask"].bool()).all()


def test_tokens_are_as_uneven_as_words():
    """By Zipf's law the first of 999 tokens makes 1 / (1 + 1/2 + ... + 1/999) = 13.4 %."""
    ids = harness.zipf(1000, n=200, length=100)["input_ids"]
    assert abs(float((ids == 1).double().mean()) - 0.134) < 0.01
    assert 0 < ids.min() and ids.max() < 1000


def test_accelerated_models_share_the_parameters_of_the_ordinary_ones():
    found = inference.variants(TINY)
    for name, model in found.items():
        assert isinstance(model.base_model, PackedBert) == ("accelerated" in name)
        if "accelerated" in name:
            origin = found[name.partition(", ")[0]]
            assert {*map(id, model.parameters())} == {*map(id, origin.parameters())}
    assert found["dense, bf16"].dtype == torch.bfloat16 and found["dense"].dtype == torch.float32


def test_every_moe_is_held_to_the_limit_of_its_own_code():
    found = inference.limits(inference.variants(TINY))
    assert found == {
        "moebert hash-random": "equal FLOPs",
        "moebert gate-sentence": "equal FLOPs",
        "release style": "equal FLOPs",
        "moebert hash-random, accelerated": "equal FLOPs, accelerated",
        "moebert gate-sentence, accelerated": "equal FLOPs, accelerated",
        "moebert hash-random, accelerated, bf16": "equal FLOPs, accelerated, bf16",
    }


def test_a_model_that_answers_differently_is_not_timed():
    inputs = harness.zipf(99, n=2, length=8)
    built = harness.models(TINY, only=("dense", "equal FLOPs"))
    wrong = {"dense": built["dense"], "dense, accelerated": built["equal FLOPs"]}
    with pytest.raises(UserError, match="'dense, accelerated' is .* from 'dense'"):
        inference.time_variants(wrong, inputs, repeats=1)
    logits = torch.zeros(2, 2)
    for name in ("dense, accelerated", "dense, bf16"):
        with pytest.raises(UserError, match="is nan of the largest logit from"):
            inference.agree({"dense": logits, name: logits * torch.nan})
    with pytest.raises(UserError, match="'release style'"):
        inference.agree({"moebert hash-random": logits, "release style": logits + 1})


def test_only_one_sentence_is_given_to_the_ordinary_gate():
    timings = inference.measure(TINY, repeats=2, scale=16)
    variants = timings.groupby("setting")["variant"].unique()
    assert [*variants.index.sort_values()] == ["1 x 128", "1 x 64", "32 x 128", "GLUE-like"]
    gated = {setting for setting, names in variants.items() if "moebert gate-sentence" in names}
    assert gated == {"1 x 128", "1 x 64"}
    counts = timings.groupby(["setting", "variant"])["repeat"].nunique()
    assert set(counts) == {2}


def test_the_command_keeps_numbers_targets_and_roofline(moebert_home, small, capsys):
    assert main.main(["bench", "--repeats", "2"]) == 0
    said = capsys.readouterr().out
    record = harness.read("inference")
    assert record["complete"] and record["machine"]["gpu"] and record["tokens"]["1 x 64"] == 4
    assert len(record["targets"]) == len(inference.WISHES)
    assert said.count("wanted") == 6 and said.count("moves") == 4 and "kept in" in said
    roof = harness.frame(record, "roofline").set_index(["setting", "variant"])
    named = {(row["setting"], row["variant"]) for row in record["summary"]}
    assert {*roof.index} == named and (roof["share"] > 0).all()


def test_ctrl_c_keeps_the_settings_that_are_finished(moebert_home, small, monkeypatch, capsys):
    usual, calls = inference.time_variants, []

    def time_variants(*args, **how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return usual(*args, **how)

    monkeypatch.setattr(inference, "time_variants", time_variants)
    assert main.main(["bench", "inference", "--repeats", "1"]) == 130
    (path,) = (moebert_home / "runs").glob("bench-inference-*.json")
    record = json.loads(path.read_text())
    assert {row["setting"] for row in record["summary"]} == {"32 x 128", "GLUE-like"}
    assert harness.read("inference")["created"] != record["created"]  # a part stands for nothing
    assert not record["complete"] and "what was finished is kept" in capsys.readouterr().out


def test_a_single_setting_is_named_by_its_sizes(moebert_home, small):
    out = moebert_home / "one.json"
    assert (
        main.main(["bench", "--batch", "2", "--length", "6", "--repeats", "1", "--out", str(out)])
        == 0
    )
    record = json.loads(out.read_text())
    assert record["tokens"] == {"2 x 6": 12} and record["targets"] == []


def test_the_way_of_a_gpu_runs_on_a_cpu():
    """In bfloat16 with grouped products; only compiling is left out."""
    built = inference.variants_bench_cuda(TINY, device="cpu", compiler=lambda model: model)
    assert built["dense"].dtype == torch.bfloat16
    assert built[inference.MOE].config._experts_implementation == "grouped_mm"
    batches = inference.settings_bench_cuda(99, device="cpu", scale=16)
    timed = [*inference.measured(built, batches, repeats=1, against=inference.AGAINST)]
    assert len(timed) == 5 and all(len(timings) == len(built) for timings in timed)
    judged = harness.judge(harness.pd.concat(timed), inference.WISHES_bench_cuda)
    assert len(judged) == len(inference.WISHES_bench_cuda)


def test_a_gpu_that_is_not_there_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(["bench", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "moebert: --device cuda: torch sees no GPU here; leave it out to measure the CPU"
    ]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trainig"], "did you mean 'training'?"),
        (["widgets", "--batch", "2"], "bench widgets has no option --batch"),
        (["--device", "cud"], "did you mean 'cuda'?"),
        (["--repeats", "0"], "expected at least 1"),
        (["--out", "no/such/folder/x.json"], "expected a file in an existing folder"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(argv, told, capsys):
    assert main.main(["bench", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
