"""Points that fail, values that look like code, and two machines that make the same bytes."""

import json
import shutil
from collections import Counter

from sweeping import ROOT, Home, digests

#: The first cell that is changed here, numbered as in the executed copy, and its text.
CELL, TEXT = 7, "own = stage("


def edit(home: Home, before: str, after: str) -> None:
    """Replace a text that stands once in the notebook."""
    path = home.folder / "notebooks" / "06_slow.ipynb"
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


def test_a_failed_point_is_told_left_alone_retried_when_asked_and_run_once_mended(tmp_path):
    home, bad = Home(tmp_path), f"assert seed != 1, 'unlucky'; {TEXT}"
    home.grid(seeds=[0, 1])
    edit(home, TEXT, bad)
    where, once = f"cell {CELL}: AssertionError: unlucky", ["own 0", "run 0", "run 1", "shared 0"]
    first = home.run()
    assert first.status == 1 and "1 of 2 done, 1 failed" in first.out and not first.err
    assert f"failed: {where}" in first.out and sorted(home.log()) == once
    status = home.run("status").out
    assert "1 of 2 done, 1 failed" in status
    (line,) = [line for line in status.splitlines() if line.startswith("  failed")]
    assert "seed=1" in line and where in line
    again = home.run()
    assert again.status == 1 and f"failed before: {where}" in again.out
    assert sorted(home.log()) == once
    for number, words in ((2, ["sweep", f"{home.folder}/grid.yaml"]), (3, ["sweep"])):
        assert home.run(*words, "--retry-failed").status == 1
        assert Counter(home.log()) == Counter(once) | Counter({"run 1": number})
    edit(home, bad, TEXT)
    assert home.sweep().out.count("done in") == 2  # it is another notebook now
    assert Counter(home.log())["own 1"] == 1
    assert ": 2 of 2 done\n" in home.run("status").out
    home.check_tidy()


def test_values_reach_the_notebook_as_text_and_pages_as_escaped_text(tmp_path):
    home, ran = Home(tmp_path), tmp_path / "ran"
    tag = "<script>alert(1)</script>"
    code = [
        f'a"; open("{ran}", "w")  #',
        f"b'; open('{ran}', 'w')  #",
        f"c'''\nopen('{ran}', 'w')\n'''",
        f'd"""\nopen("{ran}", "w")\n"""',
        f"`touch {ran}` $(touch {ran}) {{x}} {{{{y}}}} %s \\",
        f"\\\u2028open('{ran}', 'w')\u2029\x85\r\n\ttab \x00 é 漢 \\",
        f"{tag}</pre>{tag}-->{tag}",
    ]
    labels = ["\n".join(code), f"""{tag}'"`&{{}}\\"""]
    home.grid(seeds=[0], settings={"label": labels})
    edit(home, TEXT, f"assert len(label) > 99, label; {TEXT}")
    ended = home.run()
    assert ended.status == 1 and "1 of 2 done, 1 failed" in ended.out
    entry = home.places()["run 0"]
    assert json.loads((entry / "figures" / "row.json").read_text())["label"] == labels[0]
    assert json.loads((entry / "entry.json").read_text())["row"]["metrics"]["label"] == labels[0]
    assert not ran.exists()
    for page in (home.runs / "report.html", home.runs / "pages" / f"{entry.name}.html"):
        text = page.read_text().lower()
        assert tag not in text and tag.replace("<", "&lt;").replace(">", "&gt;") in text, page
    home.check_tidy()


def test_two_homes_make_the_same_bytes_of_the_real_experiment(tmp_path):
    homes = [Home(tmp_path / name, notebooks={}) for name in ("one", "another")]
    for home in homes:
        shutil.copy(ROOT / "notebooks" / "03_distillation.ipynb", home.folder / "notebooks")
        home.grid(notebook="03_distillation", seeds=[0])
    words = [["sweep", f"{home.folder}/grid.yaml", "--workers", "1"] for home in homes]
    commands = [home.start(*own) for home, own in zip(homes, words, strict=True)]
    assert [command.end().status for command in commands] == [0, 0]
    one, another = map(texts, homes)
    assert one == another and len(one) > 1


def texts(home: Home) -> dict[str, str]:
    """Digests of a home's one run's tables and numbers, and of its sweep's table."""
    (run,) = home.runs.glob("notebook-*")
    made = digests(run / "figures") | digests(next(home.runs.glob("sweeps/*")))
    return {name: made[name] for name in made if name.endswith((".csv", ".md", ".tex"))}
