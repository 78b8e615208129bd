"""What the size of a set decides, and what is refused before a run folder is made."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sphereface2 import device
from sphereface2.errors import UserError
from sphereface2.training import config, resuming
from sphereface2.training.checkpoint import Checkpoint
from sphereface2.training.distributed import World, world
from sphereface2.training.fit import fit
from sphereface2.training.inputs import open_inputs


@pytest.fixture
def people(tmp_path):
    def make(count, images):
        for person in range(count):
            (tmp_path / "set" / f"p{person:03}").mkdir(parents=True)
            for number in range(images):
                pixels = np.full((8, 8, 3), person, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / f"p{person:03}" / f"{number}.png")
        return tmp_path / "set"

    return make


def opened(folder, *words):
    with world("cpu", 1) as place:
        return open_inputs(config.load(None, ["--data.train", str(folder), *words]), place)


@pytest.mark.parametrize(
    ("count", "images", "held_out", "batch"),
    [(60, 5, 6, 16), (30, 2, 3, 4), (5, 3, 2, 2), (3, 4, 0, 2), (6, 1, 0, 2), (60, 50, 6, 256)],
)
def test_a_small_set_gets_numbers_that_fit(people, count, images, held_out, batch):
    found = opened(people(count, images))
    assert found.settings.data.validation_people == held_out
    assert found.settings.training.batch_size == batch
    assert len(found.people["validation"]) == held_out
    assert found.chosen == [f"data.validation_people {held_out}", f"training.batch_size {batch}"]


@pytest.fixture
def processor(monkeypatch):
    """Have this machine's CPU take so many seconds for a convolution in bf16, and 1 in float32."""

    def have(seconds, **known):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
        times = {torch.bfloat16: seconds, torch.float32: 1.0}
        monkeypatch.setattr(device, "convolution_seconds", times.get)

    return have


@pytest.mark.parametrize(
    ("known", "seconds", "precision"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, 0.1, "off"),
        ({"avx512_bf16": True}, 0.5, "bf16"),
        ({"l2_cache_size": 1, "amx_bf16": True}, 0.1, "bf16"),
        ({"avx512_bf16": True}, 2.0, "off"),
    ],
)
def test_precision_is_the_faster_one(people, processor, known, seconds, precision):
    processor(seconds, **known)
    found = opened(people(20, 3), "--training.autocast", "auto")
    assert found.settings.training.autocast == precision
    assert found.chosen[-1] == f"training.autocast {precision}"


def test_precision_is_the_faster_one_on_every_rank(people, processor, monkeypatch):
    processor(0.5, avx512_bf16=True)
    monkeypatch.setattr(World, "gather", lambda self, own: [own, False if own is True else own])
    assert opened(people(20, 3), "--training.autocast", "auto").settings.training.autocast == "off"


@pytest.mark.parametrize(("before", "then"), [("off", "off"), ("bf16", "bf16"), ("fp16", "auto")])
def test_a_run_that_goes_on_keeps_the_precision_it_chose(before, then):
    found = Checkpoint(Path("step-7"), {}, {"settings": {"training": {"autocast": before}}})
    for given, wanted in [("auto", then), ("fp16", "fp16")]:
        settings = config.load(None, ["--training.autocast", given])
        assert resuming.left_to_machine(Path("run"), found, settings).training.autocast == wanted


def test_precisions_are_timed():
    threads = torch.get_num_threads()
    assert 0 < device.convolution_seconds(torch.float32) < 1
    assert torch.get_num_threads() == threads


def test_numbers_that_are_given_stay(people):
    words = ["--data.validation_people", "4", "--training.batch_size", "32"]
    found = opened(people(20, 3), *words)
    assert (found.settings.data.validation_people, found.settings.training.batch_size) == (4, 32)
    assert not found.chosen
    drawn = ["--data.people_per_batch", "3", "--data.images_per_person", "2"]
    assert opened(people(0, 0), *drawn).settings.training.batch_size == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.validation_people", "40"], r"data.validation_people .* 40 must leave people"),
        (["--data.validation_people", "1"], r"data.validation_people = 1 must be 0 or 2"),
        (["--training.batch_size", "512"], r"training.batch_size = 512 must be at most .* 18:"),
        (["--training.accumulate", "3", "--training.batch_size", "4"], "training.batch_size = 4"),
        (
            ["--data.people_per_batch", "50", "--data.images_per_person", "2"],
            r"data.people_per_batch = 50 .* 9$",
        ),
        (["--validation.pairs", "[none.bin]"], "none.bin"),
        (["--data.validation_people", "10"], r"of the 11 in .* 1 would be left: lower data.valid"),
        (["--name", "n" * 250], "name must be a name of at most 239 bytes, not 250"),
    ],
)
def test_refusals_name_the_setting_and_leave_no_run_folder(people, tmp_path, words, message):
    folder = people(11, 2)
    with pytest.raises(UserError, match=message):
        fit(None, overrides=["--data.train", str(folder), "--output", str(tmp_path / "o"), *words])
    assert not (tmp_path / "o").exists()


def test_a_set_of_one_person_is_told_what_training_needs(people):
    with pytest.raises(UserError, match=r"two people or more, and .*set has 1: give a set of more"):
        opened(people(1, 4))


def test_a_path_relative_to_where_a_run_was_started(people, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    people(3, 2)
    monkeypatch.chdir(tmp_path)
    (run / "config.yaml").write_text(config.dump(config.load(None, ["--data.train", "set"])))
    about = {"starts": [], "data": {"train": str(tmp_path / "set")}}
    (run / "environment.json").write_text(json.dumps(about))
    assert resuming.own_settings(run, []).data.train == "set"
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match=rf"relative to .*, then {tmp_path}/set; .*data.train PATH"):
        resuming.own_settings(run, [])
    assert resuming.own_settings(run, [], opened=True).data.train == "set"
    assert resuming.own_settings(run, ["--data.train", "no"]).data.train == "no"  # told when opened
