"""The neurons of each expert: dealt by a ranking, or clustered, which is stored."""

import functools
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebert_lib.config.settings import Settings
from moebert_lib.data.batching import without_targets
from moebert_lib.experiments.dataset import dataset
from moebert_lib.experiments.stage_keys import IMPORTANCE, chosen, made_with
from moebert_lib.experiments.teacher import (
    importance,
    importance_key,
    only_teachers,
    teacher,
    teacher_key,
)
from moebert_lib.method import partition
from moebert_lib.method.encoder_layouts import ffns, watching, width
from moebert_lib.method.partition import choose_ranking, deal_layers
from moebert_lib.store.committed_results import AnyStore
from moebert_lib.store.store import StageKey

EXAMPLES = 200  # at most, of those that are scored
TOKENS = 4096  # of their tokens at most: what neurons are compared on


def parents(store: AnyStore, settings: Settings) -> dict:
    """What a partition depends on beside its sizes: a ranking, and a grouping where there is one.

    A random ranking needs a seed and no scores.
    """
    choices: dict = {}
    if settings.ranking == "random":
        choices |= {"teacher": teacher_key(store, settings), "split_seed": settings.split_seed}
    else:
        choices["importance"] = importance_key(store, settings)
    if settings.grouping != "deal":
        choices["grouping"] = grouping_key(store, settings)
    return choices


def grouping_key(store: AnyStore, settings: Settings) -> StageKey:
    """What clustering depends on beyond the ranking."""
    choices: dict = {"how": settings.grouping}
    if settings.grouping != "coactivation":  # k-means has a random start
        choices["split_seed"] = settings.split_seed
    if settings.grouping != "kmeans-weights":
        choices |= {"examples": EXAMPLES, "tokens": TOKENS, **chosen(settings, IMPORTANCE)}
    return StageKey("grouping", choices, made_with(store, _group))


def neurons(store: AnyStore, settings: Settings) -> Tensor:
    """Neurons of each expert, shared ones first. Shape ``(L, E, K)``, int64."""
    dealt = _dealt(store, settings)
    n_shared = settings.sizes(width(teacher(store, settings).model.config))[1]
    if settings.grouping == "deal" or n_shared == dealt.shape[2]:  # all neurons are shared
        return dealt
    entry = store.make(
        _grouped_key(store, settings, dealt.shape[2], n_shared),
        partial(_group, store, settings, dealt, n_shared),
    )
    return load_file(entry.folder / "neurons.safetensors")["neurons"]


def _grouped_key(store: AnyStore, settings: Settings, expert_size: int, n_shared: int) -> StageKey:
    choices = {
        **parents(store, settings),
        "ranking": settings.ranking,
        "n_experts": settings.n_experts,
        "expert_size": expert_size,
        "n_shared": n_shared,
    }
    return StageKey("grouped", choices, made_with(store, _group))


def _dealt(store: AnyStore, settings: Settings) -> Tensor:
    config = teacher(store, settings).model.config
    shape = (config.num_hidden_layers, width(config))
    if settings.ranking == "random":  # needs no scores
        ranking = torch.arange(shape[1]).expand(shape)
    else:
        ranking = importance(store, settings).ranking
    ranking = choose_ranking(ranking, settings.ranking, seed=settings.split_seed)
    size, n_shared = settings.sizes(shape[1])
    sizes = {"n_experts": settings.n_experts, "expert_size": size, "n_shared": n_shared}
    return deal_layers(ranking, **sizes, allow_identical=True)


def _group(store: AnyStore, settings: Settings, dealt: Tensor, n_shared: int, folder: Path) -> dict:
    """Store the partition with the neurons that are not shared clustered. ``(L, E, K)``."""
    layers = []
    for index, layer in enumerate(dealt):
        unshared = layer[:, n_shared:].T.flatten()  # by importance
        labels = _labels(store, settings, index, unshared)
        layers.append(partition.group_neurons(layer, n_shared, labels))
    save_file({"neurons": torch.stack(layers)}, folder / "neurons.safetensors")
    return {"layers": len(layers)}


def _labels(store: AnyStore, settings: Settings, index: int, unshared: Tensor) -> Tensor:
    """The cluster of each of a layer's unshared neurons, by weights or by activations."""
    k, seed = settings.n_experts, settings.split_seed
    if settings.grouping == "kmeans-weights":
        weights = [*ffns(teacher(store, settings).model)][index].up.weight.cpu()
        return partition.balanced_kmeans(partition.unit_rows(weights[unshared]), k, seed=seed)
    h = activations(store, settings)[index][:, unshared]  # (tokens, unshared)
    if settings.grouping == "kmeans-activations":
        return partition.balanced_kmeans(partition.unit_rows(h.T), k, seed=seed)
    return partition.partition_graph(partition.coactivation(h > 0), k)


def activations(store: AnyStore, settings: Settings) -> Tensor:
    """The teacher's activations ``h`` on :data:`TOKENS` real tokens, or all where there are fewer.

    Drawn at random, with a fixed seed, from those of the first :data:`EXAMPLES` of the examples
    that Eq. 4 is scored on.

    Returns:
        Shape ``(L, tokens, F)``, float32.
    """
    return _activations(store, only_teachers(settings, *IMPORTANCE))


@functools.lru_cache(maxsize=1)
def _activations(store: AnyStore, settings: Settings) -> Tensor:
    model, bundle = teacher(store, settings).model, dataset(settings)
    n, split = min(EXAMPLES, settings.importance_examples or EXAMPLES), settings.importance_split
    total = sum(map(len, bundle.rows(split, n, shuffle=True)["input_ids"][:]))
    kept = torch.zeros(total, dtype=torch.bool)
    kept[torch.randperm(total, generator=torch.Generator().manual_seed(0))[:TOKENS]] = True
    by_layer: list[list[Tensor]] = [[] for _ in ffns(model)]
    flows: dict[int, Tensor] = {}
    passed = 0
    for batch in bundle.batches(split, limit=n, shuffle=True):
        real = batch["attention_mask"].bool().cpu()
        here = kept[passed : passed + int(real.sum())]
        passed += len(here)
        with watching(model, flows.__setitem__), torch.inference_mode():
            model(**without_targets(batch))
        for layer, h in flows.items():
            by_layer[layer].append(h.float().cpu()[real][here])
    return torch.stack([torch.cat(parts) for parts in by_layer])
