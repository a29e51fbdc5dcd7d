"""Costs are reckoned right: by hand, by torch's own counter, and in their order of size."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from moebert_lib.config import paper_numbers
from moebert_lib.config.presets import BASE, MINILM, SHAPES, TINY, Shape
from moebert_lib.config.settings import Settings
from moebert_lib.method import encoder_layouts
from moebert_lib.method.encoder_layouts import parameters
from moebert_lib.model.modeling import MoEBertConfig, MoEBertModel
from moebert_lib.model.moe_layer import parameter_counts
from moebert_lib.runs import cost
from moebert_lib.runs.cost import activation_bytes, forward_flops

TOY = Shape(layers=1, hidden=2, neurons=3, heads=1)


def named(shape: Shape) -> dict:
    """A shape in transformers' words."""
    return dict(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
    )


def experts(shape: Shape, n: int, size: int) -> MoEBertConfig:
    return MoEBertConfig(**named(shape), n_experts=n, expert_size=size, n_shared=0)


def test_the_operations_of_a_toy_are_those_counted_by_hand():
    # One token of two numbers: four projections 2x2, a score and its use, three neurons in and out.
    by_hand = 2 * (4 * 2 * 2 + (2 + 2) + (2 * 3 + 3 * 2))
    assert forward_flops(TOY, 1, 3) == by_hand == 64
    # Two tokens: each sees two scores.
    assert forward_flops(TOY, 2, 3) == 2 * 2 * (4 * 2 * 2 + 2 * (2 + 2) + (2 * 3 + 3 * 2))


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_operations_equal_what_torch_counts(kind):
    shape, B, T, K = SHAPES[TINY]._replace(vocabulary=99), 2, 10, 16
    if kind == "dense":
        config = BertConfig(**named(shape), attn_implementation="eager")
        model, neurons = BertModel(config, add_pooling_layer=False), shape.neurons
    else:
        config = experts(shape, 4, K)
        config._attn_implementation = "eager"
        model, neurons = MoEBertModel(config, add_pooling_layer=False), K
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(input_ids=torch.arange(B * T).view(B, T))
    assert counter.get_total_flops() == B * forward_flops(shape, T, neurons)


@pytest.mark.parametrize("model", [TINY, MINILM, BASE])
def test_parameters_are_those_of_the_model(model):
    shape = encoder_layouts.shape(model)
    size = shape.neurons // 4
    with torch.device("meta"):
        dense = parameter_counts(BertModel(BertConfig(**named(shape))))
        moe = parameter_counts(MoEBertModel(experts(shape, 4, size)))
    assert parameters(shape) == dense
    assert parameters(shape, n_experts=4, expert_size=size) == moe


def test_moebert_of_bert_base_uses_67_million_parameters_and_stores_110():
    found = parameters(encoder_layouts.shape(BASE), n_experts=4, expert_size=768)
    assert found == (66_987_264, 109_565_184)


def test_a_saved_bert_has_the_sizes_of_its_config(tmp_path):
    config = named(TOY._replace(heads=2))
    BertConfig(**config).save_pretrained(tmp_path)
    assert encoder_layouts.shape(str(tmp_path)) == TOY._replace(heads=2)


def test_a_folder_without_a_bert_is_taken_for_bert_base(tmp_path):
    for content in ("{}", "[1]", "no JSON"):
        (tmp_path / "config.json").write_text(content)
        assert encoder_layouts.shape(str(tmp_path)) == encoder_layouts.shape(BASE)


def test_activations_of_a_transformer_are_the_usual_count():
    shape = encoder_layouts.shape(BASE)  # F is 4 D
    usual = 8 * 128 * 12 * (34 * 768 + 5 * 12 * 128)
    assert activation_bytes(shape, 8, 128, 3072, bf16=True) == usual
    assert activation_bytes(shape, 8, 128, 3072, bf16=False) == 2 * usual


def student(settings: Settings) -> cost.Cost:
    return cost.Run("student", settings).cost


def default(**changes) -> Settings:
    return Settings.at("quick").but(**changes)


@pytest.mark.parametrize(
    "more", [{"epochs": 1.0}, {"expert_size": 512, "n_shared": 512}, {"max_eval_examples": 601}]
)
def test_more_work_costs_more_time(more):
    less, larger = student(default()), student(default(**more))
    assert larger.flops > less.flops


@pytest.mark.parametrize("more", [{"batch_size": 64}, {"n_experts": 4}])
def test_larger_batches_and_more_experts_take_more_memory(more):
    base = default(n_experts=2, expert_size=384)
    less, larger = student(base), student(base.but(**more))
    assert larger.cpu_bytes > less.cpu_bytes and larger.gpu_bytes > less.gpu_bytes
    assert less.gpu_bytes < less.cpu_bytes


def test_plain_training_spares_the_teachers_pass():
    settings = default(max_eval_examples=8)
    with_teacher, plain = (student(settings.but(distill=which)) for which in ("all", "none"))
    shape = encoder_layouts.shape(settings.model)
    once = forward_flops(shape, cost.SIZES["library"].tokens, shape.neurons)
    assert with_teacher.flops - plain.flops == pytest.approx(256 * once)


def test_two_experts_a_token_cost_as_one_of_twice_the_width():
    gate = default(routing="gate-token", n_experts=2, expert_size=384, n_shared=0, distill="none")
    two, wide = gate.but(gate_top_k=2), gate.but(expert_size=768)
    assert student(two).flops == student(wide).flops


def test_known_sizes_are_the_papers_as_far_as_it_prints_them():
    for task, (train, validation) in paper_numbers.TABLE6.items():
        release = 0.2 if task == "stsb" else 0.05  # its 7k are those of an earlier release
        assert cost.SIZES[task][0] == pytest.approx(train, rel=release)
        assert cost.SIZES[task][1] == pytest.approx(validation, rel=0.05)
    assert {task: cost.SIZES[task][:2] for task in paper_numbers.TABLE5} == paper_numbers.TABLE5


def test_examples_are_capped_or_counted_in_files(tiny_glue):
    assert cost.examples(default()) == (4000, 500)
    at = Settings.at("small", task="sst2", data_dir=str(tiny_glue))
    lines = [
        (tiny_glue / "sst2" / f"{name}.jsonl").read_text().splitlines()
        for name in ("train", "validation")
    ]
    assert cost.examples(at) == tuple(map(len, lines))


def test_the_processors_speed_is_measured_and_plausible():
    assert 1e9 < cost.cpu_flops() < 1e14
