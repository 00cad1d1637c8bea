"""Layer 6, runs that were interrupted go on as if they had not been, or say why not."""

import contextlib
import shutil
import signal
from pathlib import Path

import pytest
import torch

import denoising_experiment_proper as experiment
from common.user_errors import UserError
from conftest import (
    assert_refused,
    load_history,
    same_weights,
    train_few,
    train_on,
    without_seconds,
)
from experiment.checkpoints import check_same_recipe, read_run, write_checkpoint
from experiment.run_files import RunFiles
from small_vit import MODELS, SmallViT, ViTConfig, load_model, load_weights


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_after_the_first_epoch():
    """Within the block, a training is killed when all files of its first epoch are written."""

    def kill(row):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(experiment, "epoch_line", kill)
        yield


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    ("stop_after", "recipe"),
    [(5, "published"), (8, "published"), (14, "published"), (8, "refined"), (8, "routed")],
)
def test_resume_gives_the_weights_of_an_uninterrupted_run(
    few, default_run, monkeypatch, tmp_path, stop_after, recipe
):
    """Killed between epochs, in the second and in the last; all but the last epoch is kept."""
    changes = {} if recipe == "published" else {"optimizer": "muon", "lr": 4e-3, "name": recipe}
    uninterrupted = train_few(few, **changes) if changes else default_run
    files, steps = RunFiles(tmp_path / "m.pt"), []
    original = torch.nn.utils.clip_grad_norm_

    def kill(*arguments):
        steps.append(1)
        if len(steps) > stop_after:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.nn.utils, "clip_grad_norm_", kill)
        with pytest.raises(Killed):
            train_few(few, files, **changes)
        files.history.unlink()  # as if it had been killed between two files
        files.checkpoint.write_text("of somebody else")
        state = read_run(files, {"epochs": 3}, SmallViT(MODELS[recipe]))
        with pytest.raises(Killed):
            train_few(few, files, state, **changes)
    state = read_run(files, {"epochs": 3}, SmallViT(MODELS[recipe]))
    assert len(state["history"]) == stop_after // 5
    assert load_history(files) == without_seconds(state)
    assert same_weights(weights(files.checkpoint), state["best"]["model"])
    state = train_few(few, files, state, **changes)
    assert same_weights(state["model"], uninterrupted["model"])
    assert same_weights(weights(files.checkpoint), uninterrupted["best"]["model"])
    assert without_seconds(state) == without_seconds(uninterrupted) == load_history(files)


@pytest.fixture(scope="module")
def killed(few, tmp_path_factory):
    """The folder of a run that was killed after its first epoch."""
    folder = tmp_path_factory.mktemp("killed")
    with killed_after_the_first_epoch():
        train_few(few, RunFiles(folder / "m.pt"))
    return folder


@pytest.fixture
def interrupted(killed, tmp_path, monkeypatch):
    """That run, in the working folder: function(change of its state) -> RunFiles."""
    for name in ("m.pt", "m_history.csv"):
        shutil.copy(killed / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    state = torch.load(killed / "m_resume.pt", weights_only=True)

    def forge(change):
        change(state)
        torch.save(state, "m_resume.pt")
        return RunFiles(Path("m.pt"))

    return forge


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["optimizer"][3].update(exp_avg=torch.zeros(1)),  # fused steps trust its size
        lambda s: s["optimizer"][3].update(exp_avg=s["optimizer"][3]["exp_avg"].double()),
        lambda s: s["optimizer"][0].update(step=torch.zeros(2)),
        lambda s: s["optimizer"].pop(5),
        lambda s: s["optimizer"].update({7: None}),
        lambda s: s.update(optimizer=[]),
        lambda s: s["model"].pop("position"),
        lambda s: s["model"].update(position=torch.zeros(1, 64, 127)),
        lambda s: s["best"]["model"].update(position=torch.full((1, 64, 128), float("inf"))),
        lambda s: s["best"]["model"].update(position=torch.zeros(1, 64, 127)),
        lambda s: s["best"].pop("val_mse"),
        lambda s: s["history"][0].pop("train_mse"),
        lambda s: s["history"][0].update(seconds="0"),
        lambda s: s["history"][0].update(epoch=2),
        lambda s: s["history"].append(None),
        lambda s: s["history"].clear(),
        lambda s: s["best"].update(epoch=30),
        lambda s: s["best"].update(recipe=s["recipe"] | {"lr": 0.5}),
        lambda s: s.update(recipe=[]),
        lambda s: s.pop("model"),
        lambda s: s["recipe"].update(dataset=10**5 * "x"),
    ],
)
def test_damaged_states_are_refused(few, interrupted, change):
    files = interrupted(change)
    written = files.checkpoint.read_bytes()
    recipe = {"epochs": 3, "dataset": "photos"}
    with pytest.raises(UserError, match=r"m_resume.pt|interrupted run") as refused:
        train_few(few, files, read_run(files, recipe, SmallViT()))
    assert len(str(refused.value)) < 400
    assert files.checkpoint.read_bytes() == written


def test_what_an_earlier_recipe_lacks_are_the_defaults():
    recipe = experiment.Recipe().as_dict()
    check_same_recipe({}, recipe, "", "")
    with pytest.raises(UserError, match="unclipped False, this one has True"):
        check_same_recipe({}, recipe | {"unclipped": True}, "", "")


def test_states_of_recipes_with_fewer_entries_are_not_refused(interrupted):
    """A run of an earlier version that went on, and whose best epoch is the earlier one's."""

    def change(state):
        state["best"]["recipe"] = dict(state["recipe"])
        for name in ("init", "jpeg_share", "noise_map"):
            del state["best"]["recipe"][name]

    read_run(interrupted(change), {"epochs": 3}, SmallViT())


def test_a_checkpoint_of_another_recipe_is_kept(interrupted):
    """Beside a state whose history it shares."""
    files = interrupted(lambda state: None)
    checkpoint = torch.load(files.checkpoint, weights_only=True)
    for lr, kept in ((checkpoint["recipe"]["lr"], False), (0.5, True)):
        write_checkpoint(checkpoint | {"recipe": checkpoint["recipe"] | {"lr": lr}}, "m.pt")
        read_run(files, {"epochs": 3}, SmallViT())
        assert Path("m.1.pt").exists() == kept


def test_good_states_are_not_refused(few, interrupted):
    """Two epochs alike, and a balance that rounding takes below zero."""

    def change(state):
        row = state["history"][0] | {"balance_loss": -1e-8}
        state["history"][:] = [row, row | {"epoch": 2}]
        state["best"]["epoch"] = 2

    files = interrupted(change)
    state = train_few(few, files, read_run(files, {"epochs": 3}, SmallViT()))
    assert len(state["history"]) == 3


def test_moments_without_memory_of_their_own_get_it(few, interrupted):
    """A fused step would write beyond a tensor whose rows overlap, and knows no negated one."""

    def change(state):
        for of_one in state["optimizer"].values():
            shape = of_one["exp_avg"].shape
            overlapping = (len(shape) - 1) * [0] + [1]
            of_one["exp_avg"] = torch.zeros(shape.numel()).as_strided(shape, overlapping)
            of_one["exp_avg_sq"] = torch._neg_view(-of_one["exp_avg_sq"])

    files = interrupted(change)
    train_few(few, files, read_run(files, {"epochs": 3}, SmallViT()))


def test_a_run_does_not_go_on_with_other_images(call, folder):
    """Names and numbers stay: one file is replaced, two exchange their names."""
    with killed_after_the_first_epoch():
        train_on(call, folder, "m.pt")
    one, other = (folder / "test" / "a" / f"00{n}.png" for n in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    for of_one, of_other in ((second, second), (second, first)):
        one.write_bytes(of_one)
        other.write_bytes(of_other)
        process = train_on(call, folder, "m.pt", "--resume")
        assert_refused(process, "the interrupted run had images_sha256", "--resume")
    one.write_bytes(first)
    other.write_bytes(second)
    assert train_on(call, folder, "m.pt", "--resume").returncode == 0


def test_a_kept_run_can_be_gone_on_with(call, folder):
    with killed_after_the_first_epoch():
        train_on(call, folder, "m.pt")
    process = train_on(call, folder, "m.pt")
    assert process.returncode == 0 and "--resume --output m.1.pt" in process.stdout
    assert train_on(call, folder, "m.1.pt", "--resume").returncode == 0
    assert same_weights(weights("m.1.pt"), weights("m.pt"))


@pytest.fixture
def heeds_ctrl_c():
    """What a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_an_interrupted_run_says_how_to_go_on(call, folder, monkeypatch):
    original = torch.nn.utils.clip_grad_norm_
    steps = []

    def press_ctrl_c(*arguments):
        steps.append(1)
        if len(steps) in (3, 11):  # 4 steps an epoch
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(experiment.nn.utils, "clip_grad_norm_", press_ctrl_c)
    process = train_on(call, folder, "m.pt")
    assert process.returncode == 130
    assert "nothing is kept" in process.stderr and not list(Path().glob("*.pt"))
    process = train_on(call, folder, "m.pt")
    assert process.returncode == 130
    assert "repeat the command with --resume" in process.stderr
    load_model("m.pt")
    process = train_on(call, folder, "m.pt", "--resume", "--lr", 0.5)
    assert_refused(process, "the interrupted run had lr 0.001, this one has 0.5")
    process = train_on(call, folder, "m.pt", "--resume")
    assert process.returncode == 0, process.stderr
    assert "epoch   1 " not in process.stdout and "epoch   2 " in process.stdout
    assert not Path("m_resume.pt").exists()


# Starting from the weights of another run ----------------------------------------------------


def test_training_starts_from_the_weights_of_a_checkpoint(call, folder):
    """Steps too small to move them leave them; the file is not needed to go on."""
    assert train_on(call, folder, "first.pt").returncode == 0
    options = ("--init", "first.pt", "--lr", 1e-12, "--seed", 1)
    with killed_after_the_first_epoch():
        train_on(call, folder, "second.pt", *options)
    Path("first.pt").rename("elsewhere.pt")
    process = train_on(call, folder, "second.pt", *options, "--resume")
    assert process.returncode == 0, process.stderr
    one, other = weights("elsewhere.pt"), weights("second.pt")
    assert all(torch.allclose(one[name], other[name], atol=1e-8) for name in one)
    assert torch.load("second.pt", weights_only=True)["recipe"]["init"] == "first.pt"


def test_weights_of_another_architecture_are_refused(killed, call, folder):
    path = killed / "m.pt"
    for config, words in (
        (MODELS["quick"], "m.pt: its d_model is 128, that of the model to train 64"),
        (ViTConfig(in_channels=4), "m.pt: its in_channels is 3"),
    ):
        with pytest.raises(UserError, match=words):
            load_weights(SmallViT(config), path)
    other_budgets = SmallViT(ViTConfig(k_attend=(1, 2, 3)))
    load_weights(other_budgets, path)
    assert same_weights(other_budgets.state_dict(), weights(path))
    assert_refused(train_on(call, folder, "m.pt", "--init", ""), ": no such checkpoint")
    assert not Path("m.pt").exists()
