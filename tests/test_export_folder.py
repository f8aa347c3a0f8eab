"""The folder of an export: nothing else is overwritten, and a damaged or foreign one is named, not believed."""

from __future__ import annotations

import ast
import builtins
import json
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from tiny import TinyTask

import search
from search.backends import BACKENDS, backend
from search.backends.artifact import artifact_files, check_folder, new_folder
from search.errors import ConfigError, DataError
from search.plan import Plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    task = TinyTask()
    return search.find_plan(
        task.model,
        task.example_input,
        [task.inputs(batch) for batch in task.batches("calibration")],
        lambda model, split: 0.0,
        budget={"size_ratio": 0.5},
        run_dir=tmp_path_factory.mktemp("run"),
    )


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    backend("brevitas").export(plan, TinyTask(), tmp_path / "out")
    return tmp_path / "out"


def layer(**values):
    def edit(manifest):
        manifest["layers"][0] |= values

    return edit


DAMAGES = {
    "a key is missing": lambda manifest: manifest.pop("plan_tensors"),
    "a key is unknown": lambda manifest: manifest.update(more=1),
    "files are a list": lambda manifest: manifest.update(files=["brevitas.json"]),
    "no file is listed": lambda manifest: manifest.update(files={}),
    "a file outside": lambda manifest: manifest["files"].update({"../run/plan.json": "0"}),
    "a digest is a number": lambda manifest: manifest["files"].update({"brevitas.json": 3}),
    "layers are names": lambda manifest: manifest.update(layers=["conv"]),
    "a layer is missing": lambda manifest: manifest["layers"].pop(),
    "no layers": lambda manifest: manifest.update(layers=[]),
    "another layer": layer(name="nope"),
    "no such precision": layer(runs="int99"),
    "no such fidelity": layer(weight="perfect"),
    "another plan": lambda manifest: manifest.update(plan="0" * 12),
    "another backend": lambda manifest: manifest.update(backend="aimet"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_not_believed(damage: str, plan: Plan, folder: Path):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    DAMAGES[damage](manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="bitplan export PLAN --to") as error:
        check_folder(folder, plan, "brevitas")
    assert "\n" not in str(error.value)
    backend("brevitas").export(plan, TinyTask(), folder)  # what the message says works
    check_folder(folder, plan, "brevitas")


def test_what_is_put_beside_an_artifact_is_not_counted_as_its_bytes(plan: Plan, folder: Path):
    (folder / "converted.bin").write_bytes(b"more")
    check_folder(folder, plan, "brevitas")
    assert [file.name for file in artifact_files(folder)] == ["brevitas.json", "ranges.safetensors"]


def test_the_manifest_of_another_program_is_left_alone(tmp_path: Path):
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    (tmp_path / "app.js").write_text("work of years")
    with pytest.raises(DataError, match="holds something that no export wrote"), new_folder(tmp_path):
        pass
    assert (tmp_path / "app.js").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"no folder can be written at .*file/sub"), new_folder(tmp_path / "file/sub"):
        pass


def test_a_link_to_an_export_stays_a_link(plan: Plan, folder: Path):
    link = folder.with_name("link")
    link.symlink_to(folder)
    before = (folder / "manifest.json").stat().st_ino
    backend("brevitas").export(plan, TinyTask(), link)
    assert link.is_symlink()
    assert (folder / "manifest.json").stat().st_ino != before


@pytest.mark.parametrize(
    "name", [".x", "../x", "a..b", "search.backends.base.Backend", "json.JSONDecoder", "no_such.Thing", "broken_one.B"]
)
def test_what_is_no_backend_of_ones_own_is_said_in_a_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_one.py").write_text("def :")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^backend ") as error:
        backend(name)
    assert "\n" not in str(error.value)
    sys.modules.pop("broken_one", None)


PYTHON = [name for name in BACKENDS if name not in ("llamacpp", "tensorrt", "vllm")]  # theirs are lines of a shell
GIVEN = {
    "batch",
    "calibration_inputs",
    "calibration_texts",
    "example_input",
    "float_model",
    "model",
    "sample",
    "tokenizer",
}


@pytest.mark.parametrize("name", PYTHON)
def test_the_lines_of_a_readme_import_what_they_use(name: str):
    lines = dedent(backend(name, "plan").usage).strip()
    assert len(lines.splitlines()) <= 4
    nodes = list(ast.walk(ast.parse(lines)))
    bound = GIVEN | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    bound |= {(alias.asname or alias.name).split(".")[0] for alias in imports} | set(dir(builtins))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert read <= bound
