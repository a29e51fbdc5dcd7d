"""The neurons of each expert: dealt by a ranking, or grouped by likeness, which is kept."""

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebert_lib.config.errors import home
from moebert_lib.config.provenance import code_digest
from moebert_lib.config.settings import Settings
from moebert_lib.data.batching import without_targets
from moebert_lib.experiments.dataset import chosen, dataset
from moebert_lib.experiments.stage_keys import IMPORTANCE
from moebert_lib.experiments.teacher import (
    FORWARD,
    importance,
    importance_key,
    reduced,
    teacher,
    teacher_key,
)
from moebert_lib.method import partition
from moebert_lib.method.encoder_layouts import ffns, watching, width
from moebert_lib.method.partition import choose_ranking, deal_layers
from moebert_lib.store import committed_results
from moebert_lib.store.store import StageKey

EXAMPLES = 200  # at most, of those that are scored
TOKENS = 4096  # of their tokens at most: what neurons are compared on


def order_key(settings: Settings) -> dict:
    """What decides the order of neurons: the scores, or the seed of a random order."""
    if settings.ranking == "random":
        return {"teacher": teacher_key(settings), "split_seed": settings.split_seed}
    return {"importance": importance_key(settings)}


def grouping_key(settings: Settings) -> dict:
    """What the grouping depends on beyond the order; nothing where neurons are dealt."""
    if settings.grouping == "deal":
        return {}
    choices: dict = {"how": settings.grouping}
    if settings.grouping != "coactivation":  # k-means has a start
        choices["split_seed"] = settings.split_seed
    if settings.grouping != "kmeans-weights":
        choices |= {"examples": EXAMPLES, "tokens": TOKENS, **chosen(settings, IMPORTANCE)}
    code = code_digest("method.partition", "experiments.expert_partitions", *FORWARD)
    return {"grouping": StageKey("grouping", choices, {"code": code})}


def neurons(settings: Settings) -> Tensor:
    """Neurons of each expert, shared ones first. Shape ``(L, E, K)``, int64."""
    dealt = _dealt(settings)
    n_shared = settings.sizes(width(teacher(settings).model.config))[1]
    if settings.grouping == "deal" or n_shared == dealt.shape[2]:  # nothing is an expert's own
        return dealt

    def build(folder: Path) -> dict:
        grouped = _grouped(settings, dealt, n_shared)
        save_file({"neurons": grouped}, folder / "neurons.safetensors")
        return {"layers": len(grouped)}

    choices = {
        **order_key(settings),
        **grouping_key(settings),
        "ranking": settings.ranking,
        "n_experts": settings.n_experts,
        "expert_size": dealt.shape[2],
        "n_shared": n_shared,
    }
    entry = committed_results.open_store().make(StageKey("grouped", choices), build)
    return load_file(entry.folder / "neurons.safetensors")["neurons"]


def _dealt(settings: Settings) -> Tensor:
    config = teacher(settings).model.config
    shape = (config.num_hidden_layers, width(config))
    known = torch.arange(shape[1]).expand(shape)  # a random order asks for no scores
    ranking = known if settings.ranking == "random" else importance(settings).ranking
    ranking = choose_ranking(ranking, settings.ranking, seed=settings.split_seed)
    size, n_shared = settings.sizes(shape[1])
    sizes = {"n_experts": settings.n_experts, "expert_size": size, "n_shared": n_shared}
    return deal_layers(ranking, **sizes, allow_identical=True)


def _grouped(settings: Settings, dealt: Tensor, n_shared: int) -> Tensor:
    """The deal with the neurons that are not shared in other company. Shape ``(L, E, K)``."""
    found = []
    for index, layer in enumerate(dealt):
        own = layer[:, n_shared:].T.flatten()  # by importance
        labels = _labels(settings, index, own)
        found.append(partition.group_neurons(layer, n_shared, labels))
    return torch.stack(found)


def _labels(settings: Settings, index: int, own: Tensor) -> Tensor:
    """The group of each of a layer's own neurons, by weights or by what they are active on."""
    k, seed = settings.n_experts, settings.split_seed
    if settings.grouping == "kmeans-weights":
        read = [*ffns(teacher(settings).model)][index].up.weight.cpu()
        return partition.balanced_kmeans(partition.unit_rows(read[own]), k, seed=seed)
    h = activations(settings)[index][:, own]  # (tokens, own)
    if settings.grouping == "kmeans-activations":
        return partition.balanced_kmeans(partition.unit_rows(h.T), k, seed=seed)
    return partition.partition_graph(partition.coactivation(h > 0), k)


def activations(settings: Settings) -> Tensor:
    """The teacher's activations ``h`` on :data:`TOKENS` real tokens, or all where there are fewer.

    Drawn at random, with a fixed seed, from those of the first :data:`EXAMPLES` of the examples
    that Eq. 4 is scored on.

    Returns:
        Shape ``(L, tokens, F)``, float32.
    """
    return _activations(reduced(settings, *IMPORTANCE), home())


@functools.lru_cache(maxsize=1)
def _activations(settings: Settings, _root: Path) -> Tensor:
    model, bundle = teacher(settings).model, dataset(settings)
    n, split = min(EXAMPLES, settings.importance_examples or EXAMPLES), settings.importance_split
    total = sum(map(len, bundle.rows(split, n, shuffle=True)["input_ids"][:]))
    kept = torch.zeros(total, dtype=torch.bool)
    kept[torch.randperm(total, generator=torch.Generator().manual_seed(0))[:TOKENS]] = True
    found: list[list[Tensor]] = [[] for _ in ffns(model)]
    flows: dict[int, Tensor] = {}
    passed = 0
    for batch in bundle.batches(split, limit=n, shuffle=True):
        real = batch["attention_mask"].bool().cpu()
        here = kept[passed : passed + int(real.sum())]
        passed += len(here)
        with watching(model, flows.__setitem__), torch.inference_mode():
            model(**without_targets(batch))
        for layer, h in flows.items():
            found[layer].append(h.float().cpu()[real][here])
    return torch.stack([torch.cat(parts) for parts in found])
