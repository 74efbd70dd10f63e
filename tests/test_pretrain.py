import dataclasses
import logging

import numpy as np
import pytest
import torch
import yaml
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small import DATA, ENCODER, PRETRAIN, make_spec
from torch._dynamo.backends.debugging import aot_eager

from sjepa_deploy.cli import run_command
from sjepa_deploy.cli.pretrain import pretrain as command
from sjepa_deploy.errors import CheckpointError, DataError, SpecError
from sjepa_deploy.learning import loop as engine
from sjepa_deploy.learning.data import DataConfig, Synthetic, Target, split_windows
from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.masking import Masking, MaskSampler
from sjepa_deploy.learning.pretrain import JEPA, PretrainConfig, PretrainModule, pretrain, spread_of
from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
from sjepa_deploy.models.networks import build_model, reference_mode
from sjepa_deploy.serialize import encode


def make_jepa(target_layers=1, seed=0):
    return JEPA(build_model(make_spec(n_times=280), seed=seed), target_layers)


@pytest.mark.parametrize(
    "masking", [Masking(radius=0.8), Masking(mode="fixed", n_visible=5, n_hidden=3, n_contexts=3, radius=0.8)]
)
@pytest.mark.parametrize("target_layers", [1, 2])
def test_the_loss_is_that_of_one_example_and_one_mask_at_a_time(masking, target_layers):
    """The oracle: `nn.Transformer`'s own encoder and decoder on lists of channels without padding, in float64."""
    jepa = make_jepa(target_layers).double()
    spec = jepa.base.spec
    sampler = MaskSampler(masking, spec.positions)
    eeg = torch.randn(4, 16, 280, dtype=torch.float64)
    masks = sampler(4, torch.Generator().manual_seed(0))
    with torch.no_grad():  # the teacher has gone its own way
        for parameter in jepa.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    errors = []
    with reference_mode(jepa):
        loss = jepa(eeg, masks)
        local = jepa.base.feature_encoder(eeg).reshape(4, 16, 2, 16)
        positions = jepa.base.pos_encoder().reshape(16, 2, 16)
        for row in range(len(masks.hidden)):
            example = row // masking.contexts
            tokens = (local[example] + positions).reshape(1, 32, 16)
            outputs = []
            for layer in jepa.teacher.layers:
                tokens = layer(tokens)
                outputs.append(tokens)
            target = jepa.teacher.norm(sum(outputs[-target_layers:]) / target_layers).reshape(16, 2, 16)
            visible = masks.visible[row]
            if masks.visible_padding is not None:
                visible = visible[~masks.visible_padding[row]]
            context = jepa.base.transformer.encoder((local[example] + positions)[visible].reshape(1, -1, 16))
            for k in range(masks.hidden.shape[1]):
                hidden = masks.hidden[row, k]
                if masks.hidden_padding is not None:
                    hidden = hidden[~masks.hidden_padding[row, k]]
                predicted = jepa.base.transformer.decoder(positions[hidden].reshape(1, -1, 16), context).reshape(-1, 2, 16)
                errors += (predicted - target[hidden]).abs().mean(dim=(1, 2)).tolist()
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-6)  # both are accumulated in float32 at the end


def test_hidden_channels_reach_the_loss_through_the_teacher_only():
    jepa = make_jepa().eval()
    sampler = MaskSampler(Masking(radius=0.8), jepa.base.spec.positions)
    eeg = torch.randn(2, 16, 280, requires_grad=True)
    masks = sampler(2, torch.Generator().manual_seed(0))
    jepa(eeg, masks).backward()
    for example in range(2):
        hidden = masks.hidden[example, 0][~masks.hidden_padding[example, 0]]
        seen = set(range(16)) - set(hidden.tolist())
        assert eeg.grad[example, hidden].abs().max() == 0
        assert eeg.grad[example, sorted(seen)].abs().amax(dim=1).min() > 0
    assert all(p.grad is None for p in jepa.teacher.parameters())
    assert all(p.grad is not None for p in jepa.base.parameters())


def test_the_teacher_is_a_copy_of_the_contextual_encoder_only_and_follows_it():
    jepa = make_jepa()
    assert len(list(jepa.teacher.parameters())) == len(list(jepa.base.transformer.encoder.parameters()))
    before = [p.clone() for p in jepa.teacher.parameters()]
    with torch.no_grad():
        for parameter in jepa.base.parameters():
            parameter.add_(1.0)
    jepa.follow(0.75)
    for old, new in zip(before, jepa.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
    jepa.train()
    assert not jepa.teacher.training
    assert jepa.base.training


def test_the_momentum_rises_linearly_to_its_end(monkeypatch):
    module = PretrainModule(dataclasses.replace(PRETRAIN, ema_steps=100), make_spec())
    seen = []
    monkeypatch.setattr(module.jepa, "follow", seen.append)
    for step in (0, 50, 100, 1000):
        monkeypatch.setattr(type(module), "global_step", property(lambda self, step=step: step))
        module.on_train_batch_end(None, None, 0)
    np.testing.assert_allclose(seen, [0.999, 0.99945, 0.9999, 0.9999])


def test_the_optimiser_is_adamw_on_everything_but_the_teacher():
    module = PretrainModule(dataclasses.replace(PRETRAIN, engine=PretrainConfig().engine), make_spec())
    optimiser = module.configure_optimizers()["optimizer"]
    optimiser.param_groups[0]["lr"] *= 100  # the first of 100 steps of warm-up
    (group,) = optimiser.param_groups
    assert isinstance(optimiser, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.01)
    assert {id(p) for p in group["params"]} == {id(p) for p in module.jepa.base.parameters()}


def test_spread_and_distance_from_the_mean_are_numpys():
    embeddings = torch.randn(7, 3, 2, 5)
    spread, l1_mean = spread_of(embeddings)
    values = embeddings.numpy()
    assert spread.item() == pytest.approx(values.std(axis=0).mean(), rel=1e-5)
    assert l1_mean.item() == pytest.approx(abs(values - values.mean(axis=0)).mean(), rel=1e-5)


def test_a_run_writes_a_base_model_that_braindecode_loads_and_the_same_seed_gives_the_same_weights(tmp_path):
    results = [pretrain(PRETRAIN, tmp_path / name) for name in "ab"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert results[0] == results[1]
    other = dataclasses.replace(PRETRAIN, engine=dataclasses.replace(PRETRAIN.engine, seed=1, max_epochs=1))
    pretrain(other, tmp_path / "c")
    assert (tmp_path / "c/model.safetensors").read_bytes() != weights[0]
    from oracle import braindecode_model

    checkpoint = read_checkpoint(tmp_path / "a")
    assert checkpoint.variant == "base"
    assert (checkpoint.known["steps"], checkpoint.known["phase"]) == (PRETRAIN.data.signal_steps, "causal")
    theirs = braindecode_model(make_spec())
    theirs.load_state_dict(checkpoint.weights)  # strict


@pytest.mark.parametrize("masking", [Masking(radius=0.8), Masking(mode="fixed", n_visible=5, n_hidden=3, radius=0.8)])
def test_the_compiled_step_is_one_graph_with_the_gradients_of_the_step(masking, monkeypatch):
    """The graph that every backend of torch.compile gets; what Inductor makes of it is measured on a GPU."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(engine, "COMPILE", {"backend": backend, "dynamic": engine.COMPILE["dynamic"]})
    gradients = []
    for compile_step in (False, True):
        tuned = dataclasses.replace(PRETRAIN.engine, compile=compile_step)
        module = PretrainModule(dataclasses.replace(PRETRAIN, masking=masking, engine=tuned), make_spec(n_times=280))
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            elif isinstance(part, torch.nn.MultiheadAttention):
                part.dropout = 0.0
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            module.zero_grad()
            module.jepa(torch.randn(4, 16, 280, generator=generator), module.sampler(4, generator)).backward()
        gradients.append([p.grad for p in module.jepa.base.parameters()])
    assert len(graphs) == 1  # nothing breaks it, and other masks compile nothing anew
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_collapse_is_reported(tmp_path, caplog):
    """Targets that hardly depend on the window: position embeddings far larger than the local ones."""
    config = dataclasses.replace(PRETRAIN, engine=dataclasses.replace(PRETRAIN.engine, max_epochs=1, lr=1e-9))
    module = PretrainModule(config, make_spec())
    with torch.no_grad():
        module.jepa.base.pos_encoder.pos_encoder_spat.weight.mul_(1e4)
    spread, _ = spread_of(module.jepa.target(*module.jepa.tokens(torch.randn(32, 16, 152))))
    module.seen = [module.jepa.target(*module.jepa.tokens(torch.randn(32, 16, 152)))]
    module.losses = [(torch.tensor(1.0), 32)]
    module.log_dict = lambda *args, **kwargs: None
    module.all_gather = lambda value: value
    module._current_epoch = 0
    with caplog.at_level(logging.WARNING):
        module.on_validation_epoch_end()
    assert float(spread) < 0.05
    assert "The embeddings collapse" in caplog.text


def test_the_learning_rate_rises_over_the_first_steps():
    module = PretrainModule(dataclasses.replace(PRETRAIN, warmup_steps=4), make_spec())
    found = module.configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append(found["optimizer"].param_groups[0]["lr"])
        found["optimizer"].step()
        found["lr_scheduler"]["scheduler"].step()
    np.testing.assert_allclose(rates, [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("spread", "losses", "said"), [(0.01, (3.0, 2.0), "vary over windows by 0.01 only"), (0.3, (2.0, 3.0), "2 epochs")]
)
def test_a_run_that_fails_ends_with_status_1_and_writes_no_base(spread, losses, said, tmp_path, monkeypatch, capsys):
    def planted(self):
        self.spread = torch.tensor(spread)
        self.log("val_loss", torch.tensor(losses[self.current_epoch]))

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(encode(dataclasses.replace(PRETRAIN, engine=dataclasses.replace(PRETRAIN.engine, max_epochs=2))))
    )
    arguments = ["--config", str(recipe), "--out", str(tmp_path / "base")]
    with monkeypatch.context() as patched:
        patched.setattr(PretrainModule, "on_validation_epoch_end", planted)
        assert run_command(command, "sjepa-pretrain", arguments) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert said in err
    assert "base/collapsed" in err
    assert not (tmp_path / "base/config.json").exists()
    assert read_checkpoint(tmp_path / "base/collapsed").variant == "base"
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "base")
    assert run_command(command, "sjepa-pretrain", [*arguments, "--force"]) == 0
    assert not (tmp_path / "base/collapsed").exists()


@pytest.mark.parametrize("seed", range(2))
def test_a_few_steps_on_four_channels_do_not_collapse(seed):
    """A network of the default depth. benchmarks/collapse.py measures the default network."""
    config = PretrainConfig()
    data = dataclasses.replace(DATA, ch_names=("Fz", "Cz", "T7", "Pz"), n_times=200, synthetic=Synthetic(seed=seed))
    windows = load_windows(data)
    base = build_model(
        make_spec(ch_names=data.ch_names, n_times=200, encoder=dataclasses.replace(ENCODER, n_layers=8)), seed=seed
    )
    module = PretrainModule(dataclasses.replace(config, encoder=base.spec.encoder, data=data), base.spec)
    found = module.configure_optimizers()
    torch.manual_seed(seed)
    eeg = torch.from_numpy(windows.eeg)
    parameters = list(module.jepa.base.parameters())
    for _ in range(120):
        batch = eeg[torch.randint(len(eeg), (32,))]
        module.jepa(batch, module.sampler(32)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.engine.gradient_clip)
        found["optimizer"].step()
        found["optimizer"].zero_grad()
        found["lr_scheduler"]["scheduler"].step()
        module.jepa.follow(config.ema_start)
    spread, _ = spread_of(module.jepa.target(*module.jepa.tokens(eeg)))
    assert spread > 0.05


@pytest.mark.soak
def test_pretraining_learns_what_was_planted(tmp_path):
    """One seed of benchmarks/learning.py, which measures five. The teacher follows fast, since there are few steps."""
    data = dataclasses.replace(DATA, synthetic=Synthetic(n_subjects=16, n_windows=64))
    tuning = dataclasses.replace(PRETRAIN.engine, max_epochs=18, patience=18, batch_size=32)
    config = dataclasses.replace(PRETRAIN, data=data, engine=tuning, ema_start=0.996, ema_end=0.996)
    result = pretrain(config, tmp_path / "base")
    assert result.fitted.val_loss == pytest.approx(result.val_l1 / result.val_l1_mean)
    assert result.val_l1 < 0.75 * result.val_l1_mean
    assert result.spread > 0.15

    labelled = dataclasses.replace(data, target=Target())
    windows = load_windows(labelled)
    split = split_windows(windows, labelled)
    train = np.random.default_rng(0).permutation(split.train)[:256]
    checkpoint = read_checkpoint(tmp_path / "base")
    score = {}
    for name, model in (("base", load_model(checkpoint, result.spec)), ("random", build_model(result.spec, seed=0))):
        with reference_mode(model):
            features = model(torch.from_numpy(windows.eeg)).flatten(1).numpy()
        probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 5, 15))).fit(features[train], windows.targets[train])
        score[name] = probe.score(features[split.test], windows.targets[split.test])
    assert score["base"] > score["random"] + 0.05

    tuned = dataclasses.replace(tuning, max_epochs=2, weight_decay=0.0)
    tune = FinetuneConfig(variant="contextual", warmup_epochs=0, data=labelled, engine=tuned)
    with_base = finetune(dataclasses.replace(tune, pretrained=str(tmp_path / "base")), tmp_path / "with")
    scratch = finetune(dataclasses.replace(tune, encoder=ENCODER), tmp_path / "without")
    assert with_base.fitted.val_loss < 0.9 * scratch.fitted.val_loss  # after as many steps


def test_what_cannot_be_pretrained_on_is_refused_before_the_first_step(tmp_path):
    few = dataclasses.replace(DATA, synthetic=Synthetic(n_subjects=3, n_windows=2))
    with pytest.raises(DataError, match="2 windows to train on are fewer than a batch of 16"):
        pretrain(dataclasses.replace(PRETRAIN, data=few), tmp_path / "few")
    np.savez(
        tmp_path / "w.npz",
        eeg=np.random.default_rng(0).normal(0, 10, (30, 3, 152)),
        ch_names=["a", "b", "c"],
        sfreq=100.0,
        subject=np.repeat(["x", "y", "z"], 10),
    )
    nowhere = DataConfig(source=(str(tmp_path / "w.npz"),), n_times=152, steps=DATA.signal_steps)
    with pytest.raises(DataError, match=r"have no positions.*--montage"):
        pretrain(dataclasses.replace(PRETRAIN, data=nowhere), tmp_path / "nowhere")
    with pytest.raises(SpecError, match="target_layers is 3"):
        dataclasses.replace(PRETRAIN, target_layers=3)
    assert not list(tmp_path.glob("*/training"))
    assert ENCODER.n_layers == 2
