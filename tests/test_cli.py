"""The command line: what each command prints and writes, one line and exit code 2 for a mistake, resumption."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sae_kernels import _native, cli, cli_train
from sae_kernels._info import format_info, info
from sae_kernels.data import simulate
from sae_kernels.data.extract import extract
from sae_kernels.data.store import RowWriter
from sae_kernels.eval.reconstruction import evaluate_reconstruction
from sae_kernels.experiments import demo, stages
from sae_kernels.nn import VARIANTS, TopKSAE
from sae_kernels.ops import backend
from sae_kernels.train import load_sae, save_sae
from sae_kernels.train.activations import load_activations

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--width", "4", "--k", "4", "--steps", "60", "--batch-size", "64", "--quiet"]


@pytest.fixture
def acts(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float16)
    np.save(tmp_path / "acts.npy", x)
    return tmp_path / "acts.npy"


def python(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "sae_kernels", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


def refused(capsys, *arguments):
    """The one line on stderr of a call that ends with exit code 2."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def test_train_then_eval(tmp_path, acts, capsys):
    out = tmp_path / "sae"
    assert (
        cli.main(["train", str(acts), "--out", str(out), "--normalize", "l2", "--held-out", "0", "--seed", "3", *SMALL])
        == 0
    )
    assert capsys.readouterr().out == ""
    sae = load_sae(out)
    assert (sae.d_in, sae.d_sae, sae.k, sae.normalize) == (8, 32, 4, "l2")
    assert cli.main(["eval", str(out), str(acts), "--json", str(tmp_path / "figures.json")]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == pytest.approx(evaluate_reconstruction(sae, load_activations(acts)))
    assert all(name in shown for name in ("fvu", "cosine", "l0", "dead_share"))
    assert cli.main(["eval", str(out), str(acts), "--quiet", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == figures


def test_eval_of_a_store(tmp_path, acts, capsys):
    torch.manual_seed(0)
    sae, x = TopKSAE(8, 16, 4), load_activations(acts)
    save_sae(sae, tmp_path / "sae")
    extract(torch.nn.Sequential(torch.nn.Identity()), "0", x, tmp_path / "store", shard_mb=0.003, progress=False)
    command = ["eval", str(tmp_path / "sae"), str(tmp_path / "store")]
    assert cli.main([*command, "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(evaluate_reconstruction(sae, x))
    assert cli.main([*command, "--key", "x"]) == 2
    assert "--key is for files" in capsys.readouterr().err


def test_train_says_what_came_out(tmp_path, acts, capsys):
    assert cli.main(["train", str(acts), "--out", str(tmp_path / "sae"), *SMALL[:-1], "--held-out", "0.25"]) == 0
    out, err = capsys.readouterr()
    assert "60 steps" in out and "on 100 held-out rows" in out and "fvu" in out
    assert "60/60" in err


@pytest.mark.parametrize("variant", ["batch_topk", "jumprelu"])
def test_train_a_variant(tmp_path, acts, capsys, variant):
    assert cli_train.VARIANTS == tuple(VARIANTS)
    out = tmp_path / "sae"
    assert cli.main(["train", str(acts), "--out", str(out), "--variant", variant, *SMALL]) == 0
    sae = load_sae(out)
    assert type(sae) is VARIANTS[variant] and sae.threshold.max() > 0
    assert cli.main(["eval", str(out), str(acts), "--quiet"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["l0"] < sae.max_active


def test_refitting_is_of_reading_alone(tmp_path, acts, capsys):
    saes, figures = [], []
    for steps in ("0", "4"):
        out = tmp_path / steps
        assert cli.main(["train", str(acts), "--out", str(out), "--refit", steps, *SMALL]) == 0
        saes.append(load_sae(out))
        assert cli.main(["eval", str(out), str(acts), "--quiet"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert torch.equal(saes[0].W_enc, saes[1].W_enc) and saes[1].refit == 4
    assert figures[1]["fvu"] < figures[0]["fvu"]


def test_seed_and_normaliser_change_the_weights(tmp_path, acts):
    weights = []
    for place, extra in enumerate(([], ["--seed", "1"], ["--normalize", "global"], ["--lr", "0.01"])):
        assert cli.main(["train", str(acts), "--out", str(tmp_path / str(place)), *SMALL, *extra]) == 0
        weights.append(load_sae(tmp_path / str(place)).W_enc)
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


def test_training_starts_at_the_mean_of_the_rows(tmp_path, acts):
    out, still = tmp_path / "sae", ["--width", "2", "--k", "3", "--steps", "1", "--lr", "1e-12", "--held-out", "0"]
    assert cli.main(["train", str(acts), "--out", str(out), *still, "--normalize", "none", "--quiet"]) == 0
    sae, x = load_sae(out), load_activations(acts)
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0))


def test_train_a_grid_from_a_store(tmp_path, capsys):
    with RowWriter(tmp_path / "acts", 8, shard_rows=100) as writer:
        writer.add(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)))
    command = ["train", str(tmp_path / "acts"), "--steps", "20", "--batch-size", "32", "--buffer-rows", "128"]
    grid = ["--grid", "k=2,4", "width=4", "lr=1e-3,1e-2"]
    assert cli.main([*command, *grid, "--out", str(tmp_path / "grid")]) == 0
    shown = capsys.readouterr().out
    names = [f"k{k}-width4-lr{lr}" for k in (2, 4) for lr in ("1e-3", "1e-2")]
    assert all(name in shown for name in names) and "on 400 training rows" in shown
    assert [load_sae(tmp_path / "grid" / name).k for name in names] == [2, 2, 4, 4]
    alone = ["--k", "4", "--width", "4", "--lr", "1e-2", "--quiet"]
    assert cli.main([*command, *alone, "--out", str(tmp_path / "alone")]) == 0
    member = load_sae(tmp_path / "grid" / names[3]).state_dict()
    assert all(torch.equal(value, member[key]) for key, value in load_sae(tmp_path / "alone").state_dict().items())
    half = ["--k", "4", "--width", "4", "--lr", "1e-2", "--quiet", "--bf16"]
    assert cli.main([*command, *half, "--out", str(tmp_path / "half")]) == 0
    found = load_sae(tmp_path / "half").W_enc
    assert found.dtype == torch.float32 and not torch.equal(found, member["W_enc"])


def test_mistakes_in_training_from_a_store_or_a_grid(tmp_path, acts, capsys):
    with RowWriter(tmp_path / "store", 8) as writer:
        writer.add(torch.randn(40, 8))
    out = ["--out", tmp_path / "sae"]
    assert "no activation store there" in refused(capsys, "train", tmp_path, *out)
    assert "--held-out is for files" in refused(capsys, "train", tmp_path / "store", *out, "--held-out", "0.1")
    assert "--buffer-rows is for stores" in refused(capsys, "train", acts, *out, "--buffer-rows", "9")
    assert "got 'depth=3'" in refused(capsys, "train", acts, *out, "--grid", "depth=3")
    assert "k takes ints, got '1,x'" in refused(capsys, "train", acts, *out, "--grid", "k=1,x")
    assert "--shard-latents 2 must divide the number of processes, 1" in refused(
        capsys, "train", acts, *out, "--shard-latents", "2"
    )


def test_ctrl_c_and_resume(tmp_path, acts):
    """A real Ctrl-C in a real process: exit code 130, a message how to go on, and the same bits in the end."""
    command = [
        "train",
        acts,
        "--width",
        "4",
        "--k",
        "4",
        "--steps",
        "600",
        "--batch-size",
        "32",
        "--checkpoint-every",
        "25",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "sae_kernels", *map(str, command), "--out", str(tmp_path / "cut")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "cut" / "config.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert "interrupted after step" in last and "--resume" in last and "Traceback" not in err
    resumed = python(*command, "--out", tmp_path / "cut", "--resume", "--quiet")
    whole = python(*command, "--out", tmp_path / "whole", "--quiet")
    assert (resumed.returncode, whole.returncode) == (0, 0), resumed.stderr + whole.stderr
    for name, value in load_sae(tmp_path / "whole").state_dict().items():
        assert torch.equal(value, load_sae(tmp_path / "cut").state_dict()[name]), name


def test_mistakes_are_one_line(tmp_path, acts, capsys):
    out = ["--out", tmp_path / "sae"]
    assert "no such file" in refused(capsys, "train", tmp_path / "none.npy", *out)
    assert "come from .npy, .npz, .safetensors, .pt files" in refused(capsys, "train", tmp_path / "acts.csv", *out)
    assert "--held-out must be in [0, 1), got 1.0" in refused(capsys, "train", acts, *out, "--held-out", "1")
    assert "k" in refused(capsys, "train", acts, *out, "--k", "9999")
    assert "no checkpoint there" in refused(capsys, "train", acts, *out, "--resume")
    assert "no checkpoint there" in refused(capsys, "eval", tmp_path / "none", acts)
    assert "invalid int value: 'many'" in refused(capsys, "train", acts, *out, "--k", "many")
    assert "invalid choice: 'dance'" in refused(capsys, "dance")
    assert "--model" in refused(capsys, "demo", "--model", "svd")
    assert "not allowed with argument" in refused(capsys, "demo", "--data", tmp_path, "--interactions", acts)
    assert "no known layout" in refused(capsys, "demo", "--data", tmp_path, "--out", tmp_path / "run")
    assert "needs --user-col and --item-col" in refused(capsys, "demo", "--interactions", acts)
    cli.main(["train", str(acts), *map(str, out), *SMALL])
    np.save(tmp_path / "narrow.npy", np.zeros((3, 5), dtype=np.float32))
    assert "(3, 5); the SAE takes [..., 8]" in refused(capsys, "eval", tmp_path / "sae", tmp_path / "narrow.npy")
    with pytest.raises(FileNotFoundError):
        cli.main(["eval", "--traceback", str(tmp_path / "none"), str(acts)])


def test_activation_files(tmp_path):
    from safetensors.torch import save_file

    x = torch.randn(6, 2, 3)
    np.savez(tmp_path / "two.npz", a=x.numpy(), b=x.numpy() + 1, ids=np.arange(6), names=np.array(["x"] * 6))
    np.savez(tmp_path / "one.npz", a=x.double().numpy(), ids=np.arange(6))
    save_file({"h": x}, tmp_path / "x.safetensors")
    torch.save(x, tmp_path / "x.pt")
    for name in ("one.npz", "x.safetensors", "x.pt"):
        torch.testing.assert_close(load_activations(tmp_path / name), x.reshape(12, 3))
    torch.testing.assert_close(load_activations(tmp_path / "two.npz", "b"), x.reshape(12, 3) + 1)
    with pytest.raises(ValueError, match=r"found 2 \(there is a \(6, 2, 3\), b \(6, 2, 3\), ids \(6,\)\)"):
        load_activations(tmp_path / "two.npz")
    with pytest.raises(ValueError, match="no floating matrix named 'ids'"):
        load_activations(tmp_path / "two.npz", "ids")
    x[2, 1, 0] = float("nan")
    torch.save(x, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"row 5 holds NaN or Inf \(1 such rows\)"):
        load_activations(tmp_path / "nan.pt")
    torch.save(torch.zeros(0, 4), tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="empty, shape"):
        load_activations(tmp_path / "empty.pt")
    for suffix in (".npy", ".npz", ".pt", ".safetensors"):
        (tmp_path / f"broken{suffix}").write_bytes(b"not this")
        with pytest.raises(ValueError, match=f"broken{suffix}"):
            load_activations(tmp_path / f"broken{suffix}")


def test_help_teaches(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"sae-kernels {name}" in shown for name in ("demo", "extract", "train", "eval", "info"))
    for name in ("demo", "extract", "train", "eval", "info"):
        with pytest.raises(SystemExit) as exit:
            cli.main([name, "--help"])
        assert exit.value.code == 0
        assert "usage: sae-kernels" in capsys.readouterr().out


def test_info(capsys):
    facts = info()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    if _native.cpu_loaded():
        assert (facts["backend"], facts["native_cpu"]) == ("cpu", "loaded")
        assert facts["instruction_set"] in _native.ISAS
    else:
        assert (facts["backend"], facts["instruction_set"], facts["native_cpu"]) == (
            "reference",
            None,
            _native.cpu_error,
        )
    ops = {"topk_encode", "threshold_encode", "batch_topk_encode", "sparse_decode", "sae_loss", "ActivationStats"}
    assert set(facts["gpu_verified"]) == ops
    assert facts["gpu_verified"]["sparse_decode"] == "NVIDIA H200"
    for op in ("topk_encode", "threshold_encode", "batch_topk_encode"):
        assert facts["gpu_verified"][op] == "NVIDIA H200 (timed before its kernels changed)"
    with backend("reference"):
        assert info()["backend"] == "reference" and "forced" in format_info(info())
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == format_info(facts) + "\n"


def test_info_without_the_native_library():
    without = subprocess.run(
        [sys.executable, "-m", "sae_kernels", "info"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "SAE_KERNELS_NATIVE": "0"},
    )
    assert "switched off by SAE_KERNELS_NATIVE=0" in without.stdout and "reference" in without.stdout


def test_demo_command(tmp_path, capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr(demo, "run_demo", lambda config: seen.update(vars(config)))
    command = (
        "demo --model sasrec --d 16 --width 2 --k 4 --steps 30 --normalize l2 --seed 7 --epochs 3 --resume --quiet"
    )
    assert cli.main([*command.split(), "--out", str(tmp_path)]) == 0
    wanted = {"model": "sasrec", "d": 16, "width": 2, "k": 4, "steps": 30, "normalize": "l2", "seed": 7, "epochs": 3}
    assert {name: seen[name] for name in wanted} == wanted
    assert seen["resume"] and seen["quiet"] and seen["out"] == tmp_path


def test_ctrl_c_in_the_demo_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "simulate", lambda *_, **options: simulate(100, 60, 4, **options))
    monkeypatch.setattr(stages, "train_recommender", press)
    assert cli.main(["demo", "--out", str(tmp_path / "run"), "--quiet"]) == 130
    assert f"--resume to go on from {tmp_path / 'run'}" in capsys.readouterr().err
    assert cli.main(["demo", "--model", "sasrec", "--interactions", str(tmp_path), "--out", str(tmp_path / "x")]) == 2


def test_demo_prints_its_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "simulate", lambda *_, **options: simulate(400, 120, 6, **options))
    assert cli.main(["demo", "--d", "16", "--steps", "20", "--epochs", "2", "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    for wanted in (
        "base   with SAE",
        "nDCG@20",
        "Recall@20",
        "FVU",
        "cosine",
        "L0",
        "dead",
        "best latent for each of the 6",
        "AUC",
        "steering, mean over",
        "share of top-20",
        "backend:",
        "report.html",
    ):
        assert wanted in out, wanted
    assert "elsa: 100%" in err and "SAE: 100%" in err
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_devices_that_are_not_here(tmp_path, acts, capsys):
    for device, says in (("cuda", "finds no CUDA device"), ("foo", "choose from cpu, cuda")):
        for command in (
            ("train", acts, "--out", tmp_path / "o"),
            ("extract", "--model", "m:make", "--inputs", acts, "--module", "0", "--out", tmp_path / "o"),
        ):
            assert says in refused(capsys, *command, "--device", device)
    assert "invalid count value: 'inf'" in refused(capsys, "plan", "--rows", "inf", "--d-in", "4", "--d-sae", "8")
