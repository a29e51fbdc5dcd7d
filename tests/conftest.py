"""Shared by all tests: a tiny BERT, tiny data, seeded, offline, outside the checkout.

The environment is set before any import that reads it. Everything the tests write
(runs, figures, caches) goes to one temporary folder that is removed at the end.
"""

import os
import secrets
import tempfile
from pathlib import Path

import offline

ROOT = Path(__file__).parents[1]
THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
_SCRATCH = tempfile.TemporaryDirectory(prefix="moebert-tests-", ignore_cleanup_errors=True)
SCRATCH = Path(_SCRATCH.name)


def make_home(folder: Path) -> Path:
    """A MOEBERT_HOME to write into, with the checkout's notebooks."""
    folder.mkdir(parents=True)
    (folder / "notebooks").symlink_to(ROOT / "notebooks", target_is_directory=True)
    (folder / "figures").mkdir()
    kept = ROOT / "figures" / "bench"  # notebook 07 draws them
    (folder / "figures" / "bench").symlink_to(kept, target_is_directory=True)
    return folder


os.environ.setdefault("MOEBERT_KILLS_SEED", str(secrets.randbelow(10**6)))  # one for all of xdist
offline.forbid_at_start(SCRATCH)  # of every Python below: commands, notebook kernels
os.environ.update(
    PYTHONPATH=os.pathsep.join(filter(None, [str(SCRATCH), os.environ.get("PYTHONPATH")])),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=str(SCRATCH / "huggingface"),
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    IPYTHONDIR=str(SCRATCH / "ipython"),
    MOEBERT_HOME=str(make_home(SCRATCH / "home")),
    MPLBACKEND="agg",
    RAY_AUTH_MODE="disabled",  # whatever token this machine keeps
    OMP_NUM_THREADS=THREADS,  # the same on every machine, kernels included
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("MOEBERT_FIGURES", None)

import browser  # noqa: E402
import glue_files  # noqa: E402
import hypothesis  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, set_seed  # noqa: E402

#: What takes minutes: clusters, faults, and the whole workbook in a browser, as a site and redrawn.
SLOW = (
    "faults",
    "test_browser_lab.py",
    "test_browser_page.py",
    "test_cluster.py",
    "test_redraw.py",
    "test_site.py",
)
#: What takes longest of the others.
FIRST = ("test_notebooks.py", "test_onnx_file.py", "test_cluster.py")

torch.set_num_threads(int(THREADS))
hypothesis.settings.register_profile(
    "moebert",
    deadline=None,  # the first example pays for imports and kernels
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("moebert")


def pytest_addoption(parser):
    parser.addoption(
        "--data-dir",
        metavar="DIR",
        help="GLUE-format files for the tests of real data; default: a tiny set made up here",
    )
    parser.addoption("--all", action="store_true", help=f"also {', '.join(SLOW)}")


def pytest_collection_modifyitems(config, items):
    """The longest files first, so that no worker waits for another at the end; slow ones asked for.

    A slow file or folder that is named on the command line counts as asked for.
    """
    items.sort(key=lambda item: item.path.name not in FIRST)
    named = {Path(arg.partition("::")[0]).resolve() for arg in config.args} - {ROOT / "tests", ROOT}
    slow = [ROOT / "tests" / name for name in SLOW]

    def asked(path):
        places = {path, *path.parents}
        return config.getoption("--all") or named & places or not places & {*slow}

    left = [item for item in items if not asked(item.path)]
    items[:] = [item for item in items if asked(item.path)]
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Anything but loopback and unix sockets raises ``offline.NetworkUsed``."""
    offline.forbid()
    yield
    offline.allow()


@pytest.fixture(autouse=True)
def seeded():
    """Each test starts from the same state of python's, numpy's and torch's generators."""
    set_seed(0)


@pytest.fixture(autouse=True)
def close_figs():
    """No figure outlives its test."""
    yield
    plt.close("all")


@pytest.fixture
def generator() -> torch.Generator:
    """A torch generator of its own, always in the same state."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A numpy generator of its own, always in the same state."""
    return np.random.default_rng(0)


@pytest.fixture
def tiny_bert():
    """Maker of a random BERT: hidden 32, 2 layers, 4 heads, 64 FFN neurons, vocab 99.

    ``tiny_bert(dtype=torch.float64, num_labels=2, seed=0, **config)`` returns a
    ``BertForSequenceClassification`` in eval mode. Unlike BERT's own initialisation no bias
    is zero and no LayerNorm the identity, so code that forgets one gives wrong numbers.
    """

    def make(*, dtype=torch.float64, num_labels=2, seed=0, **config):
        sizes = dict(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            num_labels=num_labels,
        )
        model = BertForSequenceClassification(BertConfig(**{**sizes, **config}))
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, values in model.named_parameters():
                centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
                values.copy_(centre + 0.2 * torch.randn(values.shape, generator=noise))
        return model.to(dtype).eval()

    return make


@pytest.fixture
def tiny_batch():
    """Maker of a padded batch: ``tiny_batch(n=4, length=12, num_labels=2, seed=0)``.

    Row ``i`` is ``i % 4`` tokens shorter than ``length``; token 0 pads.
    """

    def make(*, n=4, length=12, num_labels=2, seed=0):
        noise = torch.Generator().manual_seed(seed)
        mask = (torch.arange(length) < length - torch.arange(n)[:, None] % 4).long()
        ids = torch.randint(1, 99, (n, length), generator=noise) * mask
        labels = torch.randint(num_labels, (n,), generator=noise)
        return dict(input_ids=ids, attention_mask=mask, labels=labels)

    return make


@pytest.fixture
def moebert_home(tmp_path, monkeypatch) -> Path:
    """An empty MOEBERT_HOME of this test's own."""
    folder = make_home(tmp_path / "home")
    monkeypatch.setenv("MOEBERT_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_glue(tmp_path_factory) -> Path:
    """Folder with a few dozen made-up examples of all eight GLUE tasks."""
    return glue_files.write(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="session")
def data_dir(request, tiny_glue) -> Path:
    """``--data-dir`` where it was given (tasks: cola, mrpc, rte, sst2), else ``tiny_glue``."""
    given = request.config.getoption("--data-dir")
    return Path(given).resolve() if given else tiny_glue


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args, browser_type):
    """pytest-playwright's, with the system's Chromium where there is one."""
    found = browser.system_browser()
    if found is None and not Path(browser_type.executable_path).exists():
        (pytest.fail if "CI" in os.environ else pytest.skip)("no Chromium; playwright install")
    chosen = {"executable_path": found} if found else {}
    return {**browser_type_launch_args, **chosen, "args": ["--no-sandbox"]}


@pytest.fixture(scope="session")
def browser_context_args(browser_context_args):
    """pytest-playwright's, with a window of a laptop's size."""
    return {**browser_context_args, "viewport": {"width": 1280, "height": 900}}


@pytest.fixture
def watch(page) -> browser.Watch:
    """What goes wrong on this test's ``page``."""
    return browser.Watch(page)
