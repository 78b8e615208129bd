"""Fine-tuning: what is taken over, what is trained, and what contradicts the weights."""

import json
import shlex
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_training_step import batches, training_step
from torch.nn import functional as F

from sphereface2 import cli
from sphereface2.backbones import bundle
from sphereface2.data import synthetic
from sphereface2.data.opening import open_source
from sphereface2.errors import UserError
from sphereface2.images import read_image
from sphereface2.training import config, starting
from sphereface2.training.distributed import World
from sphereface2.training.fit import fit
from sphereface2.training.idle import flattened, idle, idle_and_changed
from sphereface2.training.sections import recipes
from sphereface2.training.trainer import Trainer

OPTIONS = {
    "backbone.name": "sfnet4",
    "backbone.width": 0.125,
    "backbone.input_size": 32,
    "backbone.batch_norm": True,
    "backbone.embedding_dim": 16,
    "data.validation_people": 2,
    "training.epochs": 1,
    "training.batch_size": 8,
    "training.device": "cpu",
    "training.threads": 1,
    "validation.pairs": "[]",
}


def words(**options):
    return [str(word) for key, value in options.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Drawn people, a folder each, so that they have names."""
    folder, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for person in range(8):
        (folder / f"person-{person}").mkdir()
        identity = synthetic.Identity.draw(rng)
        for image in range(4):
            drawn = Image.fromarray(synthetic.render(identity, rng))
            drawn.save(folder / f"person-{person}" / f"{image}.png")
    return folder


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("runs") / "first", torch.get_num_threads()
    torch.set_num_threads(2)
    fit(None, run=folder, overrides=words(**OPTIONS, **{"data.train": faces}))
    assert torch.get_num_threads() == 2  # the caller's, though the training took one
    torch.set_num_threads(threads)
    return folder


def others(faces, folder):
    """Six people of whom three have the names and images of three of ``faces``."""
    people = sorted(path for path in faces.iterdir() if path.is_dir())
    for number, person in enumerate(people[:6]):
        shutil.copytree(person, folder / (person.name if number < 3 else f"new-{number}"))
    return folder


def started(run, data, monkeypatch, **options):
    """Trainer, inputs and record of a fine-tuning before its first step."""
    found = {}

    def stop(trainer, stopper=None):
        found["trainer"] = trainer
        raise UserError("stopped before the first step")

    monkeypatch.setattr(Trainer, "train", stop)
    options = {
        "data.train": data,
        "data.validation_people": 0,
        "training.start_from": run,
    } | options
    options |= {"training.batch_size": 8, "training.device": "cpu", "validation.pairs": "[]"}
    folder = data.parent / f"tuned-{len(list(data.parent.iterdir()))}"
    with pytest.raises(UserError, match="before the first step"):
        fit(None, run=folder, overrides=words(**options))
    record = json.loads((folder / "environment.json").read_text())["starts"][0]["start_from"]
    names = json.loads((folder / "people.json").read_text())["classes"]
    return found["trainer"], names, record


@pytest.mark.parametrize("prototypes", ["imprinted", "kept", "random"])
def test_the_network_is_taken_over_and_the_head_begins(
    run, faces, tmp_path, monkeypatch, prototypes
):
    data = others(faces, tmp_path / "others")
    trainer, names, record = started(
        run, data, monkeypatch, **{"training.prototypes": prototypes, "training.ema": 0.9}
    )
    network = bundle.load(run)
    assert record["network"] == bundle.fingerprint(network)
    for key, value in trainer.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[key])
        assert torch.equal(trainer.average.average[key], value)
    assert trainer.network.preprocessing == network.preprocessing
    if prototypes == "random":
        return
    means = []
    for name in names:
        crops = [read_image(path) for path in sorted((data / name).iterdir())]
        pixels = torch.stack([torch.from_numpy(crop).permute(2, 0, 1) for crop in crops])
        with torch.no_grad():
            rows = F.normalize(network(network.preprocessing(pixels)), dim=1)
        means.append(F.normalize(rows.mean(0), dim=0))
    expected = torch.stack(means)
    if prototypes == "kept":
        stored = bundle.resolve(run).resolve() / "state"
        before = {"head": {"weight": torch.empty(6, 16)}}
        torch.distributed.checkpoint.load(before, checkpoint_id=stored, no_dist=True)
        classes = json.loads((run / "people.json").read_text())["classes"]
        shared = [name for name in names if name in classes]
        assert record["prototypes_kept"] == len(shared) > 0
        for name in shared:
            expected[names.index(name)] = before["head"]["weight"][classes.index(name)]
    found = F.normalize(trainer.head.weight.detach(), dim=1)
    torch.testing.assert_close(found, F.normalize(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_a_fine_tuned_run_resumes_without_the_weights_it_started_from(run, faces, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, symlinks=True)
    folder = tmp_path / "tuned"
    overrides = {"data.train": faces, "training.epochs": 1, "training.freeze": "[stages]"}
    overrides |= {k: v for k, v in OPTIONS.items() if k not in overrides}
    assert cli.main(
        ["fit", "--start-from", str(moved), "--run-folder", str(folder), *words(**overrides)]
    ) == 0  # fmt: skip
    before = safetensors.torch.load_file(bundle.resolve(run) / "model.safetensors")
    after = safetensors.torch.load_file(bundle.resolve(folder) / "model.safetensors")
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("stages")} <= same
    assert not {"fc.weight", "norm.weight", "norm.running_mean"} & same
    shutil.rmtree(moved)
    more = words(**{"training.epochs": 2, "validation.every": 0.1})  # with every step of three
    assert cli.main(["fit", "--resume", str(folder), *more]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 4, 5, 6]
    for key, value in {"freeze": "[]", "lr_factors": "{fc: 0.1}"}.items():
        again = ["fit", "--resume", str(folder), f"--training.{key}", value]
        assert cli.main([*again, "--training.epochs", "3"]) == 2
        assert f"{key}" in (told := capsys.readouterr().err) and "cannot be given to" in told
    assert cli.main(["fit", "--resume", str(folder), "--start-from", str(run)]) == 2
    assert (
        "--resume goes on with a run and --start-from starts a new one" in capsys.readouterr().err
    )


def test_settings_that_contradict_the_weights_are_refused(run, tmp_path):
    agreeing = {"training.start_from": run, "backbone.input_size": 32, "backbone.dropout": 0.1}
    config = starting.settings(None, words(**agreeing))
    assert config.backbone["embedding_dim"] == 16 and config.backbone["dropout"] == 0.1
    assert config.data.augmentation.size == 32
    for key, value in {
        "backbone.name": "sfnet10",
        "backbone.mean": "[0, 0, 0]",
        "backbone.input_size": 64,
        "backbone.activation": "relu",
    }.items():
        with pytest.raises(UserError, match=rf"{key} = .* contradicts training.start_from"):
            starting.settings(None, words(**{"training.start_from": run, key: value}))
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot start from .*, an ONNX network"):
        starting.settings(None, words(**{"training.start_from": tmp_path / "model.onnx"}))


def test_a_start_without_a_file_has_the_recipe_for_it_and_any_other_file_has_its_own(run, tmp_path):
    start = {"training.start_from": run}
    found = starting.settings(None, words(**start, **{"head.r": 20, "training.epochs": 3}))
    training, head = found.training, found.head
    assert (found.name, training.lr, training.epochs) == ("finetune", 0.01, 3)
    assert found.data.augmentation.affine == 0.6 and (head["r"], head["m"]) == (20, 0.3)
    (tmp_path / "own.yaml").write_text("name: own\n")
    assert starting.settings(tmp_path / "own.yaml", words(**start)).training.lr == 0.1
    assert starting.settings(None, ["--training.epochs", "3"]).training.lr == 0.1


def test_a_recipe_for_a_trained_network_is_not_run_without_one(run):
    start = words(**{"training.start_from": run})
    assert starting.settings(recipes()["finetune"], start).training.lr == 0.01
    for recipe in ("finetune", "box_tune"):
        with pytest.raises(UserError, match=f"{recipe}.yaml needs --start-from MODEL"):
            starting.settings(recipes()[recipe], [])
    with pytest.raises(UserError, match=r"box_tune.yaml needs --teacher PATH"):
        starting.settings(recipes()["box_tune"], start)


def test_what_has_no_effect_is_refused_where_it_is_asked_for_and_else_told(tmp_path):
    known = flattened(config.to_dict(config.RunConfig())) | {"head.negative_share": None}
    assert set(idle(config.RunConfig())) <= set(known)
    refused = {
        "training.nesterov true --training.optimizer adamw": "training.optimizer adamw",
        "training.prototypes kept": "training.start_from null",
        "head '{negative_share: 0.5}'": "head.negatives all",
        "sample_to_sample.weight 1 --training.epochs 1": "training.epochs 1 and sample_to",
        "teacher.path t.npz --teacher.weight 0": "teacher.weight 0",
        "validation.conditions all --data.validation_people 0": "data.validation_people 0",
    }
    for options, why in refused.items():
        with pytest.raises(UserError, match=rf"^{options[:4]}\S+ would have no effect with {why}"):
            starting.settings(None, shlex.split(f"--{options}"))
    starting.settings(None, ["--training.gamma", "0.1", "--head", "{negatives: uniform}"])
    (tmp_path / "own.yaml").write_text("training: {optimizer: adamw, nesterov: true}\n")
    found = starting.settings(tmp_path / "own.yaml", ["--training.gamma", "0.1"])
    assert idle_and_changed(found) == {"training.nesterov": "training.optimizer adamw"}
    assert not any(
        idle_and_changed(starting.settings(recipes()[name], [])) for name in ("small", "speedrun")
    )


def test_frozen_parts_and_batch_norm_stay(run):
    step = training_step(training__freeze=["stages.0"], training__lr=0.5)
    before = {key: value.clone() for key, value in step.network.state_dict().items()}
    step(batches(), 1)
    changed = {k for k, v in step.network.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(key.startswith("stages.0") for key in changed)
    assert {"stages.1.0.conv.weight", "stages.1.0.norm.running_mean", "fc.weight"} <= changed

    step = training_step(training__freeze_batch_norm=True, training__lr=0.5)
    before = {key: value.clone() for key, value in step.network.state_dict().items()}
    step.network.eval()
    step.network.train()
    step(batches(), 1)
    changed = {k for k, v in step.network.state_dict().items() if not torch.equal(v, before[k])}
    assert not any("norm" in key for key in changed) and "stages.0.0.conv.weight" in changed

    with pytest.raises(UserError, match=r"freeze: the backbone has no part 'stage\.0' \(did you"):
        training_step(training__freeze=["stage.0"])
    with pytest.raises(UserError, match="lr_factors: the backbone has no part 'head'"):
        training_step(training__lr_factors={"head": 0.1})
    with pytest.raises(UserError, match="leaves nothing of the backbone to train"):
        training_step(training__freeze=["stages", "fc", "norm"])


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_rates_of_parts(optimizer):
    factors = {"stages": 0.5, "stages.1": 0.1}
    step = training_step(training__lr_factors=factors, training__optimizer=optimizer)
    rates = {
        id(parameter): group["base_lr"]
        for one in step.optimizers
        for group in one.param_groups
        for parameter in group["params"]
    }
    settings = step.config.training
    for name, parameter in step.network.named_parameters():
        base = settings.muon_lr if optimizer == "muon" and parameter.ndim == 4 else settings.lr
        factor = 0.1 if name.startswith("stages.1.") else 0.5 if name.startswith("stages.") else 1
        assert rates[id(parameter)] == pytest.approx(base * factor), name
    assert len(rates) == len([*step.network.parameters(), *step.head.parameters()])


def test_unreadable_images_and_strangers_leave_prototypes_alone(run, faces, tmp_path):
    data = others(faces, tmp_path / "others")
    lost = sorted(data.iterdir())[4]
    for path in lost.iterdir():
        path.write_bytes(b"no image")
    source = open_source(data)
    step = training_step(
        **{
            f"backbone__{k.split('.')[1]}": v
            for k, v in OPTIONS.items()
            if k.startswith("backbone")
        }
    )
    labels = np.asarray(source.labels)
    head = step.head
    before = F.normalize(head.weight.detach()[:6].clone(), dim=1)
    settings = starting.settings(None, words(**{"training.start_from": run})).training
    place = World(0, 1, 0, 1, torch.device("cpu"))
    head.shard, head.num_classes = type(head.shard).of(6, None), 6
    head.weight = torch.nn.Parameter(head.weight.detach()[:6].clone())
    starting.begin(settings, step.network, head, place, source, np.arange(len(source)), labels,
                   source.class_names)  # fmt: skip
    after = F.normalize(head.weight.detach(), dim=1)
    assert torch.equal(after[4], before[4]) and not torch.allclose(after[3], before[3], atol=0.1)
    settings.prototypes = "kept"
    with pytest.raises(UserError, match="these sets have numbers only"):
        starting.begin(settings, step.network, head, place, source, np.arange(len(source)), labels,
                       list(range(6)))  # fmt: skip
