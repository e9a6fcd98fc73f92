"""The documentation runs, and says what the code says."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from trtc.core import hookspecs, ops
from trtc.core.graph import Node
from trtc.core.ops.elementwise import ACTIVATIONS
from trtc.core.plugin_registry import HOOKS
from trtc.core.targets.tensorrt.build_log import build_log
from trtc.tests import doc_blocks
from trtc.tests.doc_blocks import Block, blocks
from trtc.tests.fake_install import environment

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
RUNNABLE = [file for file in FILES if any(block.runs for block in blocks(file.read_text(encoding="utf-8")))]
AUTHORS_PAGE = ROOT / "docs" / "plugins.md"


def run_blocks(file: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: blocks install plugins and register ops."""
    command = [sys.executable, str(doc_blocks.__file__), str(file)]
    return subprocess.run(
        command, env=environment(folder / "site"), cwd=folder, capture_output=True, text=True
    )


@pytest.mark.parametrize("file", RUNNABLE, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_blocks_of_the_documentation_run(file: Path, tmp_path: Path) -> None:
    """Oracle: the assertions in the blocks."""
    result = run_blocks(file, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_failing_block_fails_with_its_line(tmp_path: Path) -> None:
    """Oracle: by hand. The runner itself must be able to fail."""
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 1\nassert x == 2\n```\n"
    )
    result = run_blocks(page, tmp_path)
    assert result.returncode != 0
    assert f'"{page}", line 11' in result.stderr


def test_blocks_are_told_apart_by_their_info_string() -> None:
    """Oracle: by hand."""
    text = "```python no-run\na\n```\n```bash\nb\n```\n- c:\n  ```python\n  d\n    e\n  ```\n"
    text += '```toml title="x.toml"\nf\n```\n'
    assert list(blocks(text)) == [
        Block("python", " no-run", "a\n", 2),
        Block("bash", "", "b\n", 5),
        Block("python", "", "d\n  e\n", 9),
        Block("toml", ' title="x.toml"', "f\n", 13),
    ]
    assert [block.runs for block in blocks(text)] == [False, False, True, False]
    assert [block.title for block in blocks(text)] == [None, None, None, "x.toml"]


def test_results_name_no_file_of_the_machine_that_made_them() -> None:
    results = sorted((ROOT / "bench" / "results").glob("*.json"))
    found = [path.name for path in results if '  File \\"/' in path.read_text(encoding="utf-8")]
    assert results and not found, "of a command that failed, its last line says why"


def test_the_authors_page_starts_with_a_plugin_of_less_than_40_lines() -> None:
    first = next(blocks(AUTHORS_PAGE.read_text(encoding="utf-8")))
    assert first.title == "toy.py"
    assert len(first.text.splitlines()) < 40


def test_the_authors_page_has_every_hook_with_its_signature() -> None:
    """Oracle: core/hookspecs.py."""
    page = AUTHORS_PAGE.read_text(encoding="utf-8")
    described = [line.split("`")[1] for line in page.splitlines() if line.startswith("### `trtc_")]
    specs = [getattr(hookspecs, hook) for hook in HOOKS]
    signatures = {f"{spec.__name__}({', '.join(inspect.signature(spec).parameters)})" for spec in specs}
    assert set(described) == signatures
    assert len(described) == len(HOOKS)


def test_the_authors_page_names_every_activation() -> None:
    """Oracle: the op table."""
    line = next(line for line in AUTHORS_PAGE.read_text().splitlines() if "| `activation`" in line)
    assert all(f"`{name}`" in line for name in ACTIVATIONS)


def test_the_authors_page_has_every_op_that_families_compose() -> None:
    """Oracle: the ops of the core, less those that the builder and the passes make."""
    _, table = AUTHORS_PAGE.read_text().split("| op | inputs; attributes |\n|---|---|\n")
    cells = [row.split("|")[1] for row in table.split("\n\n")[0].splitlines()]
    described = {name.strip(" `") for cell in cells for name in cell.split(",")}
    modules = (
        ops.attention,
        ops.collective,
        ops.elementwise,
        ops.linear,
        ops.norm,
        ops.quantized,
        ops.structure,
    )
    core = {value.name for module in modules for value in vars(module).values() if isinstance(value, ops.Op)}
    made = {"all_reduce", "all_reduce_norm", "all_gather", "add_layer_norm", "add_rms_norm"}
    assert described == core - made - {"dequantize", "quantized_linear"}


@pytest.mark.tensorrt_rtx
def test_the_tensorrt_lowering_of_the_authors_page_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: TensorRT-RTX's own shape inference, and the definition of its scaled tanh."""
    trt = pytest.importorskip("tensorrt_rtx")
    for block in blocks(AUTHORS_PAGE.read_text(encoding="utf-8")):
        if block.title in ("toy.py", "toycap.py"):
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "toy", importlib.import_module("toy"))
    lowering = importlib.import_module("toycap").trtc_tensorrt_plugins("tensorrt_rtx")["toy_softcap"]
    builder = trt.Builder(build_log(trt).logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.DataType.FLOAT, (-1, 50))
    (y,) = lowering(network, Node("capped", "toy_softcap", attrs={"cap": 5.0}), [x])
    assert (tuple(y.shape), y.dtype) == ((-1, 50), trt.DataType.FLOAT)
    layer = network.get_layer(0)
    layer.__class__ = trt.IActivationLayer  # get_layer returns plain layers
    assert (layer.type, layer.alpha) == (trt.ActivationType.SCALED_TANH, 5.0)
    assert layer.beta == pytest.approx(0.2)
