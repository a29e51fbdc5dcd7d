"""The explorer as a page of its own: Voila serves a notebook of two cells, without its code.

Each visitor gets a separate kernel, which ends when the visitor closes the page.
"""

import errno
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat

from moebert_lib.config.errors import UserError

TITLE = "Which neurons matter, and who gets them?"
INTRO = f"""\
# {TITLE}

MoEBERT sorts the neurons of each feed-forward layer by importance (Eq. 4), gives the most
important ones to every expert, deals the next ones out and drops the rest. Move a slider to see
what that means for each expert; choose a neuron to see the tokens that excite it."""

# Kernels of visitors do not read start-up files, keep a history or print on the terminal.
KERNEL_SETTINGS = "c.IPKernelApp.log_level = 50\nc.HistoryManager.hist_file = ':memory:'\n"
TEMPLATE = Path(__file__).parent / "templates" / "page.html.jinja"
NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
N_PORTS = 50  # ports tried, as Jupyter does


def notebook(code: str) -> nbformat.NotebookNode:
    """Return the page's notebook: an introduction, and a cell with ``code``."""
    cells = [nbformat.v4.new_markdown_cell(INTRO), nbformat.v4.new_code_cell(code)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"title": TITLE, "kernelspec": kernel})


def check_voila() -> None:
    """Raise an error where Voila is not installed."""
    try:
        import voila.app  # noqa: F401
    except ImportError:
        raise UserError("the page needs Voila: pip install 'moebert[lab]', or make lab") from None


def free_port(ip: str, first: int) -> int:
    """Return the first free port from ``first`` on.

    Raises:
        UserError: ``ip`` is not an address of this machine, or no port is free.
    """
    ports = range(first, min(first + N_PORTS, 65536))
    for port in ports:
        try:
            with socket.create_server((ip, port)):
                return port
        except PermissionError:
            raise UserError(f"port {port} is not allowed here; one above 1023 is") from None
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno in NO_ADDRESS:
                raise UserError(
                    f"--ip {ip} is not an address of this machine; expected localhost, 0.0.0.0 for "
                    "all addresses, or one address"
                ) from None
    raise UserError(f"ports {ports[0]} to {ports[-1]} are all taken; name another --port")


def serve(code: str, *, ip: str, port: int, browser: bool, opened: Callable[[str], Any]) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        code: Of the cell that shows the explorer.
        ip: Address to listen at.
        port: Port to listen at; it must be free.
        browser: Open the page in this machine's browser.
        opened: Called with the page's address once it answers.
    """
    from tornado.ioloop import IOLoop
    from voila.app import Voila

    with tempfile.TemporaryDirectory(prefix="moebert-page-") as scratch:
        page = _write(Path(scratch), code)
        os.environ |= _environment(Path(scratch))
        logging.getLogger("tornado").setLevel(logging.ERROR)
        app = Voila()
        app.initialize(_options(page, ip, port, browser))
        IOLoop.current().add_callback(lambda: opened(app.display_url))
        app.start()


def _options(page: Path, ip: str, port: int, browser: bool) -> Sequence[str]:
    options = [
        f"--Voila.ip={ip}",
        f"--port={port}",
        "--Voila.port_retries=0",
        "--template=moebert",
        "--Application.log_level=ERROR",
        "--VoilaConfiguration.preheat_kernel=True",
    ]
    options += [] if browser else ["--no-browser"]
    if sys.platform == "linux":  # sockets that only this user can open
        options.append("--KernelManager.transport=ipc")
    return [str(page), *options]


def _environment(scratch: Path) -> dict[str, str]:
    """Return the variables for Voila and its kernels: template, library and home."""
    from moebert_lib.store.run_outputs import kernel_environment

    paths = [str(scratch), os.environ.get("JUPYTER_PATH")]
    env = kernel_environment(scratch / "figures", offline=True)
    return env | {
        "JUPYTER_PATH": os.pathsep.join(filter(None, paths)),
        "IPYTHONDIR": str(scratch / "ipython"),
    }


def _write(folder: Path, code: str) -> Path:
    """Write page, template and settings of kernels into ``folder``; return the page's path."""
    page = "page/explorer.ipynb"
    template = "voila/templates/moebert"
    texts = {
        page: nbformat.writes(notebook(code)),
        f"{template}/conf.json": '{"base_template": "lab"}',
        f"{template}/index.html.j2": TEMPLATE.read_text("utf-8"),
        "ipython/profile_default/ipython_kernel_config.py": KERNEL_SETTINGS,
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / page
