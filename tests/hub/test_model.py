"""The model that hubs know: saved, pushed and loaded again, and as good a torch module as the one it is made of."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard

import visformer.hub.model
from tests.hub.fake_hub import COMMIT, TOKEN
from tests.upstream import FIXTURES, mini_architecture, mini_model, outputs
from visformer.checkpoint import Checkpoint, read_checkpoint
from visformer.data import Preprocessing
from visformer.errors import RunError, UsageError
from visformer.hub import Visformer
from visformer.hub.model import checkpoint_of
from visformer.models import VARIANTS, Architecture, change
from visformer.models import Visformer as Plain

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NAMES = [f"class {i}" for i in range(10)]


def fresh(fixture="mindcv_mini_v2", **changes) -> Visformer:
    torch.manual_seed(0)
    return Visformer(mini_architecture(fixture, **changes)).eval()


def known() -> Visformer:
    """A model that a checkpoint was made of, with all that is known of it."""
    preprocessing = Preprocessing((64, 64), crop_pct=0.9, antialias=False, crop_rounding="floor")
    training, source = {"top1": 50.0, "dataset": "digits"}, {"kind": "trained", "from": "scratch"}
    plain = fresh()
    checkpoint = Checkpoint(
        "visformer_tiny_v2", plain.config, NAMES, preprocessing, plain.state_dict(), training, source
    )
    return checkpoint.build(Visformer)


def same_outputs(a: torch.nn.Module, b: torch.nn.Module, images=IMAGES) -> bool:
    with torch.no_grad():
        return torch.equal(a(images), b(images))


# ---- folders


def test_a_saved_model_comes_back_whole(tmp_path):
    model = known()
    assert model.save_pretrained(tmp_path / "net") is None
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = Visformer.from_pretrained(tmp_path / "net")
    assert type(loaded) is Visformer and not loaded.training and same_outputs(model, loaded)
    for name in ("model_name", "class_names", "preprocessing", "training_summary", "source", "config"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert read_checkpoint(tmp_path / "net" / "model.safetensors").metadata() == checkpoint_of(model).metadata()
    assert same_outputs(Visformer.from_pretrained(str(tmp_path / "net" / "model.safetensors")), model)


def test_config_json_is_for_people_and_tools(tmp_path):
    model = known()
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert Architecture.from_dict(document["architecture"]) == model.config
    assert Preprocessing.from_dict(document["preprocessing"]) == model.preprocessing
    assert document["class_names"] == NAMES and document["model_name"] == "visformer_tiny_v2"
    model.reset_classifier(3)
    model.save_pretrained(tmp_path, config={"something": "else"})  # the mixin's argument changes nothing
    assert json.loads((tmp_path / "config.json").read_text())["class_names"] == ["0", "1", "2"]


def test_the_card_is_written_once_and_kept(tmp_path):
    model = known()
    model.save_pretrained(tmp_path, model_card_kwargs={"license": "mit", "repo_id": "someone/net"})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.eval_results[0].metric_value == 50.0
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_a_fresh_model_is_saved_too(tmp_path):
    model = fresh(image_size=(64, 96), in_channels=1)
    model.save_pretrained(tmp_path)
    loaded = Visformer.from_pretrained(tmp_path)
    assert loaded.class_names == [str(i) for i in range(10)] and loaded.model_name == "custom"
    assert loaded.preprocessing.image_size == (64, 96) and loaded.preprocessing.in_channels == 1
    assert same_outputs(loaded, model, torch.randn(2, 1, 64, 96))


@pytest.mark.parametrize("name", ["visformer_tiny", "swin_visformer_small_v2", "net1", "net7"])
def test_a_fresh_model_is_called_by_its_published_name(name):
    network = change(VARIANTS[name].architecture, num_classes=3, image_size=64, drop_path_rate=0.2, gelu="tanh")
    assert visformer.hub.model._name_of(network) == name
    assert visformer.hub.model._name_of(change(network, mlp_ratio=3.0)) == "custom"


def test_what_was_changed_after_loading_is_saved_as_it_is():
    model = known()
    model.reset_classifier(4)
    model.set_image_size((96, 64))
    checkpoint = checkpoint_of(model)
    assert checkpoint.class_names == ["0", "1", "2", "3"] and checkpoint.architecture.num_classes == 4
    assert checkpoint.preprocessing.image_size == (96, 64) and checkpoint.preprocessing.crop_pct == 0.9
    assert same_outputs(checkpoint.build(Visformer), model, torch.randn(1, 3, 96, 64))
    model.reset_classifier(0)
    assert checkpoint_of(model).class_names == []


def test_a_model_without_weights_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = Visformer(mini_architecture("mindcv_mini_v2"))
    with pytest.raises(UsageError, match="meta device and has no weights"):
        model.save_pretrained(tmp_path)


def test_published_formats_are_read(tmp_path):
    folder = tmp_path / "net"
    folder.mkdir()
    fixture = FIXTURES / "mini" / "mindcv_mini_v2.ckpt"
    (folder / "mindcv.ckpt").write_bytes(fixture.read_bytes())
    model = Visformer.from_pretrained(folder, model="custom", num_heads=(1, 2, 4, 8), qk_scale_power=-0.5)
    expected = outputs("mindcv_mini_v2")
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["input"]))
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), atol=5e-5, rtol=0)
    assert same_outputs(model, mini_model("mindcv_mini_v2"))


def test_what_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "net", "runs/best.safetensors", "./net/net"):
        with pytest.raises(UsageError, match="there is no such file"):
            Visformer.from_pretrained(source)
    (tmp_path / "net").mkdir()
    with pytest.raises(UsageError, match="it is empty"):
        Visformer.from_pretrained(tmp_path / "net")
    with pytest.raises(UsageError, match="revision: 'v1' is for a repository"):
        Visformer.from_pretrained(tmp_path / "net", revision="v1")


# ---- the hub


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_a_pushed_model_comes_back(hub, logged_in):
    model = known()
    address = model.push_to_hub("someone/net", model_card_kwargs={"license": "apache-2.0"}, commit_message="A net")
    assert address == f"{hub.url}/someone/net/commit/{COMMIT}" and hub.commits[0]["summary"] == "A net"
    files = hub.repositories["someone/net"]["main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and "hf-hub:someone/net" in card.text
    loaded = Visformer.from_pretrained("someone/net")
    assert same_outputs(model, loaded) and loaded.class_names == NAMES and loaded.training_summary["top1"] == 50.0
    assert same_outputs(visformer.load("hf-hub:someone/net"), model)


def test_a_name_alone_is_the_owners_who_is_logged_in(hub, logged_in):
    known().push_to_hub("net", private=True)
    card = hub.repositories["someone/net"]["main"]["README.md"].decode()
    assert "hf-hub:someone/net" in card and hub.validated[-1] == {"content": card, "repoType": "model"}


def test_the_repositorys_own_card_can_be_left_alone(hub, logged_in):
    hub.add("someone/net", {"README.md": b"my own words"})
    known().push_to_hub("someone/net", ignore_patterns="README.md")
    files = hub.repositories["someone/net"]["main"]
    assert files["README.md"] == b"my own words" and "model.safetensors" in files


def test_saving_can_push_at_once(hub, logged_in, tmp_path):
    address = known().save_pretrained(tmp_path / "net", push_to_hub=True, repo_id="someone/net")
    assert address.startswith(hub.url)
    assert hub.repositories["someone/net"]["main"]["config.json"] == (tmp_path / "net" / "config.json").read_bytes()


def test_a_revision_is_loaded(hub, tmp_path):
    fresh().save_pretrained(tmp_path)
    hub.add("someone/net", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}, revision="v1")
    for source, revision in [("someone/net", "v1"), ("someone/net@v1", None), ("hf-hub:someone/net@v1", "v1")]:
        assert same_outputs(Visformer.from_pretrained(source, revision=revision), fresh())
    with pytest.raises(UsageError, match="no such revision"):
        Visformer.from_pretrained("someone/net", revision="v2")
    with pytest.raises(UsageError, match="give one of them"):
        Visformer.from_pretrained("someone/net@v1", revision="v2")


def test_options_of_the_download_are_passed_on(hub, tmp_path):
    fresh().save_pretrained(tmp_path / "net")
    hub.add("someone/net", {"model.safetensors": (tmp_path / "net" / "model.safetensors").read_bytes()})
    with pytest.raises(RunError, match="not in the hub's cache"):
        Visformer.from_pretrained("someone/net", local_files_only=True)
    assert hub.requests == []
    cache = tmp_path / "other cache"
    assert same_outputs(Visformer.from_pretrained("someone/net", cache_dir=cache), fresh())
    assert same_outputs(Visformer.from_pretrained("someone/net", cache_dir=cache, local_files_only=True), fresh())


@pytest.mark.parametrize("repo_id", ["someone/net", "net"])
def test_pushing_without_a_login_is_one_line(hub, repo_id):
    with pytest.raises(UsageError, match=f"hf-hub:{repo_id}: .*`hf auth login`") as error:
        known().push_to_hub(repo_id)
    assert "\n" not in str(error.value) and hub.repositories == {}


def test_what_the_hub_does_not_have_is_one_line(hub):
    with pytest.raises(UsageError, match="hf-hub:someone/other: there is no such repository"):
        Visformer.from_pretrained("someone/other")


# ---- a torch module


def test_it_is_made_on_the_meta_device_without_memory():
    with torch.device("meta"):
        model = Visformer(VARIANTS["visformer_small"].architecture)
    assert all(p.is_meta for p in model.parameters())


def test_it_is_copied_and_pickled():
    model = known()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is Visformer and same_outputs(model, twin)
        assert twin.class_names == NAMES and twin.config == model.config
    assert pickle.loads(pickle.dumps(Visformer)) is Visformer


def test_its_state_is_that_of_the_plain_model():
    model, plain = fresh(), Plain(mini_architecture("mindcv_mini_v2")).eval()
    plain.load_state_dict(model.state_dict())
    assert same_outputs(model, plain) and isinstance(model, Plain)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


def test_it_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = known()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES))


def test_a_compiled_model_is_saved(tmp_path):
    torch.compiler.reset()
    model = known()
    torch.compile(model, backend="eager").save_pretrained(tmp_path)
    assert same_outputs(Visformer.from_pretrained(tmp_path), model)


def test_it_exports():
    model = known()
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(IMAGES[:1]), model(IMAGES[:1]), atol=1e-5, rtol=1e-5)


def test_a_subclass_keeps_its_class(tmp_path):
    class Own(Visformer):
        pass

    fresh().save_pretrained(tmp_path)
    assert type(Own.from_pretrained(tmp_path)) is Own


def test_importing_the_package_loads_neither_torch_nor_the_hubs_client():
    program = "import sys, visformer.hub; print({'torch', 'timm', 'huggingface_hub', 'rich'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
