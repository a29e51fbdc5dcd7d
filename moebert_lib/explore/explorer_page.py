"""The explorer as a page by itself: a notebook of two cells that Voila serves, without its code.

Each visitor gets a kernel of his own, which ends when he closes the page.
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

# Voila's own template asks other hosts for icon fonts; the page needs none of them.
TEMPLATE = """\
{%- extends 'voila/templates/lab/index.html.j2' -%}
{% import "spinner.macro.html.j2" as spinner %}
{%- block notebook_css -%}
{{ resources.include_js("static/voila-style.js") }}
{{ spinner.css() }}
<style>
  .jp-mod-noOutputs.jp-mod-noInput { display: none; }
  #rendered_cells > div { max-width: 1600px; margin: 0 auto; padding: 0.4em 1em; }
  #rendered_cells h1 { font-size: 1.4em; margin: 0.2em 0; }
  #rendered_cells p { margin: 0.2em 0; }
</style>
{{ super.super() }}
{%- endblock notebook_css -%}
{%- block html_head_js_mermaidjs -%}{%- endblock html_head_js_mermaidjs -%}
"""
# No visitor's kernel reads the host's start-up files, keeps a history or talks to the terminal.
KERNELS = "c.IPKernelApp.log_level = 50\nc.HistoryManager.hist_file = ':memory:'\n"
TRIED = 50  # ports from the first on, as Jupyter does


def notebook(code: str) -> nbformat.NotebookNode:
    """The page: what it is, and one cell of ``code`` that shows the explorer."""
    cells = [nbformat.v4.new_markdown_cell(INTRO), nbformat.v4.new_code_cell(code)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"title": TITLE, "kernelspec": kernel})


def check_voila() -> None:
    """Refuse in one line to go on without Voila."""
    try:
        import voila.app  # noqa: F401
    except ImportError:
        raise UserError("the page needs Voila: pip install 'moebert[lab]', or make lab") from None


def free_port(ip: str, first: int) -> int:
    """The first port from ``first`` on that nobody listens at.

    Raises:
        UserError: ``ip`` is no address of this machine, or none of the ports is free.
    """
    ports = range(first, min(first + TRIED, 65536))
    for port in ports:
        try:
            with socket.create_server((ip, port)):
                return port
        except PermissionError:
            raise UserError(f"port {port} is not allowed here; one above 1023 is") from None
        except (socket.gaierror, OSError) as error:
            if isinstance(error, socket.gaierror) or _not_here(error):
                raise UserError(
                    f"--ip {ip} is no address of this machine; expected localhost, "
                    "0.0.0.0 for all of them, or one of its own"
                ) from None
    raise UserError(f"ports {ports[0]} to {ports[-1]} are all taken; name another --port")


def serve(code: str, *, ip: str, port: int, browser: bool, opened: Callable[[str], Any]) -> None:
    """Serve the page until Ctrl-C or a signal to end; ``opened`` gets its address.

    Args:
        code: Of the cell that shows the explorer.
        ip: Address to listen at.
        port: Likewise; it must be free.
        browser: Whether to open the page in this machine's browser.
        opened: Called with the address once it answers.
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
    if sys.platform == "linux":  # as the kernels of a run: sockets that only this user can open
        options.append("--KernelManager.transport=ipc")
    return [str(page), *options]


def _environment(scratch: Path) -> dict[str, str]:
    """What Voila and its kernels find: our template first, this library, this home."""
    from moebert_lib.store.run_outputs import kernel_environment

    paths = [str(scratch), os.environ.get("JUPYTER_PATH")]
    env = kernel_environment(scratch / "figures", offline=True)
    return env | {
        "JUPYTER_PATH": os.pathsep.join(filter(None, paths)),
        "IPYTHONDIR": str(scratch / "ipython"),
    }


def _write(folder: Path, code: str) -> Path:
    """Page, template and settings of kernels in ``folder``; returns the page's path."""
    page = "page/explorer.ipynb"
    template = "voila/templates/moebert"
    texts = {
        page: nbformat.writes(notebook(code)),
        f"{template}/conf.json": '{"base_template": "lab"}',
        f"{template}/index.html.j2": TEMPLATE,
        "ipython/profile_default/ipython_kernel_config.py": KERNELS,
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / page


def _not_here(error: OSError) -> bool:
    return error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
