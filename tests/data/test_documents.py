"""Each source gives its documents in one order, and says in one line what is wrong with it."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from swarmtrain.data.corpus import Document
from swarmtrain.data.documents import read_documents
from swarmtrain.errors import RunFileError
from swarmtrain.run_data import DataSection


def _text(*paths: str) -> DataSection:
    return DataSection(source="text", paths=paths)


def _jsonl(*paths: str, field: str = "text") -> DataSection:
    return DataSection(source="jsonl", paths=paths, field=field)


def _error(section: DataSection, base: Path) -> str:
    with pytest.raises(RunFileError) as caught:
        list(read_documents(section, base))
    message = str(caught.value)
    assert "\n" not in message
    return message


def _write(base: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = base / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_text_files_and_globs_come_once_each_sorted_by_name(tmp_path: Path) -> None:
    _write(tmp_path, z_dot_txt="z", books__b_dot_txt="b", books__deep__a_dot_txt="a", books__c_dot_md="c")
    section = _text("z.txt", "books/**/*.txt", "books/b.txt")
    assert list(read_documents(section, tmp_path)) == [
        Document("books/b.txt", b"b"),
        Document("books/deep/a.txt", b"a"),
        Document("z.txt", b"z"),
    ]


def test_names_with_magic_characters_work(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")
    assert [d.text for d in read_documents(_text("a[1].txt"), tmp_path)] == [b"one"]


def test_empty_files_are_left_out_unless_all_are_empty(tmp_path: Path) -> None:
    _write(tmp_path, a_dot_txt="", b_dot_txt="b")
    assert [d.name for d in read_documents(_text("*.txt"), tmp_path)] == ["b.txt"]
    assert "a.txt is empty; name files that hold text" in _error(_text("a.txt"), tmp_path)


def test_text_errors_name_the_key_the_path_and_the_next_step(tmp_path: Path) -> None:
    _write(tmp_path, latin_dot_txt="caf\xe9".encode("latin-1"), folder__a_dot_txt="a")
    missing = _error(_text("missing.txt"), tmp_path)
    assert f"data.paths: there is no file missing.txt below {tmp_path};" in missing
    assert "--data FOLDER, so that FOLDER/missing.txt is there" in missing
    unmatched = _error(_text("texts/*.rst"), tmp_path)
    assert f"no file matches texts/*.rst below {tmp_path}" in unmatched and "FOLDER/texts/*.rst is there" in unmatched
    one_too_low = _error(_text(f"{tmp_path.name}/*.rst"), tmp_path)
    assert f"give the folder that has it: --data {tmp_path.parent}" in one_too_low
    assert "folder/**/*" in _error(_text("folder"), tmp_path)
    undecodable = _error(_text("latin.txt"), tmp_path)
    assert "latin.txt is not UTF-8 text (byte 3)" in undecodable and "convert it" in undecodable


def test_jsonl_documents_are_named_by_line(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 1}, {"text": "zwei ü"}, {"text": ""}]
    _write(tmp_path, a_dot_jsonl="\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert list(read_documents(_jsonl("a.jsonl"), tmp_path)) == [
        Document("a.jsonl:1", b"one"),
        Document("a.jsonl:3", "zwei ü".encode()),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{oops", "data.paths: line 2 of {path} is not JSON"),
        ("[1]", "data.paths: line 2 of {path} is not a JSON object"),
        ('{"body": "x"}', 'data.field: line 2 of {path} has no field "text" (it has: body)'),
        ('{"text": 3}', 'data.field: "text" in line 2 of {path} is not a string'),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert expected.format(path=path) in _error(_jsonl("a.jsonl"), tmp_path)


def _parquet(*paths: str, field: str = "text") -> DataSection:
    return DataSection(source="parquet", paths=paths, field=field)


def test_parquet_documents_are_named_by_row(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    (tmp_path / "p").mkdir()
    texts = ["one", None, "", "zwei ü"] + [f"row {number}" for number in range(2000)]
    kinds = {"a": arrow.string(), "b": arrow.large_string(), "c": arrow.dictionary(arrow.int32(), arrow.string())}
    for name, kind in kinds.items():
        column = arrow.array(texts).cast(kind) if name != "c" else arrow.array(texts).dictionary_encode()
        write_table(arrow.table({"id": range(len(texts)), "text": column}), tmp_path / "p" / f"{name}.parquet")
    documents = list(read_documents(_parquet("p/*.parquet"), tmp_path))
    assert len(documents) == 3 * 2002
    assert documents[:2] == [Document("p/a.parquet:1", b"one"), Document("p/a.parquet:4", "zwei ü".encode())]
    assert (
        [d.text for d in documents[:2002]]
        == [d.text for d in documents[2002:4004]]
        == [d.text for d in documents[4004:]]
    )


def test_parquet_errors_name_the_file_and_the_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(arrow.table({"story": ["a"], "id": [1]}), tmp_path / "a.parquet")
    assert 'a.parquet has no column "text" (it has: id, story)' in _error(_parquet("a.parquet"), tmp_path)
    assert 'column "id" of' in _error(_parquet("a.parquet", field="id"), tmp_path)
    _write(tmp_path, b_dot_parquet="no table", c_dot_parquet=(tmp_path / "a.parquet").read_bytes()[:-9])
    for name in ("b", "c"):
        assert f"{name}.parquet is not Parquet" in _error(_parquet(f"{name}.parquet"), tmp_path)
    write_table(arrow.table({"text": arrow.array([b"caf\xe9"]).view(arrow.string())}), tmp_path / "d.parquet")
    assert "d.parquet cannot be read after row 0" in _error(_parquet("d.parquet"), tmp_path)

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    assert "needs pyarrow: pip install 'pyarrow>=" in _error(_parquet("a.parquet"), tmp_path)


def test_stdlib_leaves_out_tests_tables_and_near_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "".join(f"def function_number_{i}(argument):\n    return argument * {i * i}\n" for i in range(40))
    _write(
        tmp_path,
        beta_dot_py=program,
        alpha_dot_py=program.replace("argument * 4\n", "argument + 4\n"),  # shorter by nothing: the later name goes
        pkg__core_dot_py="import os\n",
        pkg__tests__test_core_dot_py="import core\n",
        test__test_os_dot_py="import os\n",
        encodings__cp1_dot_py="table = 1\n",
        latin_dot_py="# caf\xe9\n".encode("latin-1"),
        _sysconfigdata_x_dot_py="build = 1\n",
        notes_dot_txt="no source\n",
    )
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert [d.name for d in read_documents(DataSection(), tmp_path)] == ["alpha.py", "pkg/core.py"]


def test_a_python_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert 'data.source = "text"' in _error(DataSection(), tmp_path)


def test_this_pythons_standard_library_is_a_corpus() -> None:
    documents = list(read_documents(DataSection(), Path()))
    names = [document.name for document in documents]
    assert names == sorted(set(names)) and "argparse.py" in names
    assert not [name for name in names if "/test/" in f"/{name}"]
    assert sum(len(document.text) for document in documents) > 5_000_000
