"""README tables and plots of the benchmark suite come from its CSV files."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sae_kernels.bench import CASES, Case, Row, plots, report, scaling, table

ROOT = Path(__file__).parents[1]


TINY = Case("tiny", 96, 24, 160, 5)


def row(provider="sae_kernels", p50=1.0, **changes):
    base = Row(
        "topk_encode", "forward", provider, "cpu", 96, 24, 160, 5, "float32", 0.9 * p50, p50, 1.1 * p50, device="box"
    )
    return replace(base, **changes)


def _results(tmp_path):
    folder = tmp_path / "benchmarks" / "results" / "box"
    case = CASES["sequential"]
    size = dict(zip(("rows", "d_in", "d_sae", "k", "dtype"), case.size, strict=True))
    rows = [row(p50=10.0, **size), row("torch", 30.0, **size), row("linear", 12.5, **size)]
    rows += [row(op="module", mode="step", p50=20.0, extra_bytes=2**20, **size)]
    rows += [row("torch", op="module", mode="step", p50=130.0, extra_bytes=2**30, **size)]
    table.write(rows, folder)
    scaling._write([("rows", str(n), row(p50=n, rows=n, extra_bytes=2**20)) for n in (10, 100)], folder)
    return folder


def test_readme_and_plots_follow_the_csv(tmp_path):
    folder = _results(tmp_path)
    names = ("headline", "machine", "losses", "memory", "scaling", "plots", "encode", "serving")
    readme = tmp_path / "README.md"
    readme.write_text("# t\n" + "".join(f"<!-- bench:{n} -->\nold\n<!-- /bench:{n} -->\n" for n in names))
    changed = report.write(tmp_path)
    text = readme.read_text()
    assert "| 8192, 64, 4096, 32 | 10 | 0.80 | 3.00x | - | 20 | 6.50x |" in text
    assert "1.0 | 1024.0 |" in text and "1.00 (1.00)" in text and "old" not in text
    assert "No comparison in which another provider is faster." in text and "Not measured yet." in text
    for svg in re.findall(r"!\[\w+\]\((\S+)\)", text):
        assert (tmp_path / svg).read_text().startswith("<svg")
    assert readme in changed and report.write(tmp_path) == []
    table.write([row(p50=11.0, **{n: getattr(CASES["sequential"], n) for n in ("rows", "d_in", "d_sae", "k")})], folder)
    assert readme in report.write(tmp_path)


def test_gpus_have_blocks_of_their_own(tmp_path):
    """A device is a GPU where our rows are of a GPU's backend; ratios with our unforced row; why one is missing."""
    folder = _results(tmp_path).parent / "chip"
    size = {"rows": 1048576, "d_in": 64, "d_sae": 4096, "k": 32, "dtype": "bfloat16", "device": "Chip"}
    ours = replace(row(p50=4.0, extra_bytes=3 * 2**20, **size), backend="cuda")
    rows = [ours, row("linear", 2.0, **size), row("torch", 50.0, **size), replace(ours, backend="triton", p50_ms=9.0)]
    rows += [replace(ours, op="module", mode="step", p50_ms=10.0, backend="cuda+triton")]
    rows += [replace(row("torch", 1.0, op="module", mode="step", **size), p50_ms=None, status="OOM")]
    rows += [replace(ours, op="activation_stats", p50_ms=0.2, backend="triton")]
    table.write(rows, folder)
    readme = tmp_path / "README.md"
    names = ("gpuheadline", "gpumachine", "machine", "gpustep")
    readme.write_text("".join(f"<!-- bench:{n} -->\nold\n<!-- /bench:{n} -->\n" for n in names))
    report.write(tmp_path)
    text = readme.read_text()
    assert "| 1048576, 64, 4096, 32 | 4 | 2.00 | 12.50x | 3 | - | - | 10 | OOM | - | 0.05 |" in text
    assert text.count("Measured on Chip") == text.count("Measured on box") == 1
    assert "| 1048576 x 64 x 4096, k 32 bfloat16 | 10 | OOM |" in text


def test_a_broken_marker_raises():
    with pytest.raises(ValueError, match="opened"):
        report.update("<!-- bench:encode -->\n", [])
    with pytest.raises(ValueError, match="block 'speed' is unknown"):
        report.update("<!-- bench:speed -->\n<!-- /bench:speed -->\n", [])


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="no README.md beside the package")
def test_readme_agrees_with_the_results():
    found = report.devices(ROOT / "benchmarks" / "results", ROOT)
    text = (ROOT / "README.md").read_text()
    assert report.update(text, found) == text, (
        "README.md and benchmarks/results disagree: run python -m benchmarks.report"
    )
    for result in found:
        for name, svg in report.drawings(result).items():
            assert (result.folder / name).read_text() == svg, f"{name} is stale: run python -m benchmarks.report"


def test_plots_place_points_on_log_axes():
    svg = plots.lines("t", "x", "ms", {"a": [(1, 1), (10, 10), (100, 100)]})
    spots = [tuple(map(float, m)) for m in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x0, y0), (x1, y1), (x2, y2) = spots
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.2) and math.isclose(y0 - y1, y1 - y2, abs_tol=0.2)
    wide, narrow = map(
        float, re.findall(r'<rect x="190"[^>]* width="([\d.]+)"', plots.bars("t", {"g": {"a": 4, "b": 1}}))
    )
    assert wide == pytest.approx(4 * narrow, rel=0.01)
    with pytest.raises(ValueError, match="positive"):
        plots.lines("t", "x", "y", {"a": [(1, 0)]})


# files


def test_a_comparison_measured_again_replaces_the_old_one_whole(tmp_path):
    table.write([row(), row("torch", 2.0), row(k=7)], tmp_path)
    table.write([row(p50=3.0)], tmp_path)
    kept = table.read(tmp_path / "topk_encode.csv")
    assert sorted((r.provider, r.k, r.p50_ms) for r in kept) == [("sae_kernels", 5, 3.0), ("sae_kernels", 7, 1.0)]


def test_a_status_without_figures_survives_the_file(tmp_path):
    lost = row("sae_lens", status='wrong: values, "all" off')
    lost.p20_ms = lost.p50_ms = lost.p80_ms = None
    table.write([lost], tmp_path)
    (kept,) = table.read(tmp_path / "topk_encode.csv")
    assert kept == lost


def test_other_columns_raise(tmp_path):
    (tmp_path / "x.csv").write_text("op,ms\n1,2\n")
    with pytest.raises(ValueError, match="columns are"):
        table.read(tmp_path / "x.csv")


def test_losses_come_first_plain_torch_before_peers():
    rows = [row(p50=2.0), row("sae_lens", 0.5), row("torch", 1.0), row("linear", 0.1), row("overcomplete", 3.0)]
    rows.append(row(backend="reference", p50=0.2))
    assert [other.provider for _, other in table.losses(rows)] == ["torch", "sae_lens"]
    text = table.summary(rows)
    assert text.startswith("losses:") and "2.00 times the time of torch" in text.splitlines()[1]
    assert "none" in table.losses_text([row(), row("torch", 2.0)])


def test_exponents_are_those_of_the_data():
    found = [("rows", str(n), row(p50=0.01 * n**0.97, rows=n)) for n in (10, 100, 1000, 10000)]
    ((axis, op, mode, provider, whole, large),) = scaling.exponents(found)
    assert (axis, op, mode, provider) == ("rows", "topk_encode", "forward", "sae_kernels")
    assert whole == pytest.approx(0.97) and large == pytest.approx(0.97)
    with pytest.raises(ValueError, match="two points"):
        scaling.slope([1.0], [1.0])


def test_scaling_measures_and_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "START", TINY)
    monkeypatch.setattr(scaling, "AXES", {"rows": (32, 64), "input": ("random", "sorted", "equal")})
    monkeypatch.setattr(scaling, "NAMES", ("sae_kernels", "linear"))
    monkeypatch.setattr(scaling, "MEASURED", (("topk_encode", "forward"),))
    monkeypatch.setattr(scaling, "_memory", lambda op, mode, case, name, threads: (case.rows, "ok"))
    monkeypatch.setattr(
        scaling.measure, "interleaved", lambda timers, budget, least: ((n, t()) for n, t in timers.items())
    )
    found = scaling.measure_all(tmp_path, axes=("rows", "input"), say=lambda _: None)
    assert [(axis, value) for axis, value, r in found if r.provider == "sae_kernels"] == [
        ("rows", "32"), ("rows", "64"), ("input", "random"), ("input", "sorted"), ("input", "equal"),
    ]  # fmt: skip
    assert all(r.status == "ok" and (r.extra_bytes == r.rows) is (r.provider != "linear") for _, _, r in found)
    back = scaling.read(next(tmp_path.glob("*/scaling.csv")))
    assert [(a, v, r.provider) for a, v, r in back] == [(a, v, r.provider) for a, v, r in found]
