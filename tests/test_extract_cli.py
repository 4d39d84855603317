"""sae-kernels extract: own models by factory, SASRec, Hugging Face; verify and repair; mistakes are one line."""

import json
import sys
from pathlib import Path

import pytest
import torch
from extract_models import Sequences, hidden, ids

from sae_kernels import TopKSAE, cli
from sae_kernels.data import leave_last_out, load
from sae_kernels.data.extract import CallableInputs, HuggingFace, extract, text_inputs
from sae_kernels.data.store import ActivationStore
from sae_kernels.recommenders import SASRec
from sae_kernels.train import save_sae

SHARED = Path(__file__).parents[2] / "shared" / "data"
MINE = """
import torch
from extract_models import Sequences, ids
make_model, make_inputs, nothing = Sequences, ids, 3
def pad(columns):
    return torch.tensor(columns["items"])
def real(x):
    return x != 0
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("mine", None)
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]


def command(*arguments, out="s"):
    return cli.main(["extract", *map(str, arguments), *(["--out", out] if out else [])])


OWN = ("--model", "mine:make_model", "--module", "encoder", "--mask", "mine:real", "--shard-mb", 0.01)


def refused(capsys, *arguments, **options):
    capsys.readouterr()
    try:
        code = command(*arguments, **options)
    except SystemExit as exit:
        code = exit.code
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in err
    return err


def test_own_model_and_inputs(capsys):
    assert command(*OWN, "--inputs", "mine:make_inputs", "--quiet") == 0
    out, err = capsys.readouterr()
    x, store = ids(), ActivationStore.open("s")
    assert f"{store.rows} rows of 8 x torch.float32" in out and err == ""
    torch.testing.assert_close(store.read(slice(None)), hidden(Sequences(), x)[x != 0])
    assert command("--list-modules", "--model", "mine:make_model", out=None) == 0
    assert capsys.readouterr().out.split() == ["embed", "encoder", "head"]


def test_options_reach_the_extraction(capsys):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'sae-kernels[data]'")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"user": list(range(50)), "items": ids().tolist()}), "log.parquet")
    save_sae(TopKSAE(8, 32, 3), "sae")
    assert command(*OWN, "--inputs", "mine:make_inputs", "--batch-size", 16, "--quiet", out="plain") == 0
    more = ("--inputs", "log.parquet", "--columns", "items", "--prepare", "mine:pad", "--quiet")
    changes = ("--batch-size", 16, "--positions", "last", "--dtype", "bfloat16", "--shuffle", 3, "--first-id", 100)
    assert command(*OWN, *more, *changes) == 0
    store, plain = ActivationStore.open("s"), ActivationStore.open("plain")
    last = plain.read(slice(None), "position") == 5
    assert torch.equal(store.read(slice(None), "row").sort().values, torch.arange(100, 150))
    order = store.read(slice(None), "row").argsort()
    assert torch.equal(store.read(slice(None))[order], plain.read(slice(None))[last].bfloat16())
    assert command(*OWN, *more, "--sae", "sae", "--autocast", "bfloat16", out="codes") == 0
    codes = ActivationStore.open("codes")
    assert (codes.kind, codes.d) == ("codes", 3) and codes.manifest.source["autocast"] == "torch.bfloat16"
    again = (*OWN, *more, "--sae", "sae", "--autocast", "bfloat16", "--first-id", 50)
    assert "holds other inputs" in refused(capsys, *again, out="codes")
    assert command(*again, "--append", out="codes") == 0
    assert ActivationStore.open("codes").rows == 2 * codes.rows


def test_verify_and_repair(capsys):
    own = (*OWN, "--inputs", "mine:make_inputs", "--batch-size", 8, "--quiet")
    command(*own)
    assert command("--verify") == 0
    path = Path("s") / ActivationStore.open("s").shards[1].name
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    assert command("--verify") == 2
    out, err = capsys.readouterr()
    assert "shard-00000001.safetensors: sha256 is" in err and "1 of" in out and "shards are damaged" in out
    assert command(*own, "--repair") == 0
    assert "1 shards were made anew: 1" in capsys.readouterr().out and command("--verify") == 0


def test_mistakes_are_one_line(capsys):
    inputs = ("--inputs", "mine:make_inputs")
    assert "one of --model, --sasrec and --hf is missing" in refused(capsys, *inputs)
    assert "--inputs is missing" in refused(capsys, *OWN)
    assert "--out is missing" in refused(capsys, *OWN, *inputs, out=None)
    assert "--out is missing" in refused(capsys, "--verify", out=None)
    assert "--module is missing" in refused(capsys, *OWN[:2], *inputs)
    assert "has no module 'encodr'; nearest: 'encoder'" in refused(capsys, *OWN[:2], *inputs, "--module", "encodr")
    assert "must be MODULE:FUNCTION, got 'mine'" in refused(capsys, "--model", "mine", *inputs)
    assert "there is no module 'yours'" in refused(capsys, "--model", "yours:f", *inputs)
    assert "'mine' has no 'f'" in refused(capsys, "--model", "mine:f", *inputs)
    assert "'mine:nothing' is a int, not a function" in refused(capsys, "--model", "mine:nothing", *inputs)
    assert "not allowed with argument" in refused(capsys, *OWN, *inputs, "--hf", "gpt2")
    assert "--sasrec needs --data" in refused(capsys, "--sasrec", "x.npz")
    assert "x.npz: no such file" in refused(capsys, "--sasrec", "x.npz", "--data", ".")
    assert "--hf needs --inputs" in refused(capsys, "--hf", "gpt2")
    assert "no such file" in refused(capsys, *OWN, "--inputs", "none.parquet")
    assert "no activation store there" in refused(capsys, "--verify")
    assert "no checkpoint there" in refused(capsys, *OWN, *inputs, "--sae", "nowhere")
    assert "invalid loads value" in refused(capsys, *OWN, *inputs, "--storage-options", "{")
    assert "takes 1 positional argument but 2 were" in refused(capsys, *OWN[:4], *inputs, "--mask", "mine:make_model")
    assert not Path("s").exists()


@pytest.mark.skipif(not (SHARED / "ml1m").is_dir(), reason="needs ../shared/data with ml1m and its SASRec")
def test_sasrec_on_ml1m(tmp_path):
    """The published states of the first 300 users; and by the command, on a folder of their sequences."""
    np = pytest.importorskip("numpy", reason="needs numpy")
    pd = pytest.importorskip("pandas", reason="needs pandas: pip install 'sae-kernels[data]'")
    checkpoint, users = SHARED / "models" / "sasrec_ml1m_pmixer_e860.npz", 300
    histories = leave_last_out(load(SHARED / "ml1m").histories()).inputs
    model = SASRec.from_state(np.load(checkpoint))
    inputs = CallableInputs(lambda start, stop: histories.padded(torch.arange(start, stop), 200), users, 64)
    store = extract(model, "norm", inputs, "acts", mask=lambda sequence: sequence != 0, progress=False)
    known = np.load(SHARED / "models" / "sasrec_ml1m_activations_100k.npz")
    user, place = (torch.from_numpy(known[name].astype("int64")) for name in ("sas_user", "position"))
    lengths = histories.lengths[user - 1]
    chosen = (user <= users) & (place >= lengths - 200)
    keys = store.read(slice(None), "row") * 200 + store.read(slice(None), "position")
    rows = torch.searchsorted(keys, ((user - 1) * 200 + place - lengths + 200)[chosen])
    assert len(rows) > 4000 and store.rows == int(histories.lengths[:users].clamp(max=200).sum())
    # they are kept in float16: half a unit in the last of 11 bits, plus float32 noise near zero
    wanted = torch.from_numpy(known["acts"])[chosen].float()
    torch.testing.assert_close(store.read(rows), wanted, rtol=2**-11, atol=1e-4)

    (tmp_path / "ml").mkdir()
    sequences = pd.read_parquet(SHARED / "ml1m" / "sasrec_sequences.parquet")
    # some rows of the others, so that all items occur and keep their numbers
    few = sequences[(sequences.sas_user <= 40) | ~sequences.sas_item.duplicated()]
    few.to_parquet(tmp_path / "ml" / "sasrec_sequences.parquet")
    pd.read_parquet(SHARED / "ml1m" / "movies.parquet").to_parquet(tmp_path / "ml" / "movies.parquet")
    assert command("--sasrec", checkpoint, "--data", "ml", "--dtype", "float16", "--quiet") == 0
    histories, made = load(tmp_path / "ml").histories(), ActivationStore.open("s")
    assert made.rows == int(histories.lengths.clamp(max=200).sum()) and made.manifest.source["module"] == "norm"
    with torch.no_grad():
        first = model.encode(histories.padded(torch.arange(40), 200))[:, -1]
    of, position = made.read(slice(None), "row"), made.read(slice(None), "position")
    last = ((position == 199) & (of < 40)).nonzero().squeeze(1)
    torch.testing.assert_close(made.read(last).float(), first, rtol=2**-11, atol=1e-4)


@pytest.fixture
def tiny(tmp_path):
    """A Hugging Face model and its tokenizer, made here."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'sae-kernels[hf]'")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "film", "about", "love", "war", "and", "cats"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).eval()
    model.save_pretrained(tmp_path / "tiny")
    fast.save_pretrained(tmp_path / "tiny")
    return model, fast


TEXTS = ["a film about love", "war", "cats and a film about cats and war", "love and war", "a"] * 4


def test_hugging_face_models(tiny, capsys):
    model, tokenizer = tiny
    wrapped, inputs = HuggingFace(model), text_inputs(TEXTS, tokenizer, batch_size=6, max_tokens=7)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=7, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, output_hidden_states=True)
    real = tokens["attention_mask"].bool()
    for module, wanted in (
        ("last_hidden_state", out.last_hidden_state),
        ("model.encoder.layer.0", out.hidden_states[1]),
    ):
        store = extract(wrapped, module, inputs, module, mask=wrapped.mask, progress=False)
        torch.testing.assert_close(store.read(slice(None)), wanted[real], rtol=1e-4, atol=1e-5)
        assert torch.equal(store.read(slice(None), "row"), real.nonzero()[:, 0])
    Path("texts.csv").write_text("id,title\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS)))
    given = ("--hf", "tiny", "--inputs", "texts.csv", "--columns", "title", "--max-tokens", 7, "--batch-size", 6)
    assert command(*given, "--quiet") == 0
    assert torch.equal(
        ActivationStore.open("s").read(slice(None)), ActivationStore.open("last_hidden_state").read(slice(None))
    )
    capsys.readouterr()
    assert command("--hf", "tiny", "--list-modules", out=None) == 0
    assert {"last_hidden_state", "model.encoder.layer.1"} <= set(capsys.readouterr().out.split())
    with pytest.raises(TypeError, match="texts must be a sequence of str"):
        text_inputs(["a", None], tokenizer)


def test_storage_options_are_json(capsys):
    pytest.importorskip("fsspec", reason="needs fsspec: pip install 'sae-kernels[store]'")
    options = json.dumps({"skip_instance_cache": True})
    given = (*OWN, "--inputs", "mine:make_inputs", "--storage-options", options, "--quiet")
    assert command(*given, out="memory://cli/s") == 0
    assert "storage_options are for URLs" in refused(capsys, *given, out="folder")
