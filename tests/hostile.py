"""Objects of a mirror that are damaged, or tricks, and what is said about each."""

import json
import stat
import zipfile
from io import BytesIO

from moebert_lib.store.shared import sealed


def zipped(members: dict, *, compressed=(), links=()) -> bytes:
    """A zip of these names and bytes."""
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            info.external_attr = (stat.S_IFLNK if name in links else stat.S_IFREG) << 16
            file.writestr(info, content)
    return packed.getvalue()


def names(record: dict, *paths: str) -> dict:
    """The same record, with these files besides."""
    one = next(iter(record["files"].values()))
    return {**record, "files": {**record["files"], **dict.fromkeys(paths, one)}}


def claims_more(good: dict, record: dict) -> bytes:
    """The first file is said to be as large as a gigabyte in the central directory."""
    content = bytearray(zipped(good))
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = (2**30).to_bytes(4, "little") * 2
    return bytes(content)


def twice(good: dict, record: dict) -> bytes:
    content = zipped({**good, "deep/b.txt": b"two"})
    return content.replace(b"deep/b.txt", b"deep/a.txt")


def rerecorded(good: dict, record: dict, **more: bytes) -> bytes:
    return zipped({**good, **more, "entry.json": json.dumps(sealed(record)).encode()})


def outside(path: str):
    return lambda good, record: zipped(
        {**good, path: b"one", "entry.json": json.dumps(sealed(names(record, path))).encode()}
    )


#: How an object lies, and what the line about it says.
HOSTILE = {
    "truncated": (lambda good, record: zipped(good)[:-30], "no whole zip"),
    "empty": (lambda good, record: b"", "no whole zip"),
    "altered": (lambda good, record: zipped({**good, "deep/a.txt": b"two"}), "a.txt has changed"),
    "flipped": (lambda good, record: zipped(good).replace(b"one", b"two"), "no whole zip"),
    "absolute": (outside("/tmp/evil"), "'/tmp/evil' is no name"),
    "above": (outside("../evil"), "'../evil' is no name"),
    "hidden above": (outside("deep/../../evil"), "'deep/../../evil' is no name"),
    "backslash": (outside("..\\evil"), "is no name"),
    "drive": (outside("c:evil"), "is no name"),
    "folder": (outside("folder/"), "'folder/' is no name"),
    "dot": (outside("./b"), "'./b' is no name"),
    "below a file": (outside("deep/a.txt/b"), "no whole zip"),
    "pickle": (outside("model.BIN"), "'model.BIN' is a pickle"),
    "unnamed": (lambda good, record: zipped({**good, "b": b"x"}), "'b' is in only one"),
    "unnamed above": (lambda good, record: zipped({**good, "../b": b"x"}), "'../b' is in only one"),
    "missing": (lambda good, record: rerecorded(good, names(record, "b")), "'b' is in only one"),
    "twice": (twice, "a member comes twice"),
    "link": (lambda good, record: zipped(good, links=["empty"]), "'empty' is no plain file"),
    "compressed": (
        lambda good, record: zipped({**good, "empty": bytes(2**24)}, compressed=["empty"]),
        "'empty' is compressed",
    ),
    "claims more": (claims_more, "claim more than its"),
    "no record": (lambda good, record: zipped({"deep/a.txt": b"one"}), "entry.json is missing"),
    "half a record": (lambda good, record: rerecorded(good, {"kind": "unit"}), "is unreadable"),
    "edited": (
        lambda good, record: zipped(
            {**good, "entry.json": json.dumps({**record, "row": {"score": 9}}).encode()}
        ),
        "is unreadable",
    ),
    "ill-typed": (lambda good, record: rerecorded(good, {**record, "row": []}), "is unreadable"),
    "deep": (lambda good, record: zipped({**good, "entry.json": b"[" * 100_000}), "is unreadable"),
    "another digest": (
        lambda good, record: rerecorded(good, {**record, "digest": "0" * 64}),
        "of another key",
    ),
    "another key": (
        lambda good, record: rerecorded(good, {**record, "key": {"a": 2}}),
        "of another key",
    ),
}
