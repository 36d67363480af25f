# SPDX-License-Identifier: MIT
"""The trainer beside loops written in plain torch, its resumption to the bit, and what it does with bad numbers."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastdiff import ops, spawn_seeds
from fastdiff.noise import sample_seeds
from fastdiff.training import (
    DiffusionConfig,
    DiffusionModel,
    DivergedError,
    LossTerms,
    RunOptions,
    SmallTextEncoder,
    Trainer,
    TrainingBatch,
    draw_timesteps,
    load_checkpoint,
    validate_model,
)
from fastdiff.training.checkpoints import list_checkpoints
from fastdiff.training.trainer.monitor import Monitor
from fastdiff.training.trainer.optimization import create_learning_rate, create_optimizer, parameter_groups
from fastdiff.training.trainer.sample_grids import draw_samples

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

T = 50


class Small(nn.Module):
    """Two convolutions steered by time and label, with a norm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.steer = nn.Embedding(T, 8)
        self.label = nn.Embedding(11, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        steer = self.steer(t)
        if labels is not None:
            steer = steer + self.label(labels)
        h = torch.tanh(self.enter(x)) + steer[:, :, None, None]
        out: Tensor = self.leave(self.dropout(torch.tanh(self.norm(h))))
        return out


def _config(**fields: Any) -> DiffusionConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes outside of the guide's ranges
        return DiffusionConfig(
            **{
                "image_size": 8,
                "in_channels": 1,
                "num_timesteps": T,
                "beta_schedule": "cosine",
                "learning_rate": 1e-2,
                "lr_warmup_steps": 2,
                "max_train_steps": 40,
                "ema_decay": 0.9,
                **fields,
            }
        )


@pytest.fixture(autouse=True)
def _no_range_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DiffusionConfig: ")
        yield


def _images(count: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _small(seed: int = 0, dropout: float = 0.0) -> Small:
    torch.manual_seed(seed)
    return Small(dropout)


def _loader(count: int = 24, batch: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(_images(count), torch.arange(count) % 10), batch, shuffle=True)


def _weights(trainer: Trainer) -> list[Tensor]:
    return [*trainer.parameters, *(trainer.ema.shadow_params if trainer.ema is not None else [])]


def _same(one: Trainer, other: Trainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_weights(one), _weights(other), strict=True))


def test_steps_are_those_of_plain_torch_in_float64() -> None:
    """AdamW with two groups, clipping, accumulation, warm-up and cosine, EMA: all written out here."""
    config = _config(prediction_type="v_prediction", snr_gamma=5.0, max_grad_norm=0.05, gradient_accumulation_steps=2)
    model, plain = _small().double(), _small().double()
    trainer = Trainer(model, config)
    parameters = dict(plain.named_parameters())
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in parameters.items()}
    averages = {name: value.detach().clone() for name, value in parameters.items()}
    u = torch.arange(T + 1, dtype=torch.float64) / T
    bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    signal = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
    for step in range(3):
        plain.zero_grad()
        for micro in range(2):
            number = 2 * step + micro
            images = _images(4, seed=number).double()
            loss = trainer.training_step(images)["loss"]
            seeds = sample_seeds(0, torch.arange(4 * number, 4 * number + 4), 2**32)
            t = draw_timesteps(4, T, seeds=seeds)
            _, noise = ops.noise_and_target(images, t, signal, "epsilon", seeds=seeds)
            a = signal[t].reshape(-1, 1, 1, 1)
            predicted = plain(a.sqrt() * images + (1 - a).sqrt() * noise, t)
            error = predicted - (a.sqrt() * noise - (1 - a).sqrt() * images)
            snr = (a / (1 - a)).flatten()
            expected = (error.square().mean((1, 2, 3)) * snr.clamp(max=5.0) / (snr + 1)).mean()
            (expected / 2).backward()
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
        rate = 1e-2 * (step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 38)))
        decay = 0.0 if step == 0 else min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in parameters.items():
                if name in gradients:
                    gradient = gradients[name] * min(1.0, 0.05 / (norm + 1e-6))
                    first, second = moments[name]
                    first.mul_(0.9).add_(0.1 * gradient)
                    second.mul_(0.999).add_(0.001 * gradient**2)
                    if not (name.startswith("norm") or name.endswith("bias")):
                        value.mul_(1 - rate * 0.01)
                    corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                    value.sub_(rate * corrected[0] / (corrected[1].sqrt() + 1e-8))
                averages[name].mul_(decay).add_((1 - decay) * value)
    assert trainer.step == 3
    # float64 sums in another order; the learning rate multiplies differences of 1e-16 by at most 1e8 (Adam's epsilon).
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, parameters[name], rtol=1e-7, atol=1e-9)
    for shadow, (name, _) in zip(trainer.ema.shadow_params, model.named_parameters(), strict=True):
        torch.testing.assert_close(shadow, averages[name], rtol=1e-7, atol=1e-9)


def _plain_loop(seed: int, steps: int) -> Small:
    """DDPM's algorithm 1 with torch's own random numbers."""
    model = _small(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    u = torch.arange(T + 1) / T
    bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    signal = (1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999)).cumprod(0)
    images = _images(64)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = torch.randint(0, 64, (16,))
        t, noise = torch.randint(0, T, (16,)), torch.randn(16, 1, 8, 8)
        a = signal[t].reshape(-1, 1, 1, 1)
        loss = (model(a.sqrt() * images[rows] + (1 - a).sqrt() * noise, t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def test_training_reaches_the_loss_of_a_plain_loop() -> None:
    steps, held_out = 60, [_images(64)]
    config = _config(lr_warmup_steps=0, max_train_steps=steps, use_ema=False)
    ours, plain, start = [], [], []
    for seed in range(3):
        trainer = Trainer(_small(seed), _config(**{**vars(config), "seed": seed}))
        loader = DataLoader(TensorDataset(_images(64)), 16, shuffle=True)
        trainer.train(loader, max_steps=steps)
        ours.append(validate_model(trainer.modules.model, held_out, config=config))
        plain.append(validate_model(_plain_loop(seed, steps), held_out, config=config))
        start.append(validate_model(_small(seed), held_out, config=config))
    spread = statistics.stdev(plain) + statistics.stdev(ours)
    # Three deviations of a mean of three, and not a loss that has hardly moved.
    assert abs(statistics.mean(ours) - statistics.mean(plain)) < 3 * spread / 3**0.5
    assert statistics.mean(ours) < 0.7 * statistics.mean(start)


@pytest.mark.parametrize("stop", [3, 7])
def test_resumed_run_has_the_same_bits(tmp_path: Path, stop: int) -> None:
    config = _config(gradient_accumulation_steps=2, learning_rate=3e-3)

    def make(out: str) -> Trainer:
        options = RunOptions(output_dir=str(tmp_path / out), log_every=2, checkpoint_every=1, keep_checkpoints=20)
        return Trainer(_small(dropout=0.3), config, options, null_label=10)

    whole = make("whole")
    reports = whole.train(_loader(), max_steps=8)
    assert [report["step"] for report in reports] == list(range(1, 9))
    first = make("parts")
    first.train(_loader(), max_steps=stop)
    second = make("parts")
    torch.manual_seed(99)  # torch's own generator has no part in it
    state = torch.get_rng_state()
    for parameter in second.parameters:
        parameter.data.zero_()
    second.load_checkpoint()
    assert second.step == stop
    again = second.train(_loader(), max_steps=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert again == reports[stop:]
    assert _same(whole, second)
    for name in ("model", "ema", "optimizer"):
        files = [tmp_path / out / "checkpoints" / "step-00000008" / f"{name}.safetensors" for out in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    histories = [(tmp_path / out / "history.jsonl").read_text() for out in ("whole", "parts")]
    assert histories[0] == histories[1]
    # The run depends on the seed, so equality is not that of runs in which nothing is drawn.
    other = Trainer(_small(dropout=0.3), _config(**{**vars(config), "seed": 1}), null_label=10)
    assert other.train(_loader(), max_steps=8)[-1]["loss"] != reports[-1]["loss"]


def test_small_data_and_other_batches_resume(tmp_path: Path) -> None:
    """A pass of one incomplete batch can be resumed, and so can one whose batches are smaller than earlier ones."""

    def make(folder: str) -> Trainer:
        return Trainer(_small(), _config(), RunOptions(output_dir=str(tmp_path / folder), checkpoint_every=1))

    whole = make("whole")
    whole.train(_loader(5, batch=8), max_steps=3)
    make("parts").train(_loader(5, batch=8), max_steps=2)
    parts = make("killed")
    parts.load_checkpoint(tmp_path / "parts" / "checkpoints" / "step-00000001")  # written within the first pass
    parts.train(_loader(5, batch=8), max_steps=3)
    assert _same(whole, parts)

    smaller = make("smaller")
    smaller.train(_loader(8, batch=4), max_steps=2)
    assert (smaller.epoch, smaller.batch) == (1, 0)  # a pass that is complete is no position within it
    smaller.train(_loader(8, batch=2), max_steps=3)
    again = make("smaller")
    again.load_checkpoint()
    again.train(_loader(8, batch=2), max_steps=4)
    assert again.step == 4


def test_one_more_pass_is_one_after_a_complete_one() -> None:
    batches = [_images(4), _images(4, seed=1)]
    for loader in (DataLoader(TensorDataset(_images(8)), 4), batches):
        trainer = Trainer(_small(), _config())
        trainer.train(loader, max_steps=2)
        trainer.train(loader)
        assert trainer.step == 4


def test_resumption_is_refused_where_it_would_differ(tmp_path: Path) -> None:
    options = RunOptions(output_dir=str(tmp_path))
    trainer = Trainer(_small(), _config(), options)
    trainer.train(_loader(), max_steps=2)
    with pytest.raises(ValueError, match="same text encoder, use_ema and mixed_precision"):
        Trainer(_small(), _config(use_ema=False), options).load_checkpoint()
    model = _small()
    model.more = nn.Parameter(torch.ones(1))
    larger = Trainer(model, _config(), options)
    with pytest.raises(ValueError, match="model has 'more'"):
        larger.load_checkpoint()
    other = Trainer(_small(), _config(loss_type="l1"), options)
    with pytest.warns(UserWarning, match="differs from the checkpoint's in loss_type"):
        other.load_checkpoint()
    with pytest.raises(ValueError, match="gives 8 samples a batch over all processes, expected 4"):
        other.train(_loader(batch=8))
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        Trainer(_small(), _config(), RunOptions(output_dir=str(tmp_path / "new"))).load_checkpoint()
    with pytest.raises(ValueError, match="path is left out"):
        Trainer(_small(), _config()).save_checkpoint()


def test_a_new_run_does_not_mix_with_an_older_one(tmp_path: Path) -> None:
    options = RunOptions(output_dir=tmp_path)
    Trainer(_small(), _config(), options).train(_loader(), max_steps=3)
    history = (tmp_path / "history.jsonl").read_text()
    new = Trainer(_small(), _config(), options)
    with pytest.raises(ValueError, match="has the checkpoint step-00000003, expected none after step 0"):
        new.train(_loader(), max_steps=1)
    assert (tmp_path / "history.jsonl").read_text() == history
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


@pytest.mark.parametrize("damage", [b"123\n", b"{}\n", b"\xff\xfe\n", b'{"step": "x"}\n', b'{"step": 1, '])
def test_damaged_history_does_not_stop_a_resumed_run(tmp_path: Path, damage: bytes) -> None:
    options = RunOptions(output_dir=str(tmp_path), log_every=1)
    reports = Trainer(_small(), _config(), options).train(_loader(), max_steps=1)
    with (tmp_path / "history.jsonl").open("ab") as stream:
        stream.write(damage)
    resumed = Trainer(_small(), _config(), options)
    resumed.load_checkpoint()
    reports += resumed.train(_loader(), max_steps=2)
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == reports


def test_loading_drops_what_was_accumulated(tmp_path: Path) -> None:
    def make() -> Trainer:
        return Trainer(_small(), _config(gradient_accumulation_steps=2), RunOptions(output_dir=str(tmp_path)))

    trainer, clean = make(), make()
    for _ in range(2):
        trainer.training_step(_images(4))
    trainer.save_checkpoint()
    trainer.training_step(3 * _images(4))
    for one in (trainer, clean):
        one.load_checkpoint()
        for _ in range(2):
            one.training_step(_images(4, seed=1))
    assert _same(trainer, clean)
    assert trainer.read_monitor() == clean.read_monitor()


def test_given_schedule_is_checked_and_resumed(tmp_path: Path) -> None:
    def make(folder: str) -> Trainer:
        model = _small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rate = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])  # its state has numbers as keys
        options = RunOptions(output_dir=str(tmp_path / folder))
        return Trainer(model, _config(), options, optimizer=optimizer, learning_rate=rate)

    whole = make("whole")
    whole.train(_loader(), max_steps=4)
    make("parts").train(_loader(), max_steps=1)
    parts = make("parts")
    parts.load_checkpoint()
    parts.train(_loader(), max_steps=4)
    assert parts.learning_rate.get_last_lr() == whole.learning_rate.get_last_lr() == [pytest.approx(1e-3)]
    assert _same(whole, parts)
    with pytest.raises(TypeError, match=r"learning_rate is a float, .* set a number as config\.learning_rate"):
        Trainer(_small(), _config(), learning_rate=1e-3)
    for optimizer in (None, torch.optim.SGD(_small().parameters(), lr=0.1)):
        with pytest.raises(ValueError, match="is a schedule of another optimizer"):
            Trainer(_small(), _config(), optimizer=optimizer, learning_rate=whole.learning_rate)


def test_checkpoint_of_a_compiled_model_is_that_of_the_model(tmp_path: Path) -> None:
    compiled = torch.compile(_small(), backend="eager")
    trainer = Trainer(compiled, _config(), RunOptions(output_dir=str(tmp_path)))
    folder = trainer.save_checkpoint()
    plain = _small(1)
    load_checkpoint(folder, plain)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), trainer.parameters, strict=True))
    load_checkpoint(folder, compiled)


class _Poisoned:
    """An objective whose losses are NaN in some steps."""

    def __init__(self, trainer: Trainer, bad: Callable[[int], bool]) -> None:
        self._inner, self._bad = trainer.objective, bad

    def __call__(self, predict: Any, batch: TrainingBatch) -> LossTerms:
        terms = self._inner(predict, batch)
        return LossTerms(terms.losses * (math.nan if self._bad(batch.step) else 1.0), terms.timesteps)


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_bad_gradients_never_reach_the_weights(own_optimizer: bool) -> None:
    def make(on_nan: str, bad: Callable[[int], bool]) -> Trainer:
        model = _small()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2) if own_optimizer else None
        trainer = Trainer(model, _config(), RunOptions(on_nan=on_nan, log_every=3), optimizer=optimizer)
        trainer.objective = _Poisoned(trainer, bad)
        return trainer

    stopped = make("stop", lambda step: step == 2)
    with pytest.raises(DivergedError, match=r"not finite in 1 of the steps 3 to 3, expected finite numbers; .*on_nan"):
        stopped.train(_loader(), max_steps=6)
    clean = make("stop", lambda step: False)
    clean.train(_loader(), max_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(stopped.parameters, clean.parameters, strict=True))

    skipped = make("skip", lambda step: step in (1, 2))
    reports = skipped.train(_loader(), max_steps=6)
    assert [report["skipped_steps"] for report in reports] == [2, 2]
    assert all(math.isfinite(report["loss"]) for report in reports)
    assert all(weight.isfinite().all() for weight in _weights(skipped))
    with pytest.raises(DivergedError, match="in any of the steps 4 to 6"):
        make("skip", lambda step: step >= 2).train(_loader(), max_steps=6)


class Dense(nn.Module):
    """A linear layer: convolutions in half precision take seconds on a CPU without instructions for them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1)).reshape(x.shape)
        return out


def _dense(seed: int = 0) -> Dense:
    torch.manual_seed(seed)
    return Dense()


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2**-6), ("fp16", 2**-9)])
def test_mixed_precision_keeps_the_loss_curve(precision: str, tolerance: float) -> None:
    def curve(name: str) -> list[float]:
        trainer = Trainer(_dense(), _config(mixed_precision=name), RunOptions(log_every=1))
        assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters)
        return [report["loss"] for report in trainer.train(_loader(), max_steps=6)]

    # The outputs have 8 or 11 bits, a mean of their squares too; four units for what training adds.
    torch.testing.assert_close(
        torch.tensor(curve(precision)), torch.tensor(curve("no")), rtol=tolerance, atol=tolerance
    )
    assert curve(precision) != curve("no")


def test_fp16_scaler_is_kept_in_checkpoints(tmp_path: Path) -> None:
    options = RunOptions(output_dir=str(tmp_path))
    trainer = Trainer(_dense(), _config(mixed_precision="fp16"), options)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train(_loader(), max_steps=2)
    other = Trainer(_dense(1), _config(mixed_precision="fp16"), options)
    other.load_checkpoint()
    assert other.scaler.get_scale() == trainer.scaler.get_scale() == 2.0**10  # type: ignore[union-attr]


def test_validation_is_the_same_each_time_and_uses_averages() -> None:
    loader = DataLoader(TensorDataset(_images(10)), 4)
    trainer = Trainer(_small(), _config(), RunOptions(validate_every=2, log_every=5), val_dataloader=loader)
    reports = trainer.train(_loader(), max_steps=5)
    assert [("val_loss" in report) for report in reports] == [True, True, False]
    averaged = _small()
    with torch.no_grad():
        for parameter, shadow in zip(averaged.parameters(), trainer.ema.shadow_params, strict=True):
            parameter.copy_(shadow)
    averaged.train()
    loss = validate_model(averaged, loader, "cpu", config=trainer.config)
    assert averaged.training
    assert trainer.validate(loader) == loss != reports[0]["val_loss"]
    # Batches of another size hold the same draws; convolutions of another batch size may round otherwise.
    assert validate_model(averaged, DataLoader(loader.dataset, 7), config=trainer.config) == pytest.approx(loss, 1e-5)
    assert all(parameter.grad is None for parameter in averaged.parameters())


class Prompted(nn.Module):
    """A model that needs embeddings ``[B, tokens, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.leave = nn.Linear(8, 8), nn.Conv2d(9, 1, 1)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        steer = self.read(encoder_hidden_states).sum(1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return {"sample": self.leave(torch.cat([x, steer], dim=1))}


def test_averaged_weights_nest_and_leave_everything_as_it_was(tmp_path: Path) -> None:
    trainer = Trainer(_small(dropout=0.5), _config(), RunOptions(output_dir=str(tmp_path)))
    for _ in range(2):
        trainer.training_step(_images(4))
    trainer.modules.model.dropout.eval()
    before = [weight.clone() for weight in _weights(trainer)]
    with trainer.averaged_weights():
        trainer.validate([_images(4)])
        assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, trainer.ema.shadow_params, strict=True))
        with pytest.raises(ValueError, match="save_checkpoint: the weights are the averaged ones"):
            trainer.save_checkpoint()
        with pytest.raises(ValueError, match="train: the weights are the averaged ones"):
            trainer.training_step(_images(4))
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(trainer), strict=True))
    assert trainer.modules.model.training
    assert not trainer.modules.model.dropout.training


def test_validation_without_data_is_refused() -> None:
    trainer = Trainer(_small(), _config(), RunOptions(validate_every=1))
    with pytest.raises(ValueError, match="validate_every is 1 without val_dataloader"):
        trainer.train(_loader(), max_steps=1)
    once = iter([_images(4)])
    assert math.isfinite(trainer.validate(once))
    with pytest.raises(ValueError, match="val_dataloader gave no batch"):
        trainer.validate(once)


def test_prompts_train_a_text_encoder_and_are_dropped(tmp_path: Path) -> None:
    config = _config(use_spatial_transformer=True, context_dim=8, condition_dropout=0.5)
    torch.manual_seed(0)
    trainer = Trainer(
        Prompted(), config, RunOptions(output_dir=str(tmp_path)), text_encoder=SmallTextEncoder(8, vocabulary=50)
    )
    seen: list[list[str]] = []
    encode = trainer.conditioning.encode

    def recorded(prompts: list[str], operation: str) -> Tensor:
        seen.append(list(prompts))
        return encode(prompts, operation)

    trainer.conditioning.encode = recorded  # type: ignore[assignment, method-assign]
    before = [parameter.detach().clone() for parameter in trainer.modules.text_encoder.parameters()]  # type: ignore[union-attr]
    prompts = [f"digit {i}" for i in range(16)]
    for _ in range(3):
        metrics = trainer.train_step({"images": _images(16), "prompts": prompts})
    assert metrics["learning_rate"] == trainer.learning_rate.get_last_lr()[0] > 0
    assert math.isfinite(metrics["loss"])
    dropped = [[i for i, prompt in enumerate(kept) if not prompt] for kept in seen]
    assert dropped[0] != dropped[1]
    assert all(4 <= len(places) <= 12 for places in dropped)
    assert all(kept[i] in ("", prompts[i]) for kept in seen for i in range(16))
    after = list(trainer.modules.text_encoder.parameters())  # type: ignore[union-attr]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trainer.train_step(_images(2))  # without prompts: the null condition
    assert seen[-1] == ["", ""]
    trainer.save_checkpoint()
    other = Trainer(
        Prompted(), config, RunOptions(output_dir=str(tmp_path)), text_encoder=SmallTextEncoder(8, vocabulary=50)
    )
    other.load_checkpoint()
    assert _same(trainer, other)
    with pytest.raises(ValueError, match="without a text encoder"):
        Trainer(_small(), _config()).train_step({"images": _images(1), "prompts": ["a"]})


def test_given_text_encoder_is_not_trained() -> None:
    frozen = nn.Linear(1, 8)
    config = _config(use_spatial_transformer=True, context_dim=8, condition_dropout=0.0)
    trainer = Trainer(Prompted(), config, text_encoder=lambda prompts: frozen(torch.ones(len(prompts), 3, 1)))
    trainer.train_step({"images": _images(2), "prompts": ["a", "b"]})
    assert frozen.weight.grad is None
    assert len(trainer.parameters) == len(list(Prompted().parameters()))


def test_labels_are_dropped_to_the_null_label() -> None:
    model, seen = _small(), []
    model.label.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tolist()))
    trainer = Trainer(model, _config(condition_dropout=0.3), null_label=10)
    labels = torch.arange(200) % 10
    trainer.training_step((_images(200), labels))
    dropped = [i for i, label in enumerate(seen[0]) if label == 10]
    assert 30 < len(dropped) < 90  # 60 ± 5 deviations of 6.5
    assert all(label in (10, i % 10) for i, label in enumerate(seen[0]))
    Trainer(model, _config()).training_step((_images(2), labels[:2]))
    assert len(seen) == 1  # labels are no condition without a null label


def test_out_of_memory_says_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(_small(), _config())

    def full(predict: Any, batch: TrainingBatch) -> LossTerms:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    trainer.objective = full
    with pytest.raises(
        torch.OutOfMemoryError,
        match="halve batch_size to 2 with gradient_accumulation_steps=2; or set gradient_checkpointing=True; or set",
    ):
        trainer.training_step(_images(4))

    def full_host(predict: Any, batch: TrainingBatch) -> LossTerms:
        torch.empty(2**60)
        raise AssertionError

    trainer.objective = full_host
    with pytest.raises(MemoryError, match="take a smaller model"):
        trainer.training_step(_images(1))

    def broken(predict: Any, batch: TrainingBatch) -> LossTerms:
        raise RuntimeError("another error")

    trainer.objective = broken
    with pytest.raises(RuntimeError, match=r"^another error$"):
        trainer.training_step(_images(1))


def test_full_disk_stops_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    trainer = Trainer(_small(), _config(), RunOptions(output_dir=str(tmp_path), checkpoint_every=2))
    trainer.train(_loader(), max_steps=2)
    last = list_checkpoints(tmp_path / "checkpoints")

    def full(tensors: Any, path: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="free some space"):
            trainer.train(_loader(), max_steps=6)
    assert list_checkpoints(tmp_path / "checkpoints") == last
    other = Trainer(_small(1), _config(), RunOptions(output_dir=str(tmp_path)))
    other.load_checkpoint()
    assert other.step == 2


def test_reports_go_to_history_grids_and_tensorboard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    options = RunOptions(
        output_dir=str(tmp_path),
        log_every=2,
        sample_every=4,
        sample_count=3,
        sample_labels=(1, 2),
        trackers=("tensorboard",),
        progress=True,
    )
    trainer = Trainer(_small(), _config(num_inference_steps=3, guidance_scale=1.5), options, null_label=10)
    reports = trainer.train(_loader(), max_steps=5)
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert history == reports
    assert [report["step"] for report in reports] == [2, 4, 5]
    assert {"loss", "loss/t0", "loss/t3", "grad_norm", "learning_rate", "skipped_steps"} <= set(reports[0])
    assert (tmp_path / "samples" / "step-00000004.png").stat().st_size > 100
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    assert "5/5" in capfd.readouterr().err


@pytest.mark.parametrize("method", ["ddpm", "ddim", "lcm"])
@pytest.mark.parametrize("learned", [True, False])
def test_grids_are_drawn_by_the_configured_method(method: str, learned: bool) -> None:
    """The images are those of `DiffusionModel.sample`, from the same seeds; a learned variance is DDPM's alone."""
    fields = {"image_size": 8, "model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "num_heads": 4}
    config = _config(
        **fields, attention_resolutions=(), out_channels=2 if learned else 1, sampling_method=method,
        num_inference_steps=3, guidance_scale=1.0,
    )  # fmt: skip
    model = DiffusionModel(config)
    found = draw_samples(Trainer(model.unet, config), 2)
    expected = model.sample(2, seeds=spawn_seeds(config.seed, 2), progress=False)
    assert torch.equal(found, expected)


def test_grids_that_are_no_pictures_are_refused_before_the_first_step(tmp_path: Path) -> None:
    ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm").DDPMScheduler
    options = RunOptions(output_dir=str(tmp_path), sample_every=40)
    wide = nn.Conv2d(4, 4, 1)
    wide.forward = lambda x, t: x * wide.weight.mean()  # type: ignore[method-assign, assignment]
    four, flat = _images(8).expand(-1, 4, -1, -1), _images(8).flatten(2)
    for model, images, channels, schedule, message in (
        (wide, four, 4, None, "sample_every asks for pictures of samples with 4 channels, expected"),
        (wide, flat, 1, None, r"sample_every asks for pictures of samples of shape \[4, 1, 64\], expected"),
        (_small(), _images(8), 1, ddpm(num_train_timesteps=T), "schedule is a DDPMScheduler, expected"),
    ):
        loader = DataLoader(TensorDataset(images), 4)
        trainer = Trainer(model, _config(in_channels=channels), options, schedule=schedule)
        with pytest.raises(ValueError, match=message):
            trainer.train(loader, max_steps=2)
        assert trainer.step == 0
        assert not list_checkpoints(tmp_path / "checkpoints")
    other = Trainer(wide, _config(in_channels=4), RunOptions(sample_every=1))  # no folder for grids
    other.train(DataLoader(TensorDataset(four), 4), max_steps=1)


@pytest.mark.parametrize("model", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("data", [torch.float32, torch.float64, torch.float16])
def test_images_take_the_dtype_of_the_model(model: torch.dtype, data: torch.dtype, tmp_path: Path) -> None:
    """Training, validation and grids run, with the loss of the same numbers given in the dtype of the docs."""
    images = (_images(4) * 8).round() / 8  # exact in each of these types
    losses = []
    for given in (data, torch.float64 if model == torch.float64 else torch.float32):
        trainer = Trainer(_small().to(model), _config(), RunOptions(output_dir=str(tmp_path), cpu=True))
        batch = images.to(given)
        losses.append((trainer.training_step(batch)["loss"], trainer.validate([batch])))
        assert validate_model(_small().to(model), [batch], config=trainer.config) > 0
        assert draw_samples(trainer, 2).isfinite().all()
        assert trainer.modules.model.enter.weight.dtype == model
    assert losses[0] == losses[1]


def test_embeddings_take_the_dtype_of_the_model() -> None:
    trainer = Trainer(Prompted(), _config(), text_encoder=lambda prompts: torch.zeros(len(prompts), 2, 8).double())
    embeddings = torch.randn(4, 2, 8, dtype=torch.float64)
    assert trainer.training_step({"images": _images(4).double(), "encoder_hidden_states": embeddings})["loss"] > 0
    assert trainer.training_step({"images": _images(4), "prompts": ["a"] * 4})["loss"] > 0


def test_monitor_counts_by_timestep_and_leaves_out_what_is_not_finite() -> None:
    monitor = Monitor(torch.device("cpu"), 1000)
    losses, timesteps = torch.rand(100), torch.randint(0, 1000, (100,))
    losses[3] = math.nan
    monitor.add_losses(losses, timesteps)
    monitor.add_step(torch.tensor(2.0), torch.tensor(0.0))
    monitor.add_step(torch.tensor(1.0), torch.tensor(1.0))
    found = monitor.read(lambda sums: sums)
    finite = losses.isfinite()
    assert found["loss"] == pytest.approx(float(losses[finite].double().mean()), 1e-12)
    for i in range(4):
        chosen = losses[finite & (timesteps // 250 == i)]
        assert found[f"loss/t{i}"] == pytest.approx(float(chosen.double().mean()), 1e-12)
    assert (found["grad_norm"], found["grad_norm_max"], found["bad_steps"]) == (1.0, 2.0, 1.0)
    monitor.add_losses(torch.tensor([3.0]), torch.tensor([0.9]))
    assert monitor.read(lambda sums: sums)["loss/t3"] == 3.0


def test_parameter_groups_by_type_of_module() -> None:
    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normal = nn.Linear(2, 2)  # a name with "norm" in it is decayed
            self.layers = nn.ModuleList([nn.LayerNorm(2), nn.BatchNorm1d(2), nn.RMSNorm(2), OwnNorm()])
            self.attention = nn.MultiheadAttention(2, 1)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    model = Model()
    decayed, plain = parameter_groups([model], 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in decayed["params"]] == [
        "normal.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) == 1 + 2 + 2 + 1 + 1 + 1 + 1
    optimizer = create_optimizer([model], 1e-3, 0.1)
    rates = create_learning_rate(optimizer, 1000, 10_000)
    found = {}
    for step in range(10_001):
        found[step] = rates.get_last_lr()[0]
        optimizer.step()
        rates.step()
    assert found[500] == pytest.approx(5e-4)
    assert found[1000] == 1e-3
    assert found[5500] == pytest.approx(5e-4)
    assert found[10_000] == pytest.approx(0.0, abs=1e-18)


def test_bad_data_stops_in_one_sentence() -> None:
    trainer = Trainer(_small(), _config())
    with pytest.raises(ValueError, match=r"train: images have 3 channels, expected 1"):
        trainer.train([torch.zeros(2, 3, 8, 8)])
    with pytest.raises(ValueError, match="gave no batch"):
        trainer.train(iter([]))
    with pytest.raises(ValueError, match="dataloader has 0 samples"):
        trainer.train(DataLoader(TensorDataset(_images(4)[:0]), 2))
    with pytest.raises(TypeError, match="is a str"):
        trainer.training_step("images")
    assert trainer.step == 0
    assert all(parameter.grad is None for parameter in trainer.parameters)
    with pytest.raises(TypeError, match=r"model is a function, expected a torch\.nn\.Module"):
        Trainer(_small, _config())
    with pytest.raises(ValueError, match="on_nan"):
        RunOptions(on_nan="go on").validate()
    with pytest.raises(ValueError, match="trackers"):
        RunOptions(trackers=("paper",)).validate()
    with pytest.raises(TypeError, match="sample_prompts is the string 'a cat', expected a sequence"):
        RunOptions(sample_prompts="a cat").validate()
    with pytest.raises(TypeError, match="output_dir is a int"):
        RunOptions(output_dir=3).validate()  # type: ignore[arg-type]
    options = RunOptions(output_dir=Path("run"), sample_labels=range(2), log_every=np.int64(3))  # type: ignore[arg-type]
    assert json.loads(json.dumps(options.to_dict())) == options.validate().to_dict()
